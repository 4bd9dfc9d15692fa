"""reduce: gradients that are spread over processes are clipped by the norm over all of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import gradclip
from matrices import NAMES, ORDS, Array, values


class _Recorder:
    """A process alone: keeps what it is given and returns it."""

    def __init__(self) -> None:
        self.calls: list[Array] = []

    def __call__(self, sums: Array) -> Array:
        self.calls.append(sums.copy())
        return sums


def _originals() -> list[Array]:
    return [values(name, n, seed=n) for name in NAMES for n in (3, 5000)]


@pytest.mark.parametrize("ord", ORDS)
def test_it_is_called_once_with_the_sums_of_every_group(ord: float) -> None:
    recorder = _Recorder()
    arrays = _originals()
    labels = [0, 0, 0, 0, 2, 2, 2, 2, 3, 3, 3, 3]
    result = gradclip.clip_by_global_norm_(arrays, 1.0, ord, groups=labels, reduce=recorder)
    calls = recorder.calls
    assert len(calls) == 1
    assert calls[0].dtype == np.float64
    assert calls[0].shape == (4,)
    norms = calls[0] if math.isinf(ord) else calls[0] ** (1 / ord)
    assert norms == pytest.approx(result.group_norms, rel=1e-12)


@pytest.mark.parametrize("groups", [None, "tensor", [0, 1] * 6])
@pytest.mark.parametrize("ord", [2, 1, math.inf])
def test_the_identity_changes_no_bit(ord: float, groups: Any) -> None:
    alone, reduced = _originals(), _originals()
    first = gradclip.clip_by_global_norm_(alone, 1.0, ord, groups)
    second = gradclip.clip_by_global_norm_(reduced, 1.0, ord, groups, reduce=lambda sums: sums)
    assert [a.tobytes() for a in alone] == [a.tobytes() for a in reduced]
    assert first.norms.tobytes() == second.norms.tobytes()
    assert first.group_norms.tobytes() == second.group_norms.tobytes()


@pytest.mark.parametrize("ord", ORDS)
def test_two_processes_clip_as_one(ord: float) -> None:
    """What one process would do with all gradients, two do with their halves (run one after the other)."""
    everything = _originals()
    whole = gradclip.clip_by_global_norm_(everything, 2.0, ord)
    halves = [_originals()[0::2], _originals()[1::2]]
    recorder = _Recorder()
    for half in halves:
        gradclip.clip_by_global_norm_(half, math.inf, ord, reduce=recorder)
    sums = recorder.calls
    total = np.maximum(*sums) if math.isinf(ord) else sums[0] + sums[1]
    for half in halves:
        result = gradclip.clip_by_global_norm_(half, 2.0, ord, reduce=lambda _: total)
        assert result.coefficient == pytest.approx(whole.coefficient, rel=1e-12)
        assert result.group_norms == pytest.approx(whole.group_norms, rel=1e-12)
        assert result.total_norm == pytest.approx(whole.total_norm, rel=1e-12)


def test_norms_stay_those_of_this_process() -> None:
    array = np.array([3.0, 4.0])
    result = gradclip.clip_by_global_norm_([array], 1.0, reduce=lambda sums: sums * 4)
    assert result.norms.tolist() == [5.0]
    assert result.group_norms.tolist() == [10.0]
    assert result.coefficient == 0.1
    assert array.tolist() == [3.0 * 0.1, 4.0 * 0.1]


def test_with_grad_scale() -> None:
    array = np.array([3.0, 4.0])
    result = gradclip.clip_by_global_norm_([array], 1.0, grad_scale=2.0, reduce=lambda sums: sums * 4)
    assert result.norms.tolist() == [2.5]
    assert result.group_norms.tolist() == [5.0]
    assert result.coefficient == 0.2
    assert array == pytest.approx([0.3, 0.4])


@pytest.mark.parametrize("kind", [list, tuple, np.float32, lambda sums: sums[:, None][:, 0], np.ma.asarray])
def test_what_it_may_return(kind: Any) -> None:
    array = np.array([3.0, 4.0])
    assert gradclip.clip_by_global_norm_([array], 2.5, reduce=kind).coefficient == 0.5


@pytest.mark.parametrize("bad", [np.ones(2), np.ones(0), [1.0, 2.0], np.ones((1, 2))])
def test_another_shape(bad: Any) -> None:
    array = np.array([3.0, 4.0])
    with pytest.raises(ValueError, match="reduce"):
        gradclip.clip_by_global_norm_([array], 2.5, reduce=lambda _: bad)
    assert array.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("bad", ["text", None, [object()], [1j]])
def test_no_numbers(bad: Any) -> None:
    array = np.array([3.0, 4.0])
    with pytest.raises((TypeError, ValueError)):
        gradclip.clip_by_global_norm_([array], 2.5, reduce=lambda _: bad)
    assert array.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("bad", [3, "sum", [1.0]])
def test_not_callable(bad: Any) -> None:
    array = np.array([3.0, 4.0])
    with pytest.raises(TypeError, match="reduce"):
        gradclip.clip_by_global_norm_([array], 2.5, reduce=bad)
    assert array.tolist() == [3.0, 4.0]


def test_its_exception_comes_through_and_nothing_is_written() -> None:
    array = np.array([3.0, 4.0])

    def fail(sums: Array) -> Array:
        raise ConnectionError("rank 3 is gone")

    with pytest.raises(ConnectionError, match="rank 3 is gone"):
        gradclip.clip_by_global_norm_([array], 2.5, reduce=fail)
    assert array.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("special", [math.nan, math.inf])
def test_another_process_is_not_finite(special: float) -> None:
    array = np.array([3.0, 4.0])

    def reduce(sums: Array) -> Array:
        return sums + special

    with pytest.raises(gradclip.NonFiniteGradientError, match="reduce") as caught:
        gradclip.clip_by_global_norm_([array], 2.5, reduce=reduce)
    assert caught.value.entries == []
    assert caught.value.norms.tolist() == [5.0]
    skipped = gradclip.clip_by_global_norm_([array], 2.5, nonfinite="skip", reduce=reduce)
    assert skipped.coefficient == 1.0
    assert skipped.nonfinite == ()
    assert array.tolist() == [3.0, 4.0]
    zeroed = gradclip.clip_by_global_norm_([array], 2.5, nonfinite="zero", reduce=reduce)
    assert zeroed.coefficient == 0.0
    assert array.tolist() == [0.0, 0.0]


def test_it_is_called_though_this_process_has_no_gradients() -> None:
    """Or the other processes would wait for ever."""
    empty: list[list[Any]] = [[], [None], [np.zeros(0)]]
    for grads in empty:
        recorder = _Recorder()
        gradclip.clip_by_global_norm_(grads, 1.0, reduce=recorder)
        assert [sums.tolist() for sums in recorder.calls] == [[0.0]]


def test_it_is_called_though_this_process_is_not_finite() -> None:
    recorder = _Recorder()
    with pytest.raises(gradclip.NonFiniteGradientError):
        gradclip.clip_by_global_norm_([np.array([np.nan])], 1.0, reduce=recorder)
    assert len(recorder.calls) == 1
    assert np.isnan(recorder.calls[0]).all()


def test_it_may_call_gradclip_itself() -> None:
    array = np.array([3.0, 4.0])
    inner = np.array([6.0, 8.0])

    def reduce(sums: Array) -> Array:
        gradclip.clip_by_global_norm_([inner], 5.0)
        return sums

    assert gradclip.clip_by_global_norm_([array], 2.5, reduce=reduce).coefficient == 0.5
    assert inner.tolist() == [3.0, 4.0]
