"""The monitor: warned before the explosion, quiet where all is well; every kind of alert; what it refuses."""

from __future__ import annotations

import json
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradclip
import gradclip.monitor
from blow_ups import BLOW_UPS, QUIET, Steps, judge
from device import emulated_device
from gradclip.monitor import Alert, GradientAlertError, GradientMonitor, NoiseScale
from matrices import Array


def _clip(norms: Any, max_norm: float = math.inf, names: Any = None, **options: Any) -> gradclip.ClipResult:
    """A clip of gradients with these norms; ``None`` is missing."""
    names = names or [f"layer{i}" for i in range(len(norms))]
    grads = {
        name: None if norm is None else np.array([norm]) for name, norm in zip(names, norms, strict=True)
    }
    return gradclip.clip_by_global_norm_(grads, max_norm, **{"nonfinite": "propagate", **options})


def _watch(monitor: GradientMonitor, history: Any, losses: Any = None) -> list[Alert]:
    alerts = []
    for step, norms in enumerate(history):
        alerts += monitor.update(_clip(norms), None if losses is None else losses[step])
    return alerts


def _noise(steps: int, layers: int = 3, size: float = 0.5, seed: int = 0) -> Array:
    return np.random.default_rng(seed).lognormal(0, size, (steps, layers))


# --- Real trainings -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("training", BLOW_UPS.values(), ids=BLOW_UPS)
def test_it_warns_before_the_first_number_that_is_not_finite(training: Callable[[int], Steps]) -> None:
    verdicts = [judge(training(seed), 600) for seed in range(2)]
    broken = [verdict for verdict in verdicts if verdict.broke]
    assert broken
    for verdict in broken:
        assert verdict.ahead is not None
        assert verdict.ahead >= 1
        assert verdict.warnings[0].kind in ("growing", "exploded")


@pytest.mark.parametrize("training", QUIET.values(), ids=QUIET)
def test_it_is_quiet_where_all_is_well(training: Callable[[int], Steps]) -> None:
    """At most one false alarm in so many steps; 12 000 are in docs/monitor.md."""
    verdict = judge(training(0), 150)
    assert not verdict.broke
    assert len(verdict.warnings) <= 1


# --- Every kind ---------------------------------------------------------------------------------------


def test_growing_says_how_fast_and_how_long_before() -> None:
    history = np.concatenate(
        [_noise(50, size=0.1), _noise(12, size=0.01) * 2.0 ** np.arange(12)[:, None] ** [0, 1, 0]]
    )
    first, *more = _watch(GradientMonitor(clips=False), history)
    assert (first.kind, first.layer, first.is_warning) == ("growing", "layer1", True)
    assert 52 < first.step < 60
    assert first.figures["rate"] == pytest.approx(2.0, rel=0.3)
    explodes = 51 + math.log2(1000)
    assert first.step + first.figures["steps"] == pytest.approx(explodes, abs=3)
    assert "layer1 grows" in first.message
    assert "learning rate" in first.advice
    assert [alert.kind for alert in more] == ["exploded"]


def test_exploded_at_once() -> None:
    history = [*_noise(20, size=0.1), [1.0, 5000.0, 1.0]]
    (alert,) = _watch(GradientMonitor(clips=False), history)
    assert (alert.kind, alert.step, alert.layer) == ("exploded", 21, "layer1")
    assert alert.figures["norm"] == 5000.0
    assert alert.figures["usual"] == pytest.approx(1.0, rel=0.2)


def test_a_layer_that_wakes_up_has_not_exploded() -> None:
    """It was zero, or missing, as LoRA's first factor is in the first step: that is not what is usual."""
    for asleep in (0.0, None):
        for steps in (1, 6):
            history = [[1.0, asleep]] * steps + [[1.0, 1.0]] * 20 + [[1.0, asleep]] + [[1.0, 1.0]] * 20
            monitor = GradientMonitor(clips=False)
            assert _watch(monitor, history) == []
            (alert,) = _watch(monitor, [[1.0, 5000.0]])
            assert (alert.kind, alert.layer) == ("exploded", "layer1")
            assert alert.figures["usual"] == pytest.approx(1.0)


def test_the_ends_of_float64() -> None:
    history = [[norm] for norm in (5e-324, 1e-310, 1.0, 1e308, 0.0, 1e-300, 1e308, 1e-320)] * 8
    monitor = GradientMonitor(clips=False)
    alerts = _watch(monitor, history, [norm for (norm,) in history])
    assert {alert.kind for alert in alerts} <= {"exploded", "growing"}
    assert all(math.isfinite(value) for alert in alerts for value in alert.figures.values())


