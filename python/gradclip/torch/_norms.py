"""Norms as PyTorch returns them: of parts together, and what they carry."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradclip.torch._arguments import Tensors

__all__ = ["carried", "carry", "combine", "norm_dtype", "norm_of"]

_WIDE = (torch.float64, torch.complex128)
_LARGEST_FLOAT32 = torch.finfo(torch.float32).max


def combine(norms: Sequence[Tensor], order: float) -> Tensor:
    """The norm of all from float64 norms of parts on one device; without a wait, or an overflow."""
    if len(norms) == 1:
        return norms[0]
    stacked = torch.stack(list(norms))
    return stacked.sum() if order == 0 else norm_of(stacked, order)


def norm_of(values: Tensor, order: float) -> Tensor:
    """The norm of float64 numbers that are not negative (or NaN), of any order but 0."""
    unit = values.amax() if order > 0 else values.amin()
    if math.isinf(order):
        return unit
    # Scaled, so that powers neither overflow nor vanish; 0 and inf are their own sums.
    unit = torch.where((unit > 0) & unit.isfinite(), unit, torch.ones_like(unit))
    scaled: Tensor = torch.linalg.vector_norm(values / unit, order)
    return unit * scaled


def norm_dtype(grads: Tensors) -> torch.dtype:
    """Of a norm: float64 if that is among the gradients' dtypes, else float32; 16 bits would round it."""
    wide = any(grad is not None and grad.dtype in _WIDE for grad in grads)
    return torch.float64 if wide else torch.float32


def carry(norm: Tensor, wide: Tensor) -> Tensor:
    """The norm as PyTorch returns it, with what it is in float64, where a float32 may not hold that."""
    if norm.dtype is not torch.float64 and (wide.is_cuda or wide.item() > _LARGEST_FLOAT32):
        norm._gradclip_wide = wide, norm._version  # type: ignore[attr-defined]
    return norm


def carried(norm: Tensor) -> Tensor | None:
    """The float64 norm that comes with a norm, unless somebody has changed that in between."""
    wide, version = getattr(norm, "_gradclip_wide", (None, None))
    return wide if version is not None and version == norm._version else None
