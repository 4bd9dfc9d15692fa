"""gradclip.jax gives the core's bits: of every dtype, group, order, rounding and threshold."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradclip
import gradclip.jax
from gradclip.jax._tree import leaf_names
from jax_trees import bits, clipped_by_core, layer, median_limit, to_jax
from matrices import NAMES, values

inf, nan = math.inf, math.nan
ORDS = (2, 1, inf, 3)
NARROW = ("float16", "bfloat16", "float32", "complex64")  # what JAX has without its 64-bit types
KINDS = (None, "tensor", "row", "sample", "unit", "unit_last")


def _check_result(result: Any, expected: Any, tree: Any) -> None:
    """Every field is the core's, rounded to the floats that JAX has."""
    for field in ("total_norm", "norms", "group_norms", "coefficient"):
        found = np.asarray(getattr(result, field))
        assert found.dtype == jnp.result_type(float)
        with np.errstate(over="ignore"):
            wanted = np.asarray(getattr(expected, field)).astype(found.dtype)
        np.testing.assert_array_equal(found, wanted, err_msg=field, strict=True)
    assert result.clipped.dtype == bool
    assert bool(result.clipped) == expected.clipped
    names = zip(leaf_names(tree), result.nonfinite.tolist(), strict=True)
    assert tuple(name for name, is_odd in names if is_odd) == expected.nonfinite


def _check(tree: Any, max_norm: Any, **options: Any) -> Any:
    """A clip has the core's bits, structure, shapes and dtypes."""
    written, expected = clipped_by_core(tree, max_norm, **options)
    clipped, result = gradclip.jax.clip(to_jax(tree), max_norm, **options)
    kinds = (jax.tree.map(lambda x: (x.shape, x.dtype), of) for of in (clipped, tree))
    assert next(kinds) == next(kinds)
    assert bits(clipped) == written
    _check_result(result, expected, tree)
    return result


def _tree(names: tuple[str, ...]) -> dict[str, Any]:
    """Gradients with four samples: of each dtype, a vector, a large and an empty one."""
    tree: dict[str, Any] = {name: values(name, (4, 3, 5), seed) for seed, name in enumerate(names)}
    tree["bias"] = [values("bfloat16", (4,), seed=7)]
    return tree | {"large": values("float32", (4, 9001), seed=8), "none": np.zeros((4, 0), np.float32)}


def _without_axes(tree: dict[str, Any]) -> dict[str, Any]:
    return tree | {"empty": np.zeros(0, np.float32), "scalar": values("float32", (), 9)}


