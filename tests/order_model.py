"""The reduction order a second time: docs/reduction-order.md in plain NumPy and Python integers.

Written from that page alone, never from the C++ code, so that the two can disagree. Sums are kept as
fractions (which hold any exponent), or as the floats inf and NaN.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np

from matrices import BITS, ROW_BYTES, TILE_BYTES, Array

Sum: TypeAlias = Fraction | float  # a float only when it is inf or NaN

ROWS, BLOCKS = TILE_BYTES // ROW_BYTES, 8


def in_address_order(array: Array) -> Array:
    """The elements by increasing address: axes by decreasing stride, every axis upwards."""
    upwards = array[tuple(slice(None, None, -1 if stride < 0 else 1) for stride in array.strides)]
    axes = sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))
    return upwards.transpose(axes).reshape(-1)


def _parts(array: Array) -> Array:
    """Real numbers in the order in which they are summed."""
    flat = np.ascontiguousarray(in_address_order(array))
    if flat.dtype.kind == "c":
        return flat.view(np.float32 if flat.dtype.itemsize == 8 else np.float64)
    return flat


def _tile(elements: Array, ord: float, work: type[np.floating[Any]]) -> float:
    """Steps 1 to 3 for one tile, given as (rows, blocks, elements of a block)."""
    x = elements.astype(work)
    x = np.abs(x) if ord == 1 else x * x
    if elements.dtype.itemsize == 2:
        x = x[..., 0::2] + x[..., 1::2]
    b = [x[:, i] for i in range(BLOCKS)]
    rows = ((b[0] + b[1]) + (b[2] + b[3])) + ((b[4] + b[5]) + (b[6] + b[7]))
    accumulators = np.zeros(rows.shape[1], np.float64)
    for row in rows:
        accumulators = accumulators + row.astype(np.float64)
    while len(accumulators) > 1:
        half = len(accumulators) // 2
        accumulators = accumulators[:half] + accumulators[half:]
    return float(accumulators[0])


def tile_sum(elements: Array, ord: float) -> Sum:
    """The sum of one tile, done again where it cannot be trusted."""
    if np.isnan(elements).any():
        return math.nan
    if np.isinf(elements).any():
        return math.inf
    wide = elements.dtype.itemsize == 8
    s = _tile(elements, ord, np.float64 if wide else np.float32)
    if math.isfinite(s) and s >= (2.0**-900 if wide else 2.0**-100):
        return Fraction(s)
    if not elements.any():
        return Fraction(0)
    if not wide:
        return Fraction(_tile(elements, ord, np.float64))
    k = max(-1000, min(1000, math.frexp(float(np.abs(elements).max()))[1]))
    s = _tile(np.ldexp(elements, -k), ord, np.float64)
    return Fraction(s) * Fraction(2) ** (k if ord == 1 else 2 * k)


def floor_log2(x: Fraction) -> int:
    guess = x.numerator.bit_length() - x.denominator.bit_length()
    return guess if x >= Fraction(2) ** guess else guess - 1


def add_exactly(sums: list[Sum]) -> Sum:
    """Step 4: bins of 32 bits; the four from the highest one touched downwards count."""
    special = [s for s in sums if isinstance(s, float)]
    if special:
        return math.nan if any(math.isnan(s) for s in special) else math.inf
    finite = [s for s in sums if isinstance(s, Fraction) and s > 0]
    if not finite:
        return Fraction(0)
    top = max(floor_log2(s) // 32 for s in finite)
    unit = Fraction(2) ** (32 * (top - 3))
    total = sum(math.floor(s / unit) for s in finite) * unit
    last_bit = Fraction(2) ** (floor_log2(total) - 52)
    return round(total / last_bit) * last_bit  # of a fraction: to nearest, ties to even


def root(s: Sum) -> float:
    """The correctly rounded square root; rounded once more where it is subnormal."""
    if isinstance(s, float) or s == 0:
        return float(s)
    last_bit = Fraction(2) ** (floor_log2(s) // 2 - 52)
    square = s / last_bit**2
    down = math.isqrt(math.floor(square))
    up = square > Fraction(2 * down + 1, 2) ** 2  # never equal: that has an odd number of quarters
    return to_float((down + up) * last_bit)


def to_float(s: Sum) -> float:
    try:
        return float(s)
    except OverflowError:
        return math.inf


def tensor_sum(array: Array, ord: float) -> Sum:
    """Steps 1 to 4 for the 2-norm and the 1-norm."""
    parts = _parts(array)
    per_tile = TILE_BYTES // parts.dtype.itemsize
    count = -(-parts.size // per_tile)
    padded = np.zeros(count * per_tile, parts.dtype)
    padded[: parts.size] = parts
    tiles = padded.reshape(count, ROWS, BLOCKS, per_tile // (ROWS * BLOCKS))
    with np.errstate(all="ignore"):
        return add_exactly([tile_sum(tile, ord) for tile in tiles])


def maximum(array: Array) -> float:
    """The maximum norm: bit patterns without their sign, compared as integers."""
    parts = _parts(array)
    if parts.size == 0:
        return 0.0
    bits = BITS[parts.dtype.itemsize]
    without_sign = parts.view(bits) & np.array(np.iinfo(bits).max >> 1, bits)
    return float(without_sign.max(keepdims=True).view(parts.dtype)[0])


def _magnitudes(elements: Array) -> tuple[Array, float]:
    m = np.hypot(elements.real, elements.imag) if elements.dtype.kind == "c" else np.abs(elements)
    return m, math.nan if np.isnan(m).any() else float(m.max(initial=0.0))


def slow_norm(array: Array, ord: float) -> float:
    """Any other p, and complex numbers with ``ord != 2``. ``pow`` is NumPy's: not the last bits."""
    elements = in_address_order(array)
    with np.errstate(all="ignore"):
        wide = elements.astype(np.complex128 if elements.dtype.kind == "c" else np.float64)
        m, largest = _magnitudes(wide)
        if not math.isfinite(largest) or largest == 0 or math.isinf(ord):
            return largest
        shift = 600 if largest < 2.0**-900 else 0
        if shift:
            m, largest = _magnitudes(wide * 2.0**shift)
        terms = m / largest if ord == 1 else (m / largest) ** ord
        # accumulate adds one after the other, where sum() adds in pairs.
        sums = [float(np.add.accumulate(terms[i : i + 32])[-1]) for i in range(0, len(terms), 32)]
        s = to_float(add_exactly([Fraction(x) for x in sums]))
        return float(np.ldexp(largest * (s if ord == 1 else np.float64(s) ** (1 / ord)), -shift))


def tensor_norm(array: Array, ord: float = 2) -> float:
    if array.dtype.kind != "c" and math.isinf(ord):
        return maximum(array)
    if ord == 2:
        return root(tensor_sum(array, 2))
    if ord == 1 and array.dtype.kind != "c":
        return to_float(tensor_sum(array, 1))
    return slow_norm(array, ord)


def global_norm(arrays: list[Array], ord: float = 2) -> float:
    """Steps 5 and 6, for ``ord`` 2 and, of real arrays, 1."""
    total = add_exactly([tensor_sum(array, ord) for array in arrays])
    return root(total) if ord == 2 else to_float(total)
