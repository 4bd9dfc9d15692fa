"""Gradient clipping for PyTorch: drop-ins for its functions, and what they do not offer.

Example::

    import gradclip.torch
    gradclip.torch.clip_grad_norm_(model.parameters(), 1.0)     # as torch.nn.utils.clip_grad_norm_
"""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as _error:
    if _error.name != "torch":
        raise
    raise ModuleNotFoundError(
        "gradclip.torch: expected PyTorch to be installed: pip install 'gradclip[torch]'", name="torch"
    ) from None

from gradclip._public import claim
from gradclip.torch._amp import unscale_and_clip_
from gradclip.torch._deferred import defer_clip_
from gradclip.torch._functional import (
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
)
from gradclip.torch._gradients import UnsupportedGradientError
from gradclip.torch._install import Stats, install, patched, stats, uninstall
from gradclip.torch._module import clip_module_, clip_param_groups_
from gradclip.torch._nonfinite import NonFiniteNormError

__all__ = [
    "NonFiniteNormError",
    "Stats",
    "UnsupportedGradientError",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "clip_module_",
    "clip_param_groups_",
    "defer_clip_",
    "get_total_norm",
    "install",
    "patched",
    "stats",
    "uninstall",
    "unscale_and_clip_",
]

claim(__name__)
