"""DLPack capsules that lie, made by hand: refused by name before a pointer is followed, or read right."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gradclip

_FLOAT, _INT, _BFLOAT, _COMPLEX = 2, 0, 4, 5
_CPU = 1


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _Type(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


def _numbers(values: tuple[int, ...] | None) -> Any:
    return None if values is None else (ctypes.c_int64 * max(len(values), 1))(*values)


class Forged:
    """An array by DLPack with everything given; the memory behind it is that of ``array``."""

    def __init__(self, **changes: Any) -> None:
        self.array = np.arange(1.0, 13.0)
        given: dict[str, Any] = {
            "shape": (3, 4),
            "strides": None,
            "data": self.array.ctypes.data,
            "offset": 0,
            "dtype": (_FLOAT, 64, 1),
            "device": (_CPU, 0),
            "name": b"dltensor",
            "version": None,
            "flags": 0,
        }
        given |= changes
        given.setdefault("ndim", len(given["shape"]) if given["shape"] is not None else 2)
        self._shape, self._strides = _numbers(given["shape"]), _numbers(given["strides"])
        tensor = _Tensor(
            given["data"],
            _Device(*given["device"]),
            given["ndim"],
            _Type(*given["dtype"]),
            self._shape,
            self._strides,
            given["offset"],
        )
        if given["version"] is None:
            self._managed: Any = _Managed(tensor, None, None)
        else:
            self._managed = _Versioned(*given["version"], None, None, given["flags"], tensor)
            if given["name"] == b"dltensor":
                given["name"] = b"dltensor_versioned"
        self._name, self._device = given["name"], given["device"]

    def __dlpack_device__(self) -> tuple[int, int]:
        return (_CPU, 0)

    def __dlpack__(self, **_: Any) -> Any:
        return _new_capsule(ctypes.addressof(self._managed), self._name, None)


_BIG = 2**62

MALFORMED: dict[str, dict[str, Any]] = {
    "ndim -1": {"ndim": -1},
    "ndim the least": {"ndim": -(2**31)},
    "ndim beyond 64": {"ndim": 65, "shape": (1,) * 65},
    "ndim the greatest": {"ndim": 2**31 - 1},
    "no shape": {"shape": None},
    "no shape, with strides": {"shape": None, "strides": (4, 1)},
    "a negative axis": {"shape": (-4,)},
    "a negative axis beside": {"shape": (3, -4)},
    "two negative axes": {"shape": (-3, -4)},
    "the least axis": {"shape": (-(2**63),)},
    "a negative axis, strided": {"shape": (3, -4), "strides": (4, 1)},
    "a size that overflows": {"shape": (_BIG, 4)},
    "bytes that overflow": {"shape": (2**60 + 1,)},
    "a size that wraps to a small one": {"shape": (2**32, 2**32)},
    "a size that wraps, strided": {"shape": (2**61, 8), "strides": (0, 0)},
    "a stride that overflows in bytes": {"shape": (3, 4), "strides": (2**61, 1)},
    "strides whose reach overflows": {"shape": (2**20, 4), "strides": (2**50, 1)},
    "reaches that overflow together": {"shape": (2, 2), "strides": (2**59, 2**59 + 2**58)},
    "a negative stride that overflows": {"shape": (3, 4), "strides": (-(2**61), 1)},
    "a stride below memory": {"shape": (3, 4), "strides": (-(2**58), 1)},
    "an address that overflows": {"shape": (2,), "data": 2**63 - 8},
    "an address in the upper half": {"shape": (2,), "data": 2**64 - 4096},
    "an offset that overflows": {"shape": (2,), "offset": 2**64 - 8},
    "no memory": {"data": None},
    "no memory but an offset": {"data": None, "offset": 4096},
}
WRONG: dict[str, dict[str, Any]] = {
    "lanes 0": {"dtype": (_FLOAT, 64, 0)},
    "lanes 2": {"dtype": (_FLOAT, 32, 2)},
    "odd bits": {"dtype": (_FLOAT, 33, 1)},
    "no bits": {"dtype": (_FLOAT, 0, 1)},
    "integers": {"dtype": (_INT, 64, 1)},
    "bfloat of 32 bits": {"dtype": (_BFLOAT, 32, 1)},
    "complex of 32 bits": {"dtype": (_COMPLEX, 32, 1)},
    "an unknown code": {"dtype": (99, 64, 1)},
    "another name": {"name": b"tensor"},
    "a consumed one": {"name": b"used_dltensor"},
    "a consumed one with a version": {"name": b"used_dltensor_versioned", "version": (1, 0)},
}
ELSEWHERE: dict[str, dict[str, Any]] = {
    "another device than it said": {"device": (2, 0)},
    "a device of no type": {"device": (-7, 0)},
    "version 0": {"version": (0, 8)},
    "version 2": {"version": (2, 0)},
}

CALLS: dict[str, Callable[[list[Any]], Any]] = {
    "tensor_norms": gradclip.tensor_norms,
    "global_norm": gradclip.global_norm,
    "clip_by_global_norm_": lambda grads: gradclip.clip_by_global_norm_(grads, 0.5),
    "clip_by_norm_": lambda grads: gradclip.clip_by_norm_(grads, 0.5, reduce=lambda sums: sums),
    "clip_by_value_": lambda grads: gradclip.clip_by_value_(grads, 0.5),
    "scale_": lambda grads: gradclip.scale_(grads, 2.0),
    "Plan": gradclip.Plan,
}


def _refused(error: type[Exception], changes: dict[str, Any], call: Callable[[list[Any]], Any]) -> None:
    good, forged = np.ones(5), Forged(**changes)
    before = forged.array.tobytes()
    with pytest.raises(error, match=r"^grads\[1\]: expected "):
        call([good, forged])
    assert (good == 1).all()
    assert forged.array.tobytes() == before


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("version", [None, (1, 0), (1, 9)])
@pytest.mark.parametrize("changes", MALFORMED.values(), ids=MALFORMED)
def test_malformed(changes: dict[str, Any], version: Any, call: Callable[[list[Any]], Any]) -> None:
    _refused(ValueError, {**changes, "version": version}, call)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
def test_of_another_kind(changes: dict[str, Any], call: Callable[[list[Any]], Any]) -> None:
    _refused(TypeError, changes, call)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("changes", ELSEWHERE.values(), ids=ELSEWHERE)
def test_from_elsewhere(changes: dict[str, Any], call: Callable[[list[Any]], Any]) -> None:
    _refused(ValueError, changes, call)


@pytest.mark.parametrize("version", [None, (1, 0), (1, 9)])
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, range(1, 13)),
        ({"shape": ()}, [1]),
        ({"shape": (4,), "offset": 16}, [3, 4, 5, 6]),
        ({"shape": (2, 3), "strides": (4, 1)}, [1, 2, 3, 5, 6, 7]),
        ({"shape": (3,), "strides": (-1,), "offset": 16}, [3, 2, 1]),
        ({"shape": (4, 3), "strides": (1, 4)}, range(1, 13)),
        ({"shape": (1, 4), "strides": (2**62, 1)}, [1, 2, 3, 4]),  # of one element: any stride
        ({"shape": (1,) * 64}, [1]),
        ({"shape": (3, 1, 4), "strides": (4, -(2**63), 1)}, range(1, 13)),
        ({"shape": (0, 5), "strides": (2**62, 2**62)}, []),
        ({"shape": (0,), "data": None}, []),
        ({"shape": (5, 0, 2**40), "data": None}, []),
    ],
)
def test_what_is_right_is_read(changes: dict[str, Any], expected: Any, version: Any) -> None:
    numbers = np.array(list(expected), np.float64)
    forged = Forged(**changes, version=version)
    assert gradclip.tensor_norms([forged], 1).tolist() == [numbers.sum()]
    if changes.get("data", 0) is not None:
        gradclip.scale_([forged], 0.0)
        assert sorted(set(range(1, 13)) - set(numbers)) == sorted(forged.array[forged.array > 0])


def test_read_only_and_copied() -> None:
    for flags, finding in ((1, "read-only"), (2, "a copy")):
        forged = Forged(version=(1, 0), flags=flags)
        assert gradclip.global_norm([forged], 1) == 78.0
        with pytest.raises(ValueError, match=rf"grads\[0\]: .*{finding}"):
            gradclip.scale_([forged], 2.0)


def test_misaligned_elements_are_read() -> None:
    memory = np.zeros(17, np.uint8)
    memory[1:] = np.frombuffer(np.array([3.0, 4.0]).tobytes(), np.uint8)
    forged = Forged(shape=(2,), data=memory.ctypes.data + 1)
    assert gradclip.global_norm([forged]) == 5.0


@pytest.mark.parametrize("device", [None, 3, (1,), ("cpu", 0), (2**40, 0), (1, 2**40), (1.5, 0), (1, 0, 0)])
def test_devices_that_are_none(device: Any) -> None:
    odd = type("Odd", (Forged,), {"__dlpack_device__": lambda self: device})()
    for call in CALLS.values():
        with pytest.raises((TypeError, ValueError), match=r"^grads\[1\]: expected "):
            call([np.ones(2), odd])


def test_what_is_no_capsule() -> None:
    for returned in (None, 3, "dltensor", object(), np.ones(3)):
        odd = type("Odd", (Forged,), {"__dlpack__": lambda self, _returned=returned, **_: _returned})()
        for call in CALLS.values():
            with pytest.raises(TypeError, match=r"^grads\[1\]: expected a DLPack capsule"):
                call([np.ones(2), odd])