def test_all_together_can_explode_though_no_layer_does() -> None:
    history = [np.full(400, 1.0)] * 20 + [np.full(400, 900.0)]
    alerts = _watch(GradientMonitor(explosion=890.0, clips=False), history)
    assert [alert.kind for alert in alerts] == ["exploded"]
    assert len(alerts[0].layers) == 400


def test_not_finite_names_the_layers() -> None:
    history = [*_noise(5), [1.0, math.nan, math.inf], [1.0, 1.0, 1.0]]
    (alert,) = _watch(GradientMonitor(clips=False), history)
    assert (alert.kind, alert.step, alert.layers) == ("nonfinite", 6, ("layer1", "layer2"))
    assert alert.message == "layer1, layer2 had NaN or infinities"


@pytest.mark.parametrize(
    ("norm", "kind", "text"),
    [
        (0.0, "dead", "layer1 had a gradient of zeros for 10 steps"),
        (None, "missing", "layer1 had no gradient for 10 steps"),
        (1e-5, "vanishing", "layer1 had less than 1/1000 of the usual norm for 10 steps"),
    ],
)
def test_what_stays_away(norm: float | None, kind: str, text: str) -> None:
    """Said after ten steps in a row, once; a step in between counts anew."""
    good, bad = [[1.0, 1.0, 1.0]], [[1.0, norm, 1.0]]
    monitor = GradientMonitor(clips=False)
    assert _watch(monitor, good * 20 + bad * 9 + good * 2 + bad * 9) == []
    (alert,) = _watch(monitor, bad * 5)
    assert (alert.kind, alert.step, alert.layer, alert.message) == (kind, 41, "layer1", text)
    assert alert.is_warning is (norm is not None)


def test_a_loss_that_oscillates() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=200)
    monitor = GradientMonitor(clips=False)
    assert _watch(monitor, [[1.0]] * 200, 3 - 0.01 * np.arange(200) + 0.1 * noise) == []
    (alert,) = _watch(monitor, [[1.0]] * 80, 1 + (-1.0) ** np.arange(80) + 0.1 * noise[:80])
    assert alert.kind == "oscillating"
    assert alert.layer is None
    assert alert.figures["correlation"] < -0.7


def test_the_threshold_is_always_or_never_reached() -> None:
    monitor = GradientMonitor()
    found = [alert for _ in range(250) for alert in monitor.update(_clip([1.0], 0.5))]
    assert [(alert.kind, alert.step, alert.is_warning) for alert in found] == [("always_clipped", 200, False)]
    found = [alert for _ in range(1100) for alert in monitor.update(_clip([1.0], 2.0))]
    assert [(alert.kind, alert.step) for alert in found] == [("never_clipped", 1250)]


def test_what_was_said_is_not_said_again_until_it_was_well() -> None:
    spike = [[5000.0]]
    quiet = [[1.0]]
    monitor = GradientMonitor(clips=False)
    alerts = _watch(monitor, quiet * 20 + spike + quiet * 30 + spike + quiet * 60 + spike)
    assert [(alert.kind, alert.step) for alert in alerts] == [("exploded", 21), ("exploded", 113)]


# --- What it is fed with ------------------------------------------------------------------------------


def test_results_of_everybody() -> None:
    monitor = GradientMonitor()
    grads = {"a": np.array([3.0]), "b": np.array([4.0])}
    monitor.update(gradclip.measure(grads))
    monitor.update(gradclip.clip_by_norm_(grads, 2.0), loss=np.float32(0.5))
    monitor.update(gradclip.clip_by_global_norm_(grads, 1.0), loss=0.25)
    with emulated_device() as device:
        on_gpu = {"a": device.array(np.array([6.0])), "b": None}
        monitor.update(gradclip.clip_by_global_norm_(on_gpu, 3.0, nonfinite="skip"))
    assert monitor.names == ("a", "b")
    assert monitor.norms.tolist() == [[3, 4], [3, 4], [2, 2], [6, 0]]
    assert monitor.total_norms.tolist() == [5, 5, math.sqrt(8), 6]
    assert np.array_equal(monitor.coefficients, [1, 0.5, 1 / math.sqrt(8), 0.5])
    assert np.array_equal(monitor.clipped_norms, [5, math.nan, 1, 3], equal_nan=True)
    assert np.array_equal(monitor.losses, [math.nan, 0.5, 0.25, math.nan], equal_nan=True)
    assert repr(monitor) == "GradientMonitor(2 gradients, 4 steps, 0 alerts)"


def test_the_history_is_bounded() -> None:
    monitor = GradientMonitor(window=5, clips=False)
    _watch(monitor, [[float(i)] for i in range(1, 13)])
    assert monitor.norms.tolist() == [[8], [9], [10], [11], [12]]
    assert monitor.total_norms.tolist() == [8, 9, 10, 11, 12]


def test_no_gradients_at_all() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = [gradclip.clip_by_global_norm_([], 1.0) for _ in range(8)]
    monitor = GradientMonitor()
    assert [monitor.update(result) for result in results] == [[]] * 8


