"""The CUDA engine in C++, where gradclip was built with a CUDA compiler. ``gradclip._device`` uses it.

Arguments are checked by the engine itself, so what may hold anything is an ``object``. Streams and
pointers are addresses. Nothing waits for the device except where it says so.
"""

from collections.abc import Callable
from typing import Any, Protocol

class _Memory(Protocol):
    """Memory of the device, and arrays in it."""

    ptr: int
    def float64(self, offset: int, count: int) -> object: ...

class _Measurable:
    def measure(
        self, ord: object, groups: object, grad_scale: object, reduce: object, stream: int
    ) -> Measured: ...
    # `make` is called with memory, the number of groups, whether groups is None, and the names of groups
    # or None, before anything is written. Returns what it made and, if asked to raise, per gradient that is
    # not finite (index, NaN count, infinity count). nonfinite="raise" waits.
    def clip(
        self,
        max_norm: object,
        ord: object,
        groups: object,
        grad_scale: object,
        nonfinite: object,
        reduce: object,
        formula: object,
        stream: int,
        make: Callable[..., Any],
    ) -> tuple[Any, list[tuple[int, int, int]] | None]: ...

class Pair(_Measurable):
    """Gradients and a second list of arrays, one for each."""

class Gradients(_Measurable):
    """Gradients that have been read."""

    def with_params(self, params: object, l2: object, l1: object, stream: int) -> Pair: ...
    def with_base(self, base: object, stream: int) -> Pair: ...
    # Results are memory from `allocate`, laid out as `result_layout` says.
    def norms(self, ord: object, stream: int) -> _Memory: ...
    # As somebody has measured all of them together: a float64 number on the device.
    def with_norm(self, norm: object, stream: int) -> Measured: ...
    def clip_by_value(
        self, limit: object, to_nearest: bool, stream: int, make: Callable[..., Any]
    ) -> Any: ...
    def scale(self, factor: object, stream: int) -> None: ...
    def require_writable(self) -> None: ...
    # Read, or read and write, dense arrays as fast as the device can.
    def __len__(self) -> int: ...
    @property
    def names(self) -> tuple[str, ...] | None: ...
    @property
    def has_float64(self) -> bool: ...
    @property
    def missing(self) -> list[int]: ...
    @property
    def device(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def num_elements(self) -> int: ...

class Measured:
    """What was measured of gradients, and stays on the device."""

    # As of Gradients; once: the second time raises ValueError.
    def clip(
        self, max_norm: object, nonfinite: object, formula: object, stream: int, make: Callable[..., Any]
    ) -> tuple[Any, list[tuple[int, int, int]] | None]: ...
    def scale(
        self, coefficients: object, nonfinite: object, stream: int, make: Callable[..., Any]
    ) -> tuple[Any, list[tuple[int, int, int]] | None]: ...
    @property
    def memory(self) -> _Memory: ...
    @property
    def groups(self) -> int: ...
    @property
    def is_global(self) -> bool: ...
    @property
    def group_names(self) -> tuple[str, ...] | None: ...
    @property
    def group_sizes(self) -> object: ...

# `is_kept`: for many calls. `framework` is "cupy" or "torch": whose current stream `stream` is.
def read(
    grads: object,
    device: int,
    stream: int,
    framework: str,
    allocate: Callable[[int], _Memory],
    is_kept: bool,
    is_update: bool,
) -> Gradients: ...

# Offsets in bytes: total_norm, coefficients, group_norms, group_sums, norms (float64), clipped (bool),
# penalty (float64), nonfinite (a bool for each tensor), and the size of all.
def result_layout(tensors: int, groups: int) -> tuple[int, int, int, int, int, int, int, int, int]: ...

# Waits.
def copy_to_host(pointer: int, bytes: int, device: int, stream: int) -> bytes: ...

# The device whose memory a pointer points into; -1 if it is none's.
def device_of(pointer: int) -> int: ...

# What jax.ffi.register_ffi_target takes, by name.
def jax_handlers() -> dict[str, object]: ...

# Why nothing can run here ("no CUDA driver", ...); empty if it can.
def missing() -> str: ...
def device_count() -> int: ...

# Name, compute capability (major, minor), multiprocessors, bytes of memory.
def device_info(device: int) -> tuple[str, int, int, int, int]: ...

# 13000 is CUDA 13.0; 0: no driver.
def runtime_version() -> int: ...
def driver_version() -> int: ...

# That kernels were compiled for: "75 80 86".
def architectures() -> str: ...
