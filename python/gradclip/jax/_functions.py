"""Measure, norms and clip over pytrees, and their derivatives."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradclip.jax import _kernels
from gradclip.jax._plain import float_of
from gradclip.jax._sharding import lay_out
from gradclip.jax._tree import leaf_names, make_config, read, read_limits, read_scale

if TYPE_CHECKING:
    from gradclip.jax._config import Config
    from gradclip.jax._tree import Leaves

__all__ = ["ClipResult", "Measured", "clip", "global_norm", "measure", "named_norms", "tree_norms"]


class ClipResult(NamedTuple):
    """What was measured and done; a pytree of arrays, float32, or float64 where JAX has that enabled.

    Attributes:
        total_norm: The norm of all gradients together, before clipping; of shape ().
        norms: The norm of each gradient, in the order of ``jax.tree.leaves``; of shape (leaves,).
            :func:`named_norms` gives them names.
        group_norms: The norm of each group, of shape (groups,).
        coefficient: What was clipped has been multiplied by, exactly 1 where nothing was clipped: of shape
            (), or with ``groups`` (groups,).
        clipped: Whether any group was clipped; bool, of shape ().
        nonfinite: Which gradients hold a NaN or infinity; bool, of shape (leaves,).
    """

    total_norm: Any
    norms: Any
    group_norms: Any
    coefficient: Any
    clipped: Any
    nonfinite: Any


def named_norms(result: Any, grads: Any) -> dict[str, Any]:
    """The norm of each gradient by its path.

    Args:
        result: A :class:`ClipResult`, a :class:`Measured` or the state of a transformation: what has
            ``norms``.
        grads: A pytree of the structure that was measured, of gradients or of parameters.

    Returns:
        A dictionary of path, joined by dots, to norm, of shape ().

    Raises:
        ValueError: If there are more or fewer gradients than norms.

    Example:
        >>> import jax.numpy as jnp, gradclip.jax
        >>> grads = {"dense": {"bias": jnp.ones(4), "kernel": jnp.ones((4, 4))}}
        >>> measured = gradclip.jax.measure(grads)
        >>> {name: float(norm) for name, norm in gradclip.jax.named_norms(measured, grads).items()}
        {'dense.bias': 2.0, 'dense.kernel': 4.0}
    """
    names = leaf_names(grads)
    if len(names) != len(result.norms):
        raise ValueError(
            f"grads: expected a pytree of {len(result.norms)} arrays, as was measured, got {len(names)}"
        )
    return dict(zip(names, result.norms, strict=True))


# --- What is measured -------------------------------------------------------------------------------


def _sums(config: Config, leaves: Sequence[Any]) -> Any:
    """The sums of parts, over the shards of all mapped axes."""
    words = _kernels.measure(leaves, config.ord, config.parts)
    if not config.axis_names:
        return words
    index = lax.axis_index(config.axis_names)
    # Where types tell: what is the same on all shards of an axis counts once.
    tracked = _kernels.varying_axes(index)
    places = []
    for leaf in leaves:
        same = tracked - _kernels.varying_axes(leaf)
        is_first = [lax.axis_index(axis) == 0 for axis in config.axis_names if axis in same]
        places.append(jnp.where(jnp.all(jnp.array(is_first)), index, -1) if is_first else index)
    of_part = np.repeat(np.arange(len(leaves)), np.abs(config.parts))
    shards = lay_out(
        _kernels.vary(words, tracked),
        jnp.stack([_kernels.vary(place, tracked) for place in places])[of_part],
        lax.axis_size(config.axis_names),
        config.axis_names,
    )
    return _kernels.combine(shards, config.ord)


class _Norms(NamedTuple):
    total: Any
    tensors: Any
    groups: Any


def _contribution(leaf: Any, change: Any, norm: Any, ord: float) -> Any:
    """What the change of each element does to a norm, which is not 0 where it is used."""
    x = leaf / jnp.where(norm == 0, 1, norm).astype(leaf.real.dtype)
    size = jnp.abs(x)
    if np.isinf(ord):
        is_largest = size >= 1 - jnp.finfo(size.dtype).eps
        direction = jnp.where(is_largest, jnp.sign(x), 0)
        return jnp.real(jnp.conj(direction) * change), is_largest
    if ord == 2:
        return jnp.real(jnp.conj(x) * change), None
    power = jnp.where(size == 0, 0, size ** (ord - 1)) if ord != 1 else 1
    return jnp.real(jnp.conj(jnp.sign(x)) * change) * power, None


def _parts_axis(config: Config, i: int) -> int | None:
    """Of a gradient seen as a matrix: along which axis its parts lie; None: it is one part."""
    return None if config.parts[i] == 1 else 0 if config.parts[i] > 0 else 1


def _as_matrix(config: Config, i: int, leaf: Any) -> Any:
    count = config.parts[i]
    return leaf if count == 1 else leaf.reshape(count, -1) if count > 0 else leaf.reshape(-1, -count)


def _spread(config: Config, i: int, of_groups: Any) -> Any:
    """What belongs to the groups of the parts of a gradient, to go with its elements."""
    groups = np.asarray(config.group_of_part[config.first[i] : config.first[i + 1]])
    values = of_groups[groups]
    return {None: lambda: values[0], 0: lambda: values[:, None], 1: lambda: values}[_parts_axis(config, i)]()


def _norm_tangents(config: Config, leaves: Sequence[Any], changes: Sequence[Any], norms: _Norms) -> _Norms:
    """How scaled norms change. A norm of 0 does not (0 is a subgradient there)."""
    dtype = norms.total.dtype

    def of_leaf(i: int, norm: Any, reduce_parts: bool) -> Any:
        leaf, change = (_as_matrix(config, i, x) for x in (leaves[i], changes[i]))
        wide = jnp.promote_types(leaf.dtype, dtype)
        terms, is_largest = _contribution(leaf.astype(wide), change.astype(wide), norm, config.ord)
        axis = _parts_axis(config, i)
        axes = None if reduce_parts or axis is None else 1 - axis

        def over_all(x: Any) -> Any:
            total = jnp.sum(x, axis=axes).astype(dtype).reshape(() if axes is None else (-1,))
            mine = tuple(
                a for a in config.axis_names if a in _kernels.varying_axes(total) or not _types_tell(a)
            )
            return lax.psum(total, mine) if mine else total

        total = over_all(terms)
        return total if is_largest is None else total / jnp.maximum(over_all(is_largest), 1)

    def chain(of: Any, changes: Any, labels: Sequence[int], whole: Any) -> Any:
        """From the parts of groups to groups."""
        label = np.asarray(labels)
        # Of one beyond the dtype nothing is known; where an element is infinite, changes are NaN already.
        is_known = (whole > 0) & (whole < jnp.inf)
        ratio = jnp.where(is_known[label], of / jnp.where(is_known, whole, 1)[label], 0)
        if config.is_max:
            is_largest = ((ratio >= 1) & (of > 0)).astype(dtype)
            count = jax.ops.segment_sum(is_largest, label, len(whole))
            return jax.ops.segment_sum(is_largest * changes, label, len(whole)) / jnp.maximum(count, 1)
        weight = jnp.where(ratio == 0, 0, jnp.where(ratio == 0, 1, ratio) ** (config.ord - 1))
        return jax.ops.segment_sum(weight * changes, label, len(whole))

    count = config.num_tensors
    of_tensors = jnp.stack([of_leaf(i, norms.tensors[i], True) for i in range(count)])
    total = chain(norms.tensors, of_tensors, [0] * count, norms.total[None])[0]
    if config.groups in ("row", "sample"):
        # Each part's share in the norm of its group.
        shares = [jnp.atleast_1d(of_leaf(i, _spread(config, i, norms.groups), False)) for i in range(count)]
        of_groups = jax.ops.segment_sum(
            jnp.concatenate(shares), np.asarray(config.group_of_part), config.num_groups
        )
    else:
        of_groups = chain(norms.tensors, of_tensors, config.group_of_part, norms.groups)
    return _Norms(total, of_tensors, of_groups)


def _types_tell(axis: str) -> bool:
    """Whether types say what differs over a mapped axis."""
    return axis in _kernels.varying_axes(lax.axis_index(axis))


def _no_limit() -> Any:
    return np.array([np.inf]).view(np.uint32).reshape(1, 2)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _norms(config: Config, leaves: tuple[Any, ...], grad_scale: Any) -> _Norms:
    decided = _kernels.decide(_sums(config, leaves), _no_limit(), grad_scale, config)
    return _Norms(*decided[1:4])


@_norms.defjvp
def _norms_jvp(config: Config, primals: Any, tangents: Any) -> Any:
    leaves, grad_scale = primals
    norms = _norms(config, leaves, grad_scale)
    return norms, _unscaled_tangents(config, leaves, tangents[0], norms, grad_scale, tangents[1])


def _unscaled_tangents(
    config: Config, leaves: Any, changes: Any, norms: _Norms, grad_scale: Any, scale_change: Any
) -> _Norms:
    scale = jnp.asarray(float_of(jnp.asarray(grad_scale)), norms.total.dtype)
    scaled = _Norms(*(norm * scale for norm in norms))
    of_scaled = _norm_tangents(config, leaves, changes, scaled)
    d_scale = _tangent(scale_change, norms.total.dtype) / scale

    def unscaled(change: Any, norm: Any) -> Any:
        return change / scale - jnp.where(jnp.isinf(norm), 0, norm) * d_scale

    return _Norms(*map(unscaled, of_scaled, norms))


def _tangent(change: Any, dtype: Any) -> Any:
    """Of what is a constant where its type has no tangents."""
    return jnp.zeros((), dtype) if change.dtype == jax.dtypes.float0 else change.astype(dtype)


class _Decided(NamedTuple):
    norms: _Norms
    coefficients: Any
    clipped: Any
    nonfinite: Any


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _clip(config: Config, leaves: tuple[Any, ...], limits: Any, grad_scale: Any) -> tuple[Any, _Decided]:
    return _clip_measured(config, _sums(config, leaves), leaves, limits, grad_scale)


def _clip_measured(
    config: Config, sums: Any, leaves: Sequence[Any], limits: Any, grad_scale: Any
) -> tuple[Any, _Decided]:
    factors, *norms, coefficients, clipped, nonfinite = _kernels.decide(sums, limits, grad_scale, config)
    scaled = _kernels.scale(factors, leaves, config.parts, config.down)
    return tuple(scaled), _Decided(_Norms(*norms), coefficients, clipped, nonfinite)


@_clip.defjvp
def _clip_jvp(config: Config, primals: Any, tangents: Any) -> Any:
    leaves, limits, grad_scale = primals
    changes, limits_change, scale_change = tangents
    result, decided = _clip(config, leaves, limits, grad_scale)
    dtype = decided.coefficients.dtype
    scale = jnp.asarray(float_of(jnp.asarray(grad_scale)), dtype)
    norms, coefficients = decided.norms, decided.coefficients
    if config.nonfinite != "propagate":
        # Where gradients were left as they are, or set to 0, nothing depends on norms.
        is_left = jnp.any(decided.nonfinite)
        norms, leaves = jax.tree.map(lambda x: jnp.where(is_left, jnp.zeros_like(x), x), (norms, leaves))
        coefficients = jnp.where(is_left, 0.0 if config.nonfinite == "zero" else scale, coefficients)
    d_norms = _unscaled_tangents(config, leaves, changes, norms, grad_scale, scale_change)
    d_scale = _tangent(scale_change, dtype)
    size = jnp.where(norms.groups == 0, 1, norms.groups)
    d_coefficients = (_tangent(limits_change, dtype) - coefficients * d_norms.groups) / size
    d_coefficients = jnp.where((coefficients != 1) & (norms.groups != 0), d_coefficients, 0)

    d_result = []
    for i, (leaf, change) in enumerate(zip(leaves, changes, strict=True)):
        x, dx = (_as_matrix(config, i, a) for a in (leaf, change))
        c, dc = (_spread(config, i, a) for a in (coefficients, d_coefficients))
        wide = jnp.promote_types(leaf.dtype, dtype)
        moved = c / scale * dx.astype(wide) + (dc / scale - c * (d_scale / scale**2)) * x.astype(wide)
        d_result.append(moved.astype(leaf.dtype).reshape(leaf.shape))
    none = (np.zeros(x.shape, jax.dtypes.float0) for x in (decided.clipped, decided.nonfinite))
    return (result, decided), (tuple(d_result), _Decided(d_norms, d_coefficients, *none))


# --- The public functions ---------------------------------------------------------------------------


def _result(config: Config, decided: _Decided) -> ClipResult:
    coefficient = decided.coefficients[0] if config.groups == "all" else decided.coefficients
    return ClipResult(*decided.norms, coefficient, decided.clipped, decided.nonfinite)


_jitted_norms = jax.jit(_norms, static_argnums=0)
_jitted_clip = jax.jit(_clip, static_argnums=0)
_jitted_clip_measured = jax.jit(_clip_measured, static_argnums=0)
_donating_clip = jax.jit(_clip, static_argnums=0, donate_argnums=1)


def tree_norms(grads: Any, *, ord: float = 2, axis_name: Any = None) -> Any:
    """The norm of every array of a pytree, from one pass over memory.

    Args:
        grads: A pytree of arrays of real or complex floats.
        ord: 2, 1, infinity or any other p > 0.
        axis_name: As of :func:`clip`.

    Returns:
        A pytree of the same structure, of norms of shape (). Their derivative is that of the norm, 0 where
        that is 0.

    Raises:
        TypeError: For a leaf that is no array of floats; it is named by its path.
        ValueError: For a pytree without leaves, an array that was deleted, or a bad ``ord``.

    Example:
        >>> import jax.numpy as jnp, gradclip.jax
        >>> gradclip.jax.tree_norms({"w": jnp.full((3, 3), 1e20), "b": jnp.ones(4)})["b"]
        Array(2., dtype=float32)
    """
    leaves = read(grads)
    config, _ = make_config(leaves, ord=ord, axis_name=axis_name)
    return leaves.rebuilt(list(_jitted_norms(config, leaves.arrays, read_scale(1.0)).tensors))


def global_norm(grads: Any, *, ord: float = 2, axis_name: Any = None) -> Any:
    """The norm of all arrays of a pytree together, without overflow: 1e20 in float32 has a norm.

    Args:
        grads: As of :func:`tree_norms`.
        ord: As of :func:`tree_norms`.
        axis_name: As of :func:`clip`.

    Returns:
        The norm, of shape (). Its derivative is that of the norm, 0 where that is 0.

    Raises:
        TypeError, ValueError: As :func:`tree_norms` does.

    Example:
        >>> import jax, jax.numpy as jnp, gradclip.jax
        >>> gradclip.jax.global_norm([jnp.full(3, 3e30), jnp.full(1, 3e30)])
        Array(6.e+30, dtype=float32)
        >>> jax.grad(gradclip.jax.global_norm)(jnp.array([3.0, 4.0]))
        Array([0.6, 0.8], dtype=float32)
    """
    leaves = read(grads)
    config, _ = make_config(leaves, ord=ord, axis_name=axis_name)
    return _jitted_norms(config, leaves.arrays, read_scale(1.0)).total


def clip(
    grads: Any,
    max_norm: Any,
    *,
    ord: float = 2,
    groups: Any = None,
    grad_scale: Any = 1.0,
    nonfinite: str = "propagate",
    rounding: str = "nearest",
    axis_name: Any = None,
    donate: bool = False,
) -> tuple[Any, ClipResult]:
    """Clip a pytree of gradients by norm, inside of ``jax.jit`` or outside.

    In a compiled program gradients are clipped where they lie, if nobody else needs them; what is not clipped
    is not written. Outside, new arrays are returned, or with ``donate`` the memory of the old ones. Bits are
    those of :func:`gradclip.clip_by_global_norm_`.

    The derivative with respect to a gradient g of a group with norm n that is clipped to m is that of (m / n)
    g: the part of the change along g is taken out. Elsewhere it is that of g.

    Args:
        grads: A pytree of arrays of real or complex floats, mixed at will.
        max_norm: Of each group: a number, an array of shape () or (groups,), traced or not, a sequence, or a
            mapping by the names of groups. 0 makes everything 0, infinity (or None in a sequence or mapping)
            clips nothing.
        ord: 2, 1, infinity or any other p > 0.
        groups: What shares a norm: None (all gradients), ``"tensor"``, ``"row"``, ``"sample"``, ``"unit"``
            and ``"unit_last"`` as of :func:`gradclip.clip_by_global_norm_`; labels (names or integers) in a
            prefix of the pytree; or a callable from the path of a gradient, joined by dots, to its label.
        grad_scale: The arrays hold so many times the gradients (loss scaling): norms are those of the
            gradients, and what is written is divided by it. A number, or a float array of shape ().
        nonfinite: Where a norm is not finite: ``"propagate"`` it, as optax does, make everything ``"zero"``,
            or ``"skip"``: change nothing.
        rounding: ``"down"``: the exact norm of what is returned is at most ``max_norm``.
        axis_name: A mapped axis (``jax.shard_map``, ``jax.pmap``), or a tuple of them, over which gradients
            are sharded: norms are those over all shards, with the same bits on all. In ``jax.shard_map``,
            arrays whose type says that all shards have the same count once.
        donate: Outside of ``jax.jit``: return the memory of ``grads``, which are deleted.

    Returns:
        The clipped gradients, a pytree of the same structure, shapes and dtypes; and a :class:`ClipResult`.

    Raises:
        TypeError: For a leaf that is no array of floats, named by its path; for arguments of a wrong kind.
        ValueError: For a pytree without leaves, an array that was deleted, thresholds of another shape, or
            options that do not exist. On the CPU also for a traced threshold that is negative or NaN, as a
            runtime error of JAX; elsewhere that makes gradients NaN.

    Example:
        >>> import jax.numpy as jnp, gradclip.jax
        >>> grads = {"w": jnp.array([30.0, 40.0]), "b": jnp.zeros(3)}
        >>> clipped, result = gradclip.jax.clip(grads, 5.0)
        >>> clipped["w"], result.total_norm, result.clipped
        (Array([3., 4.], dtype=float32), Array(50., dtype=float32), Array(True, dtype=bool))
    """
    leaves = read(grads)
    config, names = make_config(
        leaves, ord=ord, groups=groups, nonfinite=nonfinite, rounding=rounding, axis_name=axis_name
    )
    clipped, result = clip_leaves(config, names, leaves, max_norm, grad_scale, donate)
    return leaves.rebuilt(clipped), result


def clip_leaves(
    config: Config, names: Any, leaves: Leaves, max_norm: Any, grad_scale: Any = 1.0, donate: bool = False
) -> tuple[Any, ClipResult]:
    """Clip what has been read, for a call that is known."""
    limits = read_limits(max_norm, config, names)
    run = _donating_clip if donate else _jitted_clip
    clipped, decided = run(config, leaves.arrays, limits, read_scale(grad_scale))
    return clipped, _result(config, decided)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured of a pytree, before anything is decided: from :func:`measure`.

    Attributes:
        total_norm: As of :class:`ClipResult`.
        norms: As of :class:`ClipResult`.
        group_norms: As of :class:`ClipResult`.
        nonfinite: As of :class:`ClipResult`.
    """

    total_norm: Any
    norms: Any
    group_norms: Any
    nonfinite: Any
    _sums: Any
    _grad_scale: Any
    _config: Config = dataclasses.field(metadata={"static": True})
    _group_names: Any = dataclasses.field(metadata={"static": True})
    _shapes: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={"static": True})

    def clip(
        self, grads: Any, max_norm: Any, *, nonfinite: str = "propagate", rounding: str = "nearest"
    ) -> tuple[Any, ClipResult]:
        """Clip what was measured, without another look at it.

        Args:
            grads: The gradients that were measured.
            max_norm: As of :func:`clip`; it may have been computed from what was measured.
            nonfinite: As of :func:`clip`.
            rounding: As of :func:`clip`.

        Returns:
            As :func:`clip`. There is no derivative, unlike there.

        Raises:
            TypeError, ValueError: As :func:`clip` does, and for other gradients than were measured.

        Example:
            >>> import jax.numpy as jnp, gradclip.jax
            >>> grads = [jnp.array([3.0, 4.0]), jnp.array([30.0, 40.0])]
            >>> measured = gradclip.jax.measure(grads, groups="tensor")
            >>> clipped, result = measured.clip(grads, jnp.median(measured.group_norms))
            >>> clipped[1]
            Array([16.5, 22. ], dtype=float32)
        """
        leaves = read(grads)
        if len(leaves.arrays) != self._config.num_tensors:
            raise ValueError(
                f"grads: expected the {self._config.num_tensors} arrays that were measured, got "
                f"{len(leaves.arrays)}"
            )
        for i, (array, shape) in enumerate(zip(leaves.arrays, self._shapes, strict=True)):
            if array.shape != shape:
                raise ValueError(
                    f"{leaves.path(i)}: expected the shape that was measured, {shape}, got {array.shape}"
                )
        checked, _ = make_config(leaves, nonfinite=nonfinite, rounding=rounding)
        config = dataclasses.replace(self._config, nonfinite=checked.nonfinite, down=checked.down)
        clipped, result = clip_measured(self, leaves, max_norm, config)
        return leaves.rebuilt(clipped), result


