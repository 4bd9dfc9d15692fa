"""Right: finite input gives a finite norm of small error, whatever its size; NaN and inf are never lost."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

import gradclip
from exact import exact_norm, relative_error
from gradclip import _core
from matrices import (
    BITS,
    COMPLEX_NAMES,
    DTYPES,
    EXPONENTS,
    ISAS,
    NAMES,
    ORDS,
    REAL_NAMES,
    TILE_BYTES,
    TOLERANCE,
    Array,
    sizes,
    values,
)

# (dtype, name of the case, its elements). Sizes are chosen so that a case crosses tiles.
_TABLE: list[tuple[str, str, Any]] = [
    ("float32", "1e20, whose square overflows", [1e20] * 4),
    ("float32", "1e30", [1e30] * 5000),
    ("float32", "largest", [3.4028234e38] * 20000),
    ("float32", "1e-40, subnormal", [1e-40] * 5000),
    ("float32", "1e-25, whose square underflows", [1e-25] * 100),
    ("float32", "smallest", [1e-45]),
    ("float32", "smallest, many", [1e-45] * 10000),
    ("float32", "huge and tiny", [1e30, 1e-40] * 3000),
    ("float32", "one huge at the end", [1.0] * 9000 + [1e38]),
    ("float32", "one tile tiny, one normal, one huge", [1e-44] * 4096 + [1.0] * 4096 + [1e37] * 4096),
    ("float32", "squares that just do not underflow", [2.0**-51] * 7000),
    ("float32", "squares near the smallest normal number", [1.09e-19] * 4096),
    ("float32", "squares whose sum just overflows", [1.5 * 2.0**57] * 4096),
    ("float32", "squares that just do not overflow", [1.8e19, 1.0]),
    ("float32", "constant 0.1", [0.1] * 100_000),
    ("float16", "largest", [65504.0] * 20000),
    ("float16", "norm above the largest", [48000.0] * 4),
    ("float16", "smallest", [6e-8]),
    ("float16", "smallest, many", [6e-8] * 20000),
    ("float16", "largest and smallest", [65504.0, 6e-8, 6e-8] * 5000),
    ("float16", "constant 0.1", [0.1] * 100_000),
    ("bfloat16", "largest", [3.3895314e38] * 20000),
    ("bfloat16", "smallest, many", [9.2e-41] * 20000),
    ("bfloat16", "largest and smallest", [3.3895314e38, 9.2e-41] * 5000),
    ("bfloat16", "1e20", [1e20] * 9000),
    ("bfloat16", "constant 0.1", [0.1] * 100_000),
    ("float64", "1e300", [1e300] * 5000),
    ("float64", "largest", [1.7976931348623157e308]),
    ("float64", "largest, scaled to fit", [1.7e308 / 100] * 5000),
    ("float64", "1e-310, subnormal", [1e-310] * 5000),
    ("float64", "smallest", [5e-324]),
    ("float64", "smallest, many", [5e-324] * 5000),
    ("float64", "huge and tiny", [1e300, 1e-310] * 3000),
    ("float64", "one tile tiny, one normal, one huge", [5e-324] * 2048 + [1.0] * 2048 + [1e305] * 2048),
    ("float64", "tiny among normal", [1.0] + [1e-160] * 5000),
    ("float64", "squares near the smallest normal number", [1.5e-154] * 4096),
    ("float64", "squares that just do not underflow", [2.0**-450] * 4096),
    ("float64", "squares whose sum just overflows", [1.5 * 2.0**506] * 2048),
    ("float64", "constant 0.1", [0.1] * 100_000),
    ("complex64", "1e30", [1e30 - 1e30j, 1e-30] * 3000),
    ("complex64", "largest", [3.4e38 + 3.4e38j] * 3000),
    ("complex64", "smallest", [1e-45j, 1e-45]),
    ("complex128", "1e300", [3e300 + 4e300j] * 3000),
    ("complex128", "1e-310", [3e-310 - 4e-310j] * 3000),
    ("complex128", "smallest", [5e-324 + 5e-324j, -1.5e-323j] * 3000),
    ("complex128", "largest", [1.2e308 - 1.2e308j]),
    ("complex128", "huge and tiny", [1e300j, 1e-310] * 3000),
]


def _assert_right(arrays: list[Array], name: str, ord: float) -> None:
    measured = gradclip.tensor_norms(arrays, ord).tolist()
    # 1/p magnifies the error of the sum; the promise is given for p >= 1.
    tolerance = TOLERANCE[name] * max(1.0, 1 / ord)
    for array, norm in zip(arrays, measured, strict=True):
        exact = exact_norm(array, ord)
        error = relative_error(norm, exact)
        assert error < tolerance, f"{name}[{array.size}], ord {ord}: {norm!r}, exactly {exact}"


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize(("name", "case", "elements"), _TABLE, ids=[f"{n}-{c}" for n, c, _ in _TABLE])
def test_adversarial_table(name: str, case: str, elements: Any, ord: float) -> None:
    array = np.array(elements, DTYPES[name])
    assert np.isfinite(array).all(), f"{case!r} is not finite in this dtype"
    assert array.any(), f"{case!r} is zero in this dtype"
    _assert_right([array], name, ord)


@pytest.mark.parametrize("ord", [2, 1])
@pytest.mark.parametrize("name", NAMES)
def test_random_values(name: str, ord: float) -> None:
    _assert_right([values(name, n, seed=n, low=-8, high=8) for n in sizes(name) if n], name, ord)


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("name", NAMES)
def test_one_element_is_its_own_norm(name: str, ord: float) -> None:
    low, high = EXPONENTS[name]
    part = "real" if name in COMPLEX_NAMES else name
    arrays = [np.array([-(2.0**e)], np.float64).astype(DTYPES[name]) for e in range(low, high + 1)]
    measured = gradclip.tensor_norms(arrays, ord)
    expected = np.ldexp(1.0, np.arange(low, high + 1))
    assert (measured == expected).all(), f"{part}: {measured[measured != expected]}"


def test_known_figures() -> None:
    """What other libraries get wrong: half precision above 65504, float32 of 1e20 and 1e-25."""
    assert gradclip.global_norm([np.full(4, 48000, np.float16)]) == 96000.0
    assert gradclip.global_norm([np.full(4, 1e20, np.float32)]) == pytest.approx(2e20, rel=1e-7)
    assert gradclip.global_norm([np.full(4, 1e-25, np.float32)]) == pytest.approx(2e-25, rel=1e-7)
    assert gradclip.global_norm([np.array([3e200, 4e200])]) == pytest.approx(5e200, rel=1e-15)


def test_a_true_norm_beyond_float64_is_inf() -> None:
    arrays = [np.full(4, 1e308), np.full(4, 1e308 + 1e308j)]
    assert gradclip.tensor_norms(arrays, 2).tolist() == [math.inf, math.inf]
    assert gradclip.tensor_norms(arrays, 1).tolist() == [math.inf, math.inf]
    assert gradclip.tensor_norms(arrays, math.inf)[0] == 1e308
    assert gradclip.tensor_norms([np.full(4, 1.7e308 / 2)], 2)[0] == 1.7e308


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("name", NAMES)
def test_zero_empty_and_scalar(name: str, ord: float) -> None:
    dtype = DTYPES[name]
    nothing = [np.zeros(n, dtype) for n in (0, 1, 5000)] + [
        np.zeros((3, 0, 2), dtype),
        -np.zeros(5000, dtype),
    ]
    assert gradclip.tensor_norms([*nothing, None], ord).tolist() == [0.0] * 6
    assert gradclip.global_norm(nothing, ord) == 0.0
    assert not np.signbit(gradclip.tensor_norms(nothing, ord)).any()
    assert gradclip.tensor_norms([np.array(-2.5, dtype)], ord).tolist() == [2.5]
    assert gradclip.tensor_norms([], ord).shape == (0,)
    assert gradclip.global_norm([], ord) == 0.0 == gradclip.global_norm([None], ord)


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("name", NAMES)
def test_the_global_norm_is_that_of_one_long_vector(name: str, ord: float) -> None:
    arrays = [values(name, n, seed=n, low=-6, high=6) for n in (1, 130, 4097, 9000)]
    error = relative_error(gradclip.global_norm([*arrays, None], ord), exact_norm(arrays, ord))
    assert error < TOLERANCE[name] * max(1.0, 1 / ord)


@pytest.mark.parametrize("ord", ORDS)
def test_the_global_norm_of_mixed_sizes(ord: float) -> None:
    arrays = [np.full(300, 1e-310), np.full(5000, 1e-40, np.float32), np.full(20, 1e30, np.float32)]
    for chosen in (
        arrays,
        arrays[:2],
        [*arrays, np.full(3, 1e300)],
        [*arrays, np.full(7, 65504, np.float16)],
    ):
        assert relative_error(gradclip.global_norm(chosen, ord), exact_norm(chosen, ord)) < 1e-7 * max(
            1, 1 / ord
        )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("name", NAMES)
def test_nan_and_inf_are_never_lost(name: str, ord: float, isa: str) -> None:
    _core.set_isa(isa)
    n = 2 * TILE_BYTES // DTYPES[name].itemsize + 50
    base = np.ones(n, DTYPES[name])
    places = (0, 1, 17, n // 2 - 26, n // 2, n - 1)
    for place in places:
        for special in (math.inf, -math.inf, math.nan):
            array = base.copy()
            array[place] = special
            norm = gradclip.tensor_norms([array], ord)[0]
            assert norm == math.inf or (math.isnan(norm) and math.isnan(special)), (place, special, norm)
            assert gradclip.global_norm([base, array, base], ord) == norm or math.isnan(norm)
    for first, second in itertools.permutations(places, 2):
        array = base.copy()
        array[first], array[second] = math.nan, math.inf
        assert math.isnan(gradclip.tensor_norms([array], ord)[0]), (first, second)


@pytest.mark.parametrize("ord", ORDS)
def test_nan_wins_over_inf_across_tensors(ord: float) -> None:
    nan, inf, one = (np.array([x], np.float32) for x in (math.nan, math.inf, 1.0))
    for arrays in itertools.permutations([nan, inf, one]):
        assert math.isnan(gradclip.global_norm(arrays, ord))
    assert gradclip.global_norm([one, inf, np.zeros(3)], ord) == math.inf


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("name", REAL_NAMES)
def test_every_pattern_of_nan(name: str, ord: float) -> None:
    """Quiet and signalling, of either sign, with the smallest and the largest payload."""
    bits = BITS[DTYPES[name].itemsize]
    infinity = int(np.array([math.inf]).astype(DTYPES[name]).view(bits)[0])
    top = np.iinfo(bits).max // 2
    for magnitude in (infinity + 1, top, (infinity + top + 1) // 2):
        for sign in (0, top + 1):
            pattern = np.zeros(600, bits)
            pattern[333] = magnitude + sign
            norm = gradclip.tensor_norms([pattern.view(DTYPES[name])], ord)[0]
            assert math.isnan(norm), hex(magnitude + sign)


@pytest.mark.parametrize("name", COMPLEX_NAMES)
@pytest.mark.parametrize("ord", ORDS)
def test_complex_numbers_that_are_half_nan(name: str, ord: float) -> None:
    """hypot(inf, NaN) is inf by IEEE 754: there NaN would be lost."""
    for special in (complex(math.inf, math.nan), complex(math.nan, math.inf), complex(0, math.nan)):
        assert math.isnan(gradclip.tensor_norms([np.array([1, special, 2], DTYPES[name])], ord)[0])
    assert gradclip.tensor_norms([np.array([1, complex(0, -math.inf)], DTYPES[name])], ord)[0] == math.inf
