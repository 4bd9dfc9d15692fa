"""gradclip.jax goes through JAX's transformations: jit, donated or not, vmap, scan, cond, derivatives."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import gradclip
import gradclip.jax
from gradclip.jax._functions import _jitted_clip
from jax_trees import QUICKLY, bits, clipped_by_core, layer, pointers, to_jax
from matrices import values

inf, nan = math.inf, math.nan


# --- In place -----------------------------------------------------------------------------------------


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
        before = pointers(grads)
        clipped, result = run(grads)
        assert pointers(clipped) == before
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(grads))
        assert bits((clipped, result)) == bits(expected)


def test_others_are_left_as_they_were() -> None:
    grads = _large()
    before = bits(grads)
    for max_norm in (1.0, inf):
        for run in (gradclip.jax.clip, jax.jit(gradclip.jax.clip, static_argnums=1)):
            clipped, _ = run(grads, max_norm)
            assert bits(grads) == before
            assert not set(pointers(clipped)) & set(pointers(grads))


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
    expected, _ = clipped_by_core([x, x, x.reshape(-1), constant, constant], 0.5, groups="tensor")
    for _ in range(2):
        assert bits(run(jnp.asarray(x))[0]) == expected


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
        assert bits(_example(together, i)) == bits(clip(_example(batch, i), limits[i]))
    fewer = jax.vmap(lambda grads: clip(grads, 0.5))(batch)
    assert bits(_example(fewer, 3)) == bits(clip(_example(batch, 3), 0.5))


def test_samples_are_what_vmap_maps_over() -> None:
    batch = _batch()
    clipped, result = gradclip.jax.clip(batch, 0.5, groups="sample")
    mapped, each = jax.vmap(lambda grads: gradclip.jax.clip(grads, 0.5))(batch)
    assert bits(clipped) == bits(mapped)
    assert bits(result.group_norms) == bits(each.total_norm)


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
            assert bits(_example(found, i)) == bits(clip(*mine)), axes


def test_vmap_of_vmap_and_along_another_axis() -> None:
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, -leaf]), _batch())
    nested = jax.vmap(jax.vmap(lambda grads: gradclip.jax.clip(grads, 0.5, groups="tensor")))(batch)
    for i, j in ((0, 0), (1, 3), (2, 4)):
        one = gradclip.jax.clip(_example(_example(batch, i), j), 0.5, groups="tensor")
        assert bits(_example(_example(nested, i), j)) == bits(one)
    last = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, -1), _batch())
    found = jax.vmap(lambda grads: gradclip.jax.clip(grads, 0.5)[0], in_axes=-1)(last)
    assert bits(_example(found, 2)) == bits(gradclip.jax.clip(_example(_batch(), 2), 0.5)[0])


def test_vmap_of_norms_and_of_what_was_measured() -> None:
    batch = _batch()
    norms = jax.vmap(gradclip.jax.tree_norms)(batch)
    total = jax.vmap(functools.partial(gradclip.jax.global_norm, ord=3))(batch)
    measured = jax.vmap(gradclip.jax.measure)(batch)
    clipped, _ = jax.vmap(lambda measured, grads: measured.clip(grads, 0.5))(measured, batch)
    for i in range(5):
        one = _example(batch, i)
        assert bits(_example(norms, i)) == bits(gradclip.jax.tree_norms(one))
        assert bits(total[i]) == bits(gradclip.jax.global_norm(one, ord=3))
        assert bits(_example(clipped, i)) == bits(gradclip.jax.clip(one, 0.5)[0])


def test_over_a_mapped_axis() -> None:
    """Norms over the examples, which vmap gives a name."""
    batch = _batch()
    clipped, result = jax.vmap(
        lambda grads: gradclip.jax.clip(grads, 0.5, axis_name="examples"), axis_name="examples"
    )(batch)
    whole, of_whole = gradclip.jax.clip(batch, 0.5)
    assert bits(clipped) == bits(whole)
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
        assert bits(_example(found, i)) == bits(one)


def test_what_was_measured_goes_in_and_out_of_programs() -> None:
    tree = to_jax(layer("float16", "float32"))
    measured = jax.jit(lambda grads: gradclip.jax.measure(grads, groups="tensor", grad_scale=2.0))(tree)
    copy = jax.tree.map(jnp.copy, measured)
    limits = {"w": 0.5, "b": None}
    found = jax.jit(lambda measured, grads: measured.clip(grads, limits, rounding="down"))(copy, tree)
    expected = gradclip.jax.clip(tree, limits, groups="tensor", grad_scale=2.0, rounding="down")
    assert bits(found) == bits(expected)


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
    norms = clipped_by_core(whole(tree), inf, ord=ord, groups=groups, grad_scale=1.5)[1].group_norms
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