def _tree_of(groups: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """With an empty gradient and a scalar, where these groups have them (see the test of empty rows)."""
    tree = _tree(names)
    if groups in ("unit", "unit_last"):
        tree["scalar"] = values("float32", (), 9)
        del tree["none"]
    return tree if isinstance(groups, str) and groups != "tensor" else _without_axes(tree)


_ALL: list[tuple[Any, float]] = [(groups, ord) for groups in KINDS for ord in (2, 3)]
_ALL += [(groups, ord) for groups in (None, "row", "unit_last") for ord in (1, inf)]


@pytest.mark.parametrize(("groups", "ord"), _ALL)
@pytest.mark.usefixtures("x64")
def test_every_dtype_in_one_tree(groups: Any, ord: float) -> None:
    tree = _tree_of(groups, NAMES)
    options = {"groups": groups, "ord": ord}
    result = _check(tree, median_limit(tree, **options), **options)
    assert result.clipped


@pytest.mark.parametrize(("groups", "ord"), [(None, 2), ("sample", inf), ("unit_last", 1)])
@pytest.mark.usefixtures("x64")
def test_measuring_and_clipping_in_two_calls(groups: Any, ord: float) -> None:
    tree = _tree_of(groups, NAMES)
    options = {"groups": groups, "ord": ord, "grad_scale": 3.0}
    limit = median_limit(tree, **options)
    measured = gradclip.jax.measure(to_jax(tree), **options)
    clipped, result = measured.clip(to_jax(tree), limit, nonfinite="zero", rounding="down")
    expected, of_one_call = gradclip.jax.clip(
        to_jax(tree), limit, nonfinite="zero", rounding="down", **options
    )
    assert result.clipped
    assert bits((clipped, result)) == bits((expected, of_one_call))
    for field in ("total_norm", "norms", "group_norms", "nonfinite"):
        assert bits(getattr(measured, field)) == bits(getattr(result, field))


@pytest.mark.parametrize("groups", [None, "row", "sample"])
def test_without_the_64_bit_types_results_are_rounded(groups: Any) -> None:
    tree = _tree_of(groups, NARROW)
    result = _check(tree, median_limit(tree, groups=groups), groups=groups)
    assert result.total_norm.dtype == np.float32


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.usefixtures("x64")
def test_norms(ord: float) -> None:
    tree = _without_axes(_tree(NAMES))
    arrays = jax.tree.leaves(tree)
    found = gradclip.jax.tree_norms(to_jax(tree), ord=ord)
    assert list(found) == sorted(tree)
    assert [float(norm) for norm in jax.tree.leaves(found)] == gradclip.tensor_norms(arrays, ord).tolist()
    assert all(norm.shape == () and norm.dtype == np.float64 for norm in jax.tree.leaves(found))
    assert float(gradclip.jax.global_norm(to_jax(tree), ord=ord)) == gradclip.global_norm(arrays, ord)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("x64")
def test_rounding_down_with_a_scale(name: str) -> None:
    """Alone, for the error of float64 norms is another one."""
    tree = {"w": values(name, (5, 700), seed=3), "b": values(name, (9,), seed=4)}
    written, expected = clipped_by_core(tree, 2.0, rounding="down", grad_scale=3.0)
    result = _check(tree, 2.0, rounding="down", grad_scale=3.0)
    assert result.clipped
    assert expected.coefficient < 2.0 / expected.total_norm
    assert written != clipped_by_core(tree, 2.0, grad_scale=3.0)[0]


@pytest.mark.parametrize("groups", ["tensor", "row", "sample", "unit_last"])
def test_rounding_down_of_groups(groups: str) -> None:
    tree = _tree_of(groups, NARROW)
    options = {"groups": groups, "ord": 3, "grad_scale": 0.3}
    assert _check(tree, median_limit(tree, **options), rounding="down", **options).clipped


_LABELS: list[Any] = [
    {"float16": "narrow", "bfloat16": {"b": "wide", "w": "narrow"}, "float32": "wide"},
    {"float16": 0, "bfloat16": {"b": 2, "w": 0}, "float32": 2},
    lambda name: name.rpartition(".")[2],
    lambda name: 1 + (name == "float16.b"),
]


@pytest.mark.parametrize("groups", _LABELS)
def test_labels(groups: Any) -> None:
    shapes = {"b": (4,), "w": (4, 3, 5)}
    tree = {name: {key: values(name, shapes[key], seed=1) for key in shapes} for name in NARROW[:3]}
    assert _check(tree, median_limit(tree, groups=groups), groups=groups).clipped


def test_labels_of_a_tree_with_nothing_in_it() -> None:
    tree = {"a": np.full(2, 3.0, np.float32), "b": None, "c": (np.full(2, 4.0, np.float32), None)}
    _, result = gradclip.jax.clip(to_jax(tree), 1.0, groups={"a": "x", "b": "y", "c": "z"})
    assert result.group_norms.tolist() == [np.float32(18**0.5), np.float32(32**0.5)]


@pytest.mark.parametrize("groups", ["row", "unit", "unit_last"])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)])
def test_rows_of_what_is_empty(shape: tuple[int, ...], groups: str) -> None:
    tree = {"e": np.zeros(shape, np.float32), "w": values("float32", (3, 4), seed=1)}
    _check(tree, median_limit(tree, groups=groups), groups=groups)


