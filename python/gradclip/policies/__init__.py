"""Policies: what turns measured norms into thresholds, with a state that is saved and loaded.

A policy is passed where a threshold is. It sees what was measured, returns thresholds, and learns from what was
done: two methods, so anybody can write one.

    >>> import numpy as np, gradclip
    >>> from gradclip.policies import ZClip
    >>> policy = ZClip(warmup=2)
    >>> for norm in (1.0, 1.2, 1.1, 50.0):
    ...     result = gradclip.clip_by_global_norm_([np.array([norm])], policy)
    >>> result.clipped
    True
"""

from gradclip.policies._adaptive import AGC, AdaGC, AutoClip, Percentile, ZClip
from gradclip.policies._base import StatefulPolicy
from gradclip.policies._compose import Lowest, WarmUp

__all__ = ["AGC", "AdaGC", "AutoClip", "Lowest", "Percentile", "StatefulPolicy", "WarmUp", "ZClip"]
