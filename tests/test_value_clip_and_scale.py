"""clip_by_value_ and scale_: what they write, element by element."""

from __future__ import annotations

import math

import numpy as np
import pytest

import gradclip
from exact import scaled
from gradclip import _core
from matrices import BITS, DTYPES, EXPONENTS, ISAS, NAMES, REAL_NAMES, Array, sizes, values


def _rounded_towards_zero(limit: float, name: str) -> float:
    """The largest number of the dtype that is not above ``limit``."""
    bits = BITS[DTYPES[name].itemsize]
    low, high = 0, int(np.array([math.inf]).astype(DTYPES[name]).view(bits)[0])
    while high - low > 1:  # positive floats are in the order of their bit patterns
        middle = (low + high) // 2
        if float(np.array(middle, bits).view(DTYPES[name])) <= limit:
            low = middle
        else:
            high = middle
    return float(np.array(low, bits).view(DTYPES[name]))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", REAL_NAMES)
def test_every_element_is_within_the_limit(name: str, isa: str) -> None:
    _core.set_isa(isa)
    originals = [values(name, n, seed=n, low=-14, high=14) for n in sizes(name)]
    for limit in (0.1, 1.0, 1.0 / 3.0, 1e-4, 100.0, 9000.0):
        arrays = [array.copy() for array in originals]
        result = gradclip.clip_by_value_(arrays, limit)
        bound = _rounded_towards_zero(limit, name)
        assert bound <= limit
        for array, original in zip(arrays, originals, strict=True):
            assert (array.astype(np.float64) == np.clip(original.astype(np.float64), -bound, bound)).all(), (
                limit
            )
        largest = gradclip.tensor_norms(originals, math.inf)
        assert result.norms.tolist() == largest.tolist()
        assert result.total_norm == largest.max()
        assert result.clipped == bool((largest > bound).any())
        assert result.coefficient == 1.0
        assert result.nonfinite == ()


@pytest.mark.parametrize("name", REAL_NAMES)
def test_limits_at_the_ends_of_the_dtype(name: str) -> None:
    low, high = EXPONENTS[name]
    elements = np.array([0.0, -0.0, 2.0**low, -(2.0**low), 2.0**high, -(2.0**high), 1.0])
    for limit in (5e-324, 2.0**low, 1.5 * 2.0**low, 2.0**high, 1.01 * 2.0**high, 1.7976931348623157e308):
        array = elements.astype(DTYPES[name])
        bound = _rounded_towards_zero(limit, name)
        expected = np.clip(array.astype(np.float64), -bound, bound)
        result = gradclip.clip_by_value_([array], limit)
        assert array.astype(np.float64).tolist() == expected.tolist(), limit
        assert result.clipped == bool(2.0**high > bound)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", REAL_NAMES)
def test_infinities_become_the_limit_and_nan_stays(name: str, isa: str) -> None:
    _core.set_isa(isa)
    array = values(name, 9001, seed=1, low=-4, high=2)
    array[[0, 100, 8999]] = math.inf
    array[[1, 700]] = -math.inf
    array[[2, 5000, 9000]] = math.nan
    expected = np.clip(array.astype(np.float64), -0.5, 0.5)
    finite = values(name, 10, seed=2)
    result = gradclip.clip_by_value_({"x": finite, "y": array, "z": np.array([math.inf])}, 0.5)
    assert np.array_equal(array.astype(np.float64), expected, equal_nan=True)
    assert np.flatnonzero(np.isnan(array)).tolist() == [2, 5000, 9000]
    assert result.nonfinite == ("y", "z")
    assert result.clipped
    assert math.isnan(result.norms[1])
    assert result.norms[2] == math.inf
    assert math.isnan(result.total_norm)


@pytest.mark.parametrize("name", REAL_NAMES)
def test_an_infinity_under_a_limit_above_the_dtype(name: str) -> None:
    array = np.array([math.inf, -math.inf, 1.0], DTYPES[name])
    bound = _rounded_towards_zero(1e300, name)
    assert gradclip.clip_by_value_([array], 1e300).clipped
    assert array.astype(np.float64).tolist() == [bound, -bound, 1.0]
    array[0] = math.inf
    result = gradclip.clip_by_value_([array], math.inf)
    assert not result.clipped
    assert array[0] == math.inf
    assert result.nonfinite == (0,)


