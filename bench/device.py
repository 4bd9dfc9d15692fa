"""The GPU as a place for gradients: one buffer there, events for its time, its own speed as the roofline."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import cupy
import numpy as np

import gradclip
from bench.cases import Array, Load
from bench.data import GradientBuffer, Pattern
from bench.machine import describe
from bench.peers import GPU
from bench.timing import Clock
from bench.workload import READ, READ_WRITE, Location
from gradclip._dispatch import cuda_module

__all__ = ["GpuLocation", "describe_gpu"]

_ALIGNMENT = 512  # bytes: what CuPy's and PyTorch's allocators give
_SCRATCH_BYTES = 256 * 2**20  # several times the second cache


def gpu_clock(call: Callable[[], Any]) -> tuple[Any, tuple[float, float, float]]:
    """Seconds on the device between two events, on the host until the call returns, until all is done."""
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    cupy.cuda.Device().synchronize()
    begin = time.perf_counter()
    start.record()
    answer = call()
    end.record()
    returned = time.perf_counter()
    cupy.cuda.Device().synchronize()
    done = time.perf_counter()
    return answer, (cupy.cuda.get_elapsed_time(start, end) / 1e3, returned - begin, done - begin)


class GpuBuffer(GradientBuffer):
    """Views of one buffer of the device; CuPy copies bytes, whatever it thinks of their dtype."""

    def __init__(self, load: Load) -> None:
        self.pattern = Pattern(load, _ALIGNMENT)
        self._elements = cupy.asarray(self.pattern.elements.view(np.uint8))
        itemsize = self.pattern.dtype.itemsize
        self._buffer = cupy.empty(self.pattern.length * itemsize, np.uint8)
        self.arrays = [
            cupy.ndarray(shape, self.pattern.dtype, self._buffer.data + start * itemsize)
            for start, shape in zip(self.pattern.starts, load.case.shapes, strict=True)
        ]
        self.restore()

    def restore(self) -> None:
        """By copies within the device."""
        itemsize = self.pattern.dtype.itemsize
        for first, elements in self.pattern.pieces():
            part = self._buffer[first * itemsize : (first + elements.size) * itemsize]
            cupy.copyto(part, self._elements[: part.size])

    @staticmethod
    def to_host(array: Any) -> Array:
        on_host: Array = cupy.asnumpy(array)
        return on_host


class GpuLocation(Location):
    """The current device."""

    name = GPU
    clock: Clock = staticmethod(gpu_clock)
    clocks = ("", "@host", "@done")
    make = GpuBuffer

    scratch = staticmethod(lambda: cupy.ones(_SCRATCH_BYTES // 8))

    @staticmethod
    def free_memory() -> int:
        cupy.get_default_memory_pool().free_all_blocks()
        return int(cupy.cuda.Device().mem_info[0])

    def fill_caches(self) -> None:
        self._scratch += 1

    def rooflines(self, grads: Sequence[Any]) -> dict[str, tuple[Callable[[], Any], Clock]]:
        """The device's own speed over the same bytes, timed by events."""
        plan: Any = gradclip.Plan(grads)._plan
        return {READ: (plan.probe_read, gpu_clock), READ_WRITE: (plan.probe_read_write, gpu_clock)}


def describe_gpu() -> dict[str, Any]:
    """The machine, its GPU and what is installed."""
    cuda = cuda_module()
    assert cuda is not None
    name, major, minor, multiprocessors, memory = cuda.device_info(cupy.cuda.runtime.getDevice())
    return describe() | {
        "gpu": name,
        "compute_capability": f"{major}.{minor}",
        "multiprocessors": multiprocessors,
        "gpu_memory_gb": round(memory / 1e9, 1),
        "driver_cuda": cuda.driver_version(),
        "runtime_cuda": cuda.runtime_version(),
        "cupy": cupy.__version__,
    }
