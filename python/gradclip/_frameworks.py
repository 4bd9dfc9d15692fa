"""The frameworks that own gradients on a GPU: their current streams, and memory from their allocators.

Of the frameworks only those are used that the caller has imported.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np

__all__ = ["Cupy", "Memory", "framework_of"]

_FLOAT64 = np.dtype(np.float64)


class CupyMemory:
    """Memory from CuPy's current allocator, and arrays in it."""

    __slots__ = ("pointer", "ptr")

    def __init__(self, nbytes: int, device: int) -> None:
        # The device is the current one.
        self.pointer = sys.modules["cupy"].cuda.alloc(nbytes)
        self.ptr = self.pointer.ptr

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any], offset: int) -> Any:
        return sys.modules["cupy"].ndarray(shape, dtype, self.pointer + offset)

    def float64(self, offset: int, count: int) -> Any:
        return self.array((count,), _FLOAT64, offset)


class TorchMemory:
    """Memory from torch's caching allocator, and tensors in it."""

    __slots__ = ("buffer", "ptr")

    def __init__(self, nbytes: int, device: int) -> None:
        torch = sys.modules["torch"]
        self.buffer = torch.empty(nbytes, dtype=torch.uint8, device=f"cuda:{device}")
        self.ptr = self.buffer.data_ptr()

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any], offset: int) -> Any:
        nbytes = int(np.prod(shape)) * dtype.itemsize
        as_torch = getattr(sys.modules["torch"], dtype.name)
        return self.buffer[offset : offset + nbytes].view(as_torch).view(shape)

    def float64(self, offset: int, count: int) -> Any:
        return self.array((count,), _FLOAT64, offset)


Memory = CupyMemory | TorchMemory


class Cupy:
    """Gradients that are CuPy arrays."""

    name = "cupy"
    memory: type[Memory] = CupyMemory

    @staticmethod
    def device_of(array: Any, cuda: Any) -> int:
        return int(array.data.device_id)

    @staticmethod
    def stream(device: int) -> tuple[int, object]:
        """The current stream, and what keeps it alive."""
        stream = sys.modules["cupy"].cuda.get_current_stream(device)
        return stream.ptr, stream


class Torch:
    """Gradients that are torch tensors."""

    name = "torch"
    memory: type[Memory] = TorchMemory

    @staticmethod
    def device_of(array: Any, cuda: Any) -> int:
        return int(array.device.index)

    @staticmethod
    def stream(device: int) -> tuple[int, object]:
        # torch never destroys its streams.
        return sys.modules["torch"].cuda.current_stream(device).cuda_stream, None


class Other:
    """Gradients of anybody else: on the current stream of CuPy, or else torch, whose arrays results are.

    Work and results on one stream: memory of a framework's pool is in order with its stream alone.
    """

    def __init__(self) -> None:
        for package, framework in (("cupy", Cupy), ("torch", Torch)):
            try:
                importlib.import_module(package)
            except ImportError:
                continue
            self.name: str = framework.name
            self.memory: type[Memory] = framework.memory
            self.stream = framework.stream
            return
        raise RuntimeError("grads: expected CuPy or PyTorch to be installed, whose arrays hold the results")

    @staticmethod
    def device_of(array: Any, cuda: Any) -> int:
        if hasattr(array, "__dlpack_device__"):
            return int(array.__dlpack_device__()[1])
        return int(cuda.device_of(array.__cuda_array_interface__["data"][0]))


Framework = Cupy | Torch | Other


def framework_of(array: Any) -> Framework:
    """Whose stream and memory a call on this array uses."""
    cupy, torch = sys.modules.get("cupy"), sys.modules.get("torch")
    if cupy is not None and isinstance(array, cupy.ndarray):
        return Cupy()
    if torch is not None and isinstance(array, torch.Tensor):
        return Torch()
    return Other()
