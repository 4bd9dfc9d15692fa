"""The gradient noise scale, from norms that are measured anyway."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

__all__ = ["NoiseScale"]


class NoiseScale:
    """How large a batch is worth it: McCandlish et al. 2018, arXiv:1812.06162, appendix A.

    The norm of a gradient over a small batch is larger than that over a large one by its noise. From both,
    with moving averages: ``scale = trace of the covariance / squared norm of the true gradient``, in
    examples. Batches much smaller than that waste steps, much larger ones waste examples.

    Small batches come up anyway: the ranks of a job before their gradients are averaged, the micro-batches of
    gradient accumulation, single examples (``groups="sample"``).

    Args:
        small: How many examples the small batches have.
        large: How many the large one has.
        decay: What stays of the averages in each step.

    Raises:
        ValueError: ``small`` is not below ``large``; a number is out of range.

    Example:
        >>> from gradclip.monitor import NoiseScale
        >>> noise = NoiseScale(small=1, large=100)
        >>> noise.update(small_norms=[5.0, 5.0], large_norm=1.0)
        >>> round(noise.scale, 1)
        32.0
    """

    def __init__(self, small: float, large: float, decay: float = 0.99) -> None:
        if not 0 < small < large < math.inf:
            raise ValueError(f"small, large: expected 0 < small < large, got {small!r} and {large!r}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected a number from 0 to 1, got {decay!r}")
        self._small, self._large, self._decay = float(small), float(large), float(decay)
        self._noise = self._signal = self._weight = 0.0

    def update(self, small_norms: Any, large_norm: Any) -> None:
        """Look at a step.

        Args:
            small_norms: The norm of the mean gradient of one or several small batches.
            large_norm: That of the large batch that they make.
        """
        small = float(np.mean(np.square(np.asarray(small_norms, float))))
        large = float(large_norm) ** 2
        if not (math.isfinite(small) and math.isfinite(large)):
            return
        noise = (small - large) / (1 / self._small - 1 / self._large)
        signal = (self._large * large - self._small * small) / (self._large - self._small)
        stays = self._decay
        self._noise = stays * self._noise + (1 - stays) * noise
        self._signal = stays * self._signal + (1 - stays) * signal
        self._weight = stays * self._weight + (1 - stays)

    @property
    def scale(self) -> float:
        """In examples; infinite where the noise hides the gradient, NaN before the first step."""
        if self._weight == 0:
            return math.nan
        return self._noise / self._signal if self._signal > 0 else math.inf
