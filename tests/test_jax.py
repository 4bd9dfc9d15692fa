"""gradclip.jax: the core's bits in compiled programs, in place, through every transformation, or refused."""

from __future__ import annotations

import functools
import json
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import gradclip
import gradclip.jax
from gradclip.jax import _kernels, _plain
from gradclip.jax._config import Config
from gradclip.jax._functions import _jitted_clip
from gradclip.jax._tree import leaf_names, make_config, read, read_limits, read_scale
from matrices import NAMES, values
from processes import output_of

inf, nan = math.inf, math.nan
ORDS = (2, 1, inf, 3)
NARROW = ("float16", "bfloat16", "float32", "complex64")  # what JAX has without its 64-bit types
KINDS = (None, "tensor", "row", "sample", "unit", "unit_last")
# Of programs that are run once: to compile them takes a second.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

ready: Any = jax.block_until_ready
Shape: Any = jax.ShapeDtypeStruct


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def _bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def _jax(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)


def _leaf_labels(tree: Any, groups: Any) -> Any:
    """Groups as the core takes them: a label for each gradient."""
    if groups is None or isinstance(groups, str):
        return groups
    if callable(groups):
        return [groups(name) for name in leaf_names(tree)]
    return jax.tree.leaves(jax.tree.broadcast(groups, tree))


def _core(tree: Any, max_norm: Any, **options: Any) -> tuple[list[bytes], gradclip.ClipResult]:
    """What the core makes of copies, and its result."""
    arrays = dict(zip(leaf_names(tree), (leaf.copy() for leaf in jax.tree.leaves(tree)), strict=True))
    options = {"nonfinite": "propagate"} | options | {"groups": _leaf_labels(tree, options.get("groups"))}
    result = gradclip.clip_by_global_norm_(arrays, max_norm, **options)
    return [array.tobytes() for array in arrays.values()], result


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
    written, expected = _core(tree, max_norm, **options)
    clipped, result = gradclip.jax.clip(_jax(tree), max_norm, **options)
    kinds = (jax.tree.map(lambda x: (x.shape, x.dtype), of) for of in (clipped, tree))
    assert next(kinds) == next(kinds)
    assert _bits(clipped) == written
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


def _median_limit(tree: Any, **options: Any) -> float:
    """A threshold that clips some groups, which float32 has too."""
    norms = _core(tree, inf, **options)[1].group_norms
    return float(np.float32(0.7 * norms[0] if len(norms) == 1 else np.median(norms[norms > 0])))


# --- Bits ---------------------------------------------------------------------------------------------


_ALL: list[tuple[Any, float]] = [(groups, ord) for groups in KINDS for ord in (2, 3)]
_ALL += [(groups, ord) for groups in (None, "row", "unit_last") for ord in (1, inf)]


@pytest.mark.parametrize(("groups", "ord"), _ALL)
@pytest.mark.usefixtures("x64")
def test_every_dtype_in_one_tree(groups: Any, ord: float) -> None:
    tree = _tree_of(groups, NAMES)
    options = {"groups": groups, "ord": ord}
    result = _check(tree, _median_limit(tree, **options), **options)
    assert result.clipped


@pytest.mark.parametrize(("groups", "ord"), [(None, 2), ("sample", inf), ("unit_last", 1)])
@pytest.mark.usefixtures("x64")
def test_measuring_and_clipping_in_two_calls(groups: Any, ord: float) -> None:
    tree = _tree_of(groups, NAMES)
    options = {"groups": groups, "ord": ord, "grad_scale": 3.0}
    limit = _median_limit(tree, **options)
    measured = gradclip.jax.measure(_jax(tree), **options)
    clipped, result = measured.clip(_jax(tree), limit, nonfinite="zero", rounding="down")
    expected, of_one_call = gradclip.jax.clip(_jax(tree), limit, nonfinite="zero", rounding="down", **options)
    assert result.clipped
    assert _bits((clipped, result)) == _bits((expected, of_one_call))
    for field in ("total_norm", "norms", "group_norms", "nonfinite"):
        assert _bits(getattr(measured, field)) == _bits(getattr(result, field))


@pytest.mark.parametrize("groups", [None, "row", "sample"])
def test_without_the_64_bit_types_results_are_rounded(groups: Any) -> None:
    tree = _tree_of(groups, NARROW)
    result = _check(tree, _median_limit(tree, groups=groups), groups=groups)
    assert result.total_norm.dtype == np.float32


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.usefixtures("x64")
def test_norms(ord: float) -> None:
    tree = _without_axes(_tree(NAMES))
    arrays = jax.tree.leaves(tree)
    found = gradclip.jax.tree_norms(_jax(tree), ord=ord)
    assert list(found) == sorted(tree)
    assert [float(norm) for norm in jax.tree.leaves(found)] == gradclip.tensor_norms(arrays, ord).tolist()
    assert all(norm.shape == () and norm.dtype == np.float64 for norm in jax.tree.leaves(found))
    assert float(gradclip.jax.global_norm(_jax(tree), ord=ord)) == gradclip.global_norm(arrays, ord)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("x64")
def test_rounding_down_with_a_scale(name: str) -> None:
    """Alone, for the error of float64 norms is another one."""
    tree = {"w": values(name, (5, 700), seed=3), "b": values(name, (9,), seed=4)}
    written, expected = _core(tree, 2.0, rounding="down", grad_scale=3.0)
    result = _check(tree, 2.0, rounding="down", grad_scale=3.0)
    assert result.clipped
    assert expected.coefficient < 2.0 / expected.total_norm
    assert written != _core(tree, 2.0, grad_scale=3.0)[0]


