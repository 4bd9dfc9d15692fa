"""A GPU for the suite: emulated kernels over host memory that CuPy takes for a device's, or a real one."""

from __future__ import annotations

import ctypes
import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np

from bench.cases import Load
from bench.data import GradientBuffer
from gradclip import _dispatch, _frameworks
from matrices import Array

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of a CUDA toolkit that is not there
    import cupy


def _owner(array: Array) -> Array:
    """The bytes that an array is a view of."""
    owner = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    return np.ndarray(owner.nbytes, np.uint8, owner)


def _view_of(array: Any, memory: Any, offset: int) -> Any:
    return cupy.ndarray(array.shape, array.dtype, memory + offset, strides=array.strides)


def _extent(array: Any) -> tuple[int, int]:
    """Where an array's lowest byte lies, from its first element on, and how many there are to the highest."""
    spans = [(n - 1) * step for n, step in zip(array.shape, array.strides, strict=True)]
    low, high = sum(min(s, 0) for s in spans), sum(max(s, 0) for s in spans)
    return low, high - low + array.itemsize


class RealDevice:
    """The machine's GPU."""

    def array(self, array: Array) -> Any:
        """A CuPy array with the elements, strides and alignment of a NumPy array, gaps included."""
        if array.size == 0:
            return cupy.empty(array.shape, array.dtype)
        owner = _owner(array)
        lead = owner.ctypes.data % 512  # where CuPy's allocations begin
        buffer = cupy.empty(lead + owner.nbytes, np.uint8)
        buffer[lead:] = cupy.asarray(owner)
        return _view_of(array, buffer.data, lead + array.ctypes.data - owner.ctypes.data)

    def host(self, array: Any) -> Array:
        """A copy of a CuPy array. By bytes: CuPy has no kernels for every dtype and layout."""
        if array.size == 0:
            return np.zeros(array.shape, array.dtype)
        low, nbytes = _extent(array)
        whole = cupy.asnumpy(cupy.ndarray((nbytes,), np.uint8, array.data + low))
        return np.ndarray(array.shape, array.dtype, whole, -low, array.strides).copy()

    def surroundings(self, array: Any) -> bytes:
        """All bytes of the memory that an array of ours is a view of."""
        memory = array.data.mem
        whole = cupy.ndarray((memory.size,), np.uint8, cupy.cuda.MemoryPointer(memory, 0))
        return bytes(cupy.asnumpy(whole).tobytes())


@contextmanager
def real_device() -> Iterator[RealDevice]:
    """The machine's GPU. For compute-sanitizer without CuPy's pool: an array ends where its memory does."""
    if "GRADCLIP_TESTS_WITHOUT_POOL" in os.environ:
        with cupy.cuda.using_allocator(None):
            yield RealDevice()
    else:
        yield RealDevice()


class EmulatedDevice:
    """Memory of the host, in CuPy arrays; the kernels are emulated."""

    def __init__(self, cuda: Any) -> None:
        self.cuda = cuda

    def allocate(self, nbytes: int) -> Any:
        """What CuPy's allocator would: memory at a multiple of 512 bytes, with anything in it."""
        owner = np.full(nbytes + 512, 0xCD, np.uint8)
        start = -owner.ctypes.data % 512
        return _memory(owner[start : start + max(nbytes, 1)])

    def array(self, array: Array) -> Any:
        if array.size == 0:
            return cupy.ndarray(array.shape, array.dtype, self.allocate(0))
        owner = _owner(array)
        lead = owner.ctypes.data % 512
        memory = self.allocate(lead + owner.nbytes)
        _bytes_at(memory.ptr + lead, owner.nbytes)[:] = owner
        return _view_of(array, memory, lead + array.ctypes.data - owner.ctypes.data)

    def host(self, array: Any) -> Array:
        if array.size == 0:
            return np.zeros(array.shape, array.dtype)
        low, nbytes = _extent(array)
        whole = _bytes_at(array.data.ptr + low, nbytes)
        return np.ndarray(array.shape, array.dtype, whole, -low, array.strides).copy()

    def surroundings(self, array: Any) -> bytes:
        memory = array.data.mem
        return _bytes_at(memory.ptr, memory.size).tobytes()


Device = RealDevice | EmulatedDevice


class EmulatedBuffer(GradientBuffer):
    """Gradients of the benchmark: CuPy's arrays over the host's memory, which the emulated kernels reach."""

    def __init__(self, load: Load) -> None:
        super().__init__(load)
        self.on_host = {array.ctypes.data: array for array in self.arrays}
        self.arrays = [
            cupy.ndarray(array.shape, array.dtype, _memory(array)) for array in self.on_host.values()
        ]

    def to_host(self, array: Any) -> Array:  # type: ignore[override]
        found: Array = self.on_host[array.data.ptr]
        return found


def _memory(owner: Array) -> Any:
    """What CuPy takes for memory of device 0."""
    return cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(owner.ctypes.data, owner.nbytes, owner, 0), 0)


def _bytes_at(address: int, nbytes: int) -> Array:
    memory = memoryview((ctypes.c_uint8 * nbytes).from_address(address))
    return np.asarray(memory.cast("B"))


@contextmanager
def emulated_device(**machine: int) -> Iterator[EmulatedDevice]:
    """Let gradclip and CuPy take the emulator for the machine's GPU."""
    cuda: Any = importlib.import_module("gradclip._cuda_emulated")
    cuda.set_machine(**machine)
    device = EmulatedDevice(cuda)
    stream = mock.patch.object(_frameworks.Cupy, "stream", staticmethod(lambda device: (0, None)))
    module = mock.patch.object(_dispatch, "cuda_module", return_value=cuda)
    with stream, module, cupy.cuda.using_allocator(device.allocate):
        yield device
