"""Measure, combine, decide, scale: what XLA calls of gradclip's engines, and how vmap goes through them.

Each is a function of arrays alone that XLA cannot look into: a native one where there are kernels (csrc/jax),
a plain one of ``_plain`` elsewhere. They have no derivative: those of norms and clips are in ``_functions``.

Sums are arrays of uint32 of shape (parts, 6) and factors of shape (parts, 2), whose words are float64s,
whatever JAX's own floats are.
"""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap

from gradclip import _core
from gradclip._dispatch import cuda_module
from gradclip.jax import _plain
from gradclip.jax._config import GROUPS, NONFINITE, Config
from gradclip.jax._sharding import by_device

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["combine", "decide", "measure", "scale", "vary", "varying_axes"]


def _register(module: Any, platform: str) -> None:
    for name, handler in module.jax_handlers().items():
        jax.ffi.register_ffi_target(name, handler, platform=platform)


def _register_all() -> tuple[str, ...]:
    """The platforms with kernels, as lowering calls them."""
    _register(_core, "cpu")
    try:
        cuda = cuda_module()
    except ImportError:  # it is there and does not load: show_config() says why
        cuda = None
    if cuda is None:
        return ("cpu",)
    _register(cuda, "CUDA")
    return ("cpu", "cuda")


_NATIVE = _register_all()


def measure(leaves: Sequence[Any], ord: float, parts: tuple[int, ...]) -> Any:
    """The sums of the parts of leaves, of shape (parts, 6)."""
    return _measure(ord, parts)(*vary_together(leaves))


def combine(shards: Any, ord: float) -> Any:
    """Sums of shape (..., shards, parts, 6) -> those of all shards together, of shape (..., parts, 6)."""
    return _combine(ord)(shards)


def decide(words: Any, limits: Any, grad_scale: Any, config: Config) -> tuple[Any, ...]:
    """Sums of shape (parts, 6) -> factors, total_norm, norms, group_norms, coefficients, clipped, nonfinite.

    ``limits``, of shape (1,) or (groups,), and ``grad_scale``, of shape (), are float32 or float64, or uint32
    with one axis more: the words of float64s.
    """
    result: tuple[Any, ...] = _decide(config)(*vary_together((words, limits, grad_scale)))
    return result


def scale(factors: Any, leaves: Sequence[Any], parts: tuple[int, ...], down: bool) -> list[Any]:
    """Each part times its factor, in the memory of the leaves where nobody else needs that."""
    result: list[Any] = _scale(parts, down)(factors, *leaves)
    return result


# --- Types inside of shard_map ----------------------------------------------------------------------


def varying_axes(array: Any) -> frozenset[str]:
    """The manual axes over which an array may differ, as far as its type says so."""
    kind: Any = jax.typeof(array)
    manual = getattr(kind, "manual_axis_type", None)
    axes: frozenset[str] = getattr(kind, "vma", frozenset()) if manual is None else manual.varying
    return axes


def vary(array: Any, axes: frozenset[str]) -> Any:
    """The array, as one that may differ over these axes too."""
    more = tuple(axes - varying_axes(array))
    return lax.pcast(array, more, to="varying") if more else array


def vary_together(arrays: Sequence[Any]) -> list[Any]:
    axes = frozenset[str]().union(*map(varying_axes, arrays))
    return [vary(array, axes) for array in arrays]


def _like(shape: tuple[int, ...], dtype: Any, array: Any) -> Any:
    """The type of an array that differs where another does."""

    def broadcast(array: Any) -> Any:
        # Any number of it: an array may be empty.
        return jnp.broadcast_to(jnp.sum(array).astype(dtype), shape)

    return jax.eval_shape(broadcast, array.real if jnp.iscomplexobj(array) else array)


# --- One function for each platform -----------------------------------------------------------------


def _call(native: Callable[..., Any], plain: Callable[..., Any], *arrays: Any) -> Any:
    platform = _default_platform()
    if platform not in _NATIVE:
        _say_once(platform)
    return lax.platform_dependent(*arrays, default=plain, **dict.fromkeys(_NATIVE, native))


def _default_platform() -> str:
    """Where arrays are by default; JAX itself says gpu of both kinds."""
    name = jax.default_backend()
    if name != "gpu":
        return name
    return "rocm" if "rocm" in jax.local_devices()[0].client.platform_version else "cuda"


@functools.cache
def _say_once(platform: str) -> None:
    warnings.warn(
        f"gradclip.jax has no kernels for {platform}: norms and clips are computed by plain JAX there, equal "
        f"to rounding",
        stacklevel=2,
    )


def _are_whole(parts: tuple[int, ...]) -> bool:
    return all(count == 1 for count in parts)


def _int64(values: Sequence[int]) -> Any:
    return np.asarray(values, np.int64)


@functools.lru_cache(maxsize=256)
def _measure(ord: float, parts: tuple[int, ...]) -> Any:
    count = int(np.abs(parts).sum())

    @custom_vmap
    def call(*leaves: Any) -> Any:
        def native(*leaves: Any) -> Any:
            words = _like((count, 6), jnp.uint32, leaves[0])
            return jax.ffi.ffi_call("gradclip_measure", words)(
                *leaves, ord=np.float64(ord), parts=_int64(parts)
            )

        if _are_whole(parts):
            native = by_device(native, lambda shards: combine(shards, ord), 0)
        return _call(native, lambda *leaves: _plain.measure(leaves, ord, parts), *leaves)

    @call.def_vmap
    def rule(axis_size: int, in_batched: Sequence[bool], *leaves: Any) -> Any:
        if min(parts) < 0:
            return _sequentially(call, in_batched, leaves)
        rows = tuple(axis_size * n if b else n for n, b in zip(parts, in_batched, strict=True))
        _, place = _rows_of_batches(axis_size, parts, in_batched)
        return measure(leaves, ord, rows)[place], True

    return call