@pytest.mark.parametrize("groups", ["tensor", "row", "sample", "unit_last"])
def test_rounding_down_of_groups(groups: str) -> None:
    tree = _tree_of(groups, NARROW)
    options = {"groups": groups, "ord": 3, "grad_scale": 0.3}
    assert _check(tree, _median_limit(tree, **options), rounding="down", **options).clipped


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
    assert _check(tree, _median_limit(tree, groups=groups), groups=groups).clipped


def test_labels_of_a_tree_with_nothing_in_it() -> None:
    tree = {"a": np.full(2, 3.0, np.float32), "b": None, "c": (np.full(2, 4.0, np.float32), None)}
    _, result = gradclip.jax.clip(_jax(tree), 1.0, groups={"a": "x", "b": "y", "c": "z"})
    assert result.group_norms.tolist() == [np.float32(18**0.5), np.float32(32**0.5)]


@pytest.mark.parametrize("groups", ["row", "unit", "unit_last"])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)])
def test_rows_of_what_is_empty(shape: tuple[int, ...], groups: str) -> None:
    tree = {"e": np.zeros(shape, np.float32), "w": values("float32", (3, 4), seed=1)}
    _check(tree, _median_limit(tree, groups=groups), groups=groups)


def test_1e20_has_a_norm() -> None:
    tree = {"a": np.full((3, 4), 1e20, np.float32), "b": np.full(4, -1e20, np.float32)}
    assert gradclip.jax.global_norm(_jax(tree)) == np.float32(4e20)
    assert _check(tree, 2.0).total_norm == np.float32(4e20)
    clipped, _ = gradclip.jax.clip(_jax(tree), 2.0)
    np.testing.assert_allclose(clipped["a"], 0.5, rtol=1e-6)


@pytest.mark.parametrize("nonfinite", ["propagate", "zero", "skip"])
def test_a_norm_beyond_float32_is_finite(nonfinite: str) -> None:
    """It is reported as infinite, and what has it is clipped by what it is."""
    tree = {"a": np.full(9, 3e38, np.float32), "b": np.ones(2, np.float32)}
    result = _check(tree, 2.0, nonfinite=nonfinite)
    assert result.total_norm == inf
    assert not result.nonfinite.any()
    np.testing.assert_allclose(gradclip.jax.clip(_jax(tree), 2.0)[0]["a"], 2 / 3, rtol=1e-6)


def test_thresholds_made_of_reported_norms() -> None:
    """One that is a norm clips nothing, although it was rounded; half of it does."""
    tree = {f"{i:02}": values("float32", (3,), seed=i) for i in range(40)}
    grads = _jax(tree)

    @jax.jit
    def run(grads: Any, factor: Any) -> Any:
        measured = gradclip.jax.measure(grads, groups="tensor")
        return measured.clip(grads, factor * measured.group_norms)

    assert _bits(run(grads, 1.0)[0]) == _bits(tree)
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
            clipped, result = run(_jax(tree), limit)
            assert _bits(clipped) == _bits(tree)
            assert not result.clipped
            assert result.coefficient == 1
    limits = {"a": 1.0, "b": None}
    left, result = gradclip.jax.clip(_jax({"a": numbers, "b": -numbers}), limits, groups="tensor")
    assert _bits(left["b"]) == _bits(-numbers)
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
    clipped = gradclip.jax.clip(_jax(tree), [0.1, 9.0, 0.5, None, 0.25], groups="row")[0]
    assert _bits(clipped) == _core(tree, np.array(limits), groups="row")[0]
    _check(tree, {"weight": 0.5, "bias": None}, groups={"b": "bias", "w": "weight"})


def test_arrays_as_thresholds_and_scales() -> None:
    """Traced or not, they are what float32 holds."""
    tree = {"b": values("float32", (5,), seed=1), "w": values("bfloat16", (3, 4), seed=2)}
    limits, scale = np.array([0.3, 1.7], np.float32), np.float32(0.7)
    written, expected = _core(tree, limits.tolist(), groups="tensor", grad_scale=float(scale))

    def clip(grads: Any, limits: Any, scale: Any) -> Any:
        return gradclip.jax.clip(grads, limits, groups="tensor", grad_scale=scale)

    def clip_by_list(grads: Any, limits: Any, scale: Any) -> Any:
        return gradclip.jax.clip(grads, [limits[0], limits[1]], groups="tensor", grad_scale=scale)

    def clip_by_name(grads: Any, limits: Any, scale: Any) -> Any:
        limits = {"w": limits[1], "b": 0.3}
        return gradclip.jax.clip(grads, limits, groups="tensor", grad_scale=scale)

    for function in (clip, clip_by_list, clip_by_name):
        for run in (function, jax.jit(function)):
            clipped, result = run(_jax(tree), jnp.asarray(limits), jnp.asarray(scale))
            assert _bits(clipped) == written
            _check_result(result, expected, tree)
    narrow = gradclip.jax.clip(_jax(tree), jnp.asarray(0.5, jnp.bfloat16))[0]
    assert _bits(narrow) == _core(tree, 0.5)[0]
    whole = gradclip.jax.clip(_jax(tree), jnp.asarray(2))[0]
    assert _bits(whole) == _core(tree, 2)[0]


@pytest.mark.parametrize("bad", [nan, inf, -inf])
@pytest.mark.parametrize("nonfinite", ["propagate", "zero", "skip"])
def test_what_is_not_finite(nonfinite: str, bad: float) -> None:
    tree = {"b": values("float16", (4,), seed=1), "w": values("float32", (4, 3), seed=2)}
    tree["w"][2, 1] = bad
    for groups in (None, "row"):
        result = _check(tree, 0.5, groups=groups, nonfinite=nonfinite)
        assert result.nonfinite.tolist() == [False, True]
    assert not _check(tree, inf, nonfinite="propagate").clipped