# --- What it does -------------------------------------------------------------------------------------

_EXPLODES = [[1.0, 1.0]] * 10 + [[1.0, 1e5]]


def test_it_calls_back_warns_or_raises() -> None:
    called: list[Alert] = []
    alerts = _watch(GradientMonitor(on_alert=called.append, clips=False), _EXPLODES)
    assert called == alerts
    with pytest.warns(UserWarning, match=r"step 11: layer1 has 1e.05 times its usual norm") as caught:
        _watch(GradientMonitor(on_alert="warn", clips=False), _EXPLODES)
    assert caught[0].filename == __file__
    monitor = GradientMonitor(on_alert="raise", clips=False)
    with pytest.raises(GradientAlertError, match=r"step 11: layer1 has .*clip by the global norm") as raised:
        _watch(monitor, _EXPLODES)
    assert raised.value.alert == monitor.alerts[0]
    again = pickle.loads(pickle.dumps(raised.value))
    assert (str(again), again.alert) == (str(raised.value), raised.value.alert)


def test_raising_is_for_warnings() -> None:
    monitor = GradientMonitor(on_alert="raise")
    found = [alert for _ in range(250) for alert in monitor.update(_clip([1.0], 0.5))]
    assert [alert.kind for alert in found] == ["always_clipped"]


def test_it_saves_the_step_for_replay(tmp_path: Path) -> None:
    monitor = GradientMonitor(save_to=tmp_path / "alerts", clips=False)
    for step, norms in enumerate(_EXPLODES):
        monitor.update(_clip(norms), loss=0.5, batch={"indices": [step, step + 1]})
    saved, batch = sorted((tmp_path / "alerts").iterdir(), reverse=True)
    assert saved.name == "step-0000011-exploded.json"
    content = json.loads(saved.read_text())
    assert content["alert"]["layer"] == "layer1"
    assert content["alert"]["advice"]
    assert content["history"]["norms"] == _EXPLODES
    assert pickle.loads(batch.read_bytes()) == {"indices": [10, 11]}


# --- Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (lambda: _clip([1.0]), ValueError,
         "result: expected norms of the 2 gradients that this monitor watches, got 1"),
        (lambda: _clip([1.0, 1.0], names=["layer0", "x"]), ValueError,
         "result: expected the gradients that this monitor watches, got 'x'"),
        (lambda: 3.0, TypeError, "result: expected what a clip returned, got float"),
    ],
)  # fmt: skip
def test_results_of_another_model(result: Any, error: type[Exception], message: str) -> None:
    monitor = GradientMonitor(clips=False)
    _watch(monitor, [[1.0, 2.0]])
    with pytest.raises(error, match=f"^{message}"):
        monitor.update(result())
    assert monitor.step == 1
    assert monitor.norms.tolist() == [[1, 2]]
    with pytest.raises(ValueError, match=r"^result: expected norms of the 3 gradients"):
        GradientMonitor(["a", "b", "c"]).update(_clip([1.0]))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: GradientMonitor(horizon=0), ValueError, "horizon: expected at least 1, got 0"),
        (lambda: GradientMonitor(patience=1.5), TypeError, "patience: expected an integer, got float"),  # type: ignore[arg-type]
        (lambda: GradientMonitor(window=True), TypeError, "window: expected an integer, got bool"),
        (lambda: GradientMonitor(explosion=1.0), ValueError, "explosion: expected a finite number above 1"),
        (lambda: GradientMonitor(on_alert="log"), ValueError, "on_alert: expected 'warn', 'raise'"),  # type: ignore[arg-type]
        (lambda: NoiseScale(4, 4), ValueError, "small, large: expected 0 < small < large, got 4 and 4"),
        (lambda: NoiseScale(1, 4, decay=1.0), ValueError, "decay: expected a number from 0 to 1, got 1.0"),
    ],
)  # fmt: skip
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        call()


# --- The gradient noise scale -------------------------------------------------------------------------


def test_the_noise_scale_is_found() -> None:
    """Of gradients whose true norm and whose covariance are known."""
    rng = np.random.default_rng(0)
    true, deviation, batch = np.full(50, 0.2), 1.5, 64
    noise = NoiseScale(small=1, large=batch, decay=0.999)
    assert math.isnan(noise.scale)
    for _ in range(3000):
        examples = true + deviation * rng.standard_normal((batch, 50))
        samples = gradclip.measure([examples], groups="sample").group_norms
        noise.update(samples, gradclip.global_norm([examples.mean(axis=0)]))
    assert noise.scale == pytest.approx(50 * deviation**2 / (true @ true), rel=0.05)
    before = noise.scale
    noise.update([math.inf], 1.0)
    assert noise.scale == before
