"""Policies against plain references on histories, saved and loaded, and what they refuse."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gradclip
from gradclip.policies import AGC, AdaGC, AutoClip, Lowest, Percentile, StatefulPolicy, WarmUp, ZClip

_NORMS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=60)


def _play(policy: Any, norms: list[float], **options: Any) -> list[float]:
    """The norms after clipping, of a history of one number a call."""
    left = []
    for norm in norms:
        grad = np.array([norm])
        gradclip.clip_by_global_norm_([grad], policy, **options)
        left.append(float(grad[0]))
    return left


@given(norms=_NORMS, percentile=st.floats(0, 100), window=st.integers(2, 20))
def test_percentile_is_numpys(norms: list[float], percentile: float, window: int) -> None:
    got = _play(Percentile(percentile, window), norms)
    for i, norm in enumerate(norms):
        limit = np.percentile(norms[max(0, i - window + 1) : i + 1], percentile) if i else math.inf
        assert got[i] == pytest.approx(min(norm, limit), rel=1e-12)


@given(norms=_NORMS)
def test_autoclip_is_the_authors(norms: list[float]) -> None:
    got = _play(AutoClip(), norms)
    for i in range(1, len(norms)):
        assert got[i] == pytest.approx(min(norms[i], np.percentile(norms[: i + 1], 10)), rel=1e-12)


@given(norms=_NORMS, z_max=st.floats(0.5, 4), warmup=st.integers(1, 10))
def test_zclip_is_that_of_the_paper(norms: list[float], z_max: float, warmup: int) -> None:
    got = _play(ZClip(z_max, warmup=warmup), norms)
    first, (mean, variance) = norms[:warmup], (0.0, 0.0)
    assert got[:warmup] == first
    mean = math.fsum(first) / len(first)
    variance = math.fsum((n - mean) ** 2 for n in first) / len(first)
    for norm, clipped in zip(norms[warmup:], got[warmup:], strict=True):
        deviation = math.sqrt(variance)
        expected = norm
        if norm - mean > z_max * deviation * (1 + 1e-9):
            z = (norm - mean) / deviation if deviation else math.inf
            expected = mean + z_max**2 / z * deviation
        elif norm - mean > z_max * deviation * (1 - 1e-9):
            return  # on the edge: rounding decides
        assert clipped == pytest.approx(expected, rel=1e-9)
        mean = 0.97 * mean + 0.03 * clipped
        variance = 0.97 * variance + 0.03 * (clipped - mean) ** 2


@given(rows=st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3)), min_size=1, max_size=40))
def test_adagc_is_that_of_the_paper(rows: list[tuple[float, float]]) -> None:
    policy = AdaGC(warmup=3)
    average: list[float] = []
    for step, pair in enumerate(rows):
        grads = [np.array([norm]) for norm in pair]
        gradclip.clip_by_global_norm_(grads, policy)
        left = [float(g[0]) for g in grads]
        if step < 3:
            h = min(1.0, 1.0 / math.hypot(*pair))
            expected = [h * norm for norm in pair]
            average = [min(a, e) for a, e in zip(average or expected, expected, strict=True)]
        else:
            expected = [min(norm, 1.05 * a) for norm, a in zip(pair, average, strict=True)]
            average = [0.98 * a + 0.02 * e for a, e in zip(average, expected, strict=True)]
        assert left == pytest.approx(expected, rel=1e-12)


def test_agc_is_that_of_the_paper() -> None:
    rng = np.random.default_rng(0)
    params = {"w": rng.standard_normal((5, 7)), "b": np.array([0.0, 1.0, 1e-9])}
    grads = {"w": rng.standard_normal((5, 7)), "b": np.array([3.0, 1e-3, 1e-9])}
    before = {name: g.copy() for name, g in grads.items()}
    result = gradclip.clip_by_global_norm_(grads, AGC(params))
    assert result.group_names is not None
    assert len(result.group_names) == 8
    for name, g in before.items():
        w = params[name].reshape(len(g), -1)
        flat = g.reshape(len(g), -1)
        most = 0.01 * np.maximum(np.linalg.norm(w, axis=1), 1e-3)
        factor = np.minimum(1, most / np.linalg.norm(flat, axis=1))
        assert np.allclose(grads[name].reshape(len(g), -1), flat * factor[:, None], rtol=1e-12)


_MAKE: dict[str, Any] = {
    "Percentile": lambda: Percentile(50, 4),
    "AutoClip": AutoClip,
    "ZClip": lambda: ZClip(warmup=3),
    "AdaGC": lambda: AdaGC(warmup=2),
    "Lowest": lambda: Lowest(ZClip(warmup=3), Percentile(90, 5), 5.0),
    "WarmUp": lambda: WarmUp(2.0, 4, ZClip(warmup=3)),
}


@pytest.mark.parametrize("make", _MAKE.values(), ids=_MAKE)
@pytest.mark.parametrize("saved_at", [0, 2, 7])
def test_a_resumed_training_has_equal_bits(make: Any, saved_at: int) -> None:
    norms = np.random.default_rng(1).lognormal(size=30).tolist()
    whole = _play(make(), norms)
    policy = make()
    left = _play(policy, norms[:saved_at])
    state = pickle.loads(pickle.dumps(policy.state_dict()))
    again = make()
    again.load_state_dict(state)
    assert left + _play(again, norms[saved_at:]) == whole


@pytest.mark.parametrize("make", _MAKE.values(), ids=_MAKE)
def test_what_is_not_finite_teaches_nothing_that_lasts(make: Any) -> None:
    norms = [1.0, 1.2, math.inf, 0.9, math.nan, 1.1, 30.0, 1.0]
    left = _play(make(), norms, nonfinite="skip")
    assert all(math.isfinite(b) for a, b in zip(norms, left, strict=True) if math.isfinite(a))
    policy = make()
    _play(policy, [1.0, 1.2])
    before = policy.state_dict()
    with pytest.raises(gradclip.NonFiniteGradientError):
        _play(policy, [math.nan])
    assert repr(policy.state_dict()) == repr(before)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Percentile(101), ValueError, "percentile: expected a number from 0 to 100, got 101"),
        (lambda: Percentile(-1), ValueError, "percentile: expected a number from 0 to 100"),
        (lambda: Percentile(math.nan), ValueError, "percentile: expected a number from 0 to 100"),
        (lambda: Percentile("5"), TypeError, "percentile: expected a real number, got str"),  # type: ignore[arg-type]
        (lambda: Percentile(5, 1), ValueError, "window: expected at least 2, got 1"),
        (lambda: ZClip(0), ValueError, "z: expected a number between 0 and inf, got 0"),
        (lambda: ZClip(alpha=1.0), ValueError, "alpha: expected a number between 0 and 1, got 1.0"),
        (lambda: ZClip(warmup=True), TypeError, "warmup: expected an integer, got bool"),
        (lambda: Lowest(), ValueError, "policies: expected at least one"),
        (lambda: ZClip().load_state_dict(AutoClip().state_dict()), ValueError,
         "state: expected that of a ZClip, got that of AutoClip"),
        (lambda: ZClip().load_state_dict(ZClip(z=3).state_dict()), ValueError,
         "state: expected that of a ZClip with"),
        (lambda: ZClip().load_state_dict({}), ValueError, "state: expected that of a ZClip, got that of None"),
    ],
)  # fmt: skip
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + message.replace("(", r"\(")):
        call()


@pytest.mark.parametrize("policy", [Percentile(50, 4), ZClip(warmup=2), AdaGC(warmup=1)])
def test_a_policy_of_another_model(policy: StatefulPolicy) -> None:
    for _ in range(4):
        gradclip.clip_by_norm_([np.ones(2), np.ones(3)], policy)
    grads = [np.ones(2)]
    with pytest.raises(ValueError, match="^max_norm: expected the 2 groups that this"):
        gradclip.clip_by_norm_(grads, policy)
    with pytest.raises(ValueError, match="^params: expected 3 rows, as the gradients have, got 4"):
        gradclip.clip_by_global_norm_([np.ones(3)], AGC([np.ones(4)]))
    assert (grads[0] == 1).all()
