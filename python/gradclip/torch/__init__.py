"""Gradient clipping for PyTorch: drop-ins for its functions, and what they do not offer.

import gradclip.torch
gradclip.torch.clip_grad_norm_(model.parameters(), 1.0)     # as torch.nn.utils.clip_grad_norm_
"""

from gradclip.torch._functional import (
    NonFiniteNormError,
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
)
from gradclip.torch._install import Stats, install, patched, stats, uninstall

__all__ = [
    "NonFiniteNormError",
    "Stats",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "get_total_norm",
    "install",
    "patched",
    "stats",
    "uninstall",
]
