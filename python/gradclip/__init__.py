"""Gradient norms and clipping in one pass, with the same bits on every machine.

See https://arxiv.org/abs/1211.5063 for what clipping is, ``docs/`` for how this is done.
"""

from gradclip import _interpreter  # isort: skip  # noqa: F401
from gradclip import _core
from gradclip._api import (
    accumulate_,
    clip_by_global_norm_,
    clip_by_norm_,
    clip_by_value_,
    clip_difference_,
    get_num_threads,
    global_norm,
    measure,
    row_norms,
    scale_,
    set_num_threads,
    show_config,
    tensor_norms,
)
from gradclip._measured import Measured
from gradclip._plan import Plan
from gradclip._public import claim
from gradclip._result import ClipResult, NonFiniteGradientError, RowNames

__all__ = [
    "ClipResult",
    "Measured",
    "NonFiniteGradientError",
    "Plan",
    "RowNames",
    "__version__",
    "accumulate_",
    "clip_by_global_norm_",
    "clip_by_norm_",
    "clip_by_value_",
    "clip_difference_",
    "get_num_threads",
    "global_norm",
    "measure",
    "row_norms",
    "scale_",
    "set_num_threads",
    "show_config",
    "tensor_norms",
]

claim(__name__)

__version__ = "0.2.0"

# GRADCLIP_ISA, GRADCLIP_NUM_THREADS, OMP_NUM_THREADS: a mistake is reported here, not at the first clip.
_core.read_environment()
