"""gradclip.jax where there are no kernels: plain JAX, equal to the core's up to rounding."""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradclip
import gradclip.jax
from gradclip.jax import _kernels, _plain
from gradclip.jax._config import Config
from gradclip.jax._tree import leaf_names, make_config, read, read_limits, read_scale
from jax_trees import QUICKLY, clipped_by_core, layer, median_limit, to_jax
from matrices import values

inf, nan = math.inf, math.nan

Shape: Any = jax.ShapeDtypeStruct


@functools.cache
def _compiled(config: Config) -> Any:
    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def run(arrays: Any, limits: Any, scale: Any) -> Any:
        words = _plain.measure(arrays, config.ord, config.parts)
        factors, *decided = _plain.decide(words, limits, scale, config)
        return _plain.scale(factors, arrays, config.parts, config.down), decided

    return run


def _plain_clip(grads: Any, max_norm: Any, grad_scale: Any = 1.0, **options: Any) -> Any:
    """A clip by plain JAX: clipped, total_norm, norms, group_norms, coefficients, clipped, nonfinite."""
    leaves = read(grads)
    config, names = make_config(leaves, **options)
    limits = read_limits(max_norm, config, names)
    clipped, decided = _compiled(config)(leaves.arrays, limits, read_scale(grad_scale))
    return leaves.rebuilt(clipped), *decided


_STEP = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 1e-5, "complex64": 1e-5}


def _check_plain(tree: Any, max_norm: Any, grad_scale: Any = 1.0, **options: Any) -> None:
    """Equal to the core's up to rounding."""
    clipped, *decided, is_clipped, odd = _plain_clip(to_jax(tree), max_norm, grad_scale, **options)
    written, result = clipped_by_core(tree, max_norm, grad_scale=grad_scale, **options)
    for name, found in zip(("total_norm", "norms", "group_norms", "coefficient"), decided, strict=True):
        wanted = np.asarray(getattr(result, name))
        np.testing.assert_allclose(found.reshape(wanted.shape), wanted, rtol=1e-5, err_msg=name)
    for leaf, found, memory in zip(*map(jax.tree.leaves, (tree, clipped, written)), strict=True):
        assert (found.dtype, found.shape) == (leaf.dtype, leaf.shape)
        wide, wanted = np.asarray(found).astype(complex), np.frombuffer(memory, leaf.dtype).astype(complex)
        np.testing.assert_allclose(wide.ravel(), wanted, rtol=_STEP[leaf.dtype.name], atol=1e-30)
    assert bool(is_clipped) == result.clipped
    assert np.flatnonzero(odd).tolist() == [leaf_names(tree).index(name) for name in result.nonfinite]


_PLAIN = [
    (None, 2, "float16 complex64"),
    ("tensor", 3, "bfloat16 complex64"),
    ("row", 3, "float16 float32"),
    ("row", inf, "float32 bfloat16"),
    ("sample", 1, "complex64 float32"),
    ("unit", 1, "float16 bfloat16"),
    ("unit_last", 2, "complex64 float16"),
]


@pytest.mark.parametrize(("groups", "ord", "names"), _PLAIN)
def test_plain_jax_is_equal_to_rounding(groups: Any, ord: float, names: str) -> None:
    one, other = names.split()
    tree = {"a": values(one, (4, 3), seed=1), "b": values(other, (4,), seed=2)}
    limit = median_limit(tree, ord=ord, groups=groups, grad_scale=2.0)
    _check_plain(tree, limit, 2.0, ord=ord, groups=groups)


def test_plain_jax_of_labels_and_thresholds() -> None:
    tree = {"a": values("float16", (40,), seed=1), "b": values("bfloat16", (3, 5), 2), "c": np.zeros(0, "f4")}
    labels = {"a": "x", "b": "y", "c": "x"}
    for limits in ({"x": 0.5, "y": None}, [0.0, 1.0], [None, 0.3], [inf, inf]):
        _check_plain(tree, limits, groups=labels)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_plain_jax_rounds_down(name: str) -> None:
    for seed in range(20):
        clipped = _plain_clip([jnp.asarray(values(name, 40, seed))], 0.5, rounding="down")[0]
        assert 0.49 < gradclip.global_norm([np.asarray(clipped[0])]) <= 0.5


