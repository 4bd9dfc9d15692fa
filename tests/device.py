"""A GPU for the suite: emulated kernels over host memory that CuPy takes for a device's, or a real one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

from gradclip import _device, _dispatch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of a CUDA toolkit that is not there
    import cupy


class Device:
    """A device whose arrays tests make and read."""

    def array(self, host: npt.NDArray[Any]) -> Any:
        """A CuPy array of the same elements and layout as a NumPy array."""
        raise NotImplementedError

    def host(self, array: Any) -> npt.NDArray[Any]:
        """A copy of a CuPy array."""
        raise NotImplementedError


class RealDevice(Device):
    def array(self, host: npt.NDArray[Any]) -> Any:
        owner = host
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        flat = np.ndarray(owner.nbytes, np.uint8, owner)
        copy = cupy.asarray(flat)
        offset = host.ctypes.data - flat.ctypes.data
        return cupy.ndarray(host.shape, host.dtype, copy.data + offset, strides=host.strides)

    def host(self, array: Any) -> npt.NDArray[Any]:
        return cupy.asnumpy(array)


class EmulatedDevice(Device):
    """Memory of the host with a CuPy array around it: nothing is copied, the kernels are emulated."""

    def __init__(self, cuda: Any) -> None:
        self.cuda = cuda

    @staticmethod
    def memory(owner: npt.NDArray[np.uint8]) -> Any:
        address = owner.ctypes.data
        return cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(address, owner.nbytes, owner, 0), 0)

    def allocate(self, nbytes: int) -> Any:
        """What CuPy's allocator would: memory at a multiple of 512 bytes, with anything in it."""
        owner = np.full(nbytes + 512, 0xCD, np.uint8)
        start = -owner.ctypes.data % 512
        return self.memory(owner[start : start + max(nbytes, 1)])

    def array(self, host: npt.NDArray[Any]) -> Any:
        owner = host
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        flat = np.ndarray(owner.nbytes, np.uint8, owner) if owner.nbytes else np.zeros(1, np.uint8)
        offset = host.ctypes.data - flat.ctypes.data if host.size else 0
        strides = host.strides if host.size else None
        return cupy.ndarray(host.shape, host.dtype, self.memory(flat) + offset, strides=strides)

    def host(self, array: Any) -> npt.NDArray[Any]:
        if array.size == 0:
            return np.zeros(array.shape, array.dtype)
        low = sum((n - 1) * min(s, 0) for n, s in zip(array.shape, array.strides, strict=True))
        high = sum((n - 1) * max(s, 0) for n, s in zip(array.shape, array.strides, strict=True))
        import ctypes  # noqa: PLC0415

        nbytes = high - low + array.itemsize
        raw = np.frombuffer((ctypes.c_char * nbytes).from_address(array.data.ptr + low), np.uint8)
        return np.ndarray(array.shape, array.dtype, raw, -low, array.strides).copy()


@contextmanager
def emulated_device(**machine: int) -> Iterator[EmulatedDevice]:
    """Let gradclip and CuPy take the emulator for the machine's GPU."""
    from gradclip import _cuda_emulated as cuda  # noqa: PLC0415 (only the test install has it)

    cuda.set_machine(**machine)
    device = EmulatedDevice(cuda)
    stream = mock.patch.object(_device.Cupy, "stream", staticmethod(lambda device: (0, None)))
    module = mock.patch.object(_dispatch, "_cuda_module", lambda: cuda)
    before = cupy.cuda.get_allocator()
    cupy.cuda.set_allocator(device.allocate)
    try:
        with stream, module:
            yield device
    finally:
        cupy.cuda.set_allocator(before)
        cuda.set_machine()