@pytest.mark.parametrize("name", REAL_NAMES)
def test_nan_only_is_not_clipped_and_keeps_its_bits(name: str) -> None:
    array = np.full(300, math.nan, DTYPES[name])
    array[5] = 0.25
    before = array.tobytes()
    assert not gradclip.clip_by_value_([array], 0.5).clipped
    assert array.tobytes() == before
    array[7] = 3.0
    assert gradclip.clip_by_value_([array], 0.5).clipped
    assert array[7] == 0.5
    assert np.isnan(array).sum() == 299 - 1


@pytest.mark.parametrize("name", REAL_NAMES)
def test_value_clip_twice_changes_nothing(name: str) -> None:
    array = values(name, 9001, seed=3, low=-10, high=10)
    gradclip.clip_by_value_([array], 0.3)
    before = array.tobytes()
    assert not gradclip.clip_by_value_([array], 0.3).clipped
    assert array.tobytes() == before


def test_value_clip_of_nothing() -> None:
    with pytest.warns(UserWarning, match="grads: expected gradients, got none"):
        assert gradclip.clip_by_value_([], 1.0).total_norm == 0.0
    with pytest.warns(UserWarning, match="grads: expected gradients, got none"):
        gradclip.scale_(iter(()), 2.0)
    result = gradclip.clip_by_value_([None, np.zeros((0, 3)), np.array(-7.0)], 1.0)
    assert result.norms.tolist() == [0.0, 0.0, 7.0]
    assert result.clipped


_FACTORS = (
    0.0,
    -0.0,
    -1.0,
    0.5,
    2.0,
    1 / 3,
    1e-3,
    -1e-38,
    1e-39,
    -1.4e-45,
    1e-46,
    1e-60,
    3e38,
    1e39,
    -1e300,
    1e-300,
)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NAMES)
def test_scale_multiplies_and_rounds_once_per_step(name: str, isa: str) -> None:
    _core.set_isa(isa)
    low, high = EXPONENTS[name]
    originals = [values(name, n, seed=n, low=-3, high=3) for n in sizes(name)[::3]]
    originals.append(values(name, 9001, seed=5, low=low, high=high))
    for factor in _FACTORS:
        arrays = [array.copy() for array in originals]
        gradclip.scale_(arrays, factor)
        for array, original in zip(arrays, originals, strict=True):
            assert array.tobytes() == scaled(original, factor).tobytes(), f"{name}[{array.size}] * {factor}"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_rounding_of_16_bits_over_every_number(name: str, isa: str) -> None:
    """Each of the 65536 patterns, with factors that produce ties, subnormals and overflow."""
    _core.set_isa(isa)
    everything: Array = np.arange(2**16, dtype=np.uint16).view(DTYPES[name])
    for factor in (1.5, 0.75, 0.5, 1 + 2.0**-8, 1 + 2.0**-11, 2.0**-10, 3.0 * 2.0**-12, 2.0**14, 1e-41, 1e40):
        array = everything.copy()
        gradclip.scale_([array], factor)
        expected = scaled(everything, factor)
        nan = np.isnan(expected)
        assert (np.isnan(array) == nan).all(), factor
        assert (array[~nan].view(np.uint16) == expected[~nan].view(np.uint16)).all(), factor


def test_scale_by_1_keeps_signalling_nan_and_everything_else() -> None:
    pattern = np.arange(0x7F800000, 0x7F800000 + 5000, dtype=np.uint32)
    gradclip.scale_([pattern.view(np.float32)], 1.0)
    assert (pattern == np.arange(0x7F800000, 0x7F800000 + 5000)).all()


def test_scale_returns_nothing_and_takes_mappings_and_none() -> None:
    grads = {"a": np.ones(3), "b": None, "c": np.ones(2, np.complex64)}
    assert gradclip.scale_(grads, 3) is None  # type: ignore[func-returns-value]
    assert grads["a"] is not None
    assert grads["a"].tolist() == [3.0] * 3
    assert grads["c"] is not None
    assert grads["c"].tolist() == [3.0] * 2


def test_scale_of_infinities() -> None:
    array = np.array([math.inf, -math.inf, 1.0], np.float32)
    gradclip.scale_([array], -2.0)
    assert array.tolist() == [-math.inf, math.inf, -2.0]
    gradclip.scale_([array], 0.0)
    assert np.isnan(array).tolist() == [True, True, False]
