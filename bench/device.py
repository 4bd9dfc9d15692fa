"""The GPU as a place for gradients: one buffer there, clocks for its time, its own speed as the roofline."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cupy
import numpy as np

from bench.cases import Array, Load
from bench.data import GradientBuffer, Pattern
from bench.machine import describe
from bench.peers import GPU
from bench.timing import Clock
from bench.workload import READ, READ_WRITE, Location
from gradclip._dispatch import cuda_module

__all__ = ["FLAT_SUM", "GpuLocation", "describe_gpu", "device_clock", "host_clock", "peak_bandwidth"]

FLAT_SUM = "flat-sum"  # in the place of a job: CUB's sum of all bytes as float32, beside the rooflines

_ALIGNMENT = 512  # bytes: what CuPy's and PyTorch's allocators give
_SCRATCH_BYTES = 256 * 2**20  # several times the second cache
_AHEAD_NS = 2_000_000  # of work on the device while the host prepares what is timed
_THREADS = 256
_BLOCKS_PER_MULTIPROCESSOR = 32  # four times what is resident: late ones fill the gaps

# The roofline shares no code with the engine: a stride over the grid, four loads of 16 bytes in flight.
_SOURCE = r"""
extern "C" __global__ void spin(long long nanoseconds) {
  long long start, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
  do asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)); while (now - start < nanoseconds);
}
extern "C" __global__ void read_flat(const uint4* data, long long count, unsigned* seen) {
  const long long stride = (long long)gridDim.x * blockDim.x;
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  unsigned bits = 0;
  for (; i + 3 * stride < count; i += 4 * stride) {
    const uint4 a = data[i], b = data[i + stride], c = data[i + 2 * stride], d = data[i + 3 * stride];
    bits |= a.x | a.y | a.z | a.w | b.x | b.y | b.z | b.w;
    bits |= c.x | c.y | c.z | c.w | d.x | d.y | d.z | d.w;
  }
  for (; i < count; i += stride) bits |= data[i].x | data[i].y | data[i].z | data[i].w;
  if (bits == 0x5eed5eedu) *seen = bits;  // so that the loads are not left out
}
extern "C" __global__ void read_write_flat(uint4* data, long long count, unsigned flip) {  // flip: 0
  const long long stride = (long long)gridDim.x * blockDim.x;
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  for (; i + 3 * stride < count; i += 4 * stride) {
    uint4 v[4];
    #pragma unroll
    for (int k = 0; k < 4; ++k) v[k] = data[i + k * stride];
    #pragma unroll
    for (int k = 0; k < 4; ++k)
      data[i + k * stride] = make_uint4(v[k].x ^ flip, v[k].y ^ flip, v[k].z ^ flip, v[k].w ^ flip);
  }
  for (; i < count; i += stride) {
    const uint4 v = data[i];
    data[i] = make_uint4(v.x ^ flip, v.y ^ flip, v.z ^ flip, v.w ^ flip);
  }
}
"""


@functools.cache
def _kernel(name: str) -> Any:
    return cupy.RawModule(code=_SOURCE).get_function(name)


def _timed_by_events(call: Callable[[], Any], ahead_ns: int) -> tuple[Any, tuple[float]]:
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    cupy.cuda.Device().synchronize()
    if ahead_ns:
        _kernel("spin")((1,), (1,), (np.int64(ahead_ns),))
    start.record()
    answer = call()
    end.record()
    cupy.cuda.Device().synchronize()
    return answer, (cupy.cuda.get_elapsed_time(start, end) / 1e3,)


def device_clock(call: Callable[[], Any]) -> tuple[Any, tuple[float]]:
    """Seconds on the device between two events.

    A kernel that lasts 2 ms goes before the first one: the host prepares the call meanwhile, and the time
    that this takes is not between the events.
    """
    return _timed_by_events(call, _AHEAD_NS)


def waiting_clock(call: Callable[[], Any]) -> tuple[Any, tuple[float]]:
    """The same of a call that waits for the device itself, or uses streams that would not wait for ours."""
    return _timed_by_events(call, 0)


def host_clock(call: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
    """Seconds on the host until the call returns, and until the device is done. Without events."""
    cupy.cuda.Device().synchronize()
    begin = time.perf_counter()
    answer = call()
    returned = time.perf_counter()
    cupy.cuda.Device().synchronize()
    return answer, (returned - begin, time.perf_counter() - begin)


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
    make = GpuBuffer

    scratch = staticmethod(lambda: cupy.ones(_SCRATCH_BYTES // 8))

    @staticmethod
    def clocks(waits: bool) -> Mapping[Clock, tuple[str, ...]]:
        return {waiting_clock if waits else device_clock: ("",), host_clock: ("@host", "@done")}

    @staticmethod
    def free_memory() -> int:
        cupy.get_default_memory_pool().free_all_blocks()
        return int(cupy.cuda.Device().mem_info[0])

    def fill_caches(self) -> None:
        self._scratch += 1

    def rooflines(self, grads: Sequence[Any]) -> dict[str, tuple[Callable[[], Any], Clock]]:
        """The device's own speed over as many bytes in one piece, and CUB's sum of them."""
        nbytes = sum(grad.nbytes for grad in grads)
        flat = cupy.ndarray(nbytes // 16 * 4, np.float32, grads[0].data)
        vectors = np.int64(flat.size // 4)
        blocks = cupy.cuda.Device().attributes["MultiProcessorCount"] * _BLOCKS_PER_MULTIPROCESSOR
        seen = cupy.zeros(1, np.uint32)
        grid = (blocks,), (_THREADS,)
        return {
            READ: (lambda: _kernel("read_flat")(*grid, (flat, vectors, seen)), device_clock),
            READ_WRITE: (
                lambda: _kernel("read_write_flat")(*grid, (flat, vectors, np.uint32(0))),
                device_clock,
            ),
            FLAT_SUM: (flat.sum, device_clock),
        }


def peak_bandwidth() -> float:
    """Bytes a second that the memory of the current device could move: its clock, two edges, its width."""
    runtime = cupy.cuda.runtime
    device = runtime.getDevice()
    kilohertz = runtime.deviceGetAttribute(runtime.cudaDevAttrMemoryClockRate, device)
    bits = runtime.deviceGetAttribute(runtime.cudaDevAttrGlobalMemoryBusWidth, device)
    return float(2 * kilohertz * 1e3 * bits / 8)


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
        "peak_bytes_per_s": peak_bandwidth(),
        "driver_cuda": cuda.driver_version(),
        "runtime_cuda": cuda.runtime_version(),
        "cupy": cupy.__version__,
    }