def test_numpy_arrays_are_gradients_too() -> None:
    tree = {"b": values("bfloat16", (5,), seed=1), "s": np.float32(3.0), "w": values("float32", (3, 4), 2)}
    before = _bits(tree)
    clipped, _ = gradclip.jax.clip(tree, 0.5)
    assert _bits(clipped) == _bits(gradclip.jax.clip(_jax(tree), 0.5)[0])
    assert _bits(tree) == before


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


# --- In place -----------------------------------------------------------------------------------------


def _pointers(tree: Any) -> list[int]:
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


def _large() -> dict[str, Any]:
    return {"b": jnp.arange(1000.0), "h": jnp.ones((30, 40), jnp.bfloat16), "w": jnp.ones((300, 200))}


@pytest.mark.parametrize("max_norm", [1.0, inf])
@pytest.mark.parametrize("groups", [None, "row", "unit_last"])
def test_donated_gradients_are_clipped_where_they_lie(groups: Any, max_norm: float) -> None:
    expected = gradclip.jax.clip(_large(), max_norm, groups=groups)
    compiled = jax.jit(lambda grads: gradclip.jax.clip(grads, max_norm, groups=groups), donate_argnums=0)
    for run in (
        compiled,
        functools.partial(gradclip.jax.clip, max_norm=max_norm, groups=groups, donate=True),
    ):
        grads = _large()
        before = _pointers(grads)
        clipped, result = run(grads)
        assert _pointers(clipped) == before
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(grads))
        assert _bits((clipped, result)) == _bits(expected)


def test_others_are_left_as_they_were() -> None:
    grads = _large()
    before = _bits(grads)
    for max_norm in (1.0, inf):
        for run in (gradclip.jax.clip, jax.jit(gradclip.jax.clip, static_argnums=1)):
            clipped, _ = run(grads, max_norm)
            assert _bits(grads) == before
            assert not set(_pointers(clipped)) & set(_pointers(grads))


def test_a_program_that_needs_the_gradients_afterwards() -> None:
    """The old ones and the new ones, of gradients that the program itself has made."""

    @jax.jit
    def run(x: Any) -> Any:
        grads = {"a": jnp.sin(x), "b": jnp.cos(x)}
        clipped, result = gradclip.jax.clip(grads, 0.1)
        return grads, clipped, jax.tree.map(lambda a, b: a - b, grads, clipped), result.coefficient

    grads, clipped, difference, coefficient = run(jnp.arange(50.0))
    assert 0 < coefficient < 0.1
    np.testing.assert_allclose(grads["a"], np.sin(np.arange(50.0)), rtol=1e-4, atol=1e-6)
    for key in grads:
        np.testing.assert_allclose(clipped[key], grads[key] * coefficient, rtol=1e-6)
        np.testing.assert_allclose(difference[key], grads[key] * (1 - coefficient), rtol=1e-5)


def test_one_array_in_several_places() -> None:
    """Of which each is clipped once: inputs, constants of the program, another shape of the same."""
    constant = values("float32", (3, 4), seed=1)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(x: Any) -> Any:
        return gradclip.jax.clip([x, x, x.reshape(-1), constant, constant], 0.5, groups="tensor")

    x = values("float32", (3, 4), seed=2)
    expected, _ = _core([x, x, x.reshape(-1), constant, constant], 0.5, groups="tensor")
    for _ in range(2):
        assert _bits(run(jnp.asarray(x))[0]) == expected


def test_donated_views_of_other_memory() -> None:
    """NumPy's arrays, and torch's through DLPack, are theirs."""
    array, tensor = np.full(1000, 3.0, np.float32), torch.full((1000,), 3.0)
    clipped, _ = gradclip.jax.clip([array, jnp.asarray(array), jnp.from_dlpack(tensor)], 1.0, donate=True)
    assert (array == 3).all()
    assert (tensor == 3).all()
    assert all((np.asarray(leaf) < 1).all() for leaf in clipped)


# --- Transformations ----------------------------------------------------------------------------------


def _batch(size: int = 5) -> dict[str, Any]:
    return {
        "h": values("bfloat16", (size, 6), seed=1),
        "s": values("float32", (size,), seed=2),
        "w": values("float32", (size, 4, 3), seed=3),
    }


def _example(batch: Any, i: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf)[i], batch)


@pytest.mark.parametrize("groups", [None, "row", "unit_last"])
def test_vmap_is_a_loop(groups: Any) -> None:
    """With a threshold for each example."""
    batch, limits = _batch(), jnp.array([0.1, 0.5, 2.0, 8.0, inf])
    clip = functools.partial(gradclip.jax.clip, groups=groups)
    together = jax.jit(jax.vmap(clip))(batch, limits)
    assert together[1].norms.shape == (5, 3)
    for i in range(5):
        assert _bits(_example(together, i)) == _bits(clip(_example(batch, i), limits[i]))
    fewer = jax.vmap(lambda grads: clip(grads, 0.5))(batch)
    assert _bits(_example(fewer, 3)) == _bits(clip(_example(batch, 3), 0.5))


def test_samples_are_what_vmap_maps_over() -> None:
    batch = _batch()
    clipped, result = gradclip.jax.clip(batch, 0.5, groups="sample")
    mapped, each = jax.vmap(lambda grads: gradclip.jax.clip(grads, 0.5))(batch)
    assert _bits(clipped) == _bits(mapped)
    assert _bits(result.group_norms) == _bits(each.total_norm)


def test_vmap_over_some_of_the_arrays() -> None:
    batch, limits, scales = (
        _batch(),
        jnp.array([0.5, 1.0, 3.0, 0.0, 2.0]),
        jnp.array([1.0, 2.0, 0.5, 1.0, 3.0]),
    )
    common = _example(batch, 0)["w"]

    def clip(h: Any, w: Any, limit: Any, scale: Any) -> Any:
        return gradclip.jax.clip({"h": h, "w": w}, limit, groups="row", grad_scale=scale)

    for axes in ((0, None, None, None), (None, None, 0, None), (None, None, None, 0), (0, None, 0, 0)):
        every = (batch["h"], common, limits, scales)
        arguments = [
            a if axis == 0 or i == 1 else a[1] for i, (a, axis) in enumerate(zip(every, axes, strict=True))
        ]
        found = jax.vmap(clip, in_axes=axes)(*arguments)
        for i in (0, 4):
            mine = [a[i] if axis == 0 else a for a, axis in zip(arguments, axes, strict=True)]
            assert _bits(_example(found, i)) == _bits(clip(*mine)), axes


