"""What ``show_config`` prints."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Iterator

import numpy as np

import gradclip
from gradclip import _core
from gradclip._dispatch import cuda_module, why_no_gpu

_PROBE_BYTES = 256 * 2**20  # far beyond any cache
_PROBES = 7


def measured_bandwidth() -> tuple[float, float]:
    """Read, and read and write, bandwidth of this machine's memory in bytes per second.

    Medians of a few runs over 256 MB with the threads a call would use. The second figure counts
    every byte twice, once read and once written.
    """
    buffer = [np.ones(_PROBE_BYTES // 8)]
    grads = _core.read(buffer)
    read = statistics.median(grads.probe_read() for _ in range(_PROBES))
    read_write = statistics.median(grads.probe_read_write() for _ in range(_PROBES))
    return _PROBE_BYTES / read, 2 * _PROBE_BYTES / read_write


def _version(number: int) -> str:
    """13000 is 13.0."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _gpu_engine() -> str:
    try:
        cuda = cuda_module()
    except ImportError:
        cuda = None
    if cuda is None:
        return f"none ({why_no_gpu()})"
    return f"CUDA {_version(cuda.runtime_version())}, compute capability {cuda.architectures()}"


def _gpus() -> str:
    missing = why_no_gpu()
    if missing:
        return f"none ({missing})"
    cuda = cuda_module()
    assert cuda is not None
    devices = []
    for device in range(cuda.device_count()):
        name, major, minor, multiprocessors, memory = cuda.device_info(device)
        devices.append(
            f"{name} ({major}.{minor}, {multiprocessors} multiprocessors, {memory / 2**30:.0f} GiB)"
        )
    return f"{', '.join(devices)}; driver for CUDA {_version(cuda.driver_version())}"


def config_lines(measure: bool) -> Iterator[str]:
    """The lines of ``show_config``, each when it is known."""

    def line(name: str, value: str) -> str:
        return f"{name:>20}  {value}"

    yield line("gradclip", gradclip.__version__)
    yield line("python", f"{platform.python_version()}, NumPy {np.__version__}, {platform.platform()}")
    yield line("instruction set", f"{_core.get_isa()} (this machine has {', '.join(_core.supported_isas())})")
    yield line("threads", str(_core.get_num_threads()))
    yield line("GPU engine", _gpu_engine())
    yield line("GPU", _gpus())
    if measure:
        read, read_write = measured_bandwidth()
        yield line("memory, read", f"{read / 1e9:.1f} GB/s")
        yield line("memory, read + write", f"{read_write / 1e9:.1f} GB/s")
