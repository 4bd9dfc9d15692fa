"""A NaN or an infinity in the gradients, under each of the four policies."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import gradclip
from exact import scaled
from matrices import COMPLEX_NAMES, DTYPES, LAYOUTS, NAMES, ORDS, Array, lay_out, values

_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _grads(name: str, special: float) -> dict[str, Any]:
    grads: dict[str, Any] = {"a": values(name, 5000, seed=1), "none": None, "b": values(name, 9001, seed=2)}
    grads["b"][8999] = special
    return grads


def _bytes(grads: dict[str, Any]) -> list[bytes]:
    return [array.tobytes() for array in grads.values() if array is not None]


@pytest.mark.parametrize("special", _SPECIAL)
@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("name", NAMES)
def test_raise(name: str, ord: float, special: str) -> None:
    grads = _grads(name, _SPECIAL[special])
    before = _bytes(grads)
    with pytest.raises(gradclip.NonFiniteGradientError) as caught:
        gradclip.clip_by_global_norm_(grads, 1.0, ord)
    nan = int(special == "nan")
    assert caught.value.entries == [("b", nan, 1 - nan)]
    assert str(caught.value).startswith(
        f"grads['b']: expected finite elements, got {nan} NaN and {1 - nan} inf"
    )
    assert "nothing was written" in str(caught.value)
    assert np.isfinite(caught.value.norms).tolist() == [True, True, False]
    assert _bytes(grads) == before


@pytest.mark.parametrize("special", _SPECIAL)
@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("name", NAMES)
def test_skip(name: str, ord: float, special: str) -> None:
    grads = _grads(name, _SPECIAL[special])
    before = _bytes(grads)
    result = gradclip.clip_by_global_norm_(grads, 1.0, ord, nonfinite="skip", grad_scale=4.0)
    assert result.coefficient == 1.0
    assert not result.clipped
    assert result.nonfinite == ("b",)
    assert not math.isfinite(result.total_norm)
    assert math.isnan(result.total_norm) == (special == "nan")
    assert _bytes(grads) == before


@pytest.mark.parametrize("special", _SPECIAL)
@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("name", NAMES)
def test_zero(name: str, ord: float, special: str) -> None:
    grads = _grads(name, _SPECIAL[special])
    result = gradclip.clip_by_global_norm_(grads, 1e30, ord, nonfinite="zero")
    assert result.coefficient == 0.0
    assert result.clipped
    assert result.nonfinite == ("b",)
    assert all(set(written) == {0} for written in _bytes(grads)), "+0, in every byte"


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("name", NAMES)
def test_propagate_inf(name: str, ord: float) -> None:
    """The coefficient is 0: the infinity becomes NaN, the others zeros of their sign."""
    grads = _grads(name, math.inf)
    signs = np.signbit(grads["a"].view(grads["a"].real.dtype))
    result = gradclip.clip_by_global_norm_(grads, 1.0, ord, nonfinite="propagate")
    assert result.total_norm == math.inf
    assert result.coefficient == 0.0
    assert result.clipped
    assert (grads["a"] == 0).all()
    assert (np.signbit(grads["a"].view(grads["a"].real.dtype)) == signs).all()
    assert np.flatnonzero(np.isnan(grads["b"])).tolist() == [8999]
    assert (np.delete(grads["b"], 8999) == 0).all()


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("name", NAMES)
def test_propagate_nan(name: str, ord: float) -> None:
    grads = _grads(name, math.nan)
    result = gradclip.clip_by_global_norm_(grads, 1.0, ord, nonfinite="propagate")
    assert math.isnan(result.total_norm)
    assert math.isnan(float(result.coefficient))
    assert result.clipped
    assert np.isnan(grads["a"]).all()
    assert np.isnan(grads["b"]).all()


@pytest.mark.parametrize("special", _SPECIAL)
def test_propagate_with_infinite_max_norm_writes_nothing(special: str) -> None:
    grads = _grads("float32", _SPECIAL[special])
    before = _bytes(grads)
    result = gradclip.clip_by_global_norm_(grads, math.inf, nonfinite="propagate")
    assert result.coefficient == 1.0
    assert not result.clipped
    assert result.nonfinite == ("b",)
    assert _bytes(grads) == before


@pytest.mark.parametrize("name", NAMES)
def test_propagate_in_one_group_clips_the_others(name: str) -> None:
    originals = [values(name, n, seed=n) for n in (5000, 70, 300)]
    originals[1][5] = math.inf
    arrays = [array.copy() for array in originals]
    result = gradclip.clip_by_norm_(arrays, 2.0, nonfinite="propagate")
    norms = result.norms
    assert isinstance(result.coefficient, np.ndarray)
    assert result.coefficient.tolist() == [2 / norms[0], 0.0, 2 / norms[2]]
    for i in (0, 2):
        assert arrays[i].tobytes() == scaled(originals[i], 2 / norms[i]).tobytes()


@pytest.mark.parametrize("policy", ["skip", "zero"])
def test_skip_and_zero_concern_every_group(policy: Any) -> None:
    originals = [np.full(50, 3.0), np.array([1.0, math.nan]), np.full(20, 1e-3)]
    arrays = [array.copy() for array in originals]
    result = gradclip.clip_by_norm_(arrays, 1.0, nonfinite=policy)
    assert isinstance(result.coefficient, np.ndarray)
    if policy == "skip":
        assert result.coefficient.tolist() == [1.0] * 3
        assert not result.clipped
        assert [a.tobytes() for a in arrays] == [a.tobytes() for a in originals]
    else:
        assert result.coefficient.tolist() == [0.0] * 3
        assert result.clipped
        assert not any(any(a.tobytes()) for a in arrays)


def test_counts_names_and_places() -> None:
    grads: list[Any] = [values("float16", 4000, seed=1), None, np.ones(9), values("bfloat16", 20_000, seed=2)]
    grads[0][[0, 5, 3999]] = np.nan
    grads[0][[7, 8]] = -np.inf
    grads[3][::2] = np.inf
    for ord in ORDS:
        with pytest.raises(gradclip.NonFiniteGradientError) as caught:
            gradclip.clip_by_norm_(grads, 1.0, ord)
        assert caught.value.entries == [(0, 3, 2), (3, 0, 10_000)]
        assert "grads[0]: expected finite elements, got 3 NaN and 2 inf" in str(caught.value)
        assert "grads[3]: expected finite elements, got 0 NaN and 10000 inf" in str(caught.value)
    assert issubclass(gradclip.NonFiniteGradientError, FloatingPointError)
    with pytest.raises(gradclip.NonFiniteGradientError, match="and 95 more gradients"):
        gradclip.clip_by_global_norm_(
            [np.array([np.nan])] * 0 + [np.full(2, np.nan) for _ in range(100)], 1.0
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_counts_in_any_layout(name: str, layout: str) -> None:
    original = values(name, (7, 20, 33), seed=4)
    original.reshape(-1)[[0, 4619]] = math.nan
    original.reshape(-1)[[100, 300, 4000]] = math.inf
    view, buffer = lay_out(layout, original)
    before = buffer.tobytes()
    with pytest.raises(gradclip.NonFiniteGradientError) as caught:
        gradclip.clip_by_global_norm_([view], 1.0)
    assert caught.value.entries == [(0, 2, 3)]
    assert buffer.tobytes() == before


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("name", COMPLEX_NAMES)
def test_an_infinite_imaginary_part(name: str, ord: float) -> None:
    array = np.array([1 + 1j, complex(0, math.inf), 2], DTYPES[name])
    with pytest.raises(gradclip.NonFiniteGradientError) as caught:
        gradclip.clip_by_global_norm_([array], 1.0, ord)
    assert caught.value.entries == [(0, 0, 1)]


def test_nonfinite_of_the_result_in_a_long_list() -> None:
    arrays: list[Array] = [np.ones(3, np.float32) for _ in range(1000)]
    for i in (0, 500, 999):
        arrays[i][1] = math.nan
    result = gradclip.clip_by_norm_(arrays, 9.0, nonfinite="skip")
    assert result.nonfinite == (0, 500, 999)


def test_finite_gradients_whose_norm_is_beyond_float64() -> None:
    """No element is to blame, and the norm is infinite all the same: the policies hold."""
    original = np.full(4, 1.5e308)
    array = original.copy()
    with pytest.raises(gradclip.NonFiniteGradientError) as caught:
        gradclip.clip_by_global_norm_([array], 1.0)
    assert "beyond float64" in str(caught.value)
    assert caught.value.entries == []
    assert gradclip.clip_by_global_norm_([array], 1.0, nonfinite="skip").coefficient == 1.0
    assert array.tobytes() == original.tobytes()
    # The largest magnitude is finite, so with this norm there is nothing to refuse.
    gradclip.clip_by_global_norm_([array], 1.0, ord=math.inf)
    assert array == pytest.approx(np.ones(4), rel=1e-15)