def clip_measured(
    measured: Measured, leaves: Leaves, max_norm: Any, config: Config | None = None
) -> tuple[Any, ClipResult]:
    """Clip what has been read and measured; ``config``, where it is not that of measuring."""
    config = config or measured._config
    is_rounded = jnp.result_type(float) == jnp.float32 and not config.are_coefficients
    config = dataclasses.replace(config, as_reported=is_rounded)
    limits = read_limits(max_norm, config, measured._group_names)
    clipped, decided = _jitted_clip_measured(
        config, measured._sums, leaves.arrays, limits, measured._grad_scale
    )
    return clipped, _result(config, decided)


def measure(
    grads: Any, *, ord: float = 2, groups: Any = None, grad_scale: Any = 1.0, axis_name: Any = None
) -> Measured:
    """Measure a pytree of gradients, for anybody to decide before they are clipped.

    Args:
        grads: As of :func:`clip`.
        ord: As of :func:`clip`.
        groups: As of :func:`clip`.
        grad_scale: As of :func:`clip`.
        axis_name: As of :func:`clip`.

    Returns:
        A :class:`Measured`, a pytree. It has no derivative; that of norms is with :func:`global_norm`,
        :func:`tree_norms` and :func:`clip`.

    Raises:
        TypeError, ValueError: As :func:`clip` does.
    """
    leaves = read(grads)
    config, names = make_config(leaves, ord=ord, groups=groups, axis_name=axis_name)
    return measure_leaves(config, names, leaves, grad_scale)


def measure_leaves(config: Config, names: Any, leaves: Leaves, grad_scale: Any) -> Measured:
    """Measure what has been read."""
    scale = read_scale(grad_scale)
    sums, (total, norms, group_norms, nonfinite) = _measure(config, leaves.arrays, scale)
    shapes = tuple(array.shape for array in leaves.arrays)
    return Measured(total, norms, group_norms, nonfinite, sums, scale, config, names, shapes)


@functools.partial(jax.jit, static_argnums=0)
def _measure(config: Config, leaves: Sequence[Any], grad_scale: Any) -> Any:
    sums = _sums(config, leaves)
    _, total, norms, group_norms, _, _, nonfinite = _kernels.decide(sums, _no_limit(), grad_scale, config)
    return sums, (total, norms, group_norms, nonfinite)
