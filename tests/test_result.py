"""ClipResult: its fields, their types, and the text that a person reads."""

from __future__ import annotations

import dataclasses
import pickle
import time
from typing import Any

import numpy as np
import pytest

import gradclip


def _grads() -> dict[str, Any]:
    return {"layer.weight": np.array([3.0, 4.0]), "layer.bias": np.array([12.0], np.float32), "frozen": None}


def test_fields_of_a_global_clip_of_a_mapping() -> None:
    result = gradclip.clip_by_global_norm_(_grads(), 6.5)
    assert type(result.total_norm) is float
    assert result.total_norm == 13.0
    assert result.norms.dtype == np.float64
    assert result.norms.tolist() == [5.0, 12.0, 0.0]
    assert type(result.coefficient) is float
    assert result.coefficient == 0.5
    assert result.clipped is True
    assert result.nonfinite == ()
    assert result.names == ("layer.weight", "layer.bias", "frozen")
    assert result.group_norms.dtype == np.float64
    assert result.group_norms.tolist() == [13.0]
    assert result.named_norms() == {"layer.weight": 5.0, "layer.bias": 12.0, "frozen": 0.0}


def test_fields_of_a_sequence() -> None:
    result = gradclip.clip_by_norm_(list(_grads().values()), 6.0)
    assert result.names is None
    assert isinstance(result.coefficient, np.ndarray)
    assert result.coefficient.dtype == np.float64
    assert result.coefficient.tolist() == [1.0, 0.5, 1.0]
    assert result.group_norms.tolist() == [5.0, 12.0, 0.0]
    assert result.total_norm == 13.0
    assert result.named_norms() == {"0": 5.0, "1": 12.0, "2": 0.0}
    assert all(type(norm) is float for norm in result.named_norms().values())


def test_nonfinite_are_names_or_places() -> None:
    grads = _grads()
    grads["layer.bias"][0] = np.nan
    assert gradclip.clip_by_global_norm_(grads, 1.0, nonfinite="skip").nonfinite == ("layer.bias",)
    places = gradclip.clip_by_global_norm_(list(grads.values()), 1.0, nonfinite="skip").nonfinite
    assert places == (1,)
    assert type(places[0]) is int


def test_results_are_values_of_their_own() -> None:
    """No later call changes an earlier result, and nobody can assign to its fields."""
    array = np.array([3.0, 4.0])
    plan = gradclip.Plan([array])
    first = plan.clip_by_norm_(2.5)
    array[:] = 100.0
    plan.clip_by_norm_(2.5)
    plan.tensor_norms()
    assert first.norms.tolist() == [5.0]
    assert first.group_norms.tolist() == [5.0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.clipped = False  # type: ignore[misc]
    first.norms[0] = 7.0  # an ordinary array that the caller owns
    assert plan.tensor_norms().tolist() == pytest.approx([2.5])


def test_text() -> None:
    result = gradclip.clip_by_global_norm_(_grads(), 6.5)
    assert repr(result).splitlines() == [
        "ClipResult(clipped: total norm 13, coefficient 0.5, 3 gradients, 1 missing",
        "            12  layer.bias",
        "             5  layer.weight",
        "             0  frozen)",
    ]
    many = gradclip.clip_by_norm_([np.array([float(i)]) for i in range(1, 10)], 3.0)
    lines = repr(many).splitlines()
    assert lines[0] == "ClipResult(clipped: total norm 16.8819, 9 coefficients, lowest 0.333333, 9 gradients"
    assert [line.split() for line in lines[1:-1]] == [[str(i), str(i - 1)] for i in range(9, 4, -1)]
    assert "4 more" in lines[-1]


def test_text_when_something_is_not_finite() -> None:
    grads = {"fine": np.array([1e6]), "bad": np.array([np.nan]), "worse": np.array([-np.inf])}
    result = gradclip.clip_by_global_norm_(grads, 1.0, nonfinite="skip")
    lines = repr(result).splitlines()
    assert lines[0] == "ClipResult(not clipped: total norm nan, coefficient 1, 3 gradients"
    assert lines[1] == "  not finite: 'bad', 'worse'"
    assert [line.split()[1].rstrip(")") for line in lines[2:]] == ["bad", "worse", "fine"]


def test_text_of_nothing() -> None:
    with pytest.warns(UserWarning, match="got none"):
        nothing = gradclip.clip_by_norm_([], 1.0)
    assert repr(nothing) == "ClipResult(not clipped: total norm 0, 0 coefficients, 0 gradients)"
    one = gradclip.clip_by_norm_([np.array([4.0])], 1.0)
    assert repr(one).splitlines()[0] == "ClipResult(clipped: total norm 4, coefficient 0.25, 1 gradient"


def test_error_keeps_what_was_measured() -> None:
    grads = _grads()
    grads["layer.weight"][1] = np.inf
    with pytest.raises(gradclip.NonFiniteGradientError) as caught:
        gradclip.clip_by_global_norm_(grads, 1.0)
    error = caught.value
    assert error.entries == [("layer.weight", 0, 1)]
    assert error.norms.tolist() == [np.inf, 12.0, 0.0]
    assert type(error).__module__ == "gradclip"


def test_results_can_be_pickled() -> None:
    result = gradclip.clip_by_norm_(_grads(), 6.0)
    again = pickle.loads(pickle.dumps(result))
    assert repr(again) == repr(result)
    assert again.names == result.names


def test_everything_public_is_named() -> None:
    expected = {"ClipResult", "NonFiniteGradientError", "Plan", "clip_by_global_norm_", "clip_by_norm_"}
    expected |= {"clip_by_value_", "get_num_threads", "global_norm", "scale_", "set_num_threads"}
    expected |= {"show_config", "tensor_norms"}
    assert expected <= set(gradclip.__all__)
    assert all(hasattr(gradclip, name) for name in gradclip.__all__)
    assert isinstance(gradclip.__version__, str)


def test_numbers_for_loggers() -> None:
    numbers = gradclip.clip_by_norm_(_grads(), [1.0, 1e9, 1.0]).as_dict()
    assert numbers == {
        "total_norm": 13.0,
        "coefficient": 0.2,
        "clipped": True,
        "skipped": False,
        "gradients": 3,
        "missing": 1,
        "nonfinite": 0,
        "norms/layer.weight": 5.0,
        "norms/layer.bias": 12.0,
        "norms/frozen": 0.0,
        "group_norms/layer.weight": 5.0,
        "group_norms/layer.bias": 12.0,
        "group_norms/frozen": 0.0,
        "coefficients/layer.weight": 0.2,
        "coefficients/layer.bias": 1.0,
        "coefficients/frozen": 1.0,
    }
    assert {type(value) for value in numbers.values()} == {float, int, bool}
    assert gradclip.clip_by_global_norm_([np.array([3.0])], 1e9).as_dict()["norms/0"] == 3.0


def test_the_text_of_a_million_gradients_takes_no_time() -> None:
    result = gradclip.ClipResult(1.0, np.arange(1e6), 1.0, False, (), (), None, np.array([1.0]))
    start = time.perf_counter()
    text = repr(result)
    assert time.perf_counter() - start < 2
    assert text.splitlines()[1].split() == ["999999", "999999"]
    assert "999995 more" in text
    ties = gradclip.ClipResult(1.0, np.ones(10), 1.0, False, (), (), None, np.array([1.0]))
    assert [line.split()[1] for line in repr(ties).splitlines()[1:6]] == ["0", "1", "2", "3", "4"]
