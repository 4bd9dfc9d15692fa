"""Policies: what sets the threshold, in place of a number that nobody has.

A policy is passed where a threshold is: to :func:`gradclip.clip_by_global_norm_` and its kin, to the methods
of a :class:`gradclip.Plan`, to :func:`gradclip.torch.clip_module_`. It sees what was measured, returns
thresholds and learns from what was done. Anybody can write one: see :class:`Policy`. Nothing is measured
twice, and on a GPU nothing waits.

    >>> import numpy as np, gradclip
    >>> class Halve:
    ...     def thresholds(self, measured):
    ...         return measured.total_norm / 2
    >>> grads = [np.array([6.0, 8.0])]
    >>> gradclip.clip_by_global_norm_(grads, Halve()).coefficient
    0.5
"""

from gradclip._measured import Policy
from gradclip._public import claim
from gradclip.policies._adaptive import SPAM, AdaGC, AutoClip, Percentile, SkipStep, ZClip
from gradclip.policies._base import StatefulPolicy
from gradclip.policies._composed import FirstMatch, Lowest, WarmUp
from gradclip.policies._scaled import AGC, Normalized, UpdateRMS

__all__ = [
    "AGC",
    "SPAM",
    "AdaGC",
    "AutoClip",
    "FirstMatch",
    "Lowest",
    "Normalized",
    "Percentile",
    "Policy",
    "SkipStep",
    "StatefulPolicy",
    "UpdateRMS",
    "WarmUp",
    "ZClip",
]

claim(__name__)
