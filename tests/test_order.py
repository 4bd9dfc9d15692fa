"""The bits of every norm are those of docs/reduction-order.md, which order_model.py follows."""

from __future__ import annotations

import math

import numpy as np
import pytest

import gradclip
import order_model
from exact import exact_norm, relative_error
from gradclip import _core
from matrices import (
    COMPLEX_NAMES,
    DTYPES,
    EXPONENTS,
    FAST_ORDS,
    ISAS,
    LAYOUTS,
    NAMES,
    REAL_NAMES,
    SLOW_ORDS,
    TILE_BYTES,
    TOLERANCE,
    Array,
    lay_out,
    sizes,
    values,
)


def _orders(name: str) -> tuple[float, ...]:
    """The norms whose every bit the page fixes."""
    return (2,) if name in COMPLEX_NAMES else FAST_ORDS


def _assert_bits(arrays: list[Array], name: str) -> None:
    for ord in _orders(name):
        measured = gradclip.tensor_norms(arrays, ord).tolist()
        for array, norm in zip(arrays, measured, strict=True):
            expected = order_model.tensor_norm(array, ord)
            assert norm == expected, (
                f"{name}, {array.size} elements, ord {ord}: {norm.hex()} != {expected.hex()}"
            )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NAMES)
def test_sizes_around_every_boundary(name: str, isa: str) -> None:
    _core.set_isa(isa)
    _assert_bits([values(name, n, seed=n) for n in sizes(name)], name)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NAMES)
