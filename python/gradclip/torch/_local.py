"""Clipping what this process holds: in one call of an engine, or of one for each device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradclip._dispatch import ReadGradients, read
from gradclip._result import NonFiniteGradientError
from gradclip.torch._arguments import PARAMETERS, Names, Tensors, as_limit, as_norm, as_number, name_of
from gradclip.torch._gradients import READING, WRITING, Conversion, OnDevice, read_or_convert, written
from gradclip.torch._nonfinite import count_nonfinite, nonfinite_error
from gradclip.torch._norms import combine, norm_of

__all__ = ["EPSILON", "clip_gradients_", "clip_values_", "norms_of", "scale_by_norm_", "total_norm_of"]

EPSILON = 1e-6  # what PyTorch adds to norms

_CPU = torch.device("cpu")
_LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.float64)}


def clip_gradients_(
    grads: Tensors,
    max_norm: float | Tensor,
    norm_type: float,
    error_if_nonfinite: bool,
    names: Names = PARAMETERS,
) -> Tensor:
    """:func:`gradclip.torch.clip_grad_norm_` for a list of gradients."""
    order, limit = as_number(norm_type, "norm_type"), as_limit(max_norm)

    def clip(found: list[OnDevice], tensors: Tensors) -> Tensor:
        if order > 0 and len(found) <= 1:
            # Of no gradient at all, a CPU's engine has read the list.
            return _clip_at_once(
                found[0].read if found else read(tensors), limit, order, error_if_nonfinite, names
            )
        total, dtype = _total_norm(found, tensors, order, error_if_nonfinite, names)
        _scale(found, limit, total)
        return total.to(dtype)

    return read_or_convert(grads, names, WRITING, clip)


def _clip_at_once(
    read: ReadGradients,
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
    tensors: Tensors, norm_type: float, error_if_nonfinite: bool, names: Names
) -> tuple[Tensor, torch.dtype]:
    """The norm of a list of tensors: float64, on the device of the first; and what dtype to return."""
    order = as_number(norm_type, "norm_type")

    def measure(found: list[OnDevice], plain: Tensors) -> tuple[Tensor, torch.dtype]:
        return _total_norm(found, plain, order, error_if_nonfinite, names)

    return read_or_convert(tensors, names, READING, measure)


def _total_norm(
    found: list[OnDevice], tensors: Tensors, order: float, error_if_nonfinite: bool, names: Names
) -> tuple[Tensor, torch.dtype]:
    first = found[0].device if found else _CPU
    if order > 0:
        # A CPU's are numbers. To copy one to a GPU would wait for that, to fill memory there does not.
        measured = [read.global_norm(order) for read, _ in found]
        norms: list[Tensor] = [
            norm if isinstance(norm, Tensor) else torch.full((), norm, dtype=torch.float64, device=first)
            for norm in measured
        ]
    else:
        norms = [_odd_norm(t, order) for t in tensors if t is not None and t.numel() > 0]
    nothing = torch.zeros((), dtype=torch.float64, device=first)
    total = combine([norm.to(first) for norm in norms] or [nothing], order)
    if error_if_nonfinite and not math.isfinite(total.item()):
        raise nonfinite_error(order, count_nonfinite(tensors), norms_of(tensors, order), names)
    is_wide = any(read.has_float64 for read, _ in found)
    return total, torch.float64 if is_wide else torch.float32


def scale_by_norm_(grads: Tensors, limit: float | Tensor, total: Tensor, names: Names) -> None:
    """Multiply by what the norm ``total`` makes of the threshold; nothing is written where that is 1."""
    wide = as_norm(total)
    read_or_convert(grads, names, WRITING, lambda found, _: _scale(found, limit, wide))


def _scale(found: list[OnDevice], limit: float | Tensor, total: Tensor) -> None:
    for gradients, device in found:
        if device.type == "cuda":
            there = limit.to(device) if isinstance(limit, Tensor) else limit
            gradients.with_norm(total.to(device)).clip(there, "propagate", EPSILON)
        else:  # a CPU has to know: waits for norms that a GPU measured
            gradients.with_norm(total.item()).clip(float(limit), "propagate", EPSILON)


@contextmanager
def _written_real(grads: Tensors, names: Names) -> Iterator[Tensors]:
    """As :func:`written`; all are looked at before the first device's are written to."""
    with written(grads, names) as plain:
        for i, grad in enumerate(plain):
            if grad is not None and grad.is_complex():
                raise TypeError(
                    f"{name_of(names, i)}: expected a real dtype (complex numbers have no order), "
                    f"got {str(grad.dtype)[6:]}"
                )
        yield plain


def clip_values_(grads: Tensors, limit: float) -> None:
    def clip(found: list[OnDevice], _: Tensors) -> None:
        for each in found:
            each.read.clip_by_value(limit, to_nearest=True)

    read_or_convert(grads, PARAMETERS, Conversion(_written_real, writes=True), clip)


def _odd_norm(tensor: Tensor, order: float) -> Tensor:
    """What engines do not measure: orders that are not positive."""
    wide = tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)
    return wide.count_nonzero().to(torch.float64) if order == 0 else norm_of(wide.abs(), order)


def norms_of(tensors: Tensors, order: float) -> npt.NDArray[np.float64]:
    """The norm of every tensor."""
    return np.array([0.0 if t is None or not t.numel() else _odd_norm(t, order).item() for t in tensors])