_ENDS = {
    "float32": (1e20, 1e-20, 1e-37, 3e38),
    "bfloat16": (3e38, 1e-30),
    "complex64": (1e30, 3e38),
    "float16": (6e4, 1e-6, 2.0**-24),
}


@pytest.mark.parametrize(("name", "size"), [(name, size) for name in _ENDS for size in _ENDS[name]])
def test_plain_jax_at_the_ends_of_a_dtype(name: str, size: float) -> None:
    """Sizes whose squares float32 has not. (Subnormal float32 are 0 to XLA on a CPU.)"""
    leaf = np.array([size, size / 4]).astype(np.float32).astype(jnp.dtype(name))
    found = _plain_clip([jnp.asarray(leaf)], inf)[1]
    with np.errstate(over="ignore"):
        expected = np.float32(gradclip.global_norm([leaf]))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_plain_jax_of_a_large_norm() -> None:
    tree = {"a": np.full(12, 1e20, np.float32), "b": np.full((2, 2), 1e-30, np.float32)}
    _check_plain(tree, 1.0, ord=3)


@pytest.mark.parametrize("nonfinite", ["propagate", "zero", "skip"])
def test_plain_jax_of_what_is_not_finite(nonfinite: str) -> None:
    groups = {"propagate": "row", "zero": None, "skip": "tensor"}[nonfinite]
    for bad in (nan, inf, -inf):
        tree = layer("float16", "float32")
        tree["w"][2, 1] = bad
        _check_plain(tree, 0.5, nonfinite=nonfinite, groups=groups)


def test_plain_jax_adds_shards_up() -> None:
    whole = values("float32", (3, 6), seed=1, low=-40, high=40)
    config, _ = make_config(read([whole]), ord=3)

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def run(rows: Any) -> Any:
        each = jnp.stack([_plain.measure([row], 3, (1,)) for row in rows])
        limits, scale = (jnp.asarray(x) for x in (read_limits(inf, config, None), read_scale(1.0)))
        return _plain.decide(_plain.combine(each, 3), limits, scale, config)[1]

    np.testing.assert_allclose(run(jnp.asarray(whole)), gradclip.global_norm([whole], 3), rtol=1e-5)


def test_the_words_of_float64() -> None:
    rng = np.random.default_rng(0)
    normal = np.ldexp(rng.uniform(1, 2, 500), rng.integers(-126, 127, 500))
    special = [0.0, -0.0, 1.0, 0.1, 1 / 3, 2.0**-126, 3.4e38, 1 - 2.0**-53, 2 - 2.0**-52]
    beyond = [inf, 1e300, 1e-300, 5e-324]
    numbers = np.concatenate([normal, special, beyond])
    found = np.asarray(jax.jit(_plain.float_of)(numbers.view(np.uint32).reshape(-1, 2)))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[:-4], numbers[:-4], rtol=2.0**-23)
    assert found[-4:].tolist() == [inf, inf, 0.0, 0.0]
    assert _plain.float_of(jnp.asarray(1.5)) == 1.5


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_programs_for_other_machines(platform: str) -> None:
    """Lowered without their devices."""

    def clip(grads: Any, max_norm: Any) -> Any:
        return gradclip.jax.clip(grads, max_norm, groups="row", nonfinite="zero")

    shapes = {"b": Shape((3,), jnp.bfloat16), "w": Shape((4, 5), jnp.float32)}
    exported = jax.export.export(jax.jit(clip), platforms=[platform])(shapes, 1.0)
    assert exported.platforms == (platform,)
    assert len(exported.mlir_module_serialized) > 1000
    if platform == "tpu":
        assert "gradclip_measure" not in exported.mlir_module()


def test_a_platform_without_kernels_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    _kernels._say_once.cache_clear()
    with pytest.warns(UserWarning, match=r"^gradclip\.jax has no kernels for tpu: norms and clips are"):
        gradclip.jax.clip([jnp.ones(17)], 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradclip.jax.clip([jnp.ones(18)], 1.0)
    _kernels._say_once.cache_clear()
