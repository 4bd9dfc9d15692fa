"""Clipping that happens inside of a fused optimizer's step: it divides gradients by a scale as it reads
them, which is there for mixed precision."""

from __future__ import annotations

import math
from inspect import getattr_static
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.utils.hooks import RemovableHandle

from gradclip._measured import Measured
from gradclip.torch._amp import begin_unscaling, check_scaler, parameters_of
from gradclip.torch._amp import measured as noted
from gradclip.torch._arguments import PARAMETERS, Tensors, as_threshold, warn_if_nothing
from gradclip.torch._dtensor import any_dtensor
from gradclip.torch._environment import in_float_environment, untraced
from gradclip.torch._local import EPSILON, total_norm_of
from gradclip.torch._norms import norm_dtype
from gradclip.torch._optimizer import unwrapped
from gradclip.torch._spread import SpreadGradients

__all__ = ["defer_clip_"]


@in_float_environment
def defer_clip_(
    optimizer: torch.optim.Optimizer,
    max_norm: float,
    norm_type: float = 2.0,
    scaler: GradScaler | None = None,
    measured: Measured | None = None,
) -> Tensor:
    """Measure an optimizer's gradients now, and let its next step clip them.

    The step of a fused optimizer divides the gradients by ``optimizer.grad_scale`` as it reads them. That is
    set here to ``(norm + 1e-6) / max_norm`` for one step, where it is above 1: no pass over memory is made
    for clipping alone. The step itself writes the divided gradients back.

    A second call before the step takes the place of the first. If the step never comes, or raises, the scale
    stays in ``optimizer.grad_scale`` until the next call here, or until somebody deletes it.

    Division by a float32 in place of a multiplication by the coefficient rounds otherwise: parameters can
    differ from those after :func:`clip_grad_norm_` in their last bits. For bits that are the same with and
    without, use that.

    Args:
        optimizer: One of PyTorch's own with ``fused=True`` (Adam, AdamW, SGD; Adagrad
            from PyTorch 2.12 on), which Lightning or
            Accelerate may have wrapped; all gradients on one device.
        max_norm: Positive.
        norm_type: As for :func:`clip_grad_norm_`.
        scaler: That of mixed precision: unscaling is deferred too, and ``scaler.step(optimizer)`` is to
            follow instead of ``optimizer.step()``. On a GPU the host waits for its scale.
        measured: What :func:`gradclip.accumulate_` or :func:`gradclip.measure` has measured of these
            gradients, and maybe of others that share their norm: its ``total_norm`` is taken, and nothing is
            measured here. Without a scaler: ``accumulate_`` unscales as it adds.

    Returns:
        The norm of the (unscaled) gradients, as :func:`clip_grad_norm_` returns it. The gradients are not
        clipped before the step.

    Raises:
        ValueError: The optimizer is not fused; ``max_norm`` is not positive; gradients are on several
            devices; a scale that somebody else has set waits for the step; ``measured`` is of fewer elements
            than the gradients have, or stands beside a ``norm_type`` or a ``scaler``.
        TypeError: As for :func:`clip_grad_norm_`; ``optimizer`` is none, or in another wrapper; ``measured``
            is no :class:`gradclip.Measured`.
        RuntimeError: As for :func:`unscale_and_clip_`, with a scaler.

    Example:
        >>> import torch, gradclip.torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> gradclip.torch.defer_clip_(optimizer, max_norm=1.0)
        tensor(5.)
        >>> optimizer.step()
        >>> weight
        Parameter containing:
        tensor([-0.6000, -0.8000], requires_grad=True)
    """
    return _defer_clip_(optimizer, max_norm, norm_type, scaler, measured)


