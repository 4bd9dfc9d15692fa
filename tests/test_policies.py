"""Policies against plain references on histories that hypothesis makes; saved, loaded, combined, refused."""

from __future__ import annotations

import math
import pickle
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradclip
import gradclip.torch
from device import emulated_device
from gradclip._lab.data import split_digits
from gradclip.policies import (
    AGC,
    SPAM,
    AdaGC,
    AutoClip,
    FirstMatch,
    Lowest,
    Normalized,
    Percentile,
    SkipStep,
    StatefulPolicy,
    UpdateRMS,
    WarmUp,
    ZClip,
)
from matrices import Array
from policy_makers import MAKE
from tools import policies as tool

_NORMS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=60)


def _play(policy: Any, norms: Any, **options: Any) -> list[float]:
    """The norms after clipping, of a history of one number a call."""
    left = []
    for norm in norms:
        grad = np.array([norm])
        gradclip.clip_by_global_norm_({"a.w": grad}, policy, **options)
        left.append(float(grad[0]))
    return left


# --- The formulas -------------------------------------------------------------------------------------


@given(norms=_NORMS, percentile=st.floats(0, 100), window=st.integers(2, 20))
def test_percentile_is_numpys(norms: list[float], percentile: float, window: int) -> None:
    got = _play(Percentile(percentile, window), norms)
    for i, norm in enumerate(norms):
        limit = np.percentile(norms[max(0, i - window + 1) : i + 1], percentile)
        assert got[i] == pytest.approx(min(norm, limit), rel=1e-12)


@given(norms=_NORMS)
def test_autoclip_is_that_of_the_authors(norms: list[float]) -> None:
    """Their code: append the norm, then clip to the percentile of the history."""
    got = _play(AutoClip(), norms)
    for i, norm in enumerate(norms):
        assert got[i] == pytest.approx(min(norm, np.percentile(norms[: i + 1], 10)), rel=1e-12)


@given(norms=_NORMS, z_max=st.floats(0.5, 4), warmup=st.integers(1, 10))
def test_zclip_is_that_of_the_paper(norms: list[float], z_max: float, warmup: int) -> None:
    got = _play(ZClip(z_max, warmup=warmup), norms)
    first = norms[:warmup]
    assert got[:warmup] == first
    mean = math.fsum(first) / len(first)
    variance = math.fsum((n - mean) ** 2 for n in first) / len(first)
    for norm, clipped in zip(norms[warmup:], got[warmup:], strict=True):
        deviation = math.sqrt(variance)
        if abs(norm - mean - z_max * deviation) <= 1e-9 * mean:
            return  # on the edge: rounding decides
        expected = norm
        if norm - mean > z_max * deviation:
            score = (norm - mean) / deviation if deviation else math.inf
            expected = mean + z_max**2 / score * deviation
        assert clipped == pytest.approx(expected, rel=1e-6)
        mean = 0.97 * mean + 0.03 * clipped
        variance = 0.97 * variance + 0.03 * (clipped - mean) ** 2


_PAIRS = st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3)), min_size=1, max_size=40)


def _play_pairs(policy: Any, pairs: list[tuple[float, float]]) -> list[list[float]]:
    left = []
    for pair in pairs:
        grads = [np.array([norm]) for norm in pair]
        gradclip.clip_by_global_norm_(grads, policy)
        left.append([float(g[0]) for g in grads])
    return left


@given(pairs=_PAIRS, warmup=st.integers(0, 5))
def test_adagc_is_that_of_the_paper(pairs: list[tuple[float, float]], warmup: int) -> None:
    average: list[float] = []
    for step, (pair, left) in enumerate(zip(pairs, _play_pairs(AdaGC(warmup=warmup), pairs), strict=True)):
        if step < warmup:
            h = min(1.0, 1.0 / math.hypot(*pair))
            expected = [h * norm for norm in pair]
            average = [min(a, e) for a, e in zip(average or expected, expected, strict=True)]
        else:
            expected = [min(norm, 1.05 * a) for norm, a in zip(pair, average or (math.inf,) * 2, strict=True)]
            average = [0.98 * a + 0.02 * e for a, e in zip(average or expected, expected, strict=True)]
        assert left == pytest.approx(expected, rel=1e-12)


