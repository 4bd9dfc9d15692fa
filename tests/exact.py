"""Norms and clips computed exactly, or to far more digits than float64 has: the reference of the suite."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import mpmath  # type: ignore[import-untyped]
import numpy as np

from matrices import Array

_PRECISION = 240  # bits


def _parts(array: Array) -> Array:
    """Elements as float64 (complex128), which is exact for every dtype."""
    flat = array.reshape(-1)
    return flat.astype(np.complex128 if flat.dtype.kind == "c" else np.float64)


def _exact_sum(magnitudes: Array, power: int) -> Fraction:
    """The sum of the first or second powers of float64 numbers, as integers."""
    # Constant arrays are long, so every distinct number is looked at once.
    distinct, counts = np.unique(magnitudes, return_counts=True)
    mantissas, exponents = np.frexp(distinct)
    integers = np.ldexp(mantissas, 53).astype(np.int64).tolist()
    lowest = int(exponents.min(initial=0))
    total = 0
    for m, e, n in zip(integers, exponents.tolist(), counts.tolist(), strict=True):
        total += (n * m**power) << (power * (e - lowest))
    return Fraction(total) * Fraction(2) ** (power * (lowest - 53))


def _mpf(x: Fraction) -> Any:
    return mpmath.mpf(x.numerator) / x.denominator


def exact_norm(arrays: Array | list[Array], ord: float = 2) -> Any:
    """The norm over all elements of all arrays (finite ones) as an ``mpmath.mpf``.

    Exact before the last root for ``ord=2`` and for real numbers under 1 and inf; otherwise by
    NumPy's longdouble, with 64 bits or more and exponents beyond those of float64: about 1e-18.
    """
    flat = [_parts(a) for a in (arrays if isinstance(arrays, list) else [arrays])]
    with mpmath.workprec(_PRECISION):
        if ord == 2:
            return mpmath.sqrt(
                _mpf(sum((_exact_sum(np.abs(p.view(np.float64)), 2) for p in flat), Fraction(0)))
            )
        if ord == 1 and not any(p.dtype.kind == "c" for p in flat):
            return _mpf(sum((_exact_sum(np.abs(p), 1) for p in flat), Fraction(0)))
        wide = [np.hypot(p.real.astype(np.longdouble), p.imag.astype(np.longdouble)) for p in flat]
        m = np.concatenate([np.zeros(1, np.longdouble), *wide])
        largest = m.max()
        if largest == 0 or math.isinf(ord):
            return _of_longdouble(largest)
        distinct, counts = np.unique(m / largest, return_counts=True)
        with np.errstate(under="ignore"):
            total = (counts * distinct ** np.longdouble(ord)).sum()
        return _of_longdouble(largest) * _of_longdouble(total) ** (1 / mpmath.mpf(ord))


def _of_longdouble(x: Any) -> Any:
    """The same number: a longdouble is cut into float64 pieces that add up to it."""
    mantissa, exponent = np.frexp(x)
    high = float(mantissa)
    return mpmath.ldexp(mpmath.mpf(high) + mpmath.mpf(float(mantissa - np.longdouble(high))), int(exponent))


def relative_error(measured: float, exact: Any) -> float:
    """``abs(measured - exact) / exact``; 0 when both are 0 or when both are beyond float64.

    Below 2^-1022 float64 has fewer bits, and rounding to it may cost 2^-1075 that nobody can avoid.
    """
    with mpmath.workprec(_PRECISION):
        if exact == 0:
            return 0.0 if measured == 0 else math.inf
        # Half a unit above the largest float64 is where rounding to nearest gives infinity.
        if exact >= mpmath.mpf(2) ** 1024 * (1 - mpmath.mpf(2) ** -54):
            return 0.0 if measured == math.inf else math.inf
        if not math.isfinite(measured):
            return math.inf
        unavoidable = mpmath.mpf(2) ** -1075 if exact < mpmath.mpf(2) ** -1022 else 0
        return float(max(0, abs(mpmath.mpf(measured) - exact) - unavoidable) / exact)


def scaled(array: Array, factor: float) -> Array:
    """What an array becomes when a clip multiplies it by ``factor`` (coefficient over grad_scale).

    float64: one product. Narrower: the float32 product with the factor rounded to float32, rounded to
    the dtype; when the rounded factor is not a normal float32, the float64 product, rounded to float32
    and then to the dtype.
    """
    with np.errstate(all="ignore"):
        if array.dtype.kind == "c":
            parts = array.reshape(-1).view(np.float32 if array.dtype.itemsize == 8 else np.float64)
            return scaled(parts, factor).view(array.dtype).reshape(array.shape)
        if array.dtype == np.float64:
            return array * np.float64(factor)
        narrow = np.float32(factor)
        wide = array.astype(np.float32)
        normal = np.isfinite(narrow) and abs(narrow) >= np.finfo(np.float32).tiny
        if normal or factor == 0 or not math.isfinite(factor):
            product = wide * narrow
        else:
            product = (wide.astype(np.float64) * np.float64(factor)).astype(np.float32)
        return product.astype(array.dtype)


def scaled_down(array: Array, factor: float) -> Array:
    """The same with ``rounding="down"``, as docs/reduction-order.md says; no factor is negative."""
    with np.errstate(all="ignore"):
        if array.dtype.kind == "c":
            parts = array.reshape(-1).view(np.float32 if array.dtype.itemsize == 8 else np.float64)
            return scaled_down(parts, factor).view(array.dtype).reshape(array.shape)
        lower = np.nextafter(np.float64(factor), 0) if factor >= 2.0**-1000 else np.float64(0)
        if array.dtype == np.float64:
            return _not_above(array * lower, array)
        wide = array.astype(np.float32)
        narrow = np.float32(factor)
        normal = np.isfinite(narrow) and narrow >= np.finfo(np.float32).tiny
        if (normal or factor == 0) and factor <= 1:
            narrow = np.nextafter(narrow, np.float32(0)) if float(narrow) > factor else narrow
            product = _not_above(wide * np.nextafter(narrow, np.float32(0)), wide)
        else:
            product = _cut(_not_above(wide.astype(np.float64) * lower, wide.astype(np.float64)), np.float32)
        return _cut(product, array.dtype)


def _not_above(product: Array, of: Array) -> Array:
    """Products that were rounded to nearest: one number less where they are subnormal, or too large."""
    is_less = (np.abs(product) < np.finfo(product.dtype).tiny) | (np.isinf(product) & np.isfinite(of))
    return _less(product, is_less & (product != 0))


def _cut(numbers: Array, dtype: Any) -> Array:
    """Rounded towards zero."""
    nearest = numbers.astype(dtype)
    return _less(nearest, np.abs(nearest.astype(np.float64)) > np.abs(numbers.astype(np.float64)))


def _less(numbers: Array, where: Array) -> Array:
    """The next number towards zero."""
    bits = numbers.view(f"u{numbers.dtype.itemsize}")
    return np.where(where, bits - 1, bits).astype(bits.dtype).view(numbers.dtype)


# --- Pairs ----------------------------------------------------------------------------------------------


def _wide_parts(array: Array) -> Array:
    """The real numbers of an array as float64, in C order; those of a complex one side by side."""
    flat = array.reshape(-1)
    return flat.astype(np.complex128).view(np.float64) if flat.dtype.kind == "c" else flat.astype(np.float64)


def pair_model(x: Array, y: Array, factor: float, sign_factor: float = 0.0) -> Array:
    """``x + factor * y + sign_factor * sign(y)`` in float64, as docs/reduction-order.md says."""
    with np.errstate(all="ignore"):
        z, beside = _wide_parts(x), _wide_parts(y)
        if factor:
            z = z + factor * beside
        if sign_factor:
            z = z + np.where(beside > 0, sign_factor, np.where(beside < 0, -sign_factor, beside))
        return (z.view(np.complex128) if x.dtype.kind == "c" else z).reshape(x.shape)


def _narrowed(z: Array, dtype: Any) -> Array:
    """float64 numbers in a real dtype: by way of float32, to nearest."""
    with np.errstate(all="ignore"):
        return z if dtype == np.float64 else z.astype(np.float32).astype(dtype)


def _real(dtype: Any) -> Any:
    return {"complex64": np.dtype(np.float32), "complex128": np.dtype(np.float64)}.get(dtype.name, dtype)


def written_from(z: Array, factor: Any, dtype: Any, rounding: str = "nearest") -> Array:
    """What memory becomes of what was made of a pair, ``factor`` times."""
    parts = _wide_parts(z)
    if rounding == "down":
        product = parts if factor == 1.0 else scaled_down(parts, float(factor))
        if _real(dtype) != np.float64:
            product = _cut(_cut(product, np.float32), _real(dtype))
        written: Array = product
    else:
        written = _narrowed(parts if factor == 1.0 else parts * np.float64(factor), _real(dtype))
    typed: Array = written.view(dtype)
    return typed.reshape(z.shape)


def written_beside(z: Array, factor: Any, base: Array, rounding: str = "nearest") -> Array:
    """What memory becomes of an update: ``base + factor * z``."""
    parts, beside, real = _wide_parts(z), _wide_parts(base), _real(base.dtype)
    if rounding == "nearest":
        written = _narrowed(beside + parts * np.float64(factor), real)
    else:
        steps = scaled_down(parts, float(factor))
        written = _narrowed(beside + steps, real)
        moved = written.astype(np.float64) - beside
        is_far = (moved != 0) & ~(np.abs(moved) < np.abs(steps))
        towards = beside.astype(real)
        nearer = np.array([_next_to(a, b) for a, b in zip(written, towards, strict=True)], real)
        written = np.where(is_far, nearer, written).astype(real)
    return written.view(base.dtype).reshape(z.shape)


def _next_to(number: Any, towards: Any) -> Any:
    """The next number of a dtype on the way, which NumPy does not know of bfloat16."""
    if number == towards:
        return number
    bits = np.array([number]).view(f"u{number.dtype.itemsize}")
    if number == 0:
        smallest = np.array([1], bits.dtype).view(number.dtype)[0]
        return smallest if towards > number else -smallest
    outwards = (towards > number) == (number > 0)
    return (bits + 1 if outwards else bits - 1).astype(bits.dtype).view(number.dtype)[0]