def test_1e20_has_a_norm() -> None:
    tree = {"a": np.full((3, 4), 1e20, np.float32), "b": np.full(4, -1e20, np.float32)}
    assert gradclip.jax.global_norm(to_jax(tree)) == np.float32(4e20)
    assert _check(tree, 2.0).total_norm == np.float32(4e20)
    clipped, _ = gradclip.jax.clip(to_jax(tree), 2.0)
    np.testing.assert_allclose(clipped["a"], 0.5, rtol=1e-6)


@pytest.mark.parametrize("nonfinite", ["propagate", "zero", "skip"])
def test_a_norm_beyond_float32_is_finite(nonfinite: str) -> None:
    """It is reported as infinite, and what has it is clipped by what it is."""
    tree = {"a": np.full(9, 3e38, np.float32), "b": np.ones(2, np.float32)}
    result = _check(tree, 2.0, nonfinite=nonfinite)
    assert result.total_norm == inf
    assert not result.nonfinite.any()
    np.testing.assert_allclose(gradclip.jax.clip(to_jax(tree), 2.0)[0]["a"], 2 / 3, rtol=1e-6)


def test_thresholds_made_of_reported_norms() -> None:
    """One that is a norm clips nothing, although it was rounded; half of it does."""
    tree = {f"{i:02}": values("float32", (3,), seed=i) for i in range(40)}
    grads = to_jax(tree)

    @jax.jit
    def run(grads: Any, factor: Any) -> Any:
        measured = gradclip.jax.measure(grads, groups="tensor")
        return measured.clip(grads, factor * measured.group_norms)

    assert bits(run(grads, 1.0)[0]) == bits(tree)
    assert not run(grads, 1.0)[1].clipped
    np.testing.assert_allclose(run(grads, 0.5)[1].coefficient, 0.5, rtol=1e-6)
    exact = np.asarray(gradclip.tensor_norms(list(tree.values())))
    assert (exact.astype(np.float32) < exact).any()


def test_what_is_not_clipped_keeps_its_bits() -> None:
    """Zeros of either sign, subnormal numbers, NaN with a payload."""
    numbers = np.array([-0.0, 0.0, 1e-45, -1e-40, 3.0, 1e38], np.float32)
    odd = np.array([0x7FC12345, 0xFF800001, 0x80000000], np.uint32).view(np.float32)
    for tree, limit in (({"a": numbers}, 2e38), ({"a": numbers, "b": odd}, inf)):
        for run in (gradclip.jax.clip, jax.jit(gradclip.jax.clip, static_argnums=1)):
            clipped, result = run(to_jax(tree), limit)
            assert bits(clipped) == bits(tree)
            assert not result.clipped
            assert result.coefficient == 1
    limits = {"a": 1.0, "b": None}
    left, result = gradclip.jax.clip(to_jax({"a": numbers, "b": -numbers}), limits, groups="tensor")
    assert bits(left["b"]) == bits(-numbers)
    assert result.clipped


# Names are those of the leaves "b" and "w".
@pytest.mark.parametrize(
    "max_norm",
    [
        [0.5, 2.5],
        (None, 2.5),
        [0.0, inf],
        [0.1, np.float32(1.5)],
        {"w": 2.5, "b": None},
        {"b": 0, "w": 1},
        np.array([0.5, 2.5]),
        np.array([1, 3]),
        np.float64(1.1),
        2,
        0,
        0.0,
        inf,
        1e-300,
        5e-324,
    ],
)
def test_thresholds(max_norm: Any) -> None:
    """Numbers are not rounded to JAX's floats."""
    tree = {"b": values("float32", (5,), seed=1), "w": values("bfloat16", (3, 4), seed=2)}
    _check(tree, max_norm, groups="tensor")
    if np.shape(max_norm) == () and not isinstance(max_norm, dict):
        _check(tree, max_norm)


