"""Transformations of optax: its own published tests with ours in place, its wrappers, states, bad input."""

from __future__ import annotations

import importlib
import math
import re
import sys
import unittest
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradclip
import gradclip.jax
from gradclip.jax import ClipState
from jax_trees import bits, layer, pointers, to_jax
from matrices import REAL_NAMES, Array, values

inf, nan = math.inf, math.nan
_clipping: Any = importlib.import_module("optax.transforms._clipping")
_their_tests: Any = importlib.import_module("optax.transforms._clipping_test")


def _close(found: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-30) -> None:
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        np.testing.assert_allclose(one, other, rtol=rtol, atol=atol)


def _grads(seed: int, size: float = 1.0) -> dict[str, Array]:
    return {name: size * grad for name, grad in layer("float32", "float32", (3, 4), seed).items()}


# --- The tests that optax publishes -------------------------------------------------------------------

_NAMES = unittest.TestLoader().getTestCaseNames(_their_tests.ClippingTest)

# Not run with ours in place, and why.
_OF_ANOTHER_FUNCTION = {"test_unitwise_norm_with_axis": "of unitwise_norm, which nothing replaces"}
_REFUSED = {
    "test_per_example_global_norm_clip": (
        "its second gradient is one of integers, which optax multiplies and gradclip refuses",
        r"TypeError: grads\[1\]: expected an array of float16, .*, got one of int32",
    )
}


