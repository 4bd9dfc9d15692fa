"""Measure, decide, apply: in three steps as in one, with whoever decides in between."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import gradclip
from device import Device, emulated_device
from matrices import NAMES, ORDS, Array, values


class Host:
    """The CPU, as a device."""

    def array(self, array: Array) -> Array:
        return array.copy()

    def host(self, array: Any) -> Array:
        return np.asarray(array)


Place = Host | Device


@pytest.fixture(params=["host", "emulated"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    if request.param == "host":
        yield Host()
    else:
        with emulated_device() as device:
            yield device


def _originals() -> dict[str, Array]:
    return {f"{name}.{n}": values(name, n, seed=n) for name in NAMES for n in (3, 5000)}


def _two(place: Place) -> dict[str, Any]:
    """Of norms 5 and 12."""
    return {"w": place.array(np.array([3.0, 4.0])), "b": place.array(np.array([12.0]))}


def _contents(place: Place, grads: dict[str, Any]) -> dict[str, list[float]]:
    return {name: place.host(grad).tolist() for name, grad in grads.items()}


def _bits(place: Place, grads: dict[str, Any], result: gradclip.ClipResult) -> list[bytes]:
    host = result.to_host()
    fields = [host.total_norm, host.norms, host.coefficient, host.group_norms, host.clipped]
    return [np.asarray(field).tobytes() for field in fields] + [
        place.host(grad).tobytes() for grad in grads.values()
    ]


def _labels(names: Any) -> dict[str, str]:
    return {name: name.split(".")[0] for name in names}


GROUPINGS: dict[str, Callable[[Any], Any]] = {
    "all": lambda names: None,
    "tensor": lambda names: "tensor",
    "labels": _labels,
}


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("max_norm", [0.0, 0.75, 1e30])
@pytest.mark.parametrize("grad_scale", [1.0, 3.0])
def test_three_steps_have_the_bits_of_one(
    place: Place, grouping: str, ord: float, max_norm: float, grad_scale: float
) -> None:
    originals = _originals()
    groups = GROUPINGS[grouping](originals)
    once = {name: place.array(array) for name, array in originals.items()}
    apart = {name: place.array(array) for name, array in originals.items()}
    expected = gradclip.clip_by_global_norm_(once, max_norm, ord, groups, grad_scale)
    measured = gradclip.measure(apart, ord, groups, grad_scale)
    assert all(place.host(apart[name]).tobytes() == array.tobytes() for name, array in originals.items())
    result = measured.clip_(max_norm)
    assert _bits(place, apart, result) == _bits(place, once, expected)
    assert result.group_names == expected.group_names
    assert result.names == expected.names == measured.names


@pytest.mark.parametrize("ord", [2, math.inf, 3])
def test_a_plan_measures_and_clips_again_and_again(place: Place, ord: float) -> None:
    once, apart = _two(place), _two(place)
    plan = gradclip.Plan(apart)
    for max_norm in (7.0, 6.0, 6.0, 0.5):
        expected = gradclip.clip_by_global_norm_(once, max_norm, ord)
        assert _bits(place, apart, plan.measure(ord).clip_(max_norm)) == _bits(place, once, expected)


def test_what_was_measured(place: Place) -> None:
    grads: dict[str, Any] = {**_two(place), "none": None, "odd": place.array(np.array([np.inf, np.nan]))}
    measured = gradclip.measure(grads, groups={"w": "fine", "b": "fine", "none": "bad", "odd": "bad"})
    assert place.host(measured.norms)[:3].tolist() == [5.0, 12.0, 0.0]
    assert place.host(measured.group_norms)[0] == 13.0
    assert measured.names == ("w", "b", "none", "odd")
    assert measured.group_names == ("fine", "bad")
    assert measured.missing == ("none",)
    assert measured.nonfinite == ("odd",)
    assert measured.named_norms()["b"] == 12.0
    assert measured.named_group_norms()["fine"] == 13.0
    assert repr(measured).startswith("Measured(total norm nan, 4 gradients, 1 missing\n  not finite: 'odd'")
    sequence = gradclip.measure(list(grads.values()))
    assert (sequence.nonfinite, sequence.missing, sequence.names) == ((3,), (2,), None)
    assert sequence.named_norms()["1"] == 12.0


def test_what_cannot_be_written_can_be_measured() -> None:
    array = np.array([3.0, 4.0])
    array.flags.writeable = False
    measured = gradclip.measure([array])
    assert measured.total_norm == 5.0
    with pytest.raises(ValueError, match=r"grads\[0\]: expected writable memory"):
        measured.clip_(1.0)


# --- Policies -----------------------------------------------------------------------------------------


class _HalfTheTotal:
    """A policy: half of what the norm is, on whatever device that is."""

    def __init__(self) -> None:
        self.seen: list[gradclip.Measured] = []

    def thresholds(self, measured: gradclip.Measured) -> Any:
        self.seen.append(measured)
        return measured.total_norm * 0.5


class _Returning:
    def __init__(self, thresholds: Any) -> None:
        self._thresholds = thresholds

    def thresholds(self, measured: gradclip.Measured) -> Any:
        return self._thresholds


def _clip_calls(grads: Any) -> dict[str, Callable[..., gradclip.ClipResult]]:
    return {
        "function": lambda *a, **k: gradclip.clip_by_global_norm_(grads, *a, **k),
        "plan": lambda *a, **k: gradclip.Plan(grads).clip_by_global_norm_(*a, **k),
        "measured": lambda limit, nonfinite="raise", **k: gradclip.measure(grads, **k).clip_(
            limit, nonfinite
        ),
    }


@pytest.mark.parametrize("way", ["function", "plan", "measured"])
def test_a_policy_decides(way: str) -> None:
    grads, policy = _two(Host()), _HalfTheTotal()
    result = _clip_calls(grads)[way](policy)
    assert result.coefficient == 0.5
    assert [measured.total_norm for measured in policy.seen] == [13.0]
    assert _contents(Host(), grads) == {"w": [1.5, 2.0], "b": [6.0]}


@pytest.mark.parametrize("way", ["function", "plan", "measured"])
@pytest.mark.parametrize("kind", ["number", "sequence", "mapping"])
def test_a_policy_returns_thresholds_of_any_kind(place: Place, way: str, kind: str) -> None:
    """On a GPU, too, where numbers of the host go to the device."""
    grads = _two(place)
    limits = {"number": 6.0, "sequence": [None, 6.0], "mapping": {"b": 6.0, "w": None}}
    result = _clip_calls(grads)[way](_Returning(limits[kind]), groups="tensor").to_host()
    assert np.asarray(result.coefficient).tolist() == [1.0, 0.5]
    assert _contents(place, grads) == {"w": [3.0, 4.0], "b": [6.0]}


def test_a_policy_on_the_device_returns_an_array_there() -> None:
    with emulated_device() as device:
        grads = _two(device)
        limits = device.array(np.array([2.5, np.inf]))
        result = gradclip.clip_by_norm_(grads, _Returning(limits), nonfinite="skip")
        assert _contents(device, grads) == {"w": [1.5, 2.0], "b": [12.0]}
        assert result.to_host().clipped


@pytest.mark.parametrize("way", ["function", "plan", "measured"])
@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        (-1.0, "max_norm: expected a number that is not negative, got -1"),
        (math.nan, "max_norm: expected a number that is not negative, got nan"),
        ([1.0, 2.0, 3.0], "max_norm: expected a number or one for each of the 2 groups, got 3"),
        ([1.0, -2.0], r"max_norm\[1\]: expected a number that is not negative"),
        ({"w": 1.0}, "max_norm: expected an entry for each of the groups, got none for 'b'"),
    ],
)
def test_a_policy_that_returns_what_is_no_threshold(
    place: Place, way: str, thresholds: Any, message: str
) -> None:
    grads = _two(place)
    with pytest.raises(ValueError, match=f"^{message}"):
        _clip_calls(grads)[way](_Returning(thresholds), groups="tensor")
    assert _contents(place, grads) == {"w": [3.0, 4.0], "b": [12.0]}


@pytest.mark.parametrize("way", ["function", "plan", "measured"])
@pytest.mark.parametrize("error", [ValueError, TypeError, RuntimeError, KeyboardInterrupt])
def test_a_policy_that_raises(place: Place, way: str, error: type[BaseException]) -> None:
    class Raises:
        calls = 0

        def thresholds(self, measured: gradclip.Measured) -> float:
            self.calls += 1
            raise error("of the policy")

    grads, policy = _two(place), Raises()
    with pytest.raises(error, match="of the policy"):
        _clip_calls(grads)[way](policy)
    assert policy.calls == 1
    assert _contents(place, grads) == {"w": [3.0, 4.0], "b": [12.0]}


def test_a_policy_that_gives_a_gradient_other_memory() -> None:
    torch = pytest.importorskip("torch")
    grad = torch.tensor([3.0, 4.0])

    class Swaps:
        def thresholds(self, measured: gradclip.Measured) -> float:
            grad.data = torch.tensor([30.0, 40.0])
            return 1.0

    with pytest.raises(ValueError, match=r"grads\[0\]: expected the memory that was read before"):
        gradclip.clip_by_global_norm_([grad], Swaps())
    assert grad.tolist() == [30.0, 40.0]


# --- Clipping or scaling what was measured ------------------------------------------------------------


@pytest.mark.parametrize("second", [lambda m: m.clip_(1.0), lambda m: m.scale_(2.0)])
@pytest.mark.parametrize("first", [lambda m: m.clip_(6.5), lambda m: m.clip_(20.0), lambda m: m.scale_(0.5)])
def test_once(
    place: Place,
    first: Callable[[gradclip.Measured], gradclip.ClipResult],
    second: Callable[[gradclip.Measured], gradclip.ClipResult],
) -> None:
    grads = _two(place)
    measured = gradclip.measure(grads)
    first(measured)
    after = _contents(place, grads)
    with pytest.raises(ValueError, match="measured: expected gradients as they were measured"):
        second(measured)
    assert _contents(place, grads) == after


def test_after_an_error_another_choice_may_follow(place: Place) -> None:
    grads = {"w": place.array(np.array([3.0, np.nan]))}
    measured = gradclip.measure(grads)
    with pytest.raises(gradclip.NonFiniteGradientError, match=r"grads\['w'\].*1 NaN and 0 inf"):
        measured.clip_(1.0)
    with pytest.raises(ValueError, match="max_norm: expected a number that is not negative"):
        measured.clip_(-1.0, "zero")
    with pytest.raises(ValueError, match="nonfinite: expected 'raise'"):
        measured.clip_(1.0, "none")  # type: ignore[arg-type]
    assert measured.clip_(1.0, "zero").to_host().clipped
    assert _contents(place, grads) == {"w": [0.0, 0.0]}


@pytest.mark.parametrize("nonfinite", ["skip", "zero", "propagate"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_has_the_bits_of_one_step(place: Place, nonfinite: Any, bad: float) -> None:
    host = {"a": np.array([1.0, bad]), "b": np.array([3.0, 4.0])}
    once = {name: place.array(array) for name, array in host.items()}
    apart = {name: place.array(array) for name, array in host.items()}
    expected = gradclip.clip_by_norm_(once, 1.0, nonfinite=nonfinite)
    result = gradclip.measure(apart, groups="tensor").clip_(1.0, nonfinite)
    assert _bits(place, apart, result) == _bits(place, once, expected)
    assert result.nonfinite == expected.nonfinite == ("a",)


@pytest.mark.parametrize("kind", ["number", "sequence", "mapping", "array"])
def test_scale_by_what_the_caller_has_decided(place: Place, kind: str) -> None:
    grads = _two(place)
    coefficients: dict[str, Any] = {
        "number": 2.0,
        "sequence": [None, -0.5],
        "mapping": {"b": -0.5, "w": None},
        "array": place.array(np.array([1.0, -0.5])),
    }
    result = gradclip.measure(grads, groups="tensor").scale_(coefficients[kind]).to_host()
    expected = [2.0, 2.0] if kind == "number" else [1.0, -0.5]
    assert np.asarray(result.coefficient).tolist() == expected
    assert result.clipped
    assert _contents(place, grads) == {"w": [3 * expected[0], 4 * expected[0]], "b": [12 * expected[1]]}


def test_scale_divides_by_the_scale(place: Place) -> None:
    grads = _two(place)
    measured = gradclip.measure(grads, grad_scale=4.0)
    assert float(place.host(measured.total_norm)) == 13 / 4
    assert not measured.scale_(1.0).to_host().clipped
    assert _contents(place, grads) == {"w": [0.75, 1.0], "b": [3.0]}


@pytest.mark.parametrize(
    ("coefficients", "error", "message"),
    [
        (math.inf, ValueError, "coefficients: expected a finite number, got inf"),
        ([1.0, math.nan], ValueError, r"coefficients\[1\]: expected a finite number, got nan"),
        ([1.0], ValueError, "coefficients: expected a number or one for each of the 2 groups, got 1"),
        ("2", TypeError, "coefficients: expected a real number, got str"),
    ],
)
def test_what_is_no_coefficient(
    place: Place, coefficients: Any, error: type[Exception], message: str
) -> None:
    grads = _two(place)
    measured = gradclip.measure(grads, groups="tensor")
    with pytest.raises(error, match=f"^{message}"):
        measured.scale_(coefficients)
    assert _contents(place, grads) == {"w": [3.0, 4.0], "b": [12.0]}


def test_a_coefficient_on_the_device_that_is_not_finite_writes_nothing() -> None:
    with emulated_device() as device:
        grads = _two(device)
        result = gradclip.measure(grads, groups="tensor").scale_(device.array(np.array([2.0, np.inf])))
        assert np.isnan(result.to_host().coefficient).all()
        assert _contents(device, grads) == {"w": [3.0, 4.0], "b": [12.0]}


@pytest.mark.parametrize("arguments", [{"ord": 0}, {"grad_scale": 0}, {"groups": [0]}, {"reduce": 3}])
def test_bad_arguments_of_measure(place: Place, arguments: dict[str, Any]) -> None:
    (name,) = arguments
    for measure in (gradclip.measure, lambda grads, **k: gradclip.Plan(grads).measure(**k)):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
            measure(_two(place), **arguments)


# --- reduce -------------------------------------------------------------------------------------------


def _doubling(calls: list[int]) -> Callable[[Any], Any]:
    def reduce(sums: Any) -> Any:
        calls.append(len(sums))
        return sums + sums

    return reduce


@pytest.mark.parametrize("max_norm", [6.5, _HalfTheTotal()])
def test_reduce_is_called_once_and_with_measure(max_norm: Any) -> None:
    calls: list[int] = []
    once, apart = _two(Host()), _two(Host())
    expected = gradclip.clip_by_global_norm_(once, max_norm, reduce=_doubling(calls))
    assert calls == [1]
    measured = gradclip.measure(apart, reduce=_doubling(calls))
    assert calls == [1, 1]
    assert measured.total_norm == math.sqrt(2 * 13 * 13)
    assert measured.norms.tolist() == [5.0, 12.0]
    assert _bits(Host(), apart, measured.clip_(max_norm)) == _bits(Host(), once, expected)
    assert calls == [1, 1]


def test_reduce_on_the_device_has_the_bits_of_one_step() -> None:
    with emulated_device() as device:
        once, apart = _two(device), _two(device)
        sums = device.array(np.array([50.0, 288.0]))
        expected = gradclip.clip_by_norm_(once, 6.0, reduce=lambda _: sums)
        measured = gradclip.measure(apart, groups="tensor", reduce=lambda _: sums)
        assert device.host(measured.group_norms).tolist() == [math.sqrt(50), math.sqrt(288)]
        assert _bits(device, apart, measured.clip_(6.0)) == _bits(device, once, expected)


@pytest.mark.parametrize("shape", [(), (3,), (1, 2)])
def test_reduce_that_returns_another_shape(shape: tuple[int, ...]) -> None:
    grads = _two(Host())
    for call in (gradclip.measure, lambda grads, **k: gradclip.clip_by_global_norm_(grads, 1.0, **k)):
        with pytest.raises(ValueError, match=r"^reduce: expected sums of shape \(2,\), got shape"):
            call(grads, groups="tensor", reduce=lambda sums: np.ones(shape))
    assert _contents(Host(), grads) == {"w": [3.0, 4.0], "b": [12.0]}


@pytest.mark.parametrize("error", [ValueError, TypeError, RuntimeError, FloatingPointError])
def test_reduce_that_raises_is_called_once(place: Place, error: type[Exception]) -> None:
    calls: list[int] = []

    def reduce(sums: Any) -> Any:
        calls.append(1)
        raise error("grads[0]: of the all-reduce")

    grads = _two(place)
    for call in (gradclip.measure, lambda grads, **k: gradclip.clip_by_global_norm_(grads, 1.0, **k)):
        calls.clear()
        with pytest.raises(error, match="of the all-reduce"):
            call(grads, reduce=reduce)
        assert calls == [1]
    assert _contents(place, grads) == {"w": [3.0, 4.0], "b": [12.0]}


@pytest.mark.parametrize("error", [ValueError, TypeError, RuntimeError])
@pytest.mark.parametrize("by", ["reduce", "policy"])
def test_code_of_the_user_runs_once_under_clip_module_(error: type[Exception], by: str) -> None:
    """A second all-reduce of one rank would leave the others waiting."""
    torch = pytest.importorskip("torch")
    gradclip_torch = pytest.importorskip("gradclip.torch")
    module = torch.nn.Linear(3, 2)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    calls: list[int] = []

    class Raises:
        def __call__(self, sums: Any) -> Any:
            calls.append(1)
            raise error("of the user")

        thresholds = __call__

    arguments: dict[str, Any] = {"reduce": Raises()} if by == "reduce" else {"max_norm": Raises()}
    with pytest.raises(error, match="of the user"):
        gradclip_torch.clip_module_(module, **{"max_norm": 1.0, **arguments})
    assert calls == [1]
    assert all((parameter.grad == 1).all() for parameter in module.parameters())


# --- What it is ---------------------------------------------------------------------------------------


def test_it_keeps_the_gradients_alive_and_lets_them_go() -> None:
    class Owner(np.ndarray):
        pass

    array = np.full(100, 3.0).view(Owner)
    gone = weakref.ref(array)
    measured = gradclip.measure([array])
    del array
    gc.collect()
    assert gone() is not None
    assert measured.clip_(15.0).coefficient == 0.5
    del measured
    gc.collect()
    assert gone() is None


def test_a_gradient_that_has_been_given_other_memory() -> None:
    array = np.full(1000, 3.0)
    measured = gradclip.measure([array])
    array.resize(10, refcheck=False)
    with pytest.raises(ValueError, match=r"grads\[0\]: expected the memory that was read before"):
        measured.clip_(1.0)
    assert array.tolist() == [3.0] * 10
