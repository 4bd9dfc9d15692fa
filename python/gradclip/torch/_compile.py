"""Under ``torch.compile``: the clip as one custom operator, which the compiler takes as it is.

Reference: https://docs.pytorch.org/docs/stable/library.html#torch.library.custom_op
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradclip.torch._gradients import Gradients, norm_dtype
from gradclip.torch._local import clip_gradients_

__all__ = ["clip_grad_norm_"]


@torch.library.custom_op("gradclip::clip_grad_norm_", mutates_args={"grads"})
def _clip(grads: Sequence[Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool) -> Tensor:
    return clip_gradients_(grads, max_norm, norm_type, error_if_nonfinite)


@_clip.register_fake
def _(grads: Sequence[Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool) -> Tensor:
    return torch.empty((), dtype=norm_dtype(grads), device=grads[0].device)


def clip_grad_norm_(
    grads: Gradients, max_norm: float | Tensor, norm_type: float, error_if_nonfinite: bool
) -> Tensor:
    """As the drop-in; an operator takes no list without tensors, and no ``None`` in it."""
    present = [grad for grad in grads if grad is not None]
    if not present:
        return torch.zeros((), device="cpu")
    total: Tensor = _clip(present, float(max_norm), float(norm_type), error_if_nonfinite)
    return total