@given(pairs=_PAIRS, theta=st.floats(1.1, 100))
def test_spam_compares_squares(pairs: list[tuple[float, float]], theta: float) -> None:
    squares: list[float] = []
    for pair, left in zip(pairs, _play_pairs(SPAM(theta), pairs), strict=True):
        expected = [
            min(norm, math.sqrt(theta * v)) for norm, v in zip(pair, squares or (math.inf,) * 2, strict=True)
        ]
        assert left == pytest.approx(expected, rel=1e-9)
        old = squares or [n * n for n in expected]
        squares = [0.999 * v + 0.001 * n * n for v, n in zip(old, expected, strict=True)]


def _is_olmo_step(history: list[float], value: float, window: int) -> bool:
    """Whether OLMo's SkipStepOptimizer makes the step: its step_factor."""
    last = history[-window:]
    if len(last) < max(2, window // 2):
        return True
    return bool(value - np.mean(last) <= 6 * np.std(last, ddof=1))


@given(
    seed=st.integers(0, 2**32 - 1),
    spikes=st.lists(st.tuples(st.integers(0, 59), st.floats(5.0, 1e4)), max_size=5),
    window=st.integers(2, 40),
    with_loss=st.booleans(),
)
def test_skip_step_is_olmos(seed: int, spikes: list[tuple[int, float]], window: int, with_loss: bool) -> None:
    rng = np.random.default_rng(seed)
    norms, losses = 1 + 0.1 * rng.random((2, 60))
    for i, size in spikes:
        (losses if with_loss and i % 2 else norms)[i] = size
    policy = SkipStep(window=window)
    for i, (norm, loss) in enumerate(zip(norms, losses, strict=True)):
        grad = np.array([norm])
        result = gradclip.clip_by_global_norm_([grad], policy.with_loss(loss) if with_loss else policy)
        steps = _is_olmo_step(norms[:i].tolist(), norm, window)
        if with_loss:
            steps = steps and _is_olmo_step(losses[:i].tolist(), loss, window)
        assert result.skipped is not steps
        assert grad[0] == (norm if steps else 0.0)


@pytest.mark.parametrize("d", [0.5, 1.0])
def test_update_rms_is_adafactors(d: float) -> None:
    rng = np.random.default_rng(0)
    sizes: list[tuple[float, tuple[int, ...]]] = [(3.0, (4, 5)), (0.1, (7,)), (1.0, ())]
    updates = [np.asarray(size * rng.standard_normal(shape)) for size, shape in sizes]
    expected = [u / max(1.0, np.sqrt(np.mean(u * u)) / d) for u in updates]
    gradclip.clip_by_global_norm_(updates, UpdateRMS(d))
    for got, want in zip(updates, expected, strict=True):
        assert np.allclose(got, want, rtol=1e-14, atol=0)


@pytest.mark.parametrize("groups", [None, "tensor"])
@pytest.mark.parametrize("size", [1e-200, 1e-3, 1.0, 1e200])
def test_normalized_goes_up_and_down(groups: Any, size: float) -> None:
    grads = [size * np.array([3.0, 4.0]), size * np.array([12.0]), np.zeros(3)]
    gradclip.clip_by_global_norm_(grads, Normalized(2.0, eps=0.0), groups=groups)
    total = 13.0 if groups is None else 5.0
    assert np.allclose(grads[0], 2 * np.array([3.0, 4.0]) / total, rtol=1e-13)
    assert np.allclose(grads[1], 24.0 / total if groups is None else 2.0, rtol=1e-13)
    assert not grads[2].any()


def test_normalized_raises_or_not_for_what_is_not_finite() -> None:
    grads = [np.array([3.0, np.inf]), np.array([2.0])]
    with pytest.raises(gradclip.NonFiniteGradientError):
        gradclip.clip_by_global_norm_(grads, Normalized())
    result = gradclip.clip_by_global_norm_(grads, Normalized(), nonfinite="skip")
    assert result.skipped
    assert grads[1][0] == 2.0
    assert gradclip.clip_by_global_norm_(grads, Normalized(), nonfinite="zero").skipped
    assert not grads[1].any()


# --- AGC ----------------------------------------------------------------------------------------------


def _arrays(shapes: list[tuple[int, ...]], seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {f"p{i}": rng.standard_normal(shape).astype("f4") for i, shape in enumerate(shapes)}


def test_agc_is_optaxs() -> None:
    """Of two axes and four, kernels of JAX's layout; of vectors and scalars."""
    shapes = [(6, 5), (3, 3, 4, 8), (7,), (), (1, 9)]
    params, grads = _arrays(shapes, 1), _arrays(shapes, 2)
    params["p0"][:, 2] = 0  # eps
    params["p0"][:, 3] *= 1e-5
    grads["p2"] *= 1e-4  # not clipped
    reference, _ = optax.adaptive_grad_clip(0.01).update(grads, None, params)
    # Its vectors are those with one axis that is not 1.
    whole = {"p4": params["p4"].reshape(9)}
    gradclip.clip_by_global_norm_(
        {**grads, "p4": grads["p4"].reshape(9)}, AGC({**params, **whole}, axis=-1), grad_scale=1.0
    )
    for name, grad in grads.items():
        assert np.allclose(grad, reference[name], rtol=1e-6), name


def test_agc_is_timms() -> None:
    """Units along the first axis, as PyTorch has them; in a module, with a parameter that has no gradient."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8, 4))
    loss = model(torch.randn(2, 3, 3, 3)).square().sum()
    loss.backward()
    list(model.parameters())[1].grad = None

    def unitwise_norm(x: Any) -> Any:
        axes = tuple(range(1, x.ndim)) or None
        return torch.linalg.vector_norm(x, dim=axes, keepdim=axes is not None)

    expected = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            most = unitwise_norm(p.detach()).clamp(min=1e-3) * 0.01
            norm = unitwise_norm(p.grad)
            expected[name] = torch.where(norm < most, p.grad, p.grad * (most / norm.clamp(min=1e-6)))
    result = gradclip.torch.clip_module_(model, AGC(dict(model.named_parameters())))
    assert result.clipped
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert torch.allclose(p.grad, expected[name], rtol=1e-5), name


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"b": np.ones(3)}, ValueError, "params: expected a parameter for the gradient 'a', got none"),
        ({"a": np.ones((4, 2))}, ValueError, "params: expected 3 units along axis 0, as the gradients have"),
        ([np.ones((3, 2))] * 2, ValueError, "params: expected one for each of the 1 gradients, got 2"),
        ([None], ValueError, "params: expected 3 units along axis 0"),
        ([np.ones((3, 2), int)], TypeError, r"grads\[0\]"),
    ],
)
def test_agc_of_other_parameters(params: Any, error: type[Exception], message: str) -> None:
    grad = np.ones((3, 2))
    with pytest.raises(error, match=f"^{message}"):
        gradclip.clip_by_global_norm_({"a": grad}, AGC(params))
    assert (grad == 1).all()
    if isinstance(params, dict):
        with pytest.raises(TypeError, match=r"^params: expected a sequence, as the gradients are one"):
            gradclip.clip_by_global_norm_([grad], AGC(params))


# --- What all have in common --------------------------------------------------------------------------

_EACH = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


@_EACH
@pytest.mark.parametrize("saved_at", [0, 2, 7])
def test_a_resumed_training_has_equal_bits(make: Any, saved_at: int) -> None:
    norms = np.random.default_rng(1).lognormal(size=30).tolist()
    whole = _play(make(), norms)
    policy = make()
    left = _play(policy, norms[:saved_at])
    state = pickle.loads(pickle.dumps(policy.state_dict()))
    _play(policy, [1.0, 2.0])  # the state is a copy
    again = make()
    _play(again, [7.0])
    again.load_state_dict(state)
    resumed = _play(again, norms[saved_at:])
    assert left + resumed == whole
    if saved_at == 2:
        again.load_state_dict(state)
        assert _play(again, norms[saved_at:]) == resumed


@_EACH
def test_what_is_not_finite_teaches_nothing_that_lasts(make: Any) -> None:
    norms = [1.0, 1.2, math.inf, 0.9, math.nan, 0.0, 1.1, 30.0, 1.0]
    left = _play(make(), norms, nonfinite="skip")
    assert all(math.isfinite(b) for a, b in zip(norms, left, strict=True) if math.isfinite(a))
    policy = make()
    _play(policy, [1.0, 1.2])
    before = policy.state_dict()
    with pytest.raises(gradclip.NonFiniteGradientError):
        _play(policy, [math.nan])
    assert repr(policy.state_dict()) == repr(before)
    _play(policy, [1.0])


@pytest.mark.parametrize("policy", [ZClip(), AdaGC(), SPAM()])
def test_a_step_that_was_not_made_teaches_no_group_anything(policy: StatefulPolicy) -> None:
    """One gradient is not finite: the others were left as well, and their norms with them."""
    gradclip.clip_by_norm_([np.array([1.0]), np.array([1.0])], policy)
    before = policy.state_dict()["state"]
    gradclip.clip_by_norm_([np.array([0.5]), np.array([math.nan])], policy, nonfinite="skip")
    after = policy.state_dict()["state"]
    for name in before:
        assert isinstance(after[name], int) or np.array_equal(after[name], before[name]), name


def test_a_gradient_without_norm_pulls_no_threshold_down() -> None:
    """It was None for a while: it is not clipped to nothing when it is there again."""
    for policy in (Percentile(10, 10), ZClip(warmup=2), AdaGC(warmup=2), SPAM(4.0)):
        for call in range(12):
            grads = [np.array([0.5]), np.array([0.5]) if call in (0, 1, 11) else None]
            gradclip.clip_by_norm_(grads, policy)
        assert grads[1] is not None
        assert grads[1][0] == pytest.approx(0.5, rel=0.01), policy


def test_what_is_learnt_is_what_was_done() -> None:
    """Of a combination all learn the clipped norm, whoever clipped it."""
    policy = ZClip(warmup=2)
    _play(Lowest(policy, 1.5), [1.0, 3.0])
    assert policy.state_dict()["state"]["_mean"] == 1.25


def test_a_step_is_skipped_whatever_the_groups_are() -> None:
    policy = Lowest(SkipStep(window=4), AdaGC(warmup=0))
    for size in (1.0, 1.1, 1.0, 1.1, 1e4):
        grads = [np.array([size]), np.array([2 * size])]
        result = gradclip.clip_by_global_norm_(grads, policy)
        assert np.asarray(result.coefficient).shape == (2,)
    assert result.skipped
    assert not grads[0].any()


def test_a_warm_up_ends() -> None:
    assert _play(WarmUp(1.0, 2, 3.0), [2.0, 2.0, 2.0, 4.0]) == [1.0, 1.0, 2.0, 3.0]


# --- Leave out, first match ---------------------------------------------------------------------------


def test_first_match_has_groups_of_its_own() -> None:
    policy = FirstMatch({"embed": None, "*.b": 1.0, "h.*": AdaGC(warmup=0), "*": Percentile(0, 5)})
    for size in (1.0, 10.0):
        norms = {"h.0.w": 3.0, "embed": 5.0, "h.0.b": 3.0, "h.1.w": 2.0, "out": 4.0, "h.1.b": 4.0}
        grads = {name: np.array([size * norm]) for name, norm in norms.items()}
        result = gradclip.clip_by_global_norm_(grads, policy)
    assert result.named_group_norms() == pytest.approx(
        {"embed": 50.0, "*.b": 50.0, "h.0.w": 30.0, "h.1.w": 20.0, "*": 40.0}
    )
    left = {name: round(float(grad[0]), 10) for name, grad in grads.items()}
    assert left == {"h.0.w": 3.15, "embed": 50.0, "h.0.b": 0.6, "h.1.w": 2.1, "out": 4.0, "h.1.b": 0.8}
    none = gradclip.clip_by_global_norm_({"embed": np.ones(1)}, FirstMatch({"*": None}))
    assert np.asarray(none.coefficient).tolist() == [1.0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: gradclip.clip_by_global_norm_([np.ones(1)], p), TypeError,
         "grads: expected names for a FirstMatch (a mapping of arrays), got a sequence"),
        (lambda p: gradclip.clip_by_global_norm_({"c": np.ones(1)}, p), ValueError,
         "policies: expected a pattern for every gradient (such as '*': None), got none for 'c'"),
        (lambda p: gradclip.clip_by_norm_({"a": np.ones(1), "ab": np.ones(1)}, p), ValueError,
         "groups: expected none with a FirstMatch, which makes its own 1, got 2"),
    ],
)  # fmt: skip
def test_first_match_of_other_gradients(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=r"^" + re.escape(message)):
        call(FirstMatch({"a*": 1.0}))


# --- Devices, processes, doors ------------------------------------------------------------------------


@dataclass
class _Found:
    """What was measured, or done, as a GPU has it: arrays there."""

    group_norms: Any
    total_norm: Any
    coefficient: Any = 1.0
    is_global: Any = False
    names: Any = ("a", "b", "c")
    missing: Any = ()

    @property
    def group_sizes(self) -> Array:
        return np.array([3, 4, 5])


def _decide(policy: Any, found: _Found) -> Any:
    return (policy.coefficients if hasattr(policy, "coefficients") else policy.thresholds)(found)


_ON_DEVICE = pytest.mark.parametrize(
    "make",
    [*MAKE.values(), lambda: FirstMatch({"a": 2.0, "b": AdaGC(), "c": ZClip(warmup=1)})],
    ids=[*MAKE, "FirstMatchOfTensors"],
)


def _labelled(policy: Any) -> dict[str, Any]:
    """Of one group, where a policy makes its own."""
    is_one = isinstance(policy, FirstMatch) and len(policy.groups(("a", "b", "c")).group_names) == 1
    return {"is_global": False} if is_one else {}


def _play_found(policy: Any, history: Array, as_array: Any) -> list[Any]:
    """What was decided in each call, of arrays of another framework than NumPy's, or of NumPy's."""
    decided = []
    for call, norms in enumerate(history):
        groups = norms[:1] if _labelled(policy) else norms
        found = _Found(as_array(groups), as_array(np.array(np.sqrt((norms * norms).sum()))))
        if isinstance(policy, SkipStep):
            policy.with_loss(as_array(np.array(float(call == 9))))
        decided.append(_decide(policy, found))
        found.coefficient = as_array(np.full(len(groups), 0.5 + call / 100))
        policy.observe(found)
        if call == 6 and not isinstance(policy, SkipStep):
            policy.load_state_dict(policy.state_dict())  # from the host back to the device
    return decided


@_ON_DEVICE
def test_torch_tensors_give_the_bits_of_numpy(make: Any) -> None:
    """What a policy does with arrays on a device, done by torch on the CPU."""
    history = np.random.default_rng(3).lognormal(size=(12, 3))
    history[4, 1], history[8, 2] = 0.0, math.inf
    on_host = _play_found(make(), history, np.asarray)
    on_device = _play_found(make(), history, torch.tensor)
    for host, device in zip(on_host, on_device, strict=True):
        if isinstance(make(), UpdateRMS) or isinstance(host, float):
            assert np.array_equal(host, device)  # known on the host
            continue
        assert isinstance(device, torch.Tensor)
        assert np.array_equal(host, device.numpy())


@_ON_DEVICE
def test_nothing_waits_for_a_device(make: Any) -> None:
    """Whoever reads a meta tensor on the host raises."""
    policy = make()
    with pytest.raises(RuntimeError):
        torch.empty((), device="meta").item()
    for _ in range(12):
        groups = 1 if _labelled(policy) else 3
        found = _Found(
            *(torch.empty(s, dtype=torch.float64, device="meta") for s in ((groups,), (), (groups,)))
        )
        if isinstance(policy, SkipStep):
            policy.with_loss(torch.empty((), device="meta", requires_grad=True))
        decided = _decide(policy, found)
        assert isinstance(decided, float | np.ndarray) or decided.device.type == "meta"
        policy.observe(found)


@pytest.mark.parametrize("make", [ZClip, AutoClip, lambda: AdaGC(warmup=1), lambda: SkipStep(window=4)])
def test_all_ranks_decide_alike(make: Any) -> None:
    """Two processes, each with half of the gradients and of the sums; here threads."""
    barrier, sums = threading.Barrier(2), {}

    def run(rank: int, coefficients: list[Any]) -> None:
        policy = make()
        rng = np.random.default_rng(rank)

        def reduce(mine: Array) -> Array:
            sums[rank] = mine
            barrier.wait()
            total: Array = sums[0] + sums[1]
            barrier.wait()
            return total

        for size in [1.0] * 40 + [1e4]:
            grads = [size * rng.lognormal() * rng.standard_normal(50) for _ in range(3)]
            coefficients.append(gradclip.clip_by_global_norm_(grads, policy, reduce=reduce).coefficient)

    found: list[list[Any]] = [[], []]
    threads = [threading.Thread(target=run, args=(rank, found[rank])) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(found[0], found[1])
    assert np.min(found[0]) < 1


def test_a_policy_of_the_emulated_device() -> None:
    """Sizes are known on the host, so that this policy needs no arithmetic there."""
    with emulated_device() as device:
        grads = {"a": device.array(np.full((2, 2), 3.0)), "b": device.array(np.full(3, 0.5)), "c": None}
        result = gradclip.clip_by_global_norm_(grads, UpdateRMS(), nonfinite="skip").to_host()
        assert np.asarray(result.coefficient).tolist() == [1 / 3, 1.0, 1.0]
        assert result.named_group_norms()["a"] == 6.0


def _two_layers() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(i + 1))
    return model, torch.optim.SGD([{"params": layer.parameters()} for layer in model], lr=0.1)


def test_the_doors_of_torch() -> None:
    model, optimizer = _two_layers()
    result = gradclip.torch.clip_module_(model, UpdateRMS(0.5))
    assert all(torch.allclose(p.grad.abs(), torch.tensor(0.5)) for p in model.parameters())  # type: ignore[union-attr]
    assert result.group_names == ("0.weight", "0.bias", "1.weight", "1.bias")
    result = gradclip.torch.clip_module_(model, FirstMatch({"*.bias": None, "*": 0.5}))
    assert result.named_group_norms() == pytest.approx({"*.bias": math.sqrt(0.75), "*": math.sqrt(1.5)})

    model, optimizer = _two_layers()
    policy = Percentile(50, 5)
    for _ in range(3):
        result = gradclip.torch.clip_param_groups_(optimizer, policy)
        assert result.named_group_norms().keys() == {"0", "1"}
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    result = gradclip.torch.unscale_and_clip_(scaler, optimizer, Percentile(50), module=model)
    assert result.total_norm == pytest.approx(math.sqrt(4 + 8 + 18 + 16) / 4)


def test_plans_and_updates() -> None:
    grads = [np.array([3.0, 4.0]), np.array([12.0])]
    plan, policy = gradclip.Plan(grads), Percentile(0, 4)
    assert plan.clip_by_global_norm_(policy).coefficient == 1.0
    grads[1][0] = 84.0
    assert plan.clip_by_global_norm_(policy).coefficient == pytest.approx(13 / math.hypot(5, 84))
    assert np.asarray(plan.clip_by_norm_(UpdateRMS(1e-3)).coefficient).shape == (2,)
    base = [np.zeros(2), np.zeros(1)]
    assert np.asarray(plan.clip_difference_(base, UpdateRMS(1e-9)).coefficient).shape == (2,)
    assert gradclip.clip_by_global_norm_(grads, UpdateRMS(1e-12), params=base, l2=0.1).group_norms.shape == (
        2,
    )


def test_the_picture_is_that_of_a_run(tmp_path: Path) -> None:
    """The page's own program, for a few steps: the first broken batch is the 40th."""
    digits = split_digits(seed=0)
    free = tool.train("no clipping", lambda _: np.inf, digits, steps=45)
    clipped = tool.train("SPAM", lambda _: SPAM(theta=25), digits, steps=45)
    assert free.norms[39] > 20 * np.median(free.norms[:39])
    assert free.clipped == free.norms
    assert clipped.norms[:40] == pytest.approx(free.norms[:40])
    assert clipped.clipped[39] < 0.2 * clipped.norms[39]
    assert clipped.norms[44] < free.norms[44]
    tool.picture([free, clipped]).savefig(tmp_path / "policies.png")
    assert tool.table([free, clipped]).count("\n") == 3


# --- Bad input ----------------------------------------------------------------------------------------


class _Returning:
    def __init__(self, limits: Any) -> None:
        self._limits = limits

    def thresholds(self, measured: gradclip.Measured) -> Any:
        return self._limits


class _Scaling(_Returning):
    def coefficients(self, measured: gradclip.Measured) -> Any:
        return self._limits


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        (_Returning(math.nan), ValueError,
         "max_norm: expected a number that is not negative, got nan (of _Returning)"),
        (_Returning(-1.0), ValueError,
         "max_norm: expected a number that is not negative, got -1.0 (of _Returning)"),
        (_Returning([1.0] * 3), ValueError,
         "max_norm: expected a number or one for each of the 2 groups, got 3"),
        (_Returning("1"), TypeError, "max_norm: expected"),
        (_Scaling(math.inf), ValueError, "coefficients: expected a finite number, got inf (of _Scaling)"),
    ],
)  # fmt: skip
def test_a_policy_that_returns_what_is_no_threshold(
    policy: Any, error: type[Exception], message: str
) -> None:
    grads = [np.ones(2), np.ones(3)]
    with pytest.raises(error, match=r"^" + re.escape(message)):
        gradclip.clip_by_norm_(grads, policy)
    assert all((grad == 1).all() for grad in grads)


