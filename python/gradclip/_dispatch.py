"""Which engine the gradients of a call belong to: the CPU's or the GPU's."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from gradclip import _core

if TYPE_CHECKING:
    from types import ModuleType

    from gradclip._device import DeviceEngine
    from gradclip._result import ClipResult

__all__ = ["Engine", "PlannedGradients", "cuda_module", "engine_of", "mark_written", "why_no_gpu"]

_CUDA, _CUDA_MANAGED = 2, 13  # of DLPack's device types


class PlannedGradients(Protocol):
    """Gradients that an engine has read."""

    def tensor_norms(self, ord: object) -> npt.NDArray[np.float64]: ...
    def global_norm(self, ord: object) -> float: ...
    def clip(
        self,
        max_norm: object,
        ord: object,
        groups: object,
        grad_scale: object,
        nonfinite: object,
        reduce: object,
        epsilon: float = ...,  # added to norms
    ) -> ClipResult: ...
    def clip_with_norm(self, norm: Any, max_norm: object, epsilon: float) -> None: ...
    def clip_by_value(self, limit: object, to_nearest: bool = ...) -> ClipResult: ...
    def scale(self, factor: object) -> None: ...
    def require_writable(self) -> None: ...
    def __len__(self) -> int: ...
    @property
    def is_nothing(self) -> bool: ...
    @property
    def has_float64(self) -> bool: ...
    @property
    def names(self) -> tuple[str, ...] | None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def num_elements(self) -> int: ...


class Engine(Protocol):
    """What the CPU (the module ``_core``) and a GPU (``_device.DeviceEngine``) do alike."""

    def tensor_norms(self, grads: object, ord: object) -> npt.NDArray[np.float64]: ...
    def global_norm(self, grads: object, ord: object) -> float: ...
    def clip(
        self,
        grads: object,
        max_norm: object,
        ord: object,
        groups: object,
        grad_scale: object,
        nonfinite: object,
        reduce: object,
    ) -> ClipResult: ...
    def clip_by_value(self, grads: object, limit: object) -> ClipResult: ...
    def scale(self, grads: object, factor: object) -> None: ...
    def read(self, grads: object) -> PlannedGradients: ...  # for one call
    def Plan(self, grads: object) -> PlannedGradients: ...


_host = cast(Engine, _core)


def engine_of(grads: Any) -> tuple[Engine, Any]:
    """The engine for ``grads``, and ``grads`` as it is to be handed on (an iterator is used up here).

    The first gradient decides; the engine says what is wrong with any other.
    """
    if type(grads) is not list and type(grads) is not tuple:
        if isinstance(grads, Mapping):
            return _engine_for(_first(grads.values())), grads
        if isinstance(grads, (str, bytes, bytearray)) or not isinstance(grads, Iterable) or _is_array(grads):
            return _host, grads  # which says what is wrong
        if not isinstance(grads, Sequence):
            grads = tuple(grads)
    return _engine_for(_first(grads)), grads


def mark_written(tensors: list[Any]) -> None:
    """Tell autograd that torch tensors change in place, so that whoever saved one finds out."""
    increment_version = sys.modules["torch"].autograd.graph.increment_version
    try:
        increment_version(tensors)
    except RuntimeError:  # inference tensors have no versions
        increment_version([tensor for tensor in tensors if not tensor.is_inference()])


def why_no_gpu() -> str:
    """What is missing to run on a GPU; empty if nothing is."""
    try:
        cuda = cuda_module()
    except ImportError as error:
        return f"its CUDA module does not load: {error}"
    return "built without a CUDA compiler" if cuda is None else str(cuda.missing())


def _first(arrays: Iterable[Any]) -> Any:
    for array in arrays:
        if array is not None:
            return array
    return None


def _engine_for(array: Any) -> Engine:
    if type(array) is np.ndarray or array is None or not is_on_cuda(array):
        return _host
    return _device_engine(array)


def _is_array(value: object) -> bool:
    return hasattr(value, "__dlpack__") or is_on_cuda(value)


def is_on_cuda(array: Any) -> bool:
    """Whether an array lies on a CUDA device, as far as it says so."""
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if torch is not None and type(array) is getattr(torch, "Tensor", None):
        return bool(array.is_cuda)  # a tenth of the time of what follows
    try:
        if cupy is not None and isinstance(array, cupy.ndarray):
            return True
        if not hasattr(array, "__dlpack_device__"):
            return not isinstance(array, type) and hasattr(array, "__cuda_array_interface__")
        return array.__dlpack_device__()[0] in (_CUDA, _CUDA_MANAGED)
    except Exception:  # its own trouble, which _core reports with the name of the entry
        return False


def cuda_module() -> ModuleType | None:
    """The CUDA engine's module, if there is one. ImportError if it is there and does not load."""
    try:
        return importlib.import_module("gradclip._cuda")
    except ModuleNotFoundError as error:
        if error.name != "gradclip._cuda":
            raise
        return None


def _device_engine(array: Any) -> DeviceEngine:
    from gradclip import _device  # noqa: PLC0415 (only where there is a GPU)

    missing = why_no_gpu()
    if missing:
        raise RuntimeError(
            f"grads: expected arrays on the CPU, since gradclip has no GPU here ({missing}), got a "
            f"{type(array).__module__}.{type(array).__qualname__} on a CUDA device"
        )
    return _device.DeviceEngine(cuda_module(), array)
