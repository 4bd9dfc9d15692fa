"""The drop-ins: PyTorch's signatures, formula and return types, gradclip's norms.

Reference: https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_norm_.html
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradclip._dispatch import PlannedGradients, engine_of
from gradclip._result import NonFiniteGradientError, finish
from gradclip.torch import _compile
from gradclip.torch._dtensor import is_dtensor, whole, writable_parts
from gradclip.torch._gradients import (
    PARAMETERS,
    TENSORS,
    Gradients,
    Names,
    Unsupported,
    as_list,
    as_norm,
    as_number,
    as_threshold,
    by_device,
    combine,
    gradients_of,
    mark_written,
    name_of,
    naming,
    norm_dtype,
    norm_of,
    readable,
    writable,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "EPSILON",
    "NonFiniteNormError",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_gradients_",
    "clip_grads_with_norm_",
    "count_nonfinite",
    "describe",
    "get_total_norm",
    "nonfinite_error",
    "norms_of",
    "scale_by_norm_",
    "total_norm_of",
]

EPSILON = 1e-6  # what PyTorch adds to norms

_T = TypeVar("_T")
_CPU = torch.device("cpu")
_LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.float64)}
_Counts = Sequence[tuple[int | str, int, int]]


class NonFiniteNormError(NonFiniteGradientError, RuntimeError):
    """A :class:`gradclip.NonFiniteGradientError` that is a ``RuntimeError`` too, as PyTorch raises."""


NonFiniteNormError.__module__ = "gradclip.torch"


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float | Tensor,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Clip the gradients of all parameters together by their norm: ``torch.nn.utils.clip_grad_norm_``.

    Gradients are multiplied by ``max_norm / (norm + 1e-6)`` where that is below 1, as PyTorch does;
    otherwise not one byte is written. Unlike PyTorch's, the norm is right where squares overflow or
    underflow and for 16-bit gradients, and what is given twice counts once; see ``docs/torch.md``.

    Args:
        parameters: Tensors with gradients, or one; of any float dtypes, dense or sparse, on CPUs and CUDA
            devices, mixed. Those without a gradient are skipped.
        max_norm: Not negative. For gradients on one GPU also a 0-d tensor there, which nothing waits for.
        norm_type: Any number, ``inf``, ``-inf`` or such text. 2, 1 and ``inf`` are fast, those below or at
            0 are left to PyTorch's own norms.
        error_if_nonfinite: Raise if the norm is infinite or NaN; nothing is written then. Waits for a GPU.
        foreach: Accepted and ignored: there is one way, and it is fast.
        group: A process group of whose ranks each holds its shards of the gradients, in plain tensors: the
            norm is over all of them. All ranks make the same call, with as many tensors. DTensors know
            their groups: ``None``. See ``docs/scaling.md``.

    Returns:
        The norm before clipping: a 0-d tensor on the device of the first gradient, of dtype float64 if
        that is among the gradients' dtypes, else float32 (which says ``inf`` of a norm above 3.4e38;
        gradients are clipped by what it is). A DTensor, replicated, if DTensors are among the gradients.
        The same bits on every rank.

    Raises:
        TypeError: An entry is not a tensor, or its gradient is of a kind that cannot be clipped (integer,
            quantised, meta, requiring grad). It is named.
        ValueError: ``max_norm`` is negative or NaN; gradients overlap in memory; a process group is not
            open, or its ranks disagree on the number of tensors.
        RuntimeError: ``error_if_nonfinite`` and the norm is not finite: a
            :class:`gradclip.NonFiniteGradientError` too, which names the parameters. Of gradients on many
            ranks, every rank raises what any of them has to (on a GPU without ``error_if_nonfinite``, only
            that one does, and the norm of the others is NaN).

    Example:
        >>> import torch, gradclip.torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3e20, 4e20])  # whose norm is infinite to PyTorch
        >>> gradclip.torch.clip_grad_norm_([weight], max_norm=1.0)
        tensor(5.0000e+20)
        >>> weight.grad
        tensor([0.6000, 0.8000])
    """
    listed = as_list(parameters, warn_at=2)
    is_compiling = torch.compiler.is_compiling()
    if group is not None or (not is_compiling and listed and is_dtensor(listed[0])):
        norm: Tensor = _spread().clip_grad_norm_(listed, max_norm, norm_type, error_if_nonfinite, group)
        return norm
    if is_compiling:
        return _compile.clip_grad_norm_(gradients_of(listed), max_norm, norm_type, error_if_nonfinite)
    return clip_gradients_(gradients_of(listed), max_norm, norm_type, error_if_nonfinite, parameters=listed)


