"""Gradients on a GPU, and results that stay there.

Nothing here waits for the device except where it says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gradclip._frameworks import Memory, framework_of
from gradclip._result import ClipResult, named, nonfinite_error

__all__ = ["DeviceClipResult", "GpuGradients", "GpuMeasured"]

_FLOAT64 = np.dtype(np.float64)
_BOOL = np.dtype(np.bool_)


# --- Results ------------------------------------------------------------------------------------------


class DeviceClipResult(ClipResult):
    """What was measured and done by one clip on a GPU: a :class:`ClipResult` that stays there.

    ``total_norm``, ``norms``, ``coefficient``, ``group_norms``, ``penalty`` (float64), ``clipped`` and
    ``skipped`` (bool) are arrays on the device, CuPy's or torch's as the gradients were; scalars have shape
    ``()``. Taking one does not wait. What must be known on the host waits for the clip: ``nonfinite``,
    ``named_norms()``, ``to_host()`` and ``repr``.
    """

    __slots__ = (
        "_at",
        "_cuda",
        "_device",
        "_is_global",
        "_is_pair",
        "_memory",
        "_names",
        "_shape",
        "_stream",
    )
    _at: _Layout
    _cuda: Any
    _device: int
    _is_global: bool
    _is_pair: bool
    _memory: Memory
    _names: tuple[str, ...] | None
    _shape: tuple[int, int]  # numbers of tensors and of groups
    _stream: tuple[int, object]

    def __init__(
        self,
        gradients: GpuGradients,
        memory: Memory,
        stream: tuple[int, object],
        groups: int = 1,
        is_global: bool = True,
        group_names: Sequence[str] | None = None,
        *,
        is_pair: bool = False,
    ) -> None:
        keep = partial(object.__setattr__, self)  # the base class is frozen
        keep("_cuda", gradients.cuda)
        keep("_device", gradients.device)
        keep("_memory", memory)
        keep("_stream", stream)
        keep("_shape", (len(gradients), groups))
        keep("_is_global", is_global)
        keep("_is_pair", is_pair)
        keep("group_names", group_names)
        keep("missing", named(gradients.missing, gradients.names))
        keep("_names", gradients.names)
        keep("_at", _Layout(*gradients.cuda.result_layout(*self._shape)))

    def _scalar(self, dtype: np.dtype[Any], offset: int) -> Any:
        return self._memory.array((), dtype, offset)

    @property
    def total_norm(self) -> Any:
        return self._scalar(_FLOAT64, self._at.total_norm)

    @property
    def norms(self) -> Any:
        return self._memory.float64(self._at.norms, self._shape[0])

    @property
    def coefficient(self) -> Any:
        if self._is_global:
            return self._scalar(_FLOAT64, self._at.coefficients)
        return self._memory.float64(self._at.coefficients, self._shape[1])

    @property
    def group_norms(self) -> Any:
        return self._memory.float64(self._at.group_norms, self._shape[1])

    @property
    def group_sums(self) -> Any:
        """What ``reduce`` gets, or would have got."""
        return self._memory.float64(self._at.group_sums, self._shape[1])

    @property
    def penalty(self) -> Any:
        return self._scalar(_FLOAT64, self._at.penalty) if self._is_pair else 0.0

    @property
    def clipped(self) -> Any:
        return self._scalar(_BOOL, self._at.clipped)

    @property
    def skipped(self) -> Any:
        total, coefficient = self.total_norm, self.coefficient
        left = (total - total != 0) & (self.clipped ^ True)
        return (coefficient == 0).all() | (coefficient - coefficient != 0).any() | left

    @property
    def names(self) -> tuple[str, ...] | None:
        return self._names

    @property
    def nonfinite(self) -> tuple[int, ...] | tuple[str, ...]:
        return self.to_host().nonfinite

    def to_host(self) -> ClipResult:
        """Wait for the clip and copy all of it: a result of Python numbers and NumPy arrays."""
        tensors, groups = self._shape
        at = self._at
        copy = self._cuda.copy_to_host(self._memory.ptr, at.nbytes, self._device, self._stream[0])

        def float64(offset: int, count: int) -> npt.NDArray[np.float64]:
            return np.frombuffer(copy, np.float64, count, offset).copy()

        coefficients = float64(at.coefficients, groups)
        marked = tuple(np.flatnonzero(np.frombuffer(copy, np.uint8, tensors, at.nonfinite)).tolist())
        return ClipResult(
            float(float64(at.total_norm, 1)[0]),
            float64(at.norms, tensors),
            float(coefficients[0]) if self._is_global else coefficients,
            copy[at.clipped] != 0,
            named(marked, self._names),
            self.missing,
            self._names,
            None if self._is_global else float64(at.group_norms, groups),
            self.group_names,
            float(float64(at.penalty, 1)[0]) if self._is_pair else 0.0,
        )

    def as_dict(self) -> dict[str, float | int | bool]:
        """As of :class:`ClipResult`. Waits."""
        return self.to_host().as_dict()

    def __reduce__(self) -> tuple[Any, ...]:
        # What crosses a process is a copy on the host. Waits.
        host = self.to_host()
        return ClipResult, tuple(getattr(host, field.name) for field in fields(ClipResult))

    def named_norms(self) -> dict[str, float]:
        """As of :class:`ClipResult`. Waits."""
        return self.to_host().named_norms()

    def named_group_norms(self) -> dict[str, float]:
        """As of :class:`ClipResult`. Waits."""
        return self.to_host().named_group_norms()

    def __repr__(self) -> str:
        return repr(self.to_host())


class _Layout(NamedTuple):
    """Where the parts of a result lie in its memory, in bytes."""

    total_norm: int
    coefficients: int
    group_norms: int
    group_sums: int
    norms: int
    clipped: int
    penalty: int
    nonfinite: int
    nbytes: int


# --- Calls --------------------------------------------------------------------------------------------


class GpuMeasured(DeviceClipResult):
    """What was measured of gradients on a GPU: what :class:`gradclip.Measured` stands on there.

    A result whose coefficients are not written yet.
    """

    __slots__ = ("_gradients", "_measured")
    _gradients: GpuGradients
    _measured: Any

    def __init__(
        self, gradients: GpuGradients, measured: Any, stream: tuple[int, object], is_pair: bool = False
    ) -> None:
        super().__init__(
            gradients,
            measured.memory,
            stream,
            measured.groups,
            measured.is_global,
            measured.group_names,
            is_pair=is_pair,
        )
        object.__setattr__(self, "_gradients", gradients)
        object.__setattr__(self, "_measured", measured)

    def clip(self, max_norm: object, nonfinite: object, formula: object) -> DeviceClipResult:
        stream = self._gradients.stream()
        return self._gradients.finished(
            *self._measured.clip(
                max_norm, nonfinite, formula, stream[0], self._gradients.maker(stream, self._is_pair)
            )
        )

    def scale(self, coefficients: object, nonfinite: object) -> DeviceClipResult:
        stream = self._gradients.stream()
        make = self._gradients.maker(stream, self._is_pair)
        return self._gradients.finished(*self._measured.scale(coefficients, nonfinite, stream[0], make))

    @property
    def is_global(self) -> bool:
        return self._is_global

    @property
    def group_sizes(self) -> npt.NDArray[np.int64]:
        return self._measured.group_sizes  # type: ignore[no-any-return]


class _GpuMeasurable:
    """What can be measured and clipped: the module's object, and the gradients that it is of."""

    __slots__ = ()

    def _source(self) -> tuple[Any, GpuGradients, bool]:
        """The module's object, the gradients, and whether they have second arrays."""
        raise NotImplementedError

    def measure(self, ord: object, groups: object, grad_scale: object, reduce: object) -> GpuMeasured:
        source, gradients, is_pair = self._source()
        stream = gradients.stream()
        measured = source.measure(ord, groups, grad_scale, reduce, stream[0])
        return GpuMeasured(gradients, measured, stream, is_pair)

    def clip(
        self,
        max_norm: object,
        ord: object,
        groups: object,
        grad_scale: object,
        nonfinite: object,
        reduce: object,
        formula: object,
    ) -> DeviceClipResult:
        """``formula``: how what is written is rounded, or a float that is added to norms, as PyTorch does."""
        source, gradients, is_pair = self._source()
        stream = gradients.stream()
        make = gradients.maker(stream, is_pair)
        return gradients.finished(
            *source.clip(max_norm, ord, groups, grad_scale, nonfinite, reduce, formula, stream[0], make)
        )


