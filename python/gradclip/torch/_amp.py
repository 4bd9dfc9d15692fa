"""Mixed precision: unscaling, norms, clipping and the search for infinities in one.

Reference: https://docs.pytorch.org/docs/stable/amp.html#gradient-scaling
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState

from gradclip._api import Thresholds
from gradclip._dispatch import read
from gradclip._measured import Policy
from gradclip._result import ClipResult
from gradclip.torch import _sharded
from gradclip.torch._arguments import PARAMETERS, Tensors, as_number, as_threshold, warn_if_nothing
from gradclip.torch._dtensor import any_dtensor
from gradclip.torch._environment import in_float_environment, untraced
from gradclip.torch._gradients import WRITING, OnDevice, read_or_convert
from gradclip.torch._local import EPSILON, clip_gradients_
from gradclip.torch._module import ModuleGroups, by_name, clip_named_, groups_of
from gradclip.torch._optimizer import unwrapped
from gradclip.torch._spread import SpreadGradients

__all__ = ["begin_unscaling", "check_scaler", "measured", "parameters_of", "unscale_and_clip_"]


@overload
def unscale_and_clip_(
    scaler: GradScaler,
    optimizer: torch.optim.Optimizer,
    max_norm: float,
    norm_type: float = 2.0,
    *,
    module: None = None,
    groups: None = None,
) -> Tensor: ...
@overload
def unscale_and_clip_(
    scaler: GradScaler,
    optimizer: torch.optim.Optimizer,
    max_norm: Thresholds | Policy,
    norm_type: float = 2.0,
    *,
    module: torch.nn.Module | Iterable[tuple[str, Tensor]],
    groups: ModuleGroups = None,
) -> ClipResult: ...
@in_float_environment
def unscale_and_clip_(
    scaler: GradScaler,
    optimizer: torch.optim.Optimizer,
    max_norm: Any,
    norm_type: float = 2.0,
    *,
    module: torch.nn.Module | Iterable[tuple[str, Tensor]] | None = None,
    groups: ModuleGroups = None,
) -> Tensor | ClipResult:
    """Unscale an optimizer's gradients and clip them, in one pass to measure and one to write.

    Does what ``scaler.unscale_(optimizer)`` and ``clip_grad_norm_`` of its parameters do, and leaves the
    scaler in the same state: ``scaler.step(optimizer)`` follows, and skips the step if an infinity or a NaN
    was found. Then, unlike there, the gradients are left as they were, still scaled. Memory is read twice
    and written once, instead of read three times and written twice. (Of gradients on several devices, or
    a ``norm_type`` that is not positive, PyTorch's ``unscale_`` is called, and then the drop-in.)

    Args:
        scaler: If it is disabled, this is :func:`clip_grad_norm_`.
        optimizer: It may be wrapped (by Lightning, Accelerate). Its gradients hold ``scaler.get_scale()``
            times the gradients. On a GPU the scale is read by the host, which waits for it.
        max_norm: As for :func:`clip_grad_norm_`; with ``module``, as for :func:`clip_module_`.
        norm_type: As for :func:`clip_grad_norm_`; with ``module`` positive.
        module: A module, or what its ``named_parameters()`` yields, that has names for the optimizer's
            parameters; others of its parameters are left alone. All gradients on one device.
        groups: With ``module``, parameters that share one norm, as for :func:`clip_module_`.

    Returns:
        The norm of the unscaled gradients before clipping, as :func:`clip_grad_norm_` returns it. With
        ``module``, a :class:`gradclip.ClipResult` with the norms by name (its formula has PyTorch's 1e-6).

    Raises:
        RuntimeError: The gradients were unscaled before, or the optimizer has stepped, since the last
            ``scaler.update()``: as ``scaler.unscale_`` says.
        ValueError: A gradient is float16, which a scaler does not unscale; or as :func:`clip_grad_norm_`.
        TypeError: As for :func:`clip_grad_norm_`; ``scaler`` or ``optimizer`` is none; the scaler's class has
            an ``unscale_`` of its own (``ShardedGradScaler``).

    Example:
        >>> import torch, gradclip.torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        >>> scaler.scale((weight * torch.tensor([3.0, 4.0])).sum()).backward()
        >>> gradclip.torch.unscale_and_clip_(scaler, optimizer, max_norm=1.0)
        tensor(5.)
        >>> weight.grad
        tensor([0.6000, 0.8000])
        >>> scaler.step(optimizer)
        >>> scaler.update()

        With the names of a module:

        >>> model = torch.nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> scaler.scale(3 * model.weight.sum() + 4 * model.bias.sum()).backward()
        >>> result = gradclip.torch.unscale_and_clip_(scaler, optimizer, max_norm=1.0, module=model)
        >>> result.named_norms()
        {'weight': 3.0, 'bias': 4.0}
    """
    if module is not None:
        return _unscale_and_clip_module_(scaler, optimizer, max_norm, norm_type, module, groups)
    if groups is not None:
        raise TypeError(f"groups: expected None without a module, which has the names, got {groups!r}")
    return _unscale_and_clip_(scaler, optimizer, max_norm, norm_type)


@untraced
def _unscale_and_clip_(
    scaler: GradScaler, optimizer: torch.optim.Optimizer, max_norm: float, norm_type: float
) -> Tensor:
    check_scaler(scaler)
    parameters = parameters_of(unwrapped(optimizer))
    order, limit = as_number(norm_type, "norm_type"), as_threshold(max_norm, "max_norm")
    if not scaler.is_enabled():
        grads: Tensors = [p.grad for p in parameters]
        if any_dtensor(parameters):
            norm: Tensor = _sharded.clip_grad_norm_(parameters, limit, order, False, None)
        else:
            norm = clip_gradients_(grads, limit, order, False)
        warn_if_nothing(grads)
        return norm
    state = begin_unscaling(scaler, optimizer, "unscale_and_clip_")
    grads = _gradients(parameters)
    if any_dtensor(parameters):
        spread = SpreadGradients(grads, parameters, PARAMETERS)
        result = spread.clip(limit, order, None, scaler.get_scale(), "skip", None, EPSILON)
        return spread.layout.as_returned(measured(state, parameters, result.total_norm, spread.has_float64))

    def clip(found: list[OnDevice], tensors: Tensors) -> Tensor | None:
        if order <= 0 or len(found) > 1:
            return None
        gradients = found[0].read if found else read(tensors)
        result = gradients.clip(limit, order, None, scaler.get_scale(), "skip", None, EPSILON)
        norm = measured(state, tensors, result.total_norm, gradients.has_float64)
        warn_if_nothing(tensors)
        return norm

    total = read_or_convert(grads, PARAMETERS, WRITING, clip)
    if total is not None:
        return total
    scaler.unscale_(unwrapped(optimizer))
    return clip_gradients_(grads, limit, order, False)


@untraced
def _unscale_and_clip_module_(
    scaler: GradScaler,
    optimizer: torch.optim.Optimizer,
    max_norm: Any,
    norm_type: float,
    module: torch.nn.Module | Iterable[tuple[str, Tensor]],
    groups: ModuleGroups,
) -> ClipResult:
    check_scaler(scaler)
    ids = {id(parameter) for parameter in parameters_of(unwrapped(optimizer))}
    parameters = {name: p for name, p in by_name(module).items() if id(p) in ids}
    if len(parameters) != len(ids):
        raise ValueError(
            f"module: expected names for all {len(ids)} parameters of the optimizer, got {len(parameters)}"
        )
    group_of = groups_of(groups, list(parameters))
    if not scaler.is_enabled():
        return clip_named_(parameters, group_of, max_norm, norm_type, 1.0, "skip", None, EPSILON)
    state = begin_unscaling(scaler, optimizer, "unscale_and_clip_")
    _gradients(list(parameters.values()))
    scale = scaler.get_scale()
    result = clip_named_(parameters, group_of, max_norm, norm_type, scale, "skip", None, EPSILON)
    measured(state, list(parameters.values()), result.total_norm, False)
    return result


def check_scaler(scaler: object) -> None:
    """Raise TypeError if it is no scaler."""
    if not isinstance(scaler, GradScaler):
        got = f"{type(scaler).__module__}.{type(scaler).__qualname__}"
        raise TypeError(f"scaler: expected a torch.amp.GradScaler, got a {got}")


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for options in optimizer.param_groups for parameter in options["params"]]


def begin_unscaling(scaler: GradScaler, optimizer: torch.optim.Optimizer, name: str) -> dict[str, Any]:
    """The scaler's record of the optimizer, after the checks of ``GradScaler.unscale_``.

    Of a wrapped optimizer it is that of the wrapper and of what is in it: either may be given to the step.
    """
    if type(scaler).unscale_ is not GradScaler.unscale_:
        raise TypeError(
            "scaler: expected one with the unscale_ of torch.amp.GradScaler, got "
            f"{type(scaler).__module__}.{type(scaler).__qualname__}, whose own may do more (ranks that agree)"
        )
    scaler._check_scale_growth_tracker(name)
    states = scaler._per_optimizer_states
    state: dict[str, Any] = states[id(unwrapped(optimizer))]
    if unwrapped(optimizer) is not optimizer:
        states[id(optimizer)] = state
    if state["stage"] is OptState.UNSCALED:
        raise RuntimeError("unscale_() has already been called on this optimizer since the last update().")
    if state["stage"] is OptState.STEPPED:
        raise RuntimeError("unscale_() is being called after step().")
    return state


def measured(state: dict[str, Any], tensors: Tensors, total: Any, has_float64: bool) -> Tensor:
    """Note in the scaler's record what ``unscale_`` would have found; and the norm as PyTorch returns it."""
    if not isinstance(total, Tensor):
        total = torch.scalar_tensor(total, dtype=torch.float64, device="cpu")
    devices = {tensor.device for tensor in tensors if tensor is not None}
    found_inf = (~total.isfinite()).to(torch.float32)
    state["found_inf_per_device"] = {device: found_inf.to(device) for device in devices}
    state["stage"] = OptState.UNSCALED
    rounded: Tensor = total.to(torch.float64 if has_float64 else torch.float32)
    return rounded


def _gradients(parameters: list[Tensor]) -> list[Tensor | None]:
    grads = [parameter.grad for parameter in parameters]
    for i, grad in enumerate(grads):
        if grad is not None and grad.dtype is torch.float16:
            raise ValueError(
                f"parameters[{i}].grad: expected a gradient to unscale, of a wider dtype, got float16 "
                "(Attempting to unscale FP16 gradients.)"
            )
    return grads