def test_vmap_of_vmap_and_along_another_axis() -> None:
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, -leaf]), _batch())
    nested = jax.vmap(jax.vmap(lambda grads: gradclip.jax.clip(grads, 0.5, groups="tensor")))(batch)
    for i, j in ((0, 0), (1, 3), (2, 4)):
        one = gradclip.jax.clip(_example(_example(batch, i), j), 0.5, groups="tensor")
        assert _bits(_example(_example(nested, i), j)) == _bits(one)
    last = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, -1), _batch())
    found = jax.vmap(lambda grads: gradclip.jax.clip(grads, 0.5)[0], in_axes=-1)(last)
    assert _bits(_example(found, 2)) == _bits(gradclip.jax.clip(_example(_batch(), 2), 0.5)[0])


def test_vmap_of_norms_and_of_what_was_measured() -> None:
    batch = _batch()
    norms = jax.vmap(gradclip.jax.tree_norms)(batch)
    total = jax.vmap(functools.partial(gradclip.jax.global_norm, ord=3))(batch)
    measured = jax.vmap(gradclip.jax.measure)(batch)
    clipped, _ = jax.vmap(lambda measured, grads: measured.clip(grads, 0.5))(measured, batch)
    for i in range(5):
        one = _example(batch, i)
        assert _bits(_example(norms, i)) == _bits(gradclip.jax.tree_norms(one))
        assert _bits(total[i]) == _bits(gradclip.jax.global_norm(one, ord=3))
        assert _bits(_example(clipped, i)) == _bits(gradclip.jax.clip(one, 0.5)[0])


def test_over_a_mapped_axis() -> None:
    """Norms over the examples, which vmap gives a name."""
    batch = _batch()
    clipped, result = jax.vmap(
        lambda grads: gradclip.jax.clip(grads, 0.5, axis_name="examples"), axis_name="examples"
    )(batch)
    whole, of_whole = gradclip.jax.clip(batch, 0.5)
    assert _bits(clipped) == _bits(whole)
    assert result.total_norm.tolist() == [of_whole.total_norm.item()] * 5


def test_scan_and_cond() -> None:
    batch = _batch()

    @jax.jit
    def run(batch: Any) -> Any:
        def step(calls: Any, grads: Any) -> Any:
            clipped, result = jax.lax.cond(
                calls % 2 == 0,
                lambda: gradclip.jax.clip(grads, 0.5),
                lambda: gradclip.jax.clip(grads, inf),
            )
            return calls + 1, (clipped, result)

        return jax.lax.scan(step, 0, batch)[1]

    found = run(batch)
    for i in range(5):
        one = gradclip.jax.clip(_example(batch, i), inf if i % 2 else 0.5)
        assert _bits(_example(found, i)) == _bits(one)


def test_what_was_measured_goes_in_and_out_of_programs() -> None:
    tree = _jax({"b": values("float16", (4,), seed=1), "w": values("float32", (4, 3), seed=2)})
    measured = jax.jit(lambda grads: gradclip.jax.measure(grads, groups="tensor", grad_scale=2.0))(tree)
    copy = jax.tree.map(jnp.copy, measured)
    limits = {"w": 0.5, "b": None}
    found = jax.jit(lambda measured, grads: measured.clip(grads, limits, rounding="down"))(copy, tree)
    expected = gradclip.jax.clip(tree, limits, groups="tensor", grad_scale=2.0, rounding="down")
    assert _bits(found) == _bits(expected)


def test_a_program_is_compiled_once() -> None:
    """Thresholds that are traced, and numbers that change outside of a program."""
    traces = 0

    @jax.jit
    def clip(grads: Any, max_norm: Any) -> Any:
        nonlocal traces
        traces += 1
        return gradclip.jax.clip(grads, max_norm)

    for max_norm in (1.0, 2.0, 3.0):
        clip(_batch(), max_norm)
    assert traces == 1
    eager: Any = _jitted_clip
    gradclip.jax.clip(_batch(), 1.0)
    before = eager._cache_size()
    gradclip.jax.clip(_batch(), 2.5)
    assert eager._cache_size() == before


# --- Derivatives --------------------------------------------------------------------------------------


