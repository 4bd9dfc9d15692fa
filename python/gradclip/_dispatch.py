"""Gradients are read by the engine of their device: the CPU's or a GPU's."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from gradclip import _core

if TYPE_CHECKING:
    from types import ModuleType

    from gradclip._result import ClipResult

__all__ = [
    "Measurable",
    "MeasuredGradients",
    "ReadGradients",
    "cuda_module",
    "mark_written",
    "read",
    "read_and_see",
    "why_no_gpu",
]

_CUDA, _CUDA_MANAGED = 2, 13  # of DLPack's device types


class MeasuredGradients(Protocol):
    """What an engine has measured: of a CPU, numbers; of a GPU, arrays there."""

    def clip(self, max_norm: object, nonfinite: object, formula: object) -> ClipResult: ...
    def scale(self, coefficients: object, nonfinite: object) -> ClipResult: ...
    @property
    def total_norm(self) -> Any: ...
    @property
    def norms(self) -> Any: ...
    @property
    def group_norms(self) -> Any: ...
    @property
    def group_sums(self) -> Any: ...  # this process's, as `reduce` gets them
    @property
    def nonfinite(self) -> tuple[int, ...] | tuple[str, ...]: ...
    @property
    def missing(self) -> tuple[int, ...] | tuple[str, ...]: ...
    @property
    def names(self) -> tuple[str, ...] | None: ...
    @property
    def group_names(self) -> Sequence[str] | None: ...
    @property
    def group_sizes(self) -> npt.NDArray[np.int64]: ...  # on the host
    @property
    def is_global(self) -> bool: ...
    @property
    def penalty(self) -> Any: ...


class Measurable(Protocol):
    """What can be measured and clipped: gradients, or pairs of them and a second list of arrays."""

    @property
    def names(self) -> tuple[str, ...] | None: ...
    def measure(
        self, ord: object, groups: object, grad_scale: object, reduce: object
    ) -> MeasuredGradients: ...
    # In one call. `formula`: how what is written is rounded, or a float that is added to norms.
    def clip(
        self,
        max_norm: object,
        ord: object,
        groups: object,
        grad_scale: object,
        nonfinite: object,
        reduce: object,
        formula: object,
    ) -> ClipResult: ...


class ReadGradients(Measurable, Protocol):
    """Gradients that an engine has read: the CPU's (``_core.Gradients``) or a GPU's (``_device``)."""

    def tensor_norms(self, ord: object) -> npt.NDArray[np.float64]: ...
    def row_norms(self, ord: object) -> list[npt.NDArray[np.float64]]: ...
    def global_norm(self, ord: object) -> float: ...
    def with_norm(self, norm: Any) -> MeasuredGradients: ...  # that somebody has measured, of all together
    def with_params(self, params: Any, l2: Any, l1: Any) -> Measurable: ...  # grads + l2 w + l1 sign(w)
    def with_base(self, base: Any) -> Measurable: ...  # the update of base that they are
    def clip_by_value(self, limit: object, to_nearest: bool = ...) -> ClipResult: ...
    def scale(self, factor: object) -> None: ...
    def require_writable(self) -> None: ...
    def __len__(self) -> int: ...
    @property
    def has_float64(self) -> bool: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def num_elements(self) -> int: ...


def read(grads: Any, is_kept: bool = False) -> ReadGradients:
    """The gradients, read by the engine of their device; ``is_kept``: for many calls.

    The first gradient decides; the engine says what is wrong with any other.
    """
    return _read_and_see(grads, is_kept, False)[0]


def read_and_see(grads: Any, is_kept: bool = False, is_update: bool = False) -> tuple[ReadGradients, bool]:
    """As :func:`read`, DTensors too, and whether there is any gradient among them.

    ``is_update``: messages say ``new``.
    """
    try:
        return _read_and_see(grads, is_kept, is_update)
    except (TypeError, RuntimeError):  # RuntimeError: no engine for a GPU
        if is_kept or not _any_dtensor(grads):
            raise
    from gradclip.torch._spread import SpreadGradients  # noqa: PLC0415 (there are DTensors)

    return SpreadGradients(grads, (), "new[{}]" if is_update else "grads[{}]"), True


def _any_dtensor(grads: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or not isinstance(grads, Mapping | Sequence):
        return False
    return any(
        isinstance(g, module.DTensor) for g in (grads.values() if isinstance(grads, Mapping) else grads)
    )


def _read_and_see(grads: Any, is_kept: bool, is_update: bool) -> tuple[ReadGradients, bool]:
    arrays: Iterable[Any] = grads
    if type(grads) is not list and type(grads) is not tuple:
        if isinstance(grads, Mapping):
            arrays = grads.values()
        elif (
            isinstance(grads, (str, bytes, bytearray)) or not isinstance(grads, Iterable) or _is_array(grads)
        ):
            arrays = ()  # the CPU's says what is wrong
        elif not isinstance(grads, Sequence):
            arrays = grads = tuple(grads)
    first = _first(arrays)
    if type(first) is np.ndarray or first is None or not is_on_cuda(first):
        return _core.read(grads, is_kept, is_update), first is not None
    return _read_device(grads, first, is_kept, is_update), True


def mark_written(tensors: list[Any]) -> None:
    """Tell autograd that torch tensors change in place, so that whoever saved one finds out."""
    increment_version = sys.modules["torch"].autograd.graph.increment_version
    try:
        increment_version(tensors)
    except RuntimeError:  # inference tensors have no versions
        increment_version([tensor for tensor in tensors if not tensor.is_inference()])


def why_no_gpu() -> str:
    """What is missing to run on a GPU; empty if nothing is."""
    return _look_for_gpu()[1]


def _look_for_gpu() -> tuple[ModuleType | None, str]:
    """The CUDA engine's module, and what is missing to run on a GPU."""
    try:
        cuda = cuda_module()
    except ImportError as error:
        return None, f"its CUDA module does not load: {error}"
    if cuda is None:
        return None, "built without a CUDA compiler"
    if cuda not in _missing:
        _missing[cuda] = str(cuda.missing())
    return cuda, _missing[cuda]


_missing: dict[ModuleType, str] = {}  # to a process no device comes or goes


def _first(arrays: Iterable[Any]) -> Any:
    for array in arrays:
        if array is not None:
            return array
    return None


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


def _read_device(grads: Any, first: Any, is_kept: bool, is_update: bool) -> ReadGradients:
    from gradclip import _device  # noqa: PLC0415 (only where there is a GPU)

    cuda, missing = _look_for_gpu()
    if missing:
        raise RuntimeError(
            f"grads: expected arrays on the CPU, since gradclip has no GPU here ({missing}), got a "
            f"{type(first).__module__}.{type(first).__qualname__} on a CUDA device"
        )
    return _device.GpuGradients(cuda, grads, first, is_kept, is_update)