def _stateless(make: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    """Those of optax have no state, and its tests give them None."""

    def made(*args: Any, **options: Any) -> Any:
        transformation = make(*args, **options)

        def update(updates: Any, state: Any, params: Any = None) -> Any:
            calls.append(make.__name__)
            state = transformation.init(updates) if state is None else state
            return transformation.update(updates, state, params)

        return optax.GradientTransformation(transformation.init, update)

    return made


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """gradclip's functions in the place of optax's; the names of those that were called."""
    calls: list[str] = []
    for theirs, ours in (
        ("clip", gradclip.jax.clip_by_value),
        ("clip_by_global_norm", gradclip.jax.clip_by_global_norm),
        ("clip_by_block_rms", gradclip.jax.clip_by_block_rms),
        ("adaptive_grad_clip", gradclip.jax.adaptive_grad_clip),
    ):
        monkeypatch.setattr(_clipping, theirs, _stateless(ours, calls))

    def per_example(grads: Any, l2_norm_clip: Any) -> Any:
        calls.append("per_example_global_norm_clip")
        return gradclip.jax.per_example_global_norm_clip(grads, l2_norm_clip)

    monkeypatch.setattr(_clipping, "per_example_global_norm_clip", per_example)
    return calls


def _failures(name: str) -> list[str]:
    result = unittest.TestResult()
    _their_tests.ClippingTest(name).run(result)
    assert result.testsRun == 1
    assert not result.skipped
    return [trace for _, trace in result.failures + result.errors]


def test_the_exceptions_are_tests_of_optax() -> None:
    assert {*_OF_ANOTHER_FUNCTION, *_REFUSED} < set(_NAMES)


@pytest.mark.parametrize("name", [name for name in _NAMES if name not in {*_OF_ANOTHER_FUNCTION, *_REFUSED}])
def test_published(replaced: list[str], name: str) -> None:
    assert _failures(name) == []
    assert replaced


@pytest.mark.parametrize("name", _REFUSED)
def test_published_ones_that_are_refused(replaced: list[str], name: str) -> None:
    [trace] = _failures(name)
    assert replaced
    assert re.search(_REFUSED[name][1], trace)


def test_published_of_examples_as_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """The case that is refused passes with the same numbers as floats."""

    def with_floats(grads: Any, l2_norm_clip: Any) -> Any:
        grads = jax.tree.map(lambda g: g.astype(float), grads)
        return gradclip.jax.per_example_global_norm_clip(grads, l2_norm_clip)

    monkeypatch.setattr(_clipping, "per_example_global_norm_clip", with_floats)
    assert _failures("test_per_example_global_norm_clip") == []


def test_published_of_another_function(replaced: list[str]) -> None:
    for name in _OF_ANOTHER_FUNCTION:
        assert _failures(name) == []
        assert not replaced


# --- In place of optax's --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.01, 3.0])
def test_global_norms_are_clipped_as_by_optax(size: float) -> None:
    grads = _grads(1, size)
    theirs, ours = optax.clip_by_global_norm(1.0), gradclip.jax.clip_by_global_norm(1.0)
    expected, _ = theirs.update(grads, theirs.init(grads))
    found, state = ours.update(grads, ours.init(grads))
    _close(found, expected)
    assert bool(state.clipped_steps) == (size == 3.0)


def test_block_rms_is_clipped_as_by_optax() -> None:
    updates = _grads(1) | {
        "c": values("complex64", (5,), seed=3),
        "h": np.full((2, 3), 0.25, np.float16),
        "none": np.zeros(0, np.float32),
        "s": np.float32(-3.0),
    }
    with np.errstate(all="ignore"):
        theirs = optax.clip_by_block_rms(0.5)
        expected, _ = theirs.update(to_jax(updates), theirs.init(updates))
    ours = gradclip.jax.clip_by_block_rms(0.5)
    found, state = ours.update(updates, ours.init(updates))
    _close(found, expected)
    assert bits(found["h"]) == bits(updates["h"])
    assert state.coefficient.shape == (6,)
    np.testing.assert_allclose(state.norms[sorted(updates).index("s")], 3.0)
    traced = jax.jit(lambda u, d: gradclip.jax.clip_by_block_rms(d).update(u, ours.init(u))[0])(updates, 0.5)
    _close(traced, found)


@pytest.mark.parametrize("limit", [0.0, 0.7, inf])
def test_examples_are_clipped_as_by_optax(limit: float) -> None:
    grads = {"b": values("float32", (4,), seed=1), "w": values("float32", (4, 3, 2), seed=2)}
    grads["b"][1], grads["w"][1] = 0, 0  # an example whose norm is 0
    expected, count = optax.per_example_global_norm_clip([grads["b"], grads["w"]], limit)
    for given in (limit, jnp.asarray(limit), np.full(4, limit)):
        found, ours = gradclip.jax.per_example_global_norm_clip(grads, given)
        _close(list(found.values()), expected, atol=1e-6)
        assert ours == count
        assert (ours.dtype, ours.shape) == (np.int32, ())


def test_examples_are_added_in_float32() -> None:
    """Of half floats; and one of 1e20 is clipped, where optax has none left."""
    half = {"w": values("float16", (300, 2), seed=1), "h": values("bfloat16", (300,), seed=2)}
    found, _ = jax.jit(gradclip.jax.per_example_global_norm_clip)(half, 0.5)
    clipped, _ = gradclip.jax.clip(
        {key: g.astype(np.float32) for key, g in half.items()}, 0.5, groups="sample"
    )
    for key, one in found.items():
        total = np.asarray(clipped[key], np.float64).sum(0)
        np.testing.assert_allclose(one.astype(float), total, rtol=2.0**-7)
        assert one.dtype == half[key].dtype
    large = [np.array([[3e20, 4e20], [0.6, 0.8]], np.float32)]
    np.testing.assert_allclose(
        gradclip.jax.per_example_global_norm_clip(large, 1.0)[0][0], [1.2, 1.6], rtol=1e-6
    )


_SHAPES: dict[Any, list[tuple[int, ...]]] = {
    None: [(), (1,), (5,), (1, 1), (1, 5), (4, 3), (4, 1), (2, 3, 4), (2, 3, 2, 4), (2, 1, 2, 3, 2)],
    0: [(5,), (4, 3)],
    -1: [(5,), (4, 3), (2, 3, 4)],
    1: [(4, 3), (2, 3, 4)],
    (0, 2): [(2, 3, 4), (2, 3, 4, 2)],
    (0, 1, 2): [(2, 3, 4), (2, 2, 2, 3, 2)],
    (0, 1, 2, 3, 4, 5): [(2, 1, 2, 1, 2, 2)],
    (): [(3, 2)],
}


@pytest.mark.parametrize("axis", _SHAPES)
def test_units_are_clipped_as_by_optax(axis: Any) -> None:
    """Of parameters that are 0, and of updates that are small, too."""
    updates = [4 * values("float32", shape, seed=i) for i, shape in enumerate(_SHAPES[axis])]
    params = [values("float32", shape, seed=9 + i) for i, shape in enumerate(_SHAPES[axis])]
    for update, param in zip(updates, params, strict=True):
        if update.ndim > 1:
            param[..., 0] = 0
            update[..., -1] *= 1e-4
    ours, theirs = (module.adaptive_grad_clip(0.3, 1e-2, axis) for module in (gradclip.jax, optax))
    state = ours.init(params)
    found, state = jax.jit(ours.update)(updates, state, params)
    expected, _ = jax.jit(theirs.update)(updates, theirs.init(params), params)
    _close(found, expected, rtol=1e-5)
    assert state.clipped_steps == 1
    assert state.norms.shape == (len(updates),)
    for clipped, update in zip(found, updates, strict=True):
        if update.ndim > 1 and axis is None and update.size > 5:
            assert bits(clipped[..., -1]) == bits(update[..., -1])


def test_an_axis_of_numpy() -> None:
    update = [values("float32", (4, 3), seed=1)]
    for axis in (0, (0, -1)):
        found = []
        for given in (axis, np.int64(axis) if axis == 0 else np.array(axis)):
            ours = gradclip.jax.adaptive_grad_clip(0.3, axis=given)
            found.append(bits(ours.update(update, ours.init(update), update)))
        assert found[0] == found[1]


def test_units_of_parameters_of_another_dtype() -> None:
    updates, params = [values("bfloat16", (4, 3), seed=1)], [values("float32", (4, 3), seed=2)]
    ours = gradclip.jax.adaptive_grad_clip(jnp.asarray(0.1), eps=jnp.asarray(1e-3))
    found, state = ours.update(updates, ours.init(params), params)
    before = np.linalg.norm(updates[0].astype(np.float32), axis=0)
    limits = np.minimum(0.1 * np.linalg.norm(params[0], axis=0), before)
    assert (limits < before).any()
    norms = np.linalg.norm(np.asarray(found[0], np.float32), axis=0)
    np.testing.assert_allclose(norms, limits, rtol=2.0**-7)
    np.testing.assert_allclose(state.group_norms, before, rtol=1e-6)


@pytest.mark.parametrize("limit", [0.0, 0.1, 1 / 3, 1.0001, inf, 1e-30, np.float32(0.3)])
@pytest.mark.parametrize("name", REAL_NAMES)
@pytest.mark.usefixtures("x64")
def test_values_are_clipped_as_by_the_core(name: str, limit: Any) -> None:
    """Towards zero: no element is beyond the limit afterwards."""
    update = values(name, (40,), seed=1)
    update[:4] = nan, inf, -inf, -0.0
    copy = update.copy()
    result = gradclip.clip_by_value_([copy], limit)
    ours = gradclip.jax.clip_by_value(limit)
    [found], state = ours.update([update], ours.init([update]))
    assert np.isnan(found[0])
    assert bits(found[1:]) == bits(copy[1:])
    beyond = np.abs(np.asarray(found[1:], np.float64)) > float(limit)
    assert not beyond.any()
    np.testing.assert_array_equal(state.norms, result.norms)
    assert (state.coefficient, state.nonfinite.tolist()) == (1, [True])
    assert bool(state.clipped_steps) == bool(result.clipped)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_traced_limits_of_values(name: str) -> None:
    update, limit = values(name, (40,), seed=1), np.float32(0.1)
    copy = update.copy()
    gradclip.clip_by_value_([copy], limit)
    ours = gradclip.jax.clip_by_value(limit)

    @jax.jit
    def update_by(updates: Any, limit: Any) -> Any:
        return gradclip.jax.clip_by_value(limit).update(updates, ours.init(updates))

    [found], state = update_by([update], limit)
    assert bits(found) == bits(copy)
    assert state.clipped_steps == 1
    assert update_by([update], np.float32(1e3))[1].clipped_steps == 0


def test_a_value_clip_keeps_shapes() -> None:
    updates = [np.float32(3.0), np.full((2, 3), -3.0, np.float32)]
    for limit in (1.0, jnp.asarray(1.0), np.array([1.0])):
        ours = gradclip.jax.clip_by_value(limit)
        found, _ = ours.update(updates, ours.init(updates))
        assert [leaf.shape for leaf in found] == [(), (2, 3)]
        assert [np.unique(leaf).tolist() for leaf in found] == [[1.0], [-1.0]]


def test_clip_by_norm_is_by_tensor() -> None:
    grads = _grads(1)
    limits = [0.5, inf]
    for given in (limits, {"b": 0.5, "w": None}, np.array(limits), lambda steps: jnp.asarray(limits)):
        ours = gradclip.jax.clip_by_norm(given, ord=3, rounding="down")
        found, state = ours.update(grads, ours.init(grads))
        copies = {key: g.copy() for key, g in grads.items()}
        gradclip.clip_by_norm_(copies, limits, ord=3, rounding="down")
        assert bits(found) == bits(copies)
        assert (state.coefficient < 1).tolist() == [True, False]


# --- States -------------------------------------------------------------------------------------------


def test_the_state_is_that_of_the_last_update() -> None:
    transformation = gradclip.jax.clip_by_global_norm([1.0, inf], groups={"b": "bias", "w": "weight"})
    grads = _grads(1)
    state = transformation.init(grads)
    assert isinstance(state, ClipState)
    assert (state.steps.dtype, state.clipped_steps.dtype) == (np.int32, np.int32)
    zeros, counts = np.zeros(2, np.float32), np.zeros(2, np.int32)
    assert bits(state) == bits((*counts, zeros[0], zeros, zeros, zeros + 1, zeros.astype(bool)))
    update = jax.jit(transformation.update)
    clipped = 0
    for step, size in enumerate((0.01, 5.0, 3.0, 0.02), 1):
        grads = _grads(step, size)
        updates, state = update(grads, state)
        expected, result = gradclip.jax.clip(grads, [1.0, inf], groups={"b": "bias", "w": "weight"})
        assert bits(updates) == bits(expected)
        assert bits(state[2:7]) == bits((*result[:4], result.nonfinite))
        clipped += int(result.clipped)
        assert (state.steps, state.clipped_steps) == (step, clipped)
    assert clipped == 2
    grads["w"][0, 0] = nan
    _, state = update(grads, state)
    assert state.nonfinite.tolist() == [False, True]
    assert np.isnan(state.total_norm)
    named = gradclip.jax.named_norms(state, grads)
    assert list(named) == ["b", "w"]
    assert np.isfinite(named["b"])


def test_the_state_has_one_type_all_along() -> None:
    """So it goes through scans and conditions, and a step is compiled once."""
    transformation = gradclip.jax.clip_by_global_norm(1.0, nonfinite="skip")
    grads = jax.tree.map(lambda *g: np.stack(g), *(_grads(i, 0.1 * i) for i in range(6)))

    @jax.jit
    def run(grads: Any) -> Any:
        state = transformation.init(jax.tree.map(lambda g: g[0], grads))
        return jax.lax.scan(lambda state, g: transformation.update(g, state)[::-1], state, grads)

    state, updates = run(grads)
    assert state.steps == 6
    assert 0 < state.clipped_steps < 6
    last = jax.tree.map(lambda g: g[5], grads)
    assert bits(jax.tree.map(lambda u: u[5], updates)) == bits(gradclip.jax.clip(last, 1.0)[0])


def test_updates_and_state_are_donated() -> None:
    transformation = gradclip.jax.clip_by_global_norm(1.0)
    grads = to_jax(_grads(1))
    state = transformation.init(grads)
    before = pointers(grads)
    updates, state = jax.jit(transformation.update, donate_argnums=(0, 1))(grads, state)
    assert pointers(updates) == before
    assert state.clipped_steps == 1


_ALL: dict[str, Callable[[], Any]] = {
    "clip_by_global_norm": lambda: gradclip.jax.clip_by_global_norm(1.0),
    "clip_by_norm": lambda: gradclip.jax.clip_by_norm(1.0),
    "clip_by_block_rms": lambda: gradclip.jax.clip_by_block_rms(1.0),
    "clip_by_value": lambda: gradclip.jax.clip_by_value(1.0),
    "adaptive_grad_clip": lambda: gradclip.jax.adaptive_grad_clip(0.1),
}


@pytest.mark.parametrize("make", _ALL.values(), ids=_ALL)
def test_states_that_are_refused(make: Callable[[], Any]) -> None:
    transformation, grads = make(), _grads(1)
    message = r"^state: expected a ClipState, from init, got (NoneType|EmptyState|tuple)$"
    for wrong in (None, optax.EmptyState(), (transformation.init(grads),)):
        with pytest.raises(TypeError, match=message):
            transformation.update(grads, wrong, grads)
    message = (
        r"^state: expected one for 2 gradients in \d+ groups, as the updates have, got one for 1 in 1 "
        r"\(init was given other parameters\)$"
    )
    with pytest.raises(ValueError, match=message):
        transformation.update(grads, transformation.init([grads["b"]]), grads)


@pytest.mark.parametrize("make", _ALL.values(), ids=_ALL)
def test_updates_that_are_refused(make: Callable[[], Any]) -> None:
    transformation, grads = make(), _grads(1)
    state = transformation.init(grads)
    bad = grads | {"w": np.ones((3, 4), np.int32)}
    with pytest.raises(
        TypeError, match=r"^updates\['w'\]: expected an array of float16, .*, got one of int32$"
    ):
        transformation.update(bad, state, grads)
    with pytest.raises(
        TypeError, match=r"^params\['w'\]: expected an array of float16, .*, got one of int32$"
    ):
        transformation.init(bad)
    with pytest.raises(ValueError, match=r"^params: expected at least one array, got none in \{\}$"):
        transformation.init({})


def test_rows_of_another_shape_are_noticed() -> None:
    transformation = gradclip.jax.clip_by_global_norm(1.0, groups="row")
    state = transformation.init({"w": np.ones((3, 4), np.float32)})
    with pytest.raises(
        ValueError, match=r"^state: expected one for 1 gradients in 5 groups, .*, got one for 1 in 3 "
    ):
        transformation.update({"w": np.ones((5, 4), np.float32)}, state)


# --- The wrappers of optax ------------------------------------------------------------------------------


def test_a_chain_is_clipping_then_adam() -> None:
    chained = optax.chain(gradclip.jax.clip_by_global_norm(1.0), optax.adam(0.1))
    adam, params = optax.adam(0.1), _grads(9)
    state, of_adam = chained.init(params), adam.init(params)
    update, update_by_adam = jax.jit(chained.update), jax.jit(adam.update)
    for step in range(3):
        grads = _grads(step, 3.0)
        updates, state = update(grads, state, params)
        expected, of_adam = update_by_adam(gradclip.jax.clip(grads, 1.0)[0], of_adam, params)
        _close(updates, expected)
    assert state[0].clipped_steps == 3
    np.testing.assert_allclose(state[0].total_norm, gradclip.global_norm(list(grads.values())), rtol=1e-6)


def test_injected_hyperparameters_change_without_another_program() -> None:
    make = optax.inject_hyperparams(gradclip.jax.clip_by_global_norm, static_args=("ord",))
    transformation = make(max_norm=1.0, ord=3)
    grads, traces = _grads(1), 0
    state = transformation.init(grads)

    @jax.jit
    def update(grads: Any, state: Any) -> Any:
        nonlocal traces
        traces += 1
        return transformation.update(grads, state)

    for max_norm, grad_scale in ((1.0, 1.0), (0.5, 1.0), (0.25, 2.0), (inf, 1.0)):
        state.hyperparams["max_norm"] = jnp.asarray(max_norm)
        state.hyperparams["grad_scale"] = jnp.asarray(grad_scale)
        updates, state = update(grads, state)
        expected, _ = gradclip.jax.clip(grads, max_norm, ord=3, grad_scale=grad_scale)
        assert bits(updates) == bits(expected)
    assert traces == 1
    assert state.inner_state.steps == 4
    assert state.inner_state.clipped_steps == 3


def test_an_injected_schedule_and_one_of_its_own() -> None:
    schedule = optax.linear_schedule(2.0, 0.5, 3)
    injected = optax.inject_hyperparams(gradclip.jax.clip_by_global_norm)(max_norm=schedule)
    own = gradclip.jax.clip_by_global_norm(schedule)
    grads = _grads(1)
    states = [transformation.init(grads) for transformation in (injected, own)]
    for limit in (2.0, 1.5, 1.0, 0.5, 0.5):
        expected, _ = gradclip.jax.clip(grads, limit)
        for i, transformation in enumerate((injected, own)):
            updates, states[i] = transformation.update(grads, states[i])
            _close(updates, expected, rtol=1e-6)


def test_masked_updates_pass() -> None:
    transformation = optax.masked(gradclip.jax.clip_by_global_norm(0.5), {"b": False, "w": True})
    grads = _grads(1)
    updates, state = transformation.update(grads, transformation.init(grads))
    assert bits(updates["b"]) == bits(grads["b"])
    assert bits(updates["w"]) == bits(gradclip.jax.clip(grads["w"], 0.5)[0])
    assert state.inner_state.norms.shape == (1,)


def test_multi_transform_clips_each_label() -> None:
    transformation = optax.multi_transform(
        {"one": gradclip.jax.clip_by_global_norm(0.5), "other": gradclip.jax.clip_by_norm(0.25)},
        {"a": "one", "b": "one", "w": "other"},
    )
    grads = _grads(1) | {"a": values("float32", (4,), seed=7)}
    updates, _ = jax.jit(transformation.update)(grads, transformation.init(grads))
    expected, _ = gradclip.jax.clip({"a": grads["a"], "b": grads["b"]}, 0.5)
    expected["w"] = gradclip.jax.clip(grads["w"], 0.25)[0]
    assert bits(updates) == bits(expected)


def test_apply_if_finite() -> None:
    transformation = optax.apply_if_finite(gradclip.jax.clip_by_global_norm(1.0), max_consecutive_errors=5)
    good, bad = _grads(1), _grads(2)
    bad["w"][1, 1] = nan
    state = transformation.init(good)
    update = jax.jit(transformation.update)
    for grads, steps in ((good, 1), (bad, 1), (good, 2)):
        updates, state = update(grads, state)
        assert state.inner_state.steps == steps
        expected = gradclip.jax.clip(grads, 1.0)[0] if grads is good else jax.tree.map(np.zeros_like, grads)
        assert bits(updates) == bits(expected)
    assert state.total_notfinite == 1


def test_multi_steps_clip_the_mean() -> None:
    transformation: Any = optax.MultiSteps(gradclip.jax.clip_by_global_norm(0.5), every_k_schedule=2)
    first, second = _grads(1), _grads(2)
    state = transformation.init(first)
    update = jax.jit(transformation.update)
    updates, state = update(first, state)
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates))
    assert state.inner_opt_state.steps == 0
    updates, state = update(second, state)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    _close(updates, gradclip.jax.clip(mean, 0.5)[0])
    assert state.inner_opt_state.steps == 1