def _check_derivatives(function: Callable[..., Any], *arguments: Any) -> None:
    """Both modes against central differences, along a direction that is no axis."""
    rng = np.random.default_rng(0)
    step, inner = 1e-6, functools.partial(jax.tree.map, jnp.vdot)
    run = jax.jit(function)

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def derive(arguments: Any, along: Any, beside: Any) -> Any:
        _, forward = jax.jvp(function, arguments, along)
        _, pull = jax.vjp(function, *arguments)
        backward = pull(beside)
        return forward, [sum(jax.tree.leaves(x)) for x in (inner(beside, forward), inner(backward, along))]

    along = jax.tree.map(lambda a: rng.standard_normal(a.shape), arguments)
    after, before = (run(*jax.tree.map(lambda a, d, s=s: a + s * d, arguments, along)) for s in (step, -step))
    expected = jax.tree.map(lambda a, b: (a - b) / (2 * step), after, before)
    beside = jax.tree.map(lambda a: rng.standard_normal(a.shape), expected)
    forward, (one, other) = derive(arguments, along, beside)
    for found, wanted in zip(jax.tree.leaves(forward), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(one, other, rtol=1e-10)


_DERIVED = [(None, 2), ("tensor", 1), ("row", 3), ("sample", inf), ("unit_last", 3)]


@pytest.mark.parametrize(("groups", "ord"), _DERIVED)
@pytest.mark.usefixtures("x64")
def test_derivatives_of_clips(groups: Any, ord: float) -> None:
    """Of gradients (one is complex), thresholds and the scale; of groups that are clipped and of others."""
    parts = {"b": (3,), "im": (3, 2, 2), "re": (3, 2, 2)}
    tree = {name: values("float64", shape, seed) for seed, (name, shape) in enumerate(parts.items())}

    def whole(tree: Any) -> Any:
        return {"b": tree["b"], "c": tree["re"] + 1j * tree["im"]}

    def clip(tree: Any, limits: Any, scale: Any) -> Any:
        clipped, result = gradclip.jax.clip(whole(tree), limits, ord=ord, groups=groups, grad_scale=scale)
        return clipped["b"], clipped["c"].real, clipped["c"].imag, result[:4]

    scale = np.float64(1.5)
    norms = _core(whole(tree), inf, ord=ord, groups=groups, grad_scale=1.5)[1].group_norms
    factors = np.where(np.arange(len(norms)) % 2 == 0, 0.6, 1.4)
    coefficient = np.atleast_1d(jax.jit(clip)(tree, norms * factors, scale)[-1][-1])
    assert ((coefficient < 1) == (factors < 1)).all()
    _check_derivatives(clip, tree, norms * factors, scale)


@pytest.mark.usefixtures("x64")
def test_derivatives_of_norms() -> None:
    def norms(tree: Any) -> Any:
        return gradclip.jax.tree_norms(tree), gradclip.jax.global_norm(tree, ord=1)

    _check_derivatives(norms, {"a": values("float64", (3, 4), seed=1), "b": values("float64", (3,), seed=2)})


@pytest.mark.usefixtures("x64")
def test_second_derivatives() -> None:
    found = jax.jit(jax.hessian(gradclip.jax.global_norm))(np.array([3.0, 4.0]))
    np.testing.assert_allclose(found, np.array([[16.0, -12.0], [-12.0, 9.0]]) / 125, rtol=1e-12)


@pytest.mark.parametrize("ord", [3, inf])
def test_the_derivative_at_a_norm_of_0_is_0(ord: float) -> None:
    """And nothing is NaN; a clip is the identity there, whatever else is clipped."""

    def total(tree: Any) -> Any:
        clipped, result = gradclip.jax.clip(tree, 2.0, ord=ord, groups="tensor")
        of_zeros = gradclip.jax.global_norm(tree["a"], ord=ord)
        return jnp.sum(clipped["a"]) + jnp.sum(result.norms) + result.total_norm + of_zeros

    tree = {"a": np.zeros(3, np.float32), "b": np.array([3.0, 4.0], np.float32)}
    found = jax.jit(jax.grad(total))(tree)
    assert found["a"].tolist() == [1, 1, 1]
    assert np.isfinite(found["b"]).all()


def test_derivatives_of_norms_whose_squares_float32_has_not() -> None:
    @jax.jit
    def run(grads: Any, size: Any) -> Any:
        norm = jax.grad(gradclip.jax.global_norm)(grads)
        ones = jax.tree.map(jnp.ones_like, grads)
        return norm, jax.jvp(lambda grads: gradclip.jax.clip(grads, size)[0], (grads,), (ones,))[1]

    for size in (1e-30, 1e30):
        norm, changes = run({"a": jnp.full(3, size), "b": jnp.full(1, -size)}, size)
        assert (norm["a"].tolist(), norm["b"].tolist()) == ([0.5] * 3, [-0.5])
        # (dg - u (u, dg)) / 2 with u = g / norm
        np.testing.assert_allclose(changes["a"], 0.25, rtol=1e-5)
        np.testing.assert_allclose(changes["b"], 0.75, rtol=1e-5)


def test_derivatives_of_half_floats() -> None:
    found = jax.jit(jax.grad(gradclip.jax.global_norm))([np.full(4, 6e4, np.float16)])[0]
    assert found.dtype == np.float16
    assert found.tolist() == [0.5] * 4


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_derivatives_where_a_norm_is_beyond_float32(nonfinite: str) -> None:
    """It is clipped by what it is: by a factor of 1e39."""

    @jax.jit
    def run(grads: Any) -> Any:
        def clip(grads: Any) -> Any:
            return gradclip.jax.clip(grads, 2.0, nonfinite=nonfinite)[0]

        return jax.jvp(clip, (grads,), (jnp.arange(9.0),))[1]

    found = np.asarray(run(jnp.full(9, 3e38)))
    assert (np.abs(found) < 1e-36).all()


@pytest.mark.parametrize(("nonfinite", "expected"), [("skip", 1.0), ("zero", 0.0)])
def test_derivatives_where_gradients_were_left(nonfinite: str, expected: float) -> None:
    def clip(grads: Any) -> Any:
        return gradclip.jax.clip(grads, 1.0, nonfinite=nonfinite)[0]

    @jax.jit
    def run(grads: Any) -> Any:
        ones = jax.tree.map(jnp.ones_like, grads)
        forward = jax.jvp(clip, (grads,), (ones,))[1]
        return forward, jax.vjp(clip, grads)[1](ones)[0]

    forward, backward = run([jnp.array([3.0, 4.0, nan]), jnp.array([1.0])])
    assert [x.tolist() for x in forward] == [[expected] * 3, [expected]]
    assert [x.tolist() for x in backward] == [[expected] * 3, [expected]]


def test_derivatives_through_vmap_scan_and_checkpoint() -> None:
    batch = {"b": values("float32", (3, 2, 2), seed=2)}

    def loss(grads: Any) -> Any:
        clipped, result = gradclip.jax.clip(grads, 1.5, groups="row")
        return jnp.sum(clipped["b"] ** 3) + result.total_norm

    def scanned(batch: Any) -> Any:
        return jax.lax.scan(lambda total, grads: (total + loss(grads), None), 0.0, batch)[0]

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def run(batch: Any) -> Any:
        return (
            jax.vmap(jax.grad(jax.checkpoint(loss)))(batch),
            jax.grad(lambda batch: jnp.sum(jax.vmap(loss)(batch)))(batch),
            jax.grad(scanned)(batch),
        )

    of_one = jax.jit(jax.grad(loss))
    expected = [of_one(_example(batch, i))["b"] for i in range(3)]
    for found in run(batch):
        np.testing.assert_allclose(found["b"], expected, rtol=2e-5, atol=1e-6)


def test_derivatives_of_columns_through_vmap() -> None:
    """Units that are the last axis are clipped one example after the other."""
    batch = {"w": values("float32", (3, 4, 2), seed=1)}

    def loss(grads: Any) -> Any:
        return jnp.sum(gradclip.jax.clip(grads, 1.5, groups="unit_last")[0]["w"] ** 3)

    found = jax.jit(jax.vmap(jax.grad(loss)), compiler_options=QUICKLY)(batch)["w"]
    of_one = jax.jit(jax.grad(loss))
    expected = [of_one(_example(batch, i))["w"] for i in range(3)]
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


# --- Shards -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards() -> Any:
    """What a process with four devices has found (tests/jax_shards.py)."""
    tests = os.path.dirname(__file__)
    paths = os.pathsep.join(filter(None, [tests, os.environ.get("PYTHONPATH")]))
    flags = "--xla_force_host_platform_device_count=4"
    return json.loads(
        output_of(
            "import jax_shards; jax_shards.main()",
            300,
            PYTHONPATH=paths,
            XLA_FLAGS=flags,
            JAX_PLATFORMS="cpu",
        )
    )


_SHARDED = {
    "one axis": 4,
    "two axes": 4,
    "largest of tensors": 4,
    "rows": 3 + 7,
    "types that do not tell": 2,
    "skip": 4,
    "zero": 4,
}


def test_shards_are_over_four_devices(shards: Any) -> None:
    assert shards["devices"] == 4
    assert set(shards["cases"]) == set(_SHARDED)


@pytest.mark.parametrize(("case", "parts"), _SHARDED.items())
def test_shards_have_the_bits_of_one_device(shards: Any, case: str, parts: int) -> None:
    """And hand on nothing but sums, by an all-reduce: 24 bytes of each part and shard."""
    found = shards["cases"][case]
    assert found["equal values"]
    assert found["equal results"]
    assert found["equal on all devices"]
    assert found["clipped"] is (case != "skip")
    assert set(found["moved"]) == {"all-reduce"}
    assert 24 * parts <= found["moved"]["all-reduce"] <= 24 * parts * shards["devices"]


@pytest.mark.parametrize("case", ["one axis", "two axes", "explicit axes"])
def test_arrays_in_shards_are_not_gathered(shards: Any, case: str) -> None:
    """Under jit alone: they stay where they are, and keep the bits of one device."""
    found = shards["placed"][case]
    assert all(
        found[what] for what in ("clipped", "equal values", "equal results", "equal on all devices", "kept")
    )
    assert set(found["moved"]) == {"all-reduce"}
    assert found["moved"]["all-reduce"] <= 24 * 4 * shards["devices"]


def test_norms_of_arrays_in_shards(shards: Any) -> None:
    assert shards["norms"] < 2**-22


def test_shards_of_pmap(shards: Any) -> None:
    assert shards["pmap"] == {"equal values": True, "equal norms": True}


def test_updates_of_shards(shards: Any) -> None:
    assert shards["updates"]["equal"]


def test_derivatives_of_shards(shards: Any) -> None:
    assert shards["derivatives"] < 1e-5


# --- Where there are no kernels -----------------------------------------------------------------------


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
    clipped, *decided, is_clipped, odd = _plain_clip(_jax(tree), max_norm, grad_scale, **options)
    written, result = _core(tree, max_norm, grad_scale=grad_scale, **options)
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
    limit = _median_limit(tree, ord=ord, groups=groups, grad_scale=2.0)
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
        tree = {"b": values("float16", (4,), seed=1), "w": values("float32", (4, 3), seed=2)}
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


# --- Bad input ----------------------------------------------------------------------------------------

_FLOATS = "float16, bfloat16, float32, float64, complex64 or complex128"


class _Deleted:
    def __call__(self) -> Any:
        array = jnp.ones(3)
        array.delete()
        return {"w": array}


_BAD_TREES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "integers": (
        lambda: {"layer": {"w": jnp.ones(3, jnp.int32)}},
        TypeError,
        f"grads['layer']['w']: expected an array of {_FLOATS}, got one of int32",
    ),
    "booleans": (
        lambda: [jnp.ones(3), (np.ones(3, bool),)],
        TypeError,
        f"grads[1][0]: expected an array of {_FLOATS}, got one of bool",
    ),
    "longdouble": (
        lambda: {"w": np.ones(3, np.longdouble)},
        TypeError,
        f"grads['w']: expected an array of {_FLOATS}, got one of {np.dtype(np.longdouble).name}",
    ),
    "a number": (
        lambda: {"layer": {"w": 1.0}},
        TypeError,
        f"grads['layer']['w']: expected an array of {_FLOATS}, got builtins.float",
    ),
    "a string": (lambda: ["w"], TypeError, f"grads[0]: expected an array of {_FLOATS}, got builtins.str"),
    "a root": (lambda: 2.5, TypeError, f"grads: expected an array of {_FLOATS}, got builtins.float"),
    "only None": (
        lambda: {"w": None},
        ValueError,
        "grads: expected at least one array, got none in {'w': None}",
    ),
    "nothing": (lambda: [], ValueError, "grads: expected at least one array, got none in []"),
    "deleted": (
        _Deleted(),
        ValueError,
        "grads['w']: expected an array with memory, got a jax.Array that was deleted",
    ),
}