def test_coefficients_are_not_rounded_down() -> None:
    with pytest.raises(ValueError, match=r"^rounding: expected 'nearest' with a Normalized"):
        gradclip.clip_by_global_norm_([np.ones(2)], Normalized(), rounding="down")


def _saved(policy: StatefulPolicy, **changed: Any) -> dict[str, Any]:
    return policy.state_dict() | changed


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Percentile(101), ValueError, "percentile: expected a number from 0 to 100, got 101"),
        (lambda: Percentile(-1), ValueError, "percentile: expected a number from 0 to 100"),
        (lambda: AutoClip(math.nan), ValueError, "percentile: expected a number from 0 to 100"),
        (lambda: Percentile("5"), TypeError, "percentile: expected a real number, got str"),  # type: ignore[arg-type]
        (lambda: Percentile(5, 1), ValueError, "window: expected at least 2, got 1"),
        (lambda: ZClip(0), ValueError, "z: expected a number between 0 and inf, got 0"),
        (lambda: ZClip(math.inf), ValueError, "z: expected a number between 0 and inf, got inf"),
        (lambda: ZClip(alpha=1.0), ValueError, "alpha: expected a number between 0 and 1, got 1.0"),
        (lambda: ZClip(warmup=True), TypeError, "warmup: expected an integer, got bool"),
        (lambda: AdaGC(lam=-1), ValueError, "lam: expected a number between 0 and inf"),
        (lambda: AdaGC(warmup=-1), ValueError, "warmup: expected at least 0, got -1"),
        (lambda: SPAM(0), ValueError, "theta: expected a number between 0 and inf"),
        (lambda: SkipStep(math.nan), ValueError, "sigma: expected a number between 0 and inf"),
        (lambda: SkipStep(window=1), ValueError, "window: expected at least 2"),
        (lambda: UpdateRMS(0), ValueError, "d: expected a number between 0 and inf"),
        (lambda: Normalized(eps=-1), ValueError, "eps: expected a number from 0"),
        (lambda: AGC([], clipping=0), ValueError, "clipping: expected a number between 0 and inf"),
        (lambda: AGC([], axis=1), ValueError, "axis: expected 0 or -1, got 1"),
        (lambda: AGC(None), TypeError, "params: expected the parameters, got None"),
        (lambda: Lowest(), ValueError, "policies: expected at least one"),  # noqa: PLW0108
        (lambda: Lowest(ZClip(), AdaGC()), ValueError,
         "policies: expected ones for the same groups, got ones for None, 'tensor'"),
        (lambda: Lowest(1.0, Normalized()), TypeError,
         "policies[1]: expected a policy that gives thresholds, got Normalized("),
        (lambda: Lowest(-1.0), ValueError, "policies[0]: expected a number from 0 to inf, got -1.0"),
        (lambda: WarmUp(1.0, -1, 1.0), ValueError, "calls: expected at least 0"),
        (lambda: WarmUp("1", 1, 1.0), TypeError, "first: expected a real number, got str"),  # type: ignore[arg-type]
        (lambda: FirstMatch({}), ValueError, "policies: expected at least one pattern"),
        (lambda: FirstMatch([1.0]), TypeError, "policies: expected a mapping"),  # type: ignore[arg-type]
        (lambda: FirstMatch({"*": AGC([])}), ValueError,
         "policies['*']: expected a policy for all gradients or"),
        (lambda: ZClip().load_state_dict(_saved(AutoClip())), ValueError,
         "state: expected that of a ZClip, got that of AutoClip"),
        (lambda: ZClip().load_state_dict(_saved(ZClip(z=3))), ValueError,
         "state: expected that of ZClip(z=2.5, alpha=0.97, warmup=25), got one of ZClip(z=3.0,"),
        (lambda: ZClip().load_state_dict({}), ValueError,
         "state: expected that of a ZClip, got that of None"),
        (lambda: ZClip().load_state_dict(3), TypeError, "state: expected a mapping"),  # type: ignore[arg-type]
        (lambda: ZClip().load_state_dict(_saved(ZClip(), state={})), ValueError,
         "state: expected _mean, _variance, _calls of a ZClip, got nothing"),
        (lambda: ZClip().load_state_dict(_saved(ZClip(), state=3)), ValueError,
         "state: expected that of a ZClip"),
        (lambda: Lowest(ZClip()).load_state_dict(_saved(Lowest(ZClip(), AutoClip()))), ValueError,
         "state: expected that of Lowest("),
        (lambda: WarmUp(1.0, 2, ZClip()).load_state_dict(_saved(WarmUp(1.0, 3, ZClip()))), ValueError,
         "state: expected that of WarmUp("),
    ],
)  # fmt: skip
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=r"^" + re.escape(message)):
        call()


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    policy = Lowest(Percentile(50, 4), ZClip(warmup=2))
    _play(policy, [1.0, 2.0])
    before = repr(policy.state_dict())
    other = Lowest(Percentile(50, 4), ZClip(warmup=3))
    _play(other, [3.0])
    with pytest.raises(ValueError, match=r"^state: expected that of ZClip"):
        policy.load_state_dict(other.state_dict())
    assert repr(policy.state_dict()) == before


@pytest.mark.parametrize("policy", [Percentile(50, 4), ZClip(warmup=2), AdaGC(warmup=1), SPAM()])
def test_a_policy_of_another_model(policy: StatefulPolicy) -> None:
    for _ in range(4):
        gradclip.clip_by_norm_([np.ones(2), np.ones(3)], policy)
    before = repr(policy.state_dict())
    grads = [np.ones(2)]
    with pytest.raises(
        ValueError, match=r"^max_norm: expected the 2 groups that this \w+ has seen before, got 1"
    ):
        gradclip.clip_by_norm_(grads, policy)
    assert (grads[0] == 1).all()
    assert repr(policy.state_dict()) == before
