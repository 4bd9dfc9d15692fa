"""Under ``torch.compile``: each drop-in as one custom operator, which the compiler takes as it is.

Reference: https://docs.pytorch.org/docs/stable/library.html#torch.library.custom_op
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradclip.torch._arguments import PARAMETERS, TENSORS, Tensors
from gradclip.torch._local import clip_gradients_, clip_values_, scale_by_norm_, total_norm_of
from gradclip.torch._norms import norm_dtype

__all__ = ["clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm"]

# An operator takes no list with a None in it, nor one without any tensor, and no number or tensor. So there
# are positions beside the tensors, for errors to name them by, and a threshold is a number beside a tensor.


@torch.library.custom_op("gradclip::clip_grad_norm_", mutates_args={"grads"})
def _clip(
    grads: Sequence[Tensor],
    positions: Sequence[int],
    number: float,
    tensor: Tensor | None,
    norm_type: float,
    error_if_nonfinite: bool,
) -> Tensor:
    limit = number if tensor is None else tensor
    return clip_gradients_(_placed(grads, positions), limit, norm_type, error_if_nonfinite)


@torch.library.custom_op("gradclip::get_total_norm", mutates_args=())
def _measure(
    tensors: Sequence[Tensor], positions: Sequence[int], norm_type: float, error_if_nonfinite: bool
) -> Tensor:
    placed = _placed(tensors, positions)
    total, dtype = total_norm_of(placed, norm_type, error_if_nonfinite, TENSORS)
    return total.to(dtype, copy=True)


@torch.library.custom_op("gradclip::clip_grads_with_norm_", mutates_args={"grads"})
def _scale(
    grads: Sequence[Tensor],
    positions: Sequence[int],
    number: float,
    tensor: Tensor | None,
    total_norm: Tensor,
) -> None:
    limit = number if tensor is None else tensor
    scale_by_norm_(_placed(grads, positions), limit, total_norm, PARAMETERS)


@torch.library.custom_op("gradclip::clip_grad_value_", mutates_args={"grads"})
def _clip_values(grads: Sequence[Tensor], positions: Sequence[int], limit: float) -> None:
    clip_values_(_placed(grads, positions), limit)


@_clip.register_fake
def _(grads: Sequence[Tensor], *_: object) -> Tensor:
    return torch.empty((), dtype=norm_dtype(grads), device=grads[0].device)


@_measure.register_fake
def _(tensors: Sequence[Tensor], *_: object) -> Tensor:
    return torch.empty((), dtype=norm_dtype(tensors), device=tensors[0].device)


@_scale.register_fake
@_clip_values.register_fake
def _(*_: object) -> None:
    pass


def clip_grad_norm_(
    grads: Tensors, max_norm: float | Tensor, norm_type: float, error_if_nonfinite: bool
) -> Tensor:
    present, positions = _present(grads)
    if not present:
        return torch.zeros((), device="cpu")
    limit = _number_and_tensor(max_norm)
    total: Tensor = _clip(present, positions, *limit, float(norm_type), error_if_nonfinite)
    return total


def get_total_norm(tensors: Tensors, norm_type: float, error_if_nonfinite: bool) -> Tensor:
    present, positions = _present(tensors)
    if not present:
        return torch.zeros((), device="cpu")
    plain = [tensor.detach() for tensor in present]  # the operator has no derivative
    total: Tensor = _measure(plain, positions, float(norm_type), error_if_nonfinite)
    return total


def clip_grads_with_norm_(grads: Tensors, max_norm: float | Tensor, total_norm: Tensor) -> None:
    present, positions = _present(grads)
    if present:
        _scale(present, positions, *_number_and_tensor(max_norm), total_norm.detach())


def clip_grad_value_(grads: Tensors, limit: float) -> None:
    present, positions = _present(grads)
    if present:
        _clip_values(present, positions, limit)


def _present(grads: Tensors) -> tuple[list[Tensor], list[int]]:
    positions = [i for i, grad in enumerate(grads) if grad is not None]
    return [grad for grad in grads if grad is not None], positions


def _placed(present: Sequence[Tensor], positions: Sequence[int]) -> list[Tensor | None]:
    placed: list[Tensor | None] = [None] * (positions[-1] + 1)
    for i, grad in zip(positions, present, strict=True):
        placed[i] = grad
    return placed


def _number_and_tensor(max_norm: float | Tensor) -> tuple[float, Tensor | None]:
    return (0.0, max_norm.detach()) if isinstance(max_norm, Tensor) else (float(max_norm), None)
