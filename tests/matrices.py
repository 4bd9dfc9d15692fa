"""The matrices of the suite, named once: dtypes, norms, sizes, layouts, threads, instruction sets."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gradclip import _core

Array: TypeAlias = npt.NDArray[Any]

ROW_BYTES = 512
TILE_BYTES = 16384

DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "complex64": np.dtype(np.complex64),
    "complex128": np.dtype(np.complex128),
}
NAMES = tuple(DTYPES)
# Unsigned integers of the same size, for the bit patterns of real numbers.
BITS: dict[int, np.dtype[np.unsignedinteger[Any]]] = {
    2: np.dtype(np.uint16),
    4: np.dtype(np.uint32),
    8: np.dtype(np.uint64),
}
REAL_NAMES = ("float16", "bfloat16", "float32", "float64")
COMPLEX_NAMES = ("complex64", "complex128")
PART = {"complex64": "float32", "complex128": "float64"}

# Relative error that a norm of this dtype may have: what every test of a finite norm uses.
TOLERANCE = {name: 1e-14 if name in ("float64", "complex128") else 1e-7 for name in NAMES}
# Half a unit in the last place, relative: what storing one normal number costs.
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
ROUNDING |= {name: ROUNDING[part] for name, part in PART.items()}
# Exponents of the smallest and of the largest number.
EXPONENTS = {"float16": (-24, 15), "bfloat16": (-133, 127), "float32": (-149, 127), "float64": (-1074, 1023)}
EXPONENTS |= {name: EXPONENTS[part] for name, part in PART.items()}

FAST_ORDS = (2, 1, math.inf)
SLOW_ORDS = (0.5, 1.5, 3, 7.25)
ORDS = FAST_ORDS + SLOW_ORDS

THREADS = (1, 2, 3, 8)
ISAS: tuple[str, ...] = tuple(_core.supported_isas())


def sizes(name: str) -> list[int]:
    """Numbers of elements around every boundary of blocks (64 bytes), rows and tiles."""
    item = DTYPES[name].itemsize
    block, row, tile = 64 // item, ROW_BYTES // item, TILE_BYTES // item
    around = {edge + d for edge in (block, row, 2 * row, tile - row, tile, 2 * tile) for d in (-1, 0, 1)}
    return sorted({0, 1, 2, 3} | around | {tile + row, 3 * tile + row + block + 3, 5 * tile - 2})


def values(name: str, shape: int | tuple[int, ...], seed: int, low: int = -4, high: int = 3) -> Array:
    """Random finite numbers whose exponents lie evenly between ``low`` and ``high``."""
    rng = np.random.default_rng(seed)
    count = math.prod(shape) if isinstance(shape, tuple) else shape
    parts = 2 * count if name in PART else count
    real = PART.get(name, name)
    numbers = np.ldexp(rng.uniform(1.0, 1.99, parts), rng.integers(low, high + 1, parts))
    numbers *= rng.choice((-1.0, 1.0), parts)
    # In two steps: a conversion from float64 to bfloat16 warns about nothing that float32 does not.
    with np.errstate(over="ignore", under="ignore"):
        typed = (
            numbers.astype(np.float32).astype(DTYPES[real]) if real == "bfloat16" else numbers.astype(real)
        )
    return typed.view(DTYPES[name]).reshape(shape)


def placed(array: Array, offset: int) -> tuple[Array, Array]:
    """A copy of a 1-D array at ``offset`` bytes from a 64-byte boundary, and the buffer around it."""
    buffer = np.full(array.nbytes + 256, 0xA5, np.uint8)
    start = -buffer.ctypes.data % 64 + offset
    copy: Array = np.ndarray(array.shape, array.dtype, buffer, start)
    copy[...] = array
    return copy, buffer


Make: TypeAlias = Callable[[np.dtype[Any], tuple[int, int, int]], tuple[Array, Array]]


def _over_bytes(dtype: np.dtype[Any], shape: tuple[int, ...], offset: int = 0) -> tuple[Array, Array]:
    """An array over a byte buffer with a pattern in it, so that a byte written in a gap shows."""
    buffer = np.full(offset + math.prod(shape) * dtype.itemsize + 64, 0xA5, np.uint8)
    return np.ndarray(shape, dtype, buffer, offset), buffer


def _permuted(
    dtype: np.dtype[Any], shape: tuple[int, int, int], axes: tuple[int, int, int]
) -> tuple[Array, Array]:
    inner = tuple(shape[i] for i in axes)
    array, buffer = _over_bytes(dtype, inner)
    return array.transpose(np.argsort(axes)), buffer


def _cut(*cut: slice, grow: tuple[int, int, int] = (1, 1, 1), pad: tuple[int, int, int] = (0, 0, 0)) -> Make:
    def make(dtype: np.dtype[Any], shape: tuple[int, int, int]) -> tuple[Array, Array]:
        outer = tuple(n * g + p for n, g, p in zip(shape, grow, pad, strict=True))
        array, buffer = _over_bytes(dtype, outer)
        return array[cut], buffer

    return make


def _field(dtype: np.dtype[Any], shape: tuple[int, int, int]) -> tuple[Array, Array]:
    record = np.dtype({"names": ["pad", "x"], "formats": [np.uint8, dtype], "offsets": [0, 1]})
    buffer = np.full(math.prod(shape) * record.itemsize, 0xA5, np.uint8)
    return np.ndarray(shape, record, buffer)["x"], buffer


_ALL = slice(None)
_BACK = slice(None, None, -1)
LAYOUTS: dict[str, Make] = {
    "C": _over_bytes,
    "F": lambda dtype, shape: _permuted(dtype, shape, (2, 1, 0)),
    "axes 1 2 0": lambda dtype, shape: _permuted(dtype, shape, (1, 2, 0)),
    "axes 0 2 1": lambda dtype, shape: _permuted(dtype, shape, (0, 2, 1)),
    "all axes reversed": _cut(_BACK, _BACK, _BACK),
    "middle axis reversed": _cut(_ALL, _BACK, _ALL),
    "last axis reversed": _cut(_ALL, _ALL, _BACK),
    "every second": _cut(_ALL, _ALL, slice(None, None, 2), grow=(1, 1, 2)),
    "every third, reversed": _cut(_ALL, _ALL, slice(None, None, -3), grow=(1, 1, 3)),
    "every second plane": _cut(slice(1, None, 2), _ALL, _ALL, grow=(2, 1, 1)),
    "padded rows": _cut(_ALL, _ALL, slice(None, -3), pad=(0, 0, 3)),
    "padded planes": _cut(_ALL, slice(1, None), _ALL, pad=(0, 1, 0)),
    "padded everywhere, reversed": _cut(slice(-1, 0, -1), slice(-1, 1, -1), slice(3, None), pad=(1, 2, 3)),
    "one byte off": lambda dtype, shape: _over_bytes(dtype, shape, 1),
    "field of a record": _field,
}


def lay_out(layout: str, array: Array) -> tuple[Array, Array]:
    """A copy of a 3-D array in the named layout, and the whole buffer that it lies in."""
    a, b, c = array.shape
    view, buffer = LAYOUTS[layout](array.dtype, (a, b, c))
    view[...] = array
    return view, buffer