def _rows_of_batches(axis_size: int, parts: tuple[int, ...], in_batched: Sequence[bool]) -> tuple[Any, Any]:
    """Parts of a batch are rows of it. The part of each row, in order, and the row of each part of each
    batch."""
    part_of_row, row_of_part, first, part = [], [], 0, 0
    for count, is_batched in zip(parts, in_batched, strict=True):
        batches = axis_size if is_batched else 1
        rows = np.arange(batches * count).reshape(batches, count)
        part_of_row.append(np.tile(np.arange(part, part + count), batches))
        row_of_part.append(first + np.broadcast_to(rows, (axis_size, count)))
        first, part = first + rows.size, part + count
    return np.concatenate(part_of_row), np.concatenate(row_of_part, axis=1)


def _sequentially(call: Callable[..., Any], in_batched: Sequence[bool], arrays: Sequence[Any]) -> Any:
    """One batch after the other."""

    def one(batched: Sequence[Any]) -> Any:
        mine = iter(batched)
        return call(*(next(mine) if b else array for array, b in zip(arrays, in_batched, strict=True)))

    result = lax.map(one, [array for array, b in zip(arrays, in_batched, strict=True) if b])
    return result, jax.tree.map(lambda _: True, result)


@functools.lru_cache(maxsize=256)
def _combine(ord: float) -> Any:
    @custom_vmap
    def call(shards: Any) -> Any:
        def native(shards: Any) -> Any:
            words = _like((*shards.shape[:-3], *shards.shape[-2:]), jnp.uint32, shards)
            return jax.ffi.ffi_call("gradclip_combine", words)(shards, ord=np.float64(ord))

        return _call(native, lambda shards: _plain.combine(shards, ord), shards)

    @call.def_vmap
    def rule(axis_size: int, in_batched: Sequence[bool], shards: Any) -> Any:
        return call(shards), True

    return call


@functools.lru_cache(maxsize=256)
def _decide(config: Config) -> Any:
    tensors, groups = config.num_tensors, config.num_groups

    @custom_vmap
    def call(words: Any, limits: Any, grad_scale: Any) -> Any:
        lead = words.shape[:-2]

        def native(*arrays: Any) -> Any:
            def like(*shape: int, dtype: Any = float) -> Any:
                return _like((*lead, *shape), jnp.result_type(dtype), arrays[0])

            result = (
                like(config.num_parts, 2, dtype=jnp.uint32),
                like(),
                like(tensors),
                like(groups),
                like(groups),
                like(dtype=bool),
                like(tensors, dtype=bool),
            )
            return jax.ffi.ffi_call("gradclip_decide", result)(
                *arrays,
                ord=np.float64(config.ord),
                parts=_int64(config.parts),
                labels=_int64(config.labels or (0,)),
                groups=np.int64(GROUPS.index(config.groups)),
                groups_used=np.int64(groups),
                nonfinite=np.int64(NONFINITE.index(config.nonfinite)),
                down=np.bool_(config.down),
                are_coefficients=np.bool_(config.are_coefficients),
                as_reported=np.bool_(config.as_reported),
                all_float64=np.bool_(config.all_float64),
            )

        def plain(words: Any, limits: Any, grad_scale: Any) -> Any:
            return _plain.decide(words, limits, grad_scale, config)

        return _call(native, plain, words, limits, grad_scale)

    @call.def_vmap
    def rule(axis_size: int, in_batched: Sequence[bool], *arrays: Any) -> Any:
        whole = [
            array if b else jnp.broadcast_to(array, (axis_size, *array.shape))
            for array, b in zip(arrays, in_batched, strict=True)
        ]
        return call(*whole), (True,) * 7

    return call


@functools.lru_cache(maxsize=256)
def _scale(parts: tuple[int, ...], down: bool) -> Any:
    @custom_vmap
    def call(factors: Any, *leaves: Any) -> Any:
        def native(factors: Any, *leaves: Any) -> Any:
            scaled = [vary(leaf, varying_axes(factors)) for leaf in leaves]
            return jax.ffi.ffi_call(
                "gradclip_scale", scaled, input_output_aliases={i + 1: i for i in range(len(leaves))}
            )(*vary_together((factors, *leaves)), parts=_int64(parts), down=np.bool_(down))

        if _are_whole(parts):
            native = by_device(native, None, 1)

        def plain(factors: Any, *leaves: Any) -> Any:
            return _plain.scale(factors, leaves, parts, down)

        return _call(native, plain, factors, *leaves)

    @call.def_vmap
    def rule(axis_size: int, in_batched: Sequence[bool], factors: Any, *leaves: Any) -> Any:
        if min(parts) < 0:
            return _sequentially(call, in_batched, (factors, *leaves))
        if not in_batched[0]:
            factors = jnp.broadcast_to(factors, (axis_size, *factors.shape))
        whole = [
            leaf if b else jnp.broadcast_to(leaf, (axis_size, *leaf.shape))
            for leaf, b in zip(leaves, in_batched[1:], strict=True)
        ]
        part, _ = _rows_of_batches(axis_size, parts, (True,) * len(parts))
        batch = np.concatenate([np.repeat(np.arange(axis_size), count) for count in parts])
        rows = tuple(axis_size * count for count in parts)
        scaled = scale(factors[batch, part], whole, rows, down)
        return scaled, [True] * len(scaled)

    return call