def test_values_of_every_exponent(name: str, isa: str) -> None:
    """Windows of 6 exponents from the smallest number to the largest: tiles done again and not."""
    _core.set_isa(isa)
    first, last = EXPONENTS[name]
    step = max(1, (last - first) // 40)
    n = TILE_BYTES // DTYPES[name].itemsize + 77
    windows = range(first, last - 5, step)
    starts = [*windows, last - 5]
    _assert_bits([values(name, n, seed=e - first, low=e, high=e + 5) for e in starts], name)


@pytest.mark.parametrize("name", ["bfloat16", "float32", "float64"])  # float16 is far from the edges
def test_tiles_at_the_edge_of_done_again(name: str) -> None:
    """Sums just below, at and above the limits 2^-100 and 2^-900, and where sums overflow."""
    wide = name == "float64"
    low, high = EXPONENTS[name]
    exponents = (
        [-450, -451, -449, -900, -899, 511, 512, 505] if wide else [-50, -51, -49, -100, 63, 64, 57, 58]
    )
    arrays = []
    for e in exponents:
        if not low < e < high:
            continue
        for count in (1, 2, 3, 4, TILE_BYTES // DTYPES[name].itemsize):
            for mantissa in (1.0, 1.5, 1.9921875):
                arrays.append(np.full(count, mantissa * 2.0**e).astype(np.float64).astype(DTYPES[name]))
    assert arrays
    _assert_bits(arrays, name)


@pytest.mark.parametrize("name", REAL_NAMES)
def test_tiles_of_very_different_size(name: str) -> None:
    """Step 4 over tiles whose sums are up to 2^4000 apart: bins are dropped, ties are rounded."""
    low, high = EXPONENTS[name]
    n = TILE_BYTES // DTYPES[name].itemsize
    rng = np.random.default_rng(5)
    arrays = []
    for trial in range(40):
        exponents = rng.integers(low, high - 4, size=rng.integers(2, 7))
        tiles = [
            values(name, n, seed=100 * trial + i, low=int(e), high=int(e)) for i, e in enumerate(exponents)
        ]
        arrays.append(np.concatenate(tiles)[: -int(rng.integers(1, n))])
    _assert_bits(arrays, name)


@pytest.mark.parametrize("shift", [0, 1, 31, 32, 33, 63, -1, -31, -32, -64])
@pytest.mark.parametrize("below", [0, 26, 30, 40, 47, 48, 49, 52, 64, 80, 100])
def test_ties_broken_by_a_distant_tile(shift: int, below: int) -> None:
    """One tile is a power of 2, one exactly half its last bit, a third far below: kept, or dropped."""
    n = TILE_BYTES // 8
    array = np.zeros(3 * n)
    # 1-norms: tile sums are the elements themselves.
    array[0], array[n], array[2 * n] = (math.ldexp(1.0, shift - d) for d in (0, 53, 53 + below))
    assert gradclip.tensor_norms([array], 1)[0] == order_model.tensor_norm(array, 1)
    arrays = [array[i * n : i * n + 1] for i in range(3)]
    assert gradclip.global_norm(arrays, 1) == order_model.global_norm(arrays, 1)


@pytest.mark.parametrize("ord", [2, 1])
@pytest.mark.parametrize("name", REAL_NAMES)
def test_global_norm(name: str, ord: float) -> None:
    low, high = EXPONENTS[name]
    arrays = [values(name, n, seed=n, low=max(low, -140), high=min(high - 1, 120)) for n in sizes(name)]
    assert gradclip.global_norm(arrays, ord) == order_model.global_norm(arrays, ord)


def test_global_norm_of_every_dtype_together() -> None:
    arrays = [values(name, n, seed=n, low=-20, high=10) for name in NAMES for n in sizes(name)]
    assert gradclip.global_norm(arrays) == order_model.global_norm(arrays)
    huge = [*arrays, values("float64", 5000, seed=1, low=500, high=1020)]
    assert gradclip.global_norm(huge) == order_model.global_norm(huge)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_layouts_are_read_in_the_order_of_addresses(name: str, layout: str) -> None:
    views = [
        lay_out(layout, values(name, shape, seed=3))[0] for shape in ((3, 5, 7), (11, 40, 53), (1, 129, 33))
    ]
    _assert_bits(views, name)


def test_axes_of_equal_stride_and_of_stride_0() -> None:
    row = values("float32", 4001, seed=8)
    column = np.ascontiguousarray(row[:300])[:, None]
    broadcast = [
        np.broadcast_to(row, (7, 4001)),
        np.broadcast_to(column, (300, 50)),
        np.broadcast_to(row[0], (9, 9)),
    ]
    windows = np.lib.stride_tricks.as_strided(row, (40, 30), (4, 4), writeable=False)
    backwards = np.lib.stride_tricks.as_strided(row[100:], (40, 3, 30), (4, 8, -4), writeable=False)
    _assert_bits([*broadcast, windows, backwards], "float32")


@pytest.mark.parametrize("ord", [*SLOW_ORDS, 20, 0.1])
@pytest.mark.parametrize("name", NAMES)
def test_other_p_is_close(name: str, ord: float) -> None:
    arrays = [values(name, n, seed=n, low=-10, high=8) for n in (1, 2, 31, 32, 33, 65, 513, 5000)]
    for array, norm in zip(arrays, gradclip.tensor_norms(arrays, ord).tolist(), strict=True):
        assert norm == pytest.approx(order_model.tensor_norm(array, ord), rel=1e-13 * max(1, 1 / ord), abs=0)


@pytest.mark.parametrize("ord", [1, math.inf])
@pytest.mark.parametrize("name", COMPLEX_NAMES)
def test_magnitudes_of_complex_numbers_are_close(name: str, ord: float) -> None:
    arrays = [values(name, n, seed=n, low=-10, high=8) for n in (1, 2, 31, 32, 33, 65, 513, 5000)]
    for array, norm in zip(arrays, gradclip.tensor_norms(arrays, ord).tolist(), strict=True):
        assert norm == pytest.approx(order_model.tensor_norm(array, ord), rel=1e-13, abs=0)


@pytest.mark.parametrize("ord", [2, 1, math.inf, 3])
@pytest.mark.parametrize("name", NAMES)
def test_the_model_itself_is_right(name: str, ord: float) -> None:
    array = values(name, 6000, seed=2, low=-30 if "16" not in name else -12, high=10)
    error = relative_error(order_model.tensor_norm(array, ord), exact_norm(array, ord))
    assert error < TOLERANCE[name]