def test_a_training_goes_down() -> None:
    """Through a step whose gradients are 1e20 times as large."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 5)).astype(np.float32)
    y = x @ np.arange(1.0, 6.0, dtype=np.float32)[:, None]
    optimizer = optax.chain(gradclip.jax.clip_by_global_norm(1.0), optax.sgd(0.1))

    def loss(params: Any, size: Any) -> Any:
        return size * jnp.mean((x @ params["w"] + params["b"] - y) ** 2)

    @jax.jit
    def step(params: Any, state: Any, size: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params, size)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params = {"b": jnp.full(1, 0.5), "w": jnp.full((5, 1), 0.5)}
    state = optimizer.init(params)
    losses = []
    for size in (1.0, 1.0, 1e20, 1.0, 1.0):
        before = params
        params, state, value = step(params, state, size)
        moved = gradclip.global_norm([np.asarray(params[key] - before[key]) for key in params])
        assert moved == pytest.approx(0.1, rel=1e-5)
        losses.append(float(value) / size)
    assert losses == sorted(losses, reverse=True)
    assert (state[0].steps, state[0].clipped_steps) == (5, 5)


# --- Bad input ----------------------------------------------------------------------------------------


def test_adaptive_grad_clip_needs_its_parameters() -> None:
    transformation, grads = gradclip.jax.adaptive_grad_clip(0.1), _grads(1)
    state = transformation.init(grads)
    for params, message in (
        (None, r"^params: expected the parameters, which adaptive_grad_clip measures, got None$"),
        (
            grads | {"w": np.ones((3, 5), np.float32)},
            r"^params\['w'\]: expected the shape of its update, \(3, 4\), got \(3, 5\)$",
        ),
        (list(grads.values()), r"^params: expected the structure of the updates, .*, got "),
        ({"b": grads["b"]}, r"^params: expected the structure of the updates, .*, got "),
    ):
        with pytest.raises(ValueError, match=message):
            transformation.update(grads, state, params)


@pytest.mark.parametrize(
    ("axis", "shape", "message"),
    [
        (1, (3,), r"expected to have axis 1, got shape \(3,\)"),
        (0, (), r"expected to have axis 0, got shape \(\)"),
        (-3, (3, 4), r"expected to have axis -3, got shape \(3, 4\)"),
        ((0, 2), (3, 4), r"expected to have axis \(0, 2\), got shape \(3, 4\)"),
        (
            None,
            (2,) * 6,
            r"expected at most 5 axes, or axis=, to know its units, got shape \(2, 2, 2, 2, 2, 2\)",
        ),
    ],
)
def test_axes_that_are_not_there(axis: Any, shape: tuple[int, ...], message: str) -> None:
    params = {"w": np.ones(shape, np.float32)}
    with pytest.raises(ValueError, match=rf"^params\['w'\]: {message}$"):
        gradclip.jax.adaptive_grad_clip(0.1, axis=axis).init(params)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: gradclip.jax.clip_by_block_rms(-1.0), ValueError, r"^threshold: expected"),
        (lambda: gradclip.jax.clip_by_block_rms(nan), ValueError, r"^threshold: expected"),
        (lambda: gradclip.jax.clip_by_block_rms("1"), TypeError, r"^threshold: expected"),
        (lambda: gradclip.jax.adaptive_grad_clip(-0.1), ValueError, r"^clipping: expected"),
        (lambda: gradclip.jax.adaptive_grad_clip("1"), TypeError, r"^clipping: expected"),
        (lambda: gradclip.jax.adaptive_grad_clip(0.1, eps=-1.0), ValueError, r"^eps: expected"),
        (lambda: gradclip.jax.clip_by_norm(-1.0), ValueError, r"^max_norm: expected"),
    ],
)
def test_numbers_that_are_refused(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    """By the name that they have there."""

    def update() -> None:
        transformation, grads = make(), _grads(1)
        transformation.update(grads, transformation.init(grads), grads)

    with pytest.raises(error, match=message):
        update()


def test_complex_numbers_have_no_order() -> None:
    updates = {"c": np.ones(3, np.complex64)}
    transformation = gradclip.jax.clip_by_value(1.0)
    state = transformation.init(updates)
    message = r"^updates\['c'\]: expected real floats to clip by value, got complex64$"
    with pytest.raises(TypeError, match=message):
        transformation.update(updates, state)


@pytest.mark.parametrize(
    ("limit", "error", "message"),
    [
        (-1.0, ValueError, r"^limit: expected numbers that are not negative, got -1.0$"),
        (nan, ValueError, r"^limit: expected numbers that are not negative, got nan$"),
        ("1", TypeError, r"^limit: expected a number or an array of numbers, got '1'$"),
        (None, TypeError, r"^limit: expected a number or an array of numbers, got None$"),
        (
            [1.0, 2.0],
            ValueError,
            r"^limit: expected a number or an array of shape \(\), got one of shape \(2,\)$",
        ),
        (jnp.ones((), bool), TypeError, r"^limit: expected real numbers, got bool$"),
    ],
)
def test_limits_that_are_refused(limit: Any, error: type[Exception], message: str) -> None:
    grads = _grads(1)
    transformation = gradclip.jax.clip_by_value(limit)
    state = transformation.init(grads)
    with pytest.raises(error, match=message):
        transformation.update(grads, state)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: gradclip.jax.per_example_global_norm_clip([np.ones((2, 3), int)], 1.0),
            TypeError,
            r"^grads\[0\]: expected an array of float16, .*, got one of int(32|64)$",
        ),
        (
            lambda: gradclip.jax.per_example_global_norm_clip([np.ones((2, 3)), np.ones(3)], 1.0),
            ValueError,
            r"^grads\[1\]: expected 2 samples along the first axis, as grads\[0\] has, got 3$",
        ),
        (
            lambda: gradclip.jax.per_example_global_norm_clip([np.ones((2, 3))], -1.0),
            ValueError,
            r"^l2_norm_clip: expected numbers that are not negative, got -1.0$",
        ),
        (
            lambda: gradclip.jax.per_example_global_norm_clip([np.ones((2, 3))], [1.0, 2.0, 3.0]),
            ValueError,
            r"^l2_norm_clip: expected a number or an array of shape \(\), or of shape \(2,\), one for each",
        ),
    ],
)
def test_examples_that_are_refused(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_options_are_checked_where_it_begins() -> None:
    grads = _grads(1)
    for options, message in (
        ({"ord": -1}, r"^ord: expected a positive number"),
        ({"groups": "rows"}, r"^groups: expected None, 'tensor'"),
        ({"groups": {"b": "x"}}, r"^groups: expected labels in a prefix of the pytree of the params: "),
        ({"nonfinite": "raise"}, r"^nonfinite: expected 'propagate', 'zero' or 'skip'"),
        ({"rounding": "up"}, r"^rounding: expected 'nearest' or 'down'"),
    ):
        with pytest.raises(ValueError, match=message):
            gradclip.jax.clip_by_global_norm(1.0, **options).init(grads)


@pytest.mark.parametrize("make", _ALL.values(), ids=_ALL)
def test_without_optax(monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]) -> None:
    monkeypatch.setitem(sys.modules, "optax", None)
    message = r"^gradclip\.jax: expected optax, whose transformations these are: pip install optax$"
    with pytest.raises(ImportError, match=message):
        make()