def test_thresholds_of_rows_and_labels() -> None:
    tree = {"b": values("float32", (2,), seed=1), "w": values("float32", (3, 4), seed=2)}
    limits = [0.1, 9.0, 0.5, inf, 0.25]
    _check(tree, np.array(limits), groups="row")
    clipped = gradclip.jax.clip(to_jax(tree), [0.1, 9.0, 0.5, None, 0.25], groups="row")[0]
    assert bits(clipped) == clipped_by_core(tree, np.array(limits), groups="row")[0]
    _check(tree, {"weight": 0.5, "bias": None}, groups={"b": "bias", "w": "weight"})


def test_arrays_as_thresholds_and_scales() -> None:
    """Traced or not, they are what float32 holds."""
    tree = {"b": values("float32", (5,), seed=1), "w": values("bfloat16", (3, 4), seed=2)}
    limits, scale = np.array([0.3, 1.7], np.float32), np.float32(0.7)
    written, expected = clipped_by_core(tree, limits.tolist(), groups="tensor", grad_scale=float(scale))

    def clip(grads: Any, limits: Any, scale: Any) -> Any:
        return gradclip.jax.clip(grads, limits, groups="tensor", grad_scale=scale)

    def clip_by_list(grads: Any, limits: Any, scale: Any) -> Any:
        return gradclip.jax.clip(grads, [limits[0], limits[1]], groups="tensor", grad_scale=scale)

    def clip_by_name(grads: Any, limits: Any, scale: Any) -> Any:
        limits = {"w": limits[1], "b": 0.3}
        return gradclip.jax.clip(grads, limits, groups="tensor", grad_scale=scale)

    for function in (clip, clip_by_list, clip_by_name):
        for run in (function, jax.jit(function)):
            clipped, result = run(to_jax(tree), jnp.asarray(limits), jnp.asarray(scale))
            assert bits(clipped) == written
            _check_result(result, expected, tree)
    narrow = gradclip.jax.clip(to_jax(tree), jnp.asarray(0.5, jnp.bfloat16))[0]
    assert bits(narrow) == clipped_by_core(tree, 0.5)[0]
    whole = gradclip.jax.clip(to_jax(tree), jnp.asarray(2))[0]
    assert bits(whole) == clipped_by_core(tree, 2)[0]


@pytest.mark.parametrize("bad", [nan, inf, -inf])
@pytest.mark.parametrize("nonfinite", ["propagate", "zero", "skip"])
def test_what_is_not_finite(nonfinite: str, bad: float) -> None:
    tree = layer("float16", "float32")
    tree["w"][2, 1] = bad
    for groups in (None, "row"):
        result = _check(tree, 0.5, groups=groups, nonfinite=nonfinite)
        assert result.nonfinite.tolist() == [False, True]
    assert not _check(tree, inf, nonfinite="propagate").clipped


def test_numpy_arrays_are_gradients_too() -> None:
    tree = {"b": values("bfloat16", (5,), seed=1), "s": np.float32(3.0), "w": values("float32", (3, 4), 2)}
    before = bits(tree)
    clipped, _ = gradclip.jax.clip(tree, 0.5)
    assert bits(clipped) == bits(gradclip.jax.clip(to_jax(tree), 0.5)[0])
    assert bits(tree) == before


def test_names_of_norms() -> None:
    tree = {"dense": {"bias": jnp.ones(4), "kernel": jnp.full((4, 4), 2.0)}, "list": [jnp.ones(9)]}
    for result in (gradclip.jax.clip(tree, 1.0)[1], gradclip.jax.measure(tree)):
        named = gradclip.jax.named_norms(result, tree)
        assert {name: float(norm) for name, norm in named.items()} == {
            "dense.bias": 2.0,
            "dense.kernel": 8.0,
            "list.0": 3.0,
        }
        message = r"^grads: expected a pytree of 3 arrays, as was measured, got 1$"
        with pytest.raises(ValueError, match=message):
            gradclip.jax.named_norms(result, jnp.ones(3))