@untraced
def _defer_clip_(
    optimizer: torch.optim.Optimizer,
    max_norm: float,
    norm_type: float,
    scaler: GradScaler | None,
    known: Measured | None,
) -> Tensor:
    if known is not None:
        _check_measured(known, norm_type, scaler)
    if scaler is not None:
        check_scaler(scaler)
    given, optimizer = optimizer, unwrapped(optimizer)
    limit = as_threshold(max_norm, "max_norm")
    if limit == 0:
        raise ValueError(f"max_norm: expected a positive number, got {max_norm!r}")
    # Of the optimizer itself: a wrapper that hands reads on would step without the scale.
    if not getattr_static(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            "optimizer: expected one of PyTorch's with fused=True, whose step takes a scale, got "
            f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
        )
    if not all(options.get("fused", True) for options in optimizer.param_groups):
        raise ValueError("optimizer: expected fused=True in all parameter groups, got one without")
    _take_away(optimizer)  # of a step that never came, or raised
    if getattr(optimizer, "grad_scale", None) is not None:
        raise ValueError("optimizer: expected no grad_scale, got one that waits for the next step")
    parameters = parameters_of(optimizer)
    grads = [parameter.grad for parameter in parameters]
    devices = {grad.device for grad in grads if grad is not None}
    if len(devices) > 1:
        raise ValueError(f"optimizer: expected gradients on one device, got {sorted(map(str, devices))}")
    enabled = scaler is not None and scaler.is_enabled()
    state = begin_unscaling(scaler, given, "defer_clip_") if scaler is not None and enabled else None
    spread = SpreadGradients(grads, parameters, PARAMETERS) if any_dtensor(parameters) else None
    total, dtype = _total(known, spread, grads, norm_type)
    scale = scaler.get_scale() if scaler is not None and enabled else 1.0
    total = total / scale
    divisor = torch.full_like(total, scale)
    if math.isfinite(limit):
        divisor *= ((total + EPSILON) / limit).clamp(min=1.0)  # which lets a NaN through
    if state is not None or divisor.is_cuda or divisor.item() != 1.0:
        _put(optimizer, divisor)
    warn_if_nothing(grads)
    if state is not None:
        noted(state, parameters, total, dtype is torch.float64)
    return total.to(dtype) if spread is None else spread.layout.as_returned(total)


def _check_measured(known: object, norm_type: float, scaler: GradScaler | None) -> None:
    if not isinstance(known, Measured):
        got = f"{type(known).__module__}.{type(known).__qualname__}"
        raise TypeError(f"measured: expected a gradclip.Measured or None, got a {got}")
    if norm_type != 2:
        raise ValueError(
            f"norm_type: expected 2 beside measured, which has a norm already, got {norm_type!r}"
        )
    if scaler is not None:
        raise ValueError(
            "scaler: expected None beside measured, got one; "
            "gradclip.accumulate_(..., scale=1 / loss_scale) unscales"
        )


def _total(
    known: Measured | None, spread: SpreadGradients | None, grads: Tensors, norm_type: float
) -> tuple[Tensor, torch.dtype]:
    """The norm as float64, on the device of the gradients, and the dtype of what is returned."""
    if known is not None:
        return _norm_of(known, grads)
    if spread is not None:
        return spread.total_norm(norm_type), spread.layout.dtype
    return total_norm_of(grads, norm_type, False, PARAMETERS)


def _norm_of(known: Measured, grads: Tensors) -> tuple[Tensor, torch.dtype]:
    elements = sum(grad.numel() for grad in grads if grad is not None)
    if known.group_sizes.sum() < elements:
        raise ValueError(
            f"measured: expected what was measured of the optimizer's {elements} elements (and maybe more), "
            f"got that of {known.group_sizes.sum()}"
        )
    device = next((grad.device for grad in grads if grad is not None), torch.device("cpu"))
    total = torch.as_tensor(known.total_norm, dtype=torch.float64, device=device)
    return total, norm_dtype(grads)


class _Waiting(NamedTuple):
    """What was set here for the next step and is not taken away yet."""

    scale: Tensor
    hook: RemovableHandle


_waiting: WeakKeyDictionary[torch.optim.Optimizer, _Waiting] = WeakKeyDictionary()


def _put(optimizer: Any, divisor: Tensor) -> None:
    optimizer.grad_scale = divisor.to(torch.float32)
    hook = optimizer.register_step_post_hook(lambda optimizer, *_: _take_away(optimizer))
    _waiting[optimizer] = _Waiting(optimizer.grad_scale, hook)


def _take_away(optimizer: Any) -> None:
    waiting = _waiting.pop(optimizer, None)
    if waiting is None:
        return
    waiting.hook.remove()
    if getattr(optimizer, "grad_scale", None) is waiting.scale:
        optimizer.grad_scale = None  # not deleted, which scaler.step does
