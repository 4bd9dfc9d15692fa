"""The drop-ins: PyTorch's signatures, formula and return types, gradclip's norms.

Reference: https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_norm_.html
"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradclip.torch import _compile
from gradclip.torch._arguments import (
    PARAMETERS,
    TENSORS,
    Tensors,
    as_limit,
    as_list,
    as_threshold,
    gradients_of,
    warn_if_nothing,
)
from gradclip.torch._dtensor import any_dtensor, whole, writable_parts
from gradclip.torch._environment import in_float_environment, mark_written, untraced
from gradclip.torch._gradients import UnsupportedGradientError
from gradclip.torch._local import clip_gradients_, clip_values_, scale_by_norm_, total_norm_of
from gradclip.torch._norms import carried, carry

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm"]


@in_float_environment
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
        The norm before clipping, a 0-d tensor on the device of the first gradient, of dtype float64 if
        that is among the gradients' dtypes, else float32 (which says ``inf`` of a norm above 3.4e38;
        gradients are clipped by what it is). A DTensor, replicated, if DTensors are among the gradients.
        The same bits on every rank.

    Warns:
        UserWarning: No parameter has a gradient: an iterator that was used up, or a clip before
            ``backward()``.

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
    listed = as_list(parameters)
    # Of gradients one rank may have none that another has; and then both would take part, or wait.
    if group is not None or any_dtensor(listed):
        norm: Tensor = _spread().clip_grad_norm_(listed, max_norm, norm_type, error_if_nonfinite, group)
        return norm
    if torch.compiler.is_compiling():
        return _compile.clip_grad_norm_(gradients_of(listed), max_norm, norm_type, error_if_nonfinite)
    grads = gradients_of(listed)
    total = clip_gradients_(grads, max_norm, norm_type, error_if_nonfinite)
    warn_if_nothing(grads, parameters)
    return total


@in_float_environment
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

    Note:
        A tensor that is given twice counts once. (:func:`gradclip.global_norm` counts it twice.)

    Example:
        >>> import torch, gradclip.torch
        >>> gradclip.torch.get_total_norm([torch.full((4,), 1e-25), torch.zeros(3)])
        tensor(2.0000e-25)
    """
    listed = as_list(tensors)
    if group is not None or any_dtensor(listed):
        norm: Tensor = _spread().get_total_norm(listed, norm_type, error_if_nonfinite, group)
        return norm
    if torch.compiler.is_compiling():
        return _compile.get_total_norm(listed, norm_type, error_if_nonfinite)
    total, dtype = total_norm_of(listed, norm_type, error_if_nonfinite, TENSORS)
    return carry(total.to(dtype), total)


@in_float_environment
def clip_grads_with_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float | Tensor,
    total_norm: Tensor,
    foreach: bool | None = None,
) -> None:
    """Clip gradients by a norm that was measured: ``torch.nn.utils.clip_grads_with_norm_``.

    Args:
        parameters: As for :func:`clip_grad_norm_`.
        max_norm: Not negative; on a GPU also a 0-d tensor there.
        total_norm: A 0-d tensor or DTensor, as :func:`get_total_norm` returns it. That very tensor, unless
            it was changed, carries its norm in float64: so a norm above 3.4e38 clips as it should. On a GPU,
            nothing waits for either.
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
    grads = gradients_of(as_list(parameters))
    if torch.compiler.is_compiling() and not any_dtensor(grads):
        _compile.clip_grads_with_norm_(grads, max_norm, total_norm)
        return
    _scale_by_norm_(grads, as_limit(max_norm), total_norm)
    warn_if_nothing(grads, parameters)


@in_float_environment
def clip_grad_value_(
    parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None
) -> None:
    """Clip every element of the gradients into ``[-clip_value, clip_value]``: PyTorch's function.

    Only where an element is beyond are bytes written, by the tile of 16 KB. NaN stays NaN. The limit is
    rounded to nearest in the dtype of each gradient, as PyTorch's ``clamp`` does: the same bits.

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
    if torch.compiler.is_compiling() and not any_dtensor(grads):
        _compile.clip_grad_value_(grads, limit)
        return
    _clip_values_(grads, limit)
    warn_if_nothing(grads, parameters)


@untraced
def _scale_by_norm_(grads: Tensors, limit: float | Tensor, total_norm: Tensor) -> None:
    wide = carried(total_norm) if isinstance(total_norm, Tensor) else None
    total = whole(total_norm) if wide is None else wide
    try:
        scale_by_norm_(grads, limit, total, PARAMETERS)
    except UnsupportedGradientError:
        if not any_dtensor(grads):
            raise
        scale_by_norm_(writable_parts(grads, PARAMETERS), limit, total, PARAMETERS)
        mark_written(grads)


@untraced
def _clip_values_(grads: Tensors, limit: float) -> None:
    try:
        clip_values_(grads, limit)
    except UnsupportedGradientError:
        if not any_dtensor(grads):
            raise
        clip_values_(writable_parts(grads, PARAMETERS, each_element=True), limit)
        mark_written(grads)


def _spread() -> ModuleType:
    """The module for what is spread over ranks: a second to import, for those who need it."""
    from gradclip.torch import _sharded  # noqa: PLC0415

    return _sharded