@pytest.mark.parametrize("kind", _BAD_TREES)
@pytest.mark.parametrize("call", ["clip", "measure", "global_norm", "tree_norms"])
def test_trees_that_are_refused(call: str, kind: str) -> None:
    make, error, message = _BAD_TREES[kind]
    function = getattr(gradclip.jax, call)
    with pytest.raises(error) as caught:
        function(make(), *((1.0,) if call == "clip" else ()))
    assert str(caught.value).startswith(message)


def _two() -> dict[str, Any]:
    return {"b": jnp.ones(3), "w": jnp.ones((2, 3))}


_NO_NUMBER = "max_norm: expected a number or an array of numbers, got"
_NEGATIVE = "max_norm: expected numbers that are not negative, got"
_NO_NAMES = "max_norm: expected numbers, since the groups of this call have no names, got a mapping"
_NAMES = "max_norm: expected the names of groups, ['b', 'w'], got"
_PREFIX = "groups: expected labels in a prefix of the pytree of the grads: "
_LABEL = "expected names, or labels from 0 to 1, got"
_SCALE = "grad_scale: expected a positive finite number whose reciprocal is finite, got"
_SCALE_SHAPE = "grad_scale: expected a number or a float array of shape (), got one of"
_NONFINITE = "nonfinite: expected 'propagate', 'zero' or 'skip'"