def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Measure the norm of all tensors together: ``torch.nn.utils.get_total_norm``.

    Args:
        tensors: As the gradients in :func:`clip_grad_norm_`; they may require grad.
        norm_type: As for :func:`clip_grad_norm_`.
        error_if_nonfinite: As for :func:`clip_grad_norm_`.
        foreach: Accepted and ignored.
        group: As for :func:`clip_grad_norm_`.

    Returns:
        The norm, as :func:`clip_grad_norm_` returns it.

    Raises:
        TypeError: As for :func:`clip_grad_norm_`.
        ValueError: As for :func:`clip_grad_norm_`, of process groups.
        RuntimeError: As for :func:`clip_grad_norm_`.

    Example:
        >>> import torch, gradclip.torch
        >>> gradclip.torch.get_total_norm([torch.full((4,), 1e-25), torch.zeros(3)])
        tensor(2.0000e-25)
    """
    listed = as_list(tensors)
    if group is None and (torch.compiler.is_compiling() or not (listed and is_dtensor(listed[0]))):
        try:
            total, dtype = total_norm_of(listed, norm_type, error_if_nonfinite, TENSORS)
            return total.to(dtype)
        except Unsupported:
            if not any(map(is_dtensor, listed)):
                raise
    norm: Tensor = _spread().get_total_norm(listed, norm_type, error_if_nonfinite, group)
    return norm


def clip_grads_with_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    total_norm: Tensor,
    foreach: bool | None = None,
) -> None:
    """Clip gradients by a norm that was measured: ``torch.nn.utils.clip_grads_with_norm_``.

    Args:
        parameters: As for :func:`clip_grad_norm_`.
        max_norm: Not negative.
        total_norm: A 0-d tensor or DTensor, as :func:`get_total_norm` returns it. On a GPU, nothing waits
            for it.
        foreach: Accepted and ignored.

    Raises:
        TypeError: As for :func:`clip_grad_norm_`.
        ValueError: As for :func:`clip_grad_norm_`.

    Example:
        >>> import torch, gradclip.torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> gradclip.torch.clip_grads_with_norm_([weight], 2.5, torch.tensor(5.0))
        >>> weight.grad
        tensor([1.5000, 2.0000])
    """
    limit, total = as_threshold(max_norm, "max_norm"), whole(total_norm)
    grads = gradients_of(as_list(parameters))
    try:
        scale_by_norm_(grads, limit, total, PARAMETERS)
    except Unsupported:
        if not any(map(is_dtensor, grads)):
            raise
        scale_by_norm_(writable_parts(grads, PARAMETERS), limit, total, PARAMETERS)
        mark_written(grads)


def clip_grad_value_(
    parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None
) -> None:
    """Clip every element of the gradients into ``[-clip_value, clip_value]``: PyTorch's function.

    Only where an element is beyond are bytes written, by the tile of 16 KB. NaN stays NaN.

    Args:
        parameters: As for :func:`clip_grad_norm_`, with real gradients.
        clip_value: Not negative.
        foreach: Accepted and ignored.

    Raises:
        TypeError: As for :func:`clip_grad_norm_`; a gradient is complex.
        ValueError: ``clip_value`` is negative or NaN; gradients overlap in memory.

    Example:
        >>> import torch, gradclip.torch
        >>> weight = torch.nn.Parameter(torch.zeros(3))
        >>> weight.grad = torch.tensor([0.25, -7.0, float("inf")])
        >>> gradclip.torch.clip_grad_value_([weight], 0.5)
        >>> weight.grad
        tensor([ 0.2500, -0.5000,  0.5000])
    """
    limit = as_threshold(clip_value, "clip_value")
    grads = gradients_of(as_list(parameters))
    try:
        _clip_values(grads, limit)
    except Unsupported:
        if not any(map(is_dtensor, grads)):
            raise
        _clip_values(writable_parts(grads, PARAMETERS, each_element=True), limit)
        mark_written(grads)


# --- What they are made of ----------------------------------------------------------------------------


def clip_gradients_(
    grads: Gradients,
    max_norm: float | Tensor,
    norm_type: float,
    error_if_nonfinite: bool,
    names: Names = PARAMETERS,
    parameters: Sequence[Tensor] = (),
) -> Tensor:
    """:func:`clip_grad_norm_` for a list of gradients; ``parameters`` tell where those lie that are None."""
    order = as_number(norm_type, "norm_type")
    on_device = isinstance(max_norm, Tensor) and max_norm.is_cuda
    limit = max_norm if on_device else as_threshold(max_norm, "max_norm")
    if order > 0:
        try:
            return _clip_at_once(grads, limit, order, error_if_nonfinite, names)
        except (TypeError, ValueError):
            pass  # Something among them needs a second look, which also says what is wrong.
    if any(map(is_dtensor, grads)):
        norm: Tensor = _spread().clip_gradients_(
            grads, parameters, max_norm, norm_type, error_if_nonfinite, names
        )
        return norm
    grads = writable(grads, names)
    if order > 0 and len(by_device(grads)) <= 1:
        with naming(names):
            return _clip_at_once(grads, limit, order, error_if_nonfinite, names)
    total, dtype = total_norm_of(grads, order, error_if_nonfinite, names)
    scale_by_norm_(grads, limit, total, names)
    return total.to(dtype)


def _clip_at_once(
    grads: Gradients, limit: float | Tensor, order: float, error_if_nonfinite: bool, names: Names
) -> Tensor:
    """Of gradients on one device, in one call of its engine."""
    read = engine_of(grads)[0].read(grads)
    policy = "raise" if error_if_nonfinite else "propagate"
    try:
        result = finish(read.clip(limit, order, None, 1.0, policy, None, EPSILON))
    except NonFiniteGradientError as error:
        raise nonfinite_error(order, error.entries, error.norms, names) from None
    total: Any = result.total_norm
    dtype = torch.float64 if read.has_float64 else torch.float32
    if isinstance(total, Tensor):
        mark_written(grads)  # for all that is known here
        return total.to(dtype)
    if result.clipped:
        mark_written(grads)
    # A float32 holds no norm above 3.4e38, and scalar_tensor would raise of it.
    return torch.scalar_tensor(total if total <= _LARGEST[dtype] else total * math.inf, dtype=dtype)


def total_norm_of(
    tensors: Gradients, norm_type: float, error_if_nonfinite: bool, names: Names
) -> tuple[Tensor, torch.dtype]:
    """The norm of a list of tensors: float64, on the device of the first; and what dtype to return."""
    order = as_number(norm_type, "norm_type")
    if order > 0:
        measured = _on_every_device(
            tensors, names, readable, lambda read, _: (read.global_norm(order), read.has_float64)
        )
        norms = [torch.as_tensor(norm, dtype=torch.float64) for norm, _ in measured]
        is_wide = any(has_float64 for _, has_float64 in measured)
    else:
        found = readable(tensors, names)
        norms = [_odd_norm(t, order) for t in found if t is not None and t.numel() > 0]
        is_wide = norm_dtype(found) is torch.float64
    first = next((tensor.device for tensor in tensors if tensor is not None), _CPU)
    total = combine([norm.to(first) for norm in norms] or [torch.zeros((), dtype=torch.float64)], order)
    if error_if_nonfinite and not math.isfinite(total.item()):
        found = readable(tensors, names)
        raise nonfinite_error(order, count_nonfinite(found), norms_of(found, order), names)
    return total, torch.float64 if is_wide else torch.float32


def scale_by_norm_(grads: Gradients, limit: float | Tensor, total: Tensor, names: Names) -> None:
    """Multiply by what the norm ``total`` makes of the threshold; nothing is written where that is 1."""
    wide = as_norm(total)

    def scale(read: PlannedGradients, device: torch.device) -> None:
        read.clip_with_norm(wide.to(device) if device.type == "cuda" else wide.item(), limit, EPSILON)

    _on_every_device(grads, names, writable, scale)
    on_device = wide.is_cuda or isinstance(limit, Tensor)
    if on_device or not limit >= wide.item() + EPSILON:
        mark_written(grads)


def _zero(grads: Gradients) -> None:
    """All that is not NaN."""
    for i, grad in enumerate(grads):
        if grad is not None and grad.is_complex():
            raise TypeError(
                f"{name_of(PARAMETERS, i)}: expected a real dtype (complex numbers have no order), "
                f"got {str(grad.dtype)[6:]}"
            )
    for grad in grads:
        if grad is not None:
            grad.clamp_(0, 0)


def _clip_values(grads: Gradients, limit: float) -> None:
    if limit == 0:  # which engines take for a mistake
        _zero(writable(grads, PARAMETERS))
        return
    results = _on_every_device(grads, PARAMETERS, writable, lambda read, _: finish(read.clip_by_value(limit)))
    if not all(result.clipped is False for result in results):  # which a GPU does not know yet
        mark_written(grads)


def _on_every_device(
    grads: Gradients,
    names: Names,
    prepare: Callable[[Gradients, Names], Gradients],
    use: Callable[[PlannedGradients, torch.device], _T],
) -> list[_T]:
    """Let an engine read the gradients as they are; if it does not, look at each of them first."""
    device = next((grad.device for grad in grads if grad is not None), _CPU)
    try:
        read_at_once = engine_of(grads)[0].read(grads)
        read_at_once.require_writable()  # also what is only measured: what two share counts once
        return [use(read_at_once, device)]
    except (TypeError, ValueError):
        lists = by_device(prepare(grads, names))
    with naming(names):
        read = [(engine_of(each)[0].read(each), device) for device, each in lists.items()]
        if prepare is writable:
            for each, _ in read:  # all of them before the first is written
                each.require_writable()
        return [use(each, device) for each, device in read]


def _odd_norm(tensor: Tensor, order: float) -> Tensor:
    """What engines do not measure: orders that are not positive."""
    wide = tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)
    return wide.count_nonzero().to(torch.float64) if order == 0 else norm_of(wide.abs(), order)


def _spread() -> ModuleType:
    """The module for what is spread over ranks, imported by those who need it: it imports this one."""
    from gradclip.torch import _sharded  # noqa: PLC0415

    return _sharded


# --- What is not finite -------------------------------------------------------------------------------


def norms_of(tensors: Gradients, order: float) -> npt.NDArray[np.float64]:
    """The norm of every tensor."""
    return np.array([0.0 if t is None or not t.numel() else _odd_norm(t, order).item() for t in tensors])


def count_nonfinite(grads: Gradients) -> _Counts:
    """Position, NaNs and infinities of those that have any."""
    counts = [(i, int(g.isnan().sum()), int(g.isinf().sum())) for i, g in enumerate(grads) if g is not None]
    return [(i, nan, inf) for i, nan, inf in counts if nan or inf]


def describe(entries: _Counts, names: Names) -> list[str]:
    """What errors say of them."""
    found = [
        f"{name_of(names, int(i))}: expected finite elements, got {nan} NaN and {inf} inf"
        for i, nan, inf in entries[:5]
    ]
    if len(entries) > len(found):
        found.append(f"and {len(entries) - len(found)} more")
    return found


def nonfinite_error(
    order: float,
    entries: _Counts,
    norms: npt.NDArray[np.float64],
    names: Names,
    found: Sequence[str] | None = None,
) -> NonFiniteNormError:
    """The error for them; ``found`` is what it says, if not what :func:`describe` does."""
    found = describe(entries, names) if found is None else found
    if not found:
        found = ["expected a finite norm, got one that is not, of gradients that are"]
    named: list[tuple[int | str, int, int]] = [(name_of(names, int(i)), a, b) for i, a, b in entries]
    # PyTorch's words first: there are scripts that look for them.
    start = f"The total norm of order {order} for gradients from `parameters` is non-finite"
    return NonFiniteNormError("; ".join([start, *found, "nothing was written"]), named, norms)
