"""The policies in compiled programs: the thresholds that they set in the core, step after step."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradclip
import gradclip.jax
from gradclip.policies import (
    AGC,
    SPAM,
    AutoClip,
    FirstMatch,
    Lowest,
    Normalized,
    Percentile,
    SkipStep,
    WarmUp,
    ZClip,
)
from jax_trees import QUICKLY, bits
from matrices import Array
from policy_makers import MAKE

inf, nan = math.inf, math.nan
STEPS = 12

pytestmark = pytest.mark.usefixtures("x64")


def _history(steps: int = STEPS) -> list[dict[str, Array]]:
    """Gradients of a training: a spike of all in the seventh step, of one tensor in the tenth."""
    rng = np.random.default_rng(0)
    history: list[dict[str, Array]] = []
    for i in range(steps):
        size = {6: 40.0}.get(i, 1.0) * (1 + 0.2 * rng.random())
        shapes = {"a.w": (3, 4), "b.bias": (3,), "b.w": (2, 2, 2)}
        history.append({name: size * rng.standard_normal(shape) for name, shape in shapes.items()})
        history[i]["b.w"] *= 25.0 if i == 9 else 1.0
    return history


def _broken_history() -> list[dict[str, Array]]:
    """With a NaN in the fifth step, and an infinity in the twelfth of fourteen."""
    history = _history(STEPS + 2)
    history[4]["b.w"][0, 0, 0] = nan
    history[11]["a.w"][1, 1] = inf
    return history


def _play_core(policy: Any, history: Any, losses: Any = None, **options: Any) -> Any:
    """What the core makes of a history: gradients, and results, of each step."""
    played = []
    for i, grads in enumerate(history):
        if losses is not None:
            policy.with_loss(losses[i])
        copies = {name: grad.copy() for name, grad in grads.items()}
        result = gradclip.clip_by_global_norm_(copies, policy, nonfinite="propagate", **options)
        played.append((copies, result))
    return played


def _play(transformation: Any, history: Any, losses: Any = None) -> Any:
    """The same by a compiled update: updates and states of each step."""

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def update(grads: Any, state: Any, loss: Any) -> Any:
        extra = {} if loss is None else {"value": loss}
        return transformation.update(grads, state, **extra)

    state, played = transformation.init(history[0]), []
    for i, grads in enumerate(history):
        updates, state = update(grads, state, None if losses is None else losses[i])
        played.append((updates, state))
    return played


def _same(found: Any, expected: Any) -> int:
    """Equal but for rounding, as XLA fuses products and sums; how many steps were clipped."""
    clipped = 0
    for (updates, state), (grads, result) in zip(found, expected, strict=True):
        clipped += int(result.clipped)
        assert int(state.clipped_steps) == clipped, f"step {state.steps} decides otherwise"
        np.testing.assert_allclose(state.coefficient, result.coefficient, rtol=1e-12)
        for name in ("total_norm", "norms", "group_norms"):
            np.testing.assert_array_equal(getattr(state, name), getattr(result, name), err_msg=name)
        for name, grad in grads.items():
            np.testing.assert_allclose(updates[name], grad, rtol=1e-12)
    return clipped


MORE: dict[str, Any] = {
    "first of several": lambda: FirstMatch(
        {"*.bias": SPAM(2.0), "a.*": WarmUp(1.0, 3, ZClip(warmup=3)), "*": 2.0}
    ),
    "lowest of a skip": lambda: Lowest(SkipStep(2.0, 4), Percentile(50, 4)),
    "a warm-up of a warm-up": lambda: WarmUp(WarmUp(0.5, 2, 2.0), 4, Percentile(20, 3)),
    "for all groups": lambda: AutoClip(30, 6),
}
POLICIES = MAKE | MORE


@pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
def test_policies_decide_as_in_the_core(make: Any) -> None:
    """Also after gradients that were not finite."""
    history = _broken_history()
    clipped = _same(_play(gradclip.jax.clip_by_global_norm(make()), history), _play_core(make(), history))
    assert clipped > 0


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: ZClip(warmup=3), {"groups": "tensor", "grad_scale": 8.0}),
        (lambda: Percentile(50, 4), {"groups": "row", "ord": 3}),
        (lambda: SkipStep(1.0, 4), {"groups": "tensor"}),
        (lambda: Normalized(2.0), {"groups": "tensor"}),
        (lambda: SPAM(2.0), {"rounding": "down"}),
    ],
)
def test_options_beside_a_policy(make: Any, options: dict[str, Any]) -> None:
    history = _history()
    transformation = gradclip.jax.clip_by_global_norm(make(), **options)
    assert _same(_play(transformation, history), _play_core(make(), history, **options)) > 0


def test_without_the_64_bit_types() -> None:
    """Decisions are the same, thresholds those of float32."""
    history = [{name: g.astype(np.float32) for name, g in grads.items()} for grads in _history()]
    for name in ("ZClip", "FirstMatch"):
        with jax.enable_x64(False):
            found = _play(gradclip.jax.clip_by_global_norm(MAKE[name]()), history)
        for (_, state), (_, result) in zip(found, _play_core(MAKE[name](), history), strict=True):
            np.testing.assert_allclose(state.coefficient, result.coefficient, rtol=1e-4)
            assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} <= {"float32", "int32", "bool"}


def test_a_step_is_skipped_by_its_loss() -> None:
    history = [{"w": np.full(4, 1 + 0.01 * (i % 3))} for i in range(STEPS)]
    losses = [1 + 0.1 * (i % 4) for i in range(STEPS)]
    losses[8] = 50.0
    found = _play(gradclip.jax.clip_by_global_norm(SkipStep(3.0, 6)), history, losses)
    assert _same(found, _play_core(SkipStep(3.0, 6), history, losses)) == 1
    assert not found[8][0]["w"].any()
    assert not any(result.clipped for _, result in _play_core(SkipStep(3.0, 6), history))


def test_a_loss_goes_through_a_chain() -> None:
    chained = optax.chain(gradclip.jax.clip_by_global_norm(SkipStep(3.0, 4)), optax.sgd(1.0))
    grads = {"w": np.ones(4)}
    state: Any = chained.init(grads)
    update: Any = jax.jit(chained.update)
    for loss in (1.0, 1.1, 0.9, 1.0, 99.0):
        updates, state = update(grads, state, value=jnp.asarray(loss))
    assert not updates["w"].any()
    assert state[0].clipped_steps == 1


# --- Policies of one's own ------------------------------------------------------------------------------


class _BySize:
    """Looks at all that there is of what was measured."""

    def __init__(self, groups: Any) -> None:
        self.groups = groups

    def thresholds(self, measured: Any) -> Any:
        assert measured.names == ("a.w", "b.bias", "b.w")
        assert len(measured.norms) == 3
        limits = 0.5 * np.sqrt(measured.group_sizes) + 0 * measured.group_norms
        return limits[0] + 0 * measured.total_norm if measured.is_global else limits


class _Half:
    def coefficients(self, measured: Any) -> Any:
        return measured.group_norms[0] * 0 + 0.5 if measured.is_global else measured.group_norms * 0 + 0.5


@pytest.mark.parametrize("groups", [None, "tensor", "row", "unit_last", [0, 1, 0]])
def test_a_policy_without_a_state(groups: Any) -> None:
    history = _history(3)
    for policy in (_BySize(groups), _BySize(None)):
        found = _play(gradclip.jax.clip_by_global_norm(policy, groups=_as_tree(groups)), history)
        assert _same(found, _play_core(policy, history, groups=groups)) > 0
        assert found[-1][1].policy == {}
    found = _play(gradclip.jax.clip_by_global_norm(_Half(), groups=_as_tree(groups)), history)
    assert _same(found, _play_core(_Half(), history, groups=groups)) == 3


def _as_tree(groups: Any) -> Any:
    return dict(zip(("a.w", "b.bias", "b.w"), groups, strict=True)) if isinstance(groups, list) else groups


def test_groups_of_a_policy_are_its_own() -> None:
    grads = _history(1)[0]
    for policy, count in (
        (_BySize("row"), 3 + 3 + 2),
        (SPAM(), 3),
        (ZClip(), 1),
        (FirstMatch({"b.*": 1, "*": 2}), 2),
    ):
        state = gradclip.jax.clip_by_global_norm(policy).init(grads)
        assert state.group_norms.shape == (count,)


def test_patterns_are_of_paths() -> None:
    transformation = gradclip.jax.clip_by_global_norm(FirstMatch({"0": 1.0, "*.kernel": 2.0, "*": None}))
    grads = [np.full(4, 3.0), {"bias": np.full(4, 5.0), "kernel": np.full(4, 4.0)}]
    updates, state = transformation.update(grads, transformation.init(grads))
    assert [leaf.tolist() for leaf in jax.tree.leaves(updates)] == [[0.5] * 4, [5.0] * 4, [1.0] * 4]
    assert state.coefficient.tolist() == [1 / 6, 1 / 4, 1.0]
    unmatched = gradclip.jax.clip_by_global_norm(FirstMatch({"0": 1.0}))
    with pytest.raises(
        ValueError, match=r"^policies: expected a pattern for every gradient .*, got none for '1.bias'$"
    ):
        unmatched.init(grads)


# --- States -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdaGC", "FirstMatch"])
def test_a_state_goes_through_scans_and_copies(name: str) -> None:
    history = _history()
    transformation = gradclip.jax.clip_by_global_norm(POLICIES[name]())
    one_by_one = _play(transformation, history)

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def scan(state: Any, grads: Any) -> Any:
        return jax.lax.scan(lambda state, g: transformation.update(g, state)[::-1], state, grads)

    def stacked(part: Any) -> Any:
        return jax.tree.map(lambda *leaves: np.stack(leaves), *part)

    state, first = scan(transformation.init(history[0]), stacked(history[:6]))
    leaves, structure = jax.tree.flatten(jax.tree.map(np.array, state))
    state, second = scan(jax.tree.unflatten(structure, leaves), stacked(history[6:]))
    for found, expected in zip(jax.tree.leaves(state), jax.tree.leaves(one_by_one[-1][1]), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    for i, (updates, _) in enumerate(one_by_one):
        for key, update in updates.items():
            part = first[key][i] if i < 6 else second[key][i - 6]
            np.testing.assert_allclose(part, update, rtol=1e-12)


def test_the_object_itself_learns_nothing() -> None:
    policy = Lowest(Percentile(50, 4), WarmUp(1.0, 3, ZClip(warmup=2)))
    before = repr(policy.state_dict())
    transformation = gradclip.jax.clip_by_global_norm(policy)
    first, again = (_play(transformation, _history()) for _ in range(2))
    assert repr(policy.state_dict()) == before
    assert bits([state for _, state in first]) == bits([state for _, state in again])
    initial = transformation.init(_history()[0])
    assert jax.tree.map(lambda a: (a.shape, a.dtype), initial) == jax.tree.map(
        lambda a: (a.shape, a.dtype), first[-1][1]
    )


def test_in_a_training_with_accumulation() -> None:
    """MultiSteps updates under a condition, and has means that are rounded to float32."""
    history = _history()
    steps: Any = optax.MultiSteps(gradclip.jax.clip_by_global_norm(ZClip(warmup=2)), every_k_schedule=2)
    state, update = steps.init(history[0]), jax.jit(steps.update)
    means = [jax.tree.map(lambda a, b: (a + b) / 2, *history[i : i + 2]) for i in range(0, STEPS, 2)]
    expected = _play_core(ZClip(warmup=2), means)
    for i, grads in enumerate(history):
        updates, state = update(grads, state)
        if i % 2:
            for name, grad in expected[i // 2][0].items():
                np.testing.assert_allclose(updates[name], grad, rtol=1e-6, atol=1e-6)
    assert state.inner_opt_state.clipped_steps == sum(result.clipped for _, result in expected) > 0


# --- Refused ------------------------------------------------------------------------------------------


class _Observes:
    def thresholds(self, measured: Any) -> Any:
        return 1.0

    def observe(self, result: Any) -> None:
        raise AssertionError


@pytest.mark.parametrize(
    "wrapped", [lambda p: p, lambda p: FirstMatch({"*": p}), lambda p: WarmUp(1.0, 2, Lowest(p, 2))]
)
def test_a_state_that_nobody_sees_is_refused(wrapped: Any) -> None:
    message = (
        r"^max_norm: expected a policy of gradclip\.policies, or one without a state, got <.*_Observes object"
    )
    with pytest.raises(TypeError, match=message):
        gradclip.jax.clip_by_global_norm(wrapped(_Observes()))


@pytest.mark.parametrize("wrapped", [lambda p: p, lambda p: Lowest(1.0, p), lambda p: WarmUp(p, 2, 1.0)])
def test_agc_is_another_function(wrapped: Any) -> None:
    message = (
        r"^max_norm: expected a policy of norms alone, got AGC\(.*\) "
        r"\(gradclip\.jax\.adaptive_grad_clip takes the parameters of each update\)$"
    )
    with pytest.raises(TypeError, match=message):
        gradclip.jax.clip_by_global_norm(wrapped(AGC([np.ones((2, 2))])))


def test_coefficients_are_not_rounded_down() -> None:
    """As in the core."""

    def update() -> None:
        transformation = gradclip.jax.clip_by_global_norm(Normalized(), rounding="down")
        transformation.update({"w": np.ones(3)}, transformation.init({"w": np.ones(3)}))

    message = r"^rounding: expected 'nearest' with a Normalized, which gives coefficients"
    with pytest.raises(ValueError, match=message):
        update()


class _Given:
    def __init__(self, limits: Any) -> None:
        self.limits = limits

    def thresholds(self, measured: Any) -> Any:
        return self.limits


@pytest.mark.parametrize(
    ("limits", "error"), [(-1.0, ValueError), (nan, ValueError), ([1.0, 2.0], ValueError), ("1", TypeError)]
)
def test_a_policy_that_returns_what_is_no_threshold(limits: Any, error: type[Exception]) -> None:
    transformation = gradclip.jax.clip_by_global_norm(_Given(limits))
    grads = {"w": np.ones(3)}
    with pytest.raises(error, match=r"^max_norm: expected"):
        transformation.update(grads, transformation.init(grads))


@pytest.mark.parametrize("other", [2.0, ZClip(), Percentile(50, 6), Lowest(Percentile(50, 4), 1.0)], ids=repr)
def test_states_of_another_policy(other: Any) -> None:
    grads = {"w": np.ones(3)}
    transformation = gradclip.jax.clip_by_global_norm(Percentile(50, 4))
    state = gradclip.jax.clip_by_global_norm(other).init(grads)
    with pytest.raises((TypeError, ValueError), match=r"^state: expected"):
        transformation.update(grads, state)