class GpuPair(_GpuMeasurable):
    """Gradients and a second list of arrays; as ``_core.Pair``."""

    __slots__ = ("_gradients", "_pair")

    def __init__(self, gradients: GpuGradients, pair: Any) -> None:
        self._gradients = gradients
        self._pair = pair

    @property
    def names(self) -> tuple[str, ...] | None:
        return self._gradients.names

    def _source(self) -> tuple[Any, GpuGradients, bool]:
        return self._pair, self._gradients, True


class GpuGradients(_GpuMeasurable):
    """Gradients that have been read, of the framework and device of ``first``; as ``_core.Gradients``."""

    __slots__ = ("_argument", "_framework", "_gradients", "cuda", "device")

    def _source(self) -> tuple[Any, GpuGradients, bool]:
        return self._gradients, self, False

    def __init__(self, cuda: Any, grads: Any, first: Any, is_kept: bool, is_update: bool = False) -> None:
        self.cuda = cuda
        self._argument = "new" if is_update else "grads"
        self._framework = framework = framework_of(first)
        self.device = device = framework.device_of(first, cuda)
        memory = framework.memory
        self._gradients = cuda.read(
            grads,
            device,
            self.stream()[0],
            framework.name,
            lambda nbytes: memory(nbytes, device),
            is_kept,
            is_update,
        )

    @property
    def names(self) -> tuple[str, ...] | None:
        return self._gradients.names  # type: ignore[no-any-return]

    @property
    def missing(self) -> tuple[int, ...]:
        return tuple(self._gradients.missing)

    @property
    def has_float64(self) -> bool:
        return self._gradients.has_float64  # type: ignore[no-any-return]

    @property
    def nbytes(self) -> int:
        return self._gradients.nbytes  # type: ignore[no-any-return]

    @property
    def num_elements(self) -> int:
        return self._gradients.num_elements  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return len(self._gradients)

    def stream(self) -> tuple[int, object]:
        """The framework's current stream on the device, and what keeps it alive."""
        return self._framework.stream(self.device)

    def maker(self, stream: tuple[int, object], is_pair: bool = False) -> Callable[..., DeviceClipResult]:
        """What the module calls with memory for a result before it writes, so that nothing can fail after."""
        return lambda memory, *of_groups: DeviceClipResult(self, memory, stream, *of_groups, is_pair=is_pair)

    def finished(
        self, result: DeviceClipResult, counts: list[tuple[int, int, int]] | None
    ) -> DeviceClipResult:
        """The result, unless there is something to raise."""
        if counts is not None:
            raise nonfinite_error(counts, self.names, result.to_host().norms, self._argument)
        return result

    def _norms(self, ord: object) -> DeviceClipResult:
        stream = self.stream()
        return DeviceClipResult(self, self._gradients.norms(ord, stream[0]), stream)

    def tensor_norms(self, ord: object) -> Any:
        return self._norms(ord).norms

    def row_norms(self, ord: object) -> list[Any]:
        measured = self.measure(ord, "row", 1.0, None)
        names: Any = measured.group_names
        rows: list[Any] = names.split(measured.group_norms)
        return rows

    def global_norm(self, ord: object) -> Any:
        return self._norms(ord).total_norm

    def with_params(self, params: object, l2: object, l1: object) -> GpuPair:
        return GpuPair(self, self._gradients.with_params(params, l2, l1, self.stream()[0]))

    def with_base(self, base: object) -> GpuPair:
        return GpuPair(self, self._gradients.with_base(base, self.stream()[0]))

    def with_norm(self, norm: object) -> GpuMeasured:
        """As measured by somebody: ``norm`` is a float64 number on the device."""
        stream = self.stream()
        return GpuMeasured(self, self._gradients.with_norm(norm, stream[0]), stream)

    def clip_by_value(self, limit: object, to_nearest: bool = False) -> DeviceClipResult:
        stream = self.stream()
        result: DeviceClipResult = self._gradients.clip_by_value(
            limit, to_nearest, stream[0], self.maker(stream)
        )
        return result

    def scale(self, factor: object) -> None:
        self._gradients.scale(factor, self.stream()[0])

    def require_writable(self) -> None:
        self._gradients.require_writable()