_BAD_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"max_norm": [1.0, 2.0]}, "max_norm: expected a number or an array of shape (), got one of shape (2,)"),
    (
        {"max_norm": jnp.ones(3), "groups": "tensor"},
        "max_norm: expected a number or an array of shape (), or of shape (2,), one for each group, got one "
        "of shape (3,)",
    ),
    ({"max_norm": -1.0}, f"{_NEGATIVE} -1.0"),
    ({"max_norm": nan}, f"{_NEGATIVE} nan"),
    ({"max_norm": [1.0, -inf], "groups": "tensor"}, f"{_NEGATIVE} [1.0, -inf]"),
    ({"max_norm": {"b": 1.0, "w": 1.0}}, _NO_NAMES),
    ({"max_norm": {"b": 1.0, "w": 1.0}, "groups": {"b": 0, "w": 1}}, _NO_NAMES),
    ({"max_norm": {"b": 1.0, "w": 1.0}, "groups": "row"}, _NO_NAMES),
    ({"max_norm": {"b": 1.0, "v": 1.0}, "groups": "tensor"}, f"{_NAMES} ['b', 'v']"),
    ({"max_norm": {"b": 1.0}, "groups": "tensor"}, f"{_NAMES} ['b']"),
    (
        {"groups": "tensors"},
        "groups: expected None, 'tensor', 'row', 'sample', 'unit', 'unit_last', a pytree of labels or a "
        "callable, got 'tensors'",
    ),
    ({"groups": {"b": "x"}}, _PREFIX),
    ({"groups": {"b": 0, "w": {"v": 1}}}, _PREFIX),
    ({"groups": ["x", "y"]}, _PREFIX),
    ({"groups": {"b": 0, "w": 2}}, f"groups of grads['w']: {_LABEL} 2"),
    ({"groups": {"b": -1, "w": 0}}, f"groups of grads['b']: {_LABEL} -1"),
    ({"groups": {"b": "x", "w": 0}}, f"groups of grads['b']: {_LABEL} 'x'"),
    ({"groups": lambda name: 1.5}, f"groups of grads['b']: {_LABEL} 1.5"),
    ({"groups": lambda name: True}, f"groups of grads['b']: {_LABEL} True"),
    (
        {"groups": "sample"},
        "grads['w']: expected 3 samples along the first axis, as grads['b'] has, got 2",
    ),
    ({"ord": 0}, "ord: expected a positive number or infinity, got 0"),
    ({"ord": -2}, "ord: expected a positive number or infinity, got -2"),
    ({"ord": nan}, "ord: expected a positive number or infinity, got nan"),
    ({"nonfinite": "raise"}, f"{_NONFINITE}, since a compiled program cannot raise, got 'raise'"),
    ({"nonfinite": "nan"}, f"{_NONFINITE}, got 'nan'"),
    ({"nonfinite": True}, f"{_NONFINITE}, got True"),
    ({"rounding": "up"}, "rounding: expected 'nearest' or 'down', got 'up'"),
    ({"rounding": 2}, "rounding: expected 'nearest' or 'down', got 2"),
    ({"grad_scale": 0.0}, f"{_SCALE} 0.0"),
    ({"grad_scale": -1}, f"{_SCALE} -1"),
    ({"grad_scale": nan}, f"{_SCALE} nan"),
    ({"grad_scale": inf}, f"{_SCALE} inf"),
    ({"grad_scale": 5e-324}, f"{_SCALE} 5e-324"),
    ({"grad_scale": jnp.ones(2)}, f"{_SCALE_SHAPE} float32 and shape (2,)"),
    ({"grad_scale": jnp.ones((), int)}, f"{_SCALE_SHAPE} int32 and shape ()"),
]
_BAD_KINDS: list[tuple[dict[str, Any], str]] = [
    ({"max_norm": [[1.0], [1.0, 2.0]], "groups": "tensor"}, _NO_NUMBER),
    ({"max_norm": "1"}, f"{_NO_NUMBER} '1'"),
    ({"max_norm": None}, f"{_NO_NUMBER} None"),
    ({"max_norm": True}, f"{_NO_NUMBER} True"),
    ({"max_norm": 1j}, f"{_NO_NUMBER} 1j"),
    ({"max_norm": jnp.ones((), complex)}, "max_norm: expected real numbers, got complex64"),
    ({"max_norm": jnp.ones((), bool)}, "max_norm: expected real numbers, got bool"),
    ({"ord": "2"}, "ord: expected a number, got '2'"),
    ({"ord": True}, "ord: expected a number, got True"),
    ({"ord": None}, "ord: expected a number, got None"),
    ({"grad_scale": "2"}, "grad_scale: expected a number, got '2'"),
    ({"grad_scale": [1.0]}, "grad_scale: expected a number, got [1.0]"),
]
_BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]]
_BAD_OPTIONS = [(options, ValueError, message) for options, message in _BAD_VALUES]
_BAD_OPTIONS += [(options, TypeError, message) for options, message in _BAD_KINDS]


