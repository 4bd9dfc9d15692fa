"""Clipping what this process holds: by one engine where it reads all as it is, else after a second look."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradclip._dispatch import PlannedGradients, engine_of
from gradclip._result import NonFiniteGradientError
from gradclip.torch._gradients import (
    PARAMETERS,
    Gradients,
    Names,
    as_limit,
    as_norm,
    as_number,
    by_device,
    combine,
    name_of,
    naming,
    norm_dtype,
    norm_of,
    read_as_they_are,
    readable,
    written,
)
from gradclip.torch._nonfinite import count_nonfinite, nonfinite_error

__all__ = ["EPSILON", "clip_gradients_", "clip_values_", "norms_of", "scale_by_norm_", "total_norm_of"]

EPSILON = 1e-6  # what PyTorch adds to norms

_T = TypeVar("_T")
_CPU = torch.device("cpu")
_LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.float64)}


def clip_gradients_(
    grads: Gradients,
    max_norm: float | Tensor,
    norm_type: float,
    error_if_nonfinite: bool,
    names: Names = PARAMETERS,
) -> Tensor:
    """:func:`gradclip.torch.clip_grad_norm_` for a list of gradients."""
    order, limit = as_number(norm_type, "norm_type"), as_limit(max_norm)

    def at_once(read: PlannedGradients) -> Tensor:
        return _clip_at_once(read, limit, order, error_if_nonfinite, names)

    if order > 0:
        try:
            return at_once(read_as_they_are(grads))
        except (TypeError, ValueError):
            pass  # Something among them needs a second look, which also says what is wrong.
    with written(grads, names) as plain:
        if order > 0 and len(by_device(plain)) <= 1:
            with naming(names):
                return at_once(engine_of(plain)[0].read(plain))
        total, dtype = total_norm_of(plain, order, error_if_nonfinite, names)
        scale_by_norm_(plain, limit, total, names)
    return total.to(dtype)


def _clip_at_once(
    read: PlannedGradients,
    limit: float | Tensor,
    order: float,
    error_if_nonfinite: bool,
    names: Names,
) -> Tensor:
    """Of gradients on one device, in one call of its engine."""
    policy = "raise" if error_if_nonfinite else "propagate"
    try:
        result = read.clip(limit, order, None, 1.0, policy, None, EPSILON)
    except NonFiniteGradientError as error:
        raise nonfinite_error(order, error.entries, error.norms, names) from None
    total: Any = result.total_norm
    dtype = torch.float64 if read.has_float64 else torch.float32
    if isinstance(total, Tensor):
        return total.to(dtype)
    # A float32 holds no norm above 3.4e38, and scalar_tensor would raise of it.
    return torch.scalar_tensor(
        total if total <= _LARGEST[dtype] else total * math.inf, dtype=dtype, device=_CPU
    )


def total_norm_of(
    tensors: Gradients, norm_type: float, error_if_nonfinite: bool, names: Names
) -> tuple[Tensor, torch.dtype]:
    """The norm of a list of tensors: float64, on the device of the first; and what dtype to return."""
    order = as_number(norm_type, "norm_type")
    first = next((tensor.device for tensor in tensors if tensor is not None), _CPU)
    if order > 0:
        measured = _on_every_device(
            tensors, names, _reading, lambda read, _: (read.global_norm(order), read.has_float64)
        )
        # A CPU's are numbers. To copy one to a GPU would wait for that, to fill memory there does not.
        norms: list[Tensor] = [
            norm if isinstance(norm, Tensor) else torch.full((), norm, dtype=torch.float64, device=first)
            for norm, _ in measured
        ]
        is_wide = any(has_float64 for _, has_float64 in measured)
    else:
        found = readable(tensors, names)
        norms = [_odd_norm(t, order) for t in found if t is not None and t.numel() > 0]
        is_wide = norm_dtype(found) is torch.float64
    nothing = torch.zeros((), dtype=torch.float64, device=first)
    total = combine([norm.to(first) for norm in norms] or [nothing], order)
    if error_if_nonfinite and not math.isfinite(total.item()):
        found = readable(tensors, names)
        raise nonfinite_error(order, count_nonfinite(found), norms_of(found, order), names)
    return total, torch.float64 if is_wide else torch.float32


def scale_by_norm_(grads: Gradients, limit: float | Tensor, total: Tensor, names: Names) -> None:
    """Multiply by what the norm ``total`` makes of the threshold; nothing is written where that is 1."""
    wide = as_norm(total)

    def scale(read: PlannedGradients, device: torch.device) -> None:
        if device.type == "cuda":
            there = limit.to(device) if isinstance(limit, Tensor) else limit
            read.clip_with_norm(wide.to(device), there, EPSILON)
        else:  # a CPU has to know: waits for norms that a GPU measured
            read.clip_with_norm(wide.item(), float(limit), EPSILON)

    _on_every_device(grads, names, written, scale)


@contextmanager
def _written_real(grads: Gradients, names: Names) -> Iterator[Gradients]:
    """As :func:`written`; all are looked at before the first device's are written to."""
    with written(grads, names) as plain:
        for i, grad in enumerate(plain):
            if grad is not None and grad.is_complex():
                raise TypeError(
                    f"{name_of(names, i)}: expected a real dtype (complex numbers have no order), "
                    f"got {str(grad.dtype)[6:]}"
                )
        yield plain


def clip_values_(grads: Gradients, limit: float) -> None:
    _on_every_device(
        grads, PARAMETERS, _written_real, lambda read, _: read.clip_by_value(limit, to_nearest=True)
    )


def _on_every_device(
    grads: Gradients,
    names: Names,
    prepare: Callable[[Gradients, Names], AbstractContextManager[Gradients]],
    use: Callable[[PlannedGradients, torch.device], _T],
) -> list[_T]:
    """Let an engine read the gradients as they are; if it does not, look at each of them first."""
    device = next((grad.device for grad in grads if grad is not None), _CPU)
    try:
        read_at_once = read_as_they_are(grads)
        read_at_once.require_writable()  # also what is only measured: what two share counts once
        return [use(read_at_once, device)]
    except (TypeError, ValueError):
        pass
    with prepare(grads, names) as plain, naming(names):
        read = [(engine_of(each)[0].read(each), device) for device, each in by_device(plain).items()]
        if prepare is not _reading:
            for each, _ in read:  # all of them before the first is written
                each.require_writable()
        return [use(each, device) for each, device in read]


def _reading(tensors: Gradients, names: Names) -> AbstractContextManager[Gradients]:
    return nullcontext(readable(tensors, names))


def _odd_norm(tensor: Tensor, order: float) -> Tensor:
    """What engines do not measure: orders that are not positive."""
    wide = tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)
    return wide.count_nonzero().to(torch.float64) if order == 0 else norm_of(wide.abs(), order)


def norms_of(tensors: Gradients, order: float) -> npt.NDArray[np.float64]:
    """The norm of every tensor."""
    return np.array([0.0 if t is None or not t.numel() else _odd_norm(t, order).item() for t in tensors])
