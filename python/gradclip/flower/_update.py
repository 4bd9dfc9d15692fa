"""One update as Flower carries it: arrays that ``numpy.save`` wrote, clipped in such bytes.

Nothing is deserialised: what the server sent is read where it lies; what the client sends is copied once,
clipped in the copy, and the copy is sent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from io import BytesIO
from logging import INFO, WARNING
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from flwr.common import log

from gradclip._api import clip_difference_
from gradclip._result import NonFiniteGradientError, count_of

__all__ = ["Clipped", "checked_norm", "clip_update", "floating", "view", "views"]

_NPY_1_0 = b"\x93NUMPY\x01\x00"  # and two bytes: the length of the text that follows
_SHOWN = 5


class Clipped(NamedTuple):
    """What has become of an update.

    Attributes:
        arrays: The arrays that have changed, serialised, by their names: none where nothing was clipped.
        norm_bit: Whether the update was clipped, as Flower's adaptive clipping counts it.
    """

    arrays: dict[str, bytes]
    norm_bit: bool


def checked_norm(who: str, clipping_norm: Any) -> float:
    """The clipping norm, if it is one."""
    if isinstance(clipping_norm, bool) or not isinstance(clipping_norm, Real):
        raise TypeError(f"{who}: clipping_norm: expected a number, got {type(clipping_norm).__name__}")
    norm = float(clipping_norm)
    if not 0 < norm < math.inf:
        raise ValueError(f"{who}: clipping_norm: expected a positive finite number, got {norm}")
    return norm


@lru_cache(maxsize=4096)
def _layout(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    # Reading a header takes 15 µs, and every array of a round comes with the same one.
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(BytesIO(header[8:]))
    if dtype.hasobject or any(length < 0 for length in shape):  # objects are pointers, which the sender chose
        raise ValueError(f"shape {shape}, dtype {dtype}")
    return shape, is_fortran, dtype


def view(who: str, name: str, data: bytes | memoryview) -> npt.NDArray[Any]:
    """The array that ``numpy.save`` wrote into these bytes, in them: writable where they are."""
    try:
        if data[:8] != _NPY_1_0:  # records with long names
            return np.asarray(np.lib.format.read_array(BytesIO(data), allow_pickle=False))
        offset = 10 + int.from_bytes(data[8:10], "little")
        shape, is_fortran, dtype = _layout(bytes(data[:offset]))
        return np.ndarray(shape, dtype, data, offset, order="F" if is_fortran else "C")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{who}: {name!r}: expected an array as numpy.save writes it, got: {error}"
        ) from None


def views(who: str, arrays: Mapping[str, bytes]) -> dict[str, npt.NDArray[Any]]:
    """All of them, to be read."""
    return {name: view(who, name, data) for name, data in arrays.items()}


def floating(array: npt.NDArray[Any]) -> bool:
    """Whether it belongs to the update: integers (counters of batches) and booleans do not."""
    return array.dtype.kind not in "iub"


def clip_update(
    who: str, new: Mapping[str, bytes], base: Mapping[str, npt.NDArray[Any]], clipping_norm: float
) -> Clipped:
    """Clip what a client has made of the arrays that it was sent.

    The exact L2 norm of ``new - base`` is at most ``clipping_norm`` afterwards. Arrays of integers and
    booleans are left as they are, and reported.

    Args:
        who: For messages: who clips.
        new: Serialised arrays of the client by their names.
        base: Arrays that it was sent: as many, by the same names, or in the same order.
        clipping_norm: The bound.

    Raises:
        NonFiniteGradientError: The update holds a NaN or an infinity.
        TypeError: A dtype that has no norm.
        ValueError: Another number of arrays, or another shape.
    """
    if len(new) != len(base):
        raise ValueError(
            f"{who}: expected {count_of(len(base), 'array')}, as the server sent, got {len(new)}"
        )
    if new.keys() != base.keys():
        base = dict(zip(new, base.values(), strict=True))
    files: dict[str, BytesIO] = {}
    arrays: dict[str, npt.NDArray[Any]] = {}
    origins: dict[str, npt.NDArray[Any]] = {}
    left = []
    for name, data in new.items():
        array, origin = view(who, name, data), base[name]
        if array.shape != origin.shape:
            raise ValueError(
                f"{who}: {name!r}: expected shape {origin.shape}, as the server sent it, got {array.shape}"
            )
        if not floating(array):
            left.append(f"{name!r} ({array.dtype})")
            continue
        if not floating(origin):
            raise TypeError(
                f"{who}: {name!r}: expected {origin.dtype}, as the server sent it, got {array.dtype}"
            )
        files[name], arrays[name], origins[name] = _copied(who, name, data, array, origin)
    if left:
        log(WARNING, "%s: not clipped, for they are no floating-point arrays: %s", who, ", ".join(left))
    if not arrays:
        log(WARNING, "%s: no floating-point array in the update, so nothing is clipped", who)
        return Clipped({}, False)
    try:
        result = clip_difference_(arrays, origins, clipping_norm, rounding="down")
    except NonFiniteGradientError as error:
        raise _refused(who, error) from None
    log(INFO, "%s: the update has norm %.4g, its bound is %.4g", who, result.total_norm, clipping_norm)
    arrays.clear()  # no view is left when the bytes are handed over
    changed = {name: file.getvalue() for name, file in files.items()} if result.clipped else {}
    return Clipped(changed, result.clipped)


def _copied(
    who: str, name: str, data: bytes, array: npt.NDArray[Any], origin: npt.NDArray[Any]
) -> tuple[BytesIO, npt.NDArray[Any], npt.NDArray[Any]]:
    """A copy to write to, the array in it, and what it was, of the dtype that NumPy subtracts them in."""
    common = np.result_type(array.dtype, origin.dtype)
    if array.dtype == common and data[:8] == _NPY_1_0:
        file = BytesIO(data)
    else:
        file = BytesIO()
        np.save(file, array.astype(common))
    # The memory of the file itself, which getvalue() hands over.
    return file, view(who, name, file.getbuffer()), origin.astype(common, copy=False)


def _refused(who: str, error: NonFiniteGradientError) -> NonFiniteGradientError:
    found: Iterable[str] = [
        f"{name!r} holds {nan} NaN and {inf} inf" for name, nan, inf in error.entries[:_SHOWN]
    ]
    if len(error.entries) > _SHOWN:
        found = [*found, f"and {count_of(len(error.entries) - _SHOWN, 'more array')}"]
    text = "; ".join(found) or "its norm is beyond float64"
    return NonFiniteGradientError(
        f"{who}: expected an update of finite elements: {text}", error.entries, error.norms
    )