@pytest.mark.parametrize(("options", "error", "message"), _BAD_OPTIONS)
def test_options_that_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    def clip(grads: Any) -> Any:
        return gradclip.jax.clip(grads, **({"max_norm": 1.0} | options))

    for run in (clip, jax.jit(clip)):
        with pytest.raises(error) as caught:
            run(_two())
        assert str(caught.value).startswith(message)


def test_samples_that_are_refused() -> None:
    for grads, message in (
        (
            [jnp.ones(()), jnp.ones(3)],
            "grads[0]: expected samples along the first axis, got an array without axes",
        ),
        ([jnp.ones((0, 3))], "grads[0]: expected at least one sample along the first axis, got none"),
    ):
        with pytest.raises(ValueError, match="expected") as caught:
            gradclip.jax.clip(grads, 1.0, groups="sample")
        assert str(caught.value) == message


def test_an_order_that_is_traced() -> None:
    with pytest.raises(TypeError, match=r"^ord: expected a number, got .*JitTracer"):
        jax.jit(lambda grads, ord: gradclip.jax.clip(grads, 1.0, ord=ord))(_two(), 2.0)


@pytest.mark.parametrize("bad", [-1.0, nan])
def test_traced_numbers_that_are_refused_when_they_are_known(bad: float) -> None:
    clip = jax.jit(lambda grads, max_norm, scale: gradclip.jax.clip(grads, max_norm, grad_scale=scale))
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=r"max_norm: expected numbers that are 0 or more, got -?(1|nan)"
    ):
        ready(clip(_two(), bad, 1.0))
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=r"grad_scale: expected a positive finite number, got -?(1|nan)"
    ):
        ready(clip(_two(), 1.0, bad))
    assert clip(_two(), 1.0, 1.0)[1].clipped  # and nothing is broken


def test_other_gradients_than_were_measured() -> None:
    measured = gradclip.jax.measure(_two(), groups="row")
    with pytest.raises(ValueError, match=r"^grads: expected the 2 arrays that were measured, got 1$"):
        measured.clip([jnp.ones(3)], 1.0)
    with pytest.raises(ValueError, match=r"^grads\['w'\]: expected"):
        measured.clip({"b": jnp.ones(3), "w": jnp.ones((5, 1))}, 1.0)
    with pytest.raises(ValueError, match=r"^nonfinite: expected 'propagate', 'zero' or 'skip'"):
        measured.clip(_two(), 1.0, nonfinite="raise")


# --- Threads ------------------------------------------------------------------------------------------


def test_many_threads_at_once() -> None:
    """Each its own gradients, by one program of a few megabytes."""
    clip = jax.jit(lambda grads: gradclip.jax.clip(grads, 1.0))

    def grads(seed: int) -> Any:
        return {"h": values("bfloat16", 70_001, seed), "w": values("float32", (700, 401), seed)}

    trees = [grads(seed) for seed in range(6)]
    expected = [_core(tree, 1.0)[0] for tree in trees]
    clip(trees[0])
    start = threading.Barrier(6)

    def work(i: int) -> int:
        start.wait()
        for _ in range(4):
            assert _bits(clip(trees[i])[0]) == expected[i]
            assert _bits(gradclip.jax.clip(trees[i], 1.0)[0]) == expected[i]
        return i

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(work, range(6))) == list(range(6))


def test_other_programs_run_beside() -> None:
    """What shares XLA's threads with a clip of 8 MB goes on."""
    tree = {"w": values("float32", (2_000_003,), seed=1)}
    expected, _ = _core(tree, 1.0)
    grads = _jax(tree)
    clip = jax.jit(lambda grads: gradclip.jax.clip(grads, 1.0)[0])
    multiply = jax.jit(lambda a: jnp.sum(a @ a))
    matrix = jnp.ones((400, 400))
    stop = threading.Event()

    def others() -> int:
        runs = 0
        while not stop.is_set():
            assert multiply(matrix) == 400.0**3
            runs += 1
        return runs

    with ThreadPoolExecutor(2) as pool:
        workers = [pool.submit(others) for _ in range(2)]
        try:
            for _ in range(10):
                assert _bits(clip(grads)) == expected
        finally:
            stop.set()
        assert all(worker.result() > 0 for worker in workers)


def test_no_threads_of_our_own() -> None:
    """Clips inside of XLA work on its threads."""
    code = """
    import jax, jax.numpy as jnp, gradclip.jax
    from gradclip import _core
    grads = {"w": jnp.ones((1000, 2000)), "b": jnp.ones(500_000, jnp.bfloat16)}
    clip = jax.jit(lambda grads: gradclip.jax.clip(grads, 1.0))
    for _ in range(3):
        clipped, result = jax.block_until_ready(clip(grads))
        rows = jax.block_until_ready(gradclip.jax.clip(grads, 1.0, groups="row"))
    assert result.clipped
    print(_core.num_started_threads())
    """
    assert output_of(code, GRADCLIP_NUM_THREADS="4") == "0"
