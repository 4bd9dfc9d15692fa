"""Thresholds that adapt themselves to the norms seen so far, each by the formula of its paper."""

from __future__ import annotations

import math
import sys
from typing import Any, ClassVar

import numpy as np

from gradclip.policies._base import (
    ClippedGroups,
    MeasuredGroups,
    StatefulPolicy,
    at_least,
    beside,
    clipped_norms,
    either,
    full,
    in_range,
    operations_of,
    positive,
    tree_sum,
    with_row,
)

__all__ = ["SPAM", "AdaGC", "AutoClip", "Percentile", "SkipStep", "ZClip"]


class Percentile(StatefulPolicy):
    """A percentile of the norms of the last calls, this one included.

    What bitsandbytes called percentile clipping, until it was removed in 0.50. Norms are those before
    clipping. One that is 0 (there was no gradient) or not finite counts as the largest there is. The first
    call clips nothing.

    Args:
        percentile: From 0 to 100; between two norms by linear interpolation.
        window: How many norms of each group are looked at: so many float64 are kept of each.

    Example:
        >>> import numpy as np, gradclip
        >>> from gradclip.policies import Percentile
        >>> policy = Percentile(50, window=3)
        >>> for norm in (1.0, 3.0, 2.0, 9.0):
        ...     result = gradclip.clip_by_global_norm_([np.array([norm])], policy)
        >>> result.coefficient * 9.0
        3.0
    """

    _state: ClassVar = ("_history", "_calls")
    _options: ClassVar = ("percentile", "window")

    def __init__(self, percentile: float = 5.0, window: int = 100) -> None:
        self.percentile = in_range("percentile", percentile, 0, 100)
        self.window = at_least("window", window, 2)
        self._history: Any = None  # of shape (window - 1, groups), a ring: the last is row _calls - 1
        self._calls = 0

    def _limits(self, measured: MeasuredGroups) -> Any:
        seen = _largest_if_odd(measured.group_norms)[None]
        operations = operations_of(seen)
        before = either(self._calls < self.window - 1, self._calls, self.window - 1)
        if self._history is not None:
            [history] = self._held(seen[0], "_history")
            # Rows to come are infinite, and the last in order: on the host it is a look at fewer.
            history = history[:before] if isinstance(before, int) else history
            seen = operations.concatenate([history, seen])
        ordered = operations.sort(seen, 0)
        ordered = ordered[0] if operations.__name__ == "torch" else ordered
        place = before * self.percentile / 100
        floor, ceil = (f(place) for f in ((math.floor, math.ceil) if isinstance(place, float) else _rounds()))
        lower, upper = ordered[floor], ordered[ceil]
        between = lower + (place - floor) * (upper - lower)
        return operations.where(lower == upper, lower, between)  # also infinite ones

    def _learn(self, result: ClippedGroups) -> None:
        norms = result.group_norms
        if self._history is None:
            self._history = self._initial(norms)["_history"]
        [history] = self._held(norms, "_history")
        self._history = with_row(history, self._calls % (self.window - 1), _largest_if_odd(norms))
        self._calls += 1

    def _initial(self, norms: Any) -> dict[str, Any]:
        return {"_history": full(norms, (self.window - 1, len(norms)), math.inf), "_calls": 0}


class AutoClip(Percentile):
    """A percentile of all norms seen so far, before clipping (Seetharaman et al. 2020, arXiv:2007.14469).

    :class:`Percentile` with the paper's default and a window for a training: after so many calls the oldest
    are forgotten, so that memory is bounded.

    Args:
        percentile: As of :class:`Percentile`.
        window: As of :class:`Percentile`.
    """

    def __init__(self, percentile: float = 10.0, window: int = 10_000) -> None:
        super().__init__(percentile, window)


def _largest_if_odd(norms: Any) -> Any:
    return operations_of(norms).where((norms > 0) & (norms < math.inf), norms, math.inf)


class ZClip(StatefulPolicy):
    """Norms that are z standard deviations above their mean (Kumar et al. 2025, arXiv:2504.02507).

    Where ``score = (norm - mean) / deviation`` is above ``z``, the threshold is ``mean + z**2 / score *
    deviation`` (the paper's reciprocal clipping); elsewhere nothing is clipped. Mean and variance are
    exponential moving averages of the norms after clipping. They begin as those of the first ``warmup``
    calls, in which nothing is clipped: combine it, as in ``Lowest(ZClip(), 10.0)``, where these may explode.

    Args:
        z: The highest score that is let through.
        alpha: What stays of the averages in each call.
        warmup: How many calls are watched first.

    Example:
        >>> import numpy as np, gradclip
        >>> from gradclip.policies import ZClip
        >>> policy = ZClip(warmup=3)
        >>> for norm in (1.0, 1.2, 1.1, 50.0):
        ...     result = gradclip.clip_by_global_norm_([np.array([norm])], policy)
        >>> result.clipped, result.coefficient * 50 < 1.2
        (True, True)
    """

    _state: ClassVar = ("_mean", "_variance", "_calls")
    _options: ClassVar = ("z", "alpha", "warmup")

    def __init__(self, z: float = 2.5, alpha: float = 0.97, warmup: int = 25) -> None:
        self.z = positive("z", z)
        self.alpha = in_range("alpha", alpha, 0, 1, is_open=True)
        self.warmup = at_least("warmup", warmup, 1)
        self._mean: Any = None
        self._variance: Any = None
        self._calls: Any = None  # that have taught each group something

    def _limits(self, measured: MeasuredGroups) -> Any:
        norms = measured.group_norms
        operations = operations_of(norms)
        mean, variance, calls = self._held(norms, *self._state)
        above = norms - mean
        is_spike = (calls >= self.warmup) & (above > self.z * operations.sqrt(variance))
        # z**2 / score * deviation, without the square root
        limits = mean + self.z**2 * variance / operations.where(is_spike, above, 1.0)
        return operations.where(is_spike, limits, math.inf)

    def _learn(self, result: ClippedGroups) -> None:
        norms = clipped_norms(result)
        operations = operations_of(norms)
        mean, variance, calls = self._held(norms, *self._state)
        is_watching = calls < self.warmup
        # Those of so many norms, one more each time; then the moving averages.
        weight = operations.where(is_watching, 1 / (calls + 1), 1 - self.alpha)
        new_mean = mean + weight * (norms - mean)
        square = (norms - new_mean) * operations.where(is_watching, norms - mean, norms - new_mean)
        new_variance = variance + weight * (square - variance)
        teaches = norms > 0
        self._mean = operations.where(teaches, new_mean, mean)
        self._variance = operations.where(teaches, new_variance, variance)
        self._calls = operations.where(teaches, calls + 1, calls)


class AdaGC(StatefulPolicy):
    """Each tensor by a moving average of its own clipped norm (Wang et al. 2025, arXiv:2502.11034).

    In the first ``warmup`` calls all gradients are clipped together, as their global norm asks at
    ``warmup_norm``, and the average of a tensor is the lowest of its clipped norms; afterwards its threshold
    is ``lam`` times its average. A tensor that had no gradient before is not clipped when it has one for the
    first time.

    Args:
        lam: How far above its average a norm may be.
        beta: What stays of the average in each call.
        warmup: How many calls are clipped together first.
        warmup_norm: To what norm.

    Example:
        >>> import numpy as np, gradclip
        >>> from gradclip.policies import AdaGC
        >>> policy = AdaGC(warmup=2)
        >>> for norm in (0.5, 0.6, 100.0):
        ...     grads = {"w": np.array([norm]), "b": np.array([0.1])}
        ...     result = gradclip.clip_by_global_norm_(grads, policy)
        >>> {name: round(float(grad[0]), 3) for name, grad in grads.items()}
        {'w': 0.525, 'b': 0.1}
    """

    groups = "tensor"
    _state: ClassVar = ("_average", "_calls")
    _options: ClassVar = ("lam", "beta", "warmup", "warmup_norm")

    def __init__(
        self, lam: float = 1.05, beta: float = 0.98, warmup: int = 100, warmup_norm: float = 1.0
    ) -> None:
        self.lam = positive("lam", lam)
        self.beta = in_range("beta", beta, 0, 1, is_open=True)
        self.warmup = at_least("warmup", warmup, 0)
        self.warmup_norm = positive("warmup_norm", warmup_norm)
        self._average: Any = None
        self._calls = 0

    def _limits(self, measured: MeasuredGroups) -> Any:
        norms = measured.group_norms
        operations = operations_of(norms)
        [average] = self._held(norms, "_average")
        together = norms * self.warmup_norm / measured.total_norm
        return either(
            self._calls < self.warmup,
            operations.where(together < norms, together, math.inf),
            operations.where(average > 0, self.lam * average, math.inf),
        )

    def _learn(self, result: ClippedGroups) -> None:
        norms = clipped_norms(result)
        operations = operations_of(norms)
        [average] = self._held(norms, "_average")
        lowest = operations.where(norms < average, norms, average)
        new = either(self._calls < self.warmup, lowest, average + (1 - self.beta) * (norms - average))
        new = operations.where(average > 0, new, norms)
        self._average = operations.where(norms > 0, new, average)
        self._calls += 1

    def _initial(self, norms: Any) -> dict[str, Any]:
        return super()._initial(norms) | {"_calls": 0}


class SPAM(StatefulPolicy):
    """Spikes against a second moment (Huang et al. 2025, arXiv:2501.06842), of tensors.

    A norm whose square is above ``theta`` times the moving average of squares is clipped to the root of that.
    The paper does so to each element, against Adam's second moment; here it is each group (a tensor, unless
    the call says otherwise), so that a gradient keeps its direction. Nothing is clipped in the first call.

    Args:
        theta: How far above its average a square may be. The paper's default is for elements, and a norm 70
            times as large as usual; 25 lets through five times.
        beta: What stays of the average in each call, as Adam's second beta.

    Example:
        >>> import numpy as np, gradclip
        >>> from gradclip.policies import SPAM
        >>> policy = SPAM(theta=25)
        >>> for norm in (1.0, 1.0, 50.0):
        ...     result = gradclip.clip_by_global_norm_([np.array([norm])], policy)
        >>> result.coefficient * 50.0
        array([5.])
    """

    groups = "tensor"
    _state: ClassVar = ("_root",)
    _options: ClassVar = ("theta", "beta")

    def __init__(self, theta: float = 5000.0, beta: float = 0.999) -> None:
        self.theta = positive("theta", theta)
        self.beta = in_range("beta", beta, 0, 1, is_open=True)
        self._root: Any = None  # of the average; squares could overflow

    def _limits(self, measured: MeasuredGroups) -> Any:
        [root] = self._held(measured.group_norms, "_root")
        return operations_of(root).where(root > 0, math.sqrt(self.theta) * root, math.inf)

    def _learn(self, result: ClippedGroups) -> None:
        norms = clipped_norms(result)
        operations = operations_of(norms)
        [root] = self._held(norms, "_root")
        ratio = norms / operations.where(root > 0, root, norms)
        new = operations.where(root > 0, root, norms)
        new = new * operations.sqrt(self.beta + (1 - self.beta) * (ratio * ratio))
        self._root = operations.where(norms > 0, new, root)


class SkipStep(StatefulPolicy):
    """Leave out steps whose norm, or loss, is far above those before (OLMo's ``SkipStepOptimizer``).

    Where the global norm, or the loss if it is given, is more than ``sigma`` standard deviations above the
    mean of the last ``window`` calls, all gradients become 0 and ``skipped`` of the result is true: then the
    optimizer is not to step, for momentum and weight decay would move the weights all the same. (On a GPU
    that is a boolean there; fused optimizers of PyTorch take it as ``optimizer.found_inf =
    result.skipped.float()`` and wait for nothing.) Nothing is left out before half a window was seen. What
    was left out is remembered too, as in OLMo, so that a level that stays high is accepted.

    Args:
        sigma: How many standard deviations are let through.
        window: How many calls are remembered.

    Example:
        >>> import numpy as np, gradclip
        >>> from gradclip.policies import SkipStep
        >>> policy = SkipStep(window=8)
        >>> for loss in (1.0, 0.9, 1.1, 1.0, 7.0):
        ...     result = gradclip.clip_by_global_norm_([np.array([2.0])], policy.with_loss(loss))
        >>> result.skipped
        True
    """

    _fits_any_groups = True
    _state: ClassVar = ("_norms", "_losses", "_calls")
    _options: ClassVar = ("sigma", "window")

    def __init__(self, sigma: float = 6.0, window: int = 128) -> None:
        self.sigma = positive("sigma", sigma)
        self.window = at_least("window", window, 2)
        self._rows = 1 << (self.window - 1).bit_length()  # of which the sum is a tree
        self._norms: Any = None  # of the last calls, of shape (rows, 1); NaN of those that there are not
        self._losses: Any = None
        self._calls = 0
        self._loss: Any = None

    def with_loss(self, loss: Any) -> SkipStep:
        """Look at the loss too, in the next clip.

        Args:
            loss: A number, or an array of one on the device of the gradients.

        Returns:
            The policy.
        """
        self._loss = loss
        return self

    def thresholds(self, measured: MeasuredGroups) -> Any:
        with np.errstate(all="ignore"):
            norm = _one_of(measured.total_norm, measured.group_norms)
            is_spike = self._is_spike(norm, self._norms)
            if self._loss is not None:
                is_spike = is_spike | self._is_spike(_one_of(self._loss, norm), self._losses)
            return operations_of(norm).where(is_spike, 0.0, math.inf)[0]

    def _is_spike(self, value: Any, history: Any) -> Any:
        if history is None:
            return value != value  # noqa: PLR0124 (NaN)
        operations = operations_of(value)
        if isinstance(history, np.ndarray) and not isinstance(value, np.ndarray):
            history = beside(history, value)
        is_there = operations.isfinite(history)
        count = tree_sum(operations.where(is_there, 1.0, 0.0))
        mean = tree_sum(operations.where(is_there, history, 0.0)) / count
        off = operations.where(is_there, history - mean, 0.0)
        deviation = operations.sqrt(tree_sum(off * off) / (count - 1))
        is_within = value - mean <= self.sigma * deviation
        return (count >= max(2, self.window // 2)) & ~is_within

    def observe(self, result: ClippedGroups) -> None:
        norm = _one_of(result.total_norm, result.group_norms)
        self._norms = self._remembered(norm, self._norms)
        if self._loss is not None:
            self._losses = self._remembered(_one_of(self._loss, norm), self._losses)
        self._calls += 1
        self._loss = None

    def _remembered(self, value: Any, history: Any) -> Any:
        if history is None:
            history = full(value, (self._rows, 1), math.nan)
        elif isinstance(history, np.ndarray) and not isinstance(value, np.ndarray):
            history = beside(history, value)
        return with_row(history, self._calls % self.window, value)

    def _initial(self, norms: Any) -> dict[str, Any]:
        empty = full(norms, (self._rows, 1), math.nan)
        return {"_norms": empty, "_losses": empty, "_calls": 0}


def _rounds() -> tuple[Any, Any]:
    """Floor and ceiling of what JAX counts, as indices."""
    jnp = sys.modules["jax.numpy"]
    return (lambda x: jnp.floor(x).astype(int)), (lambda x: jnp.ceil(x).astype(int))


def _one_of(value: Any, norms: Any) -> Any:
    """A number as an array of one, where norms are."""
    if isinstance(norms, np.ndarray):
        return np.array([float(value)])
    operations = operations_of(norms)
    if hasattr(value, "shape") and operations_of(value) is operations:
        value = value.detach() if operations.__name__ == "torch" else value
        return value.reshape(1) + full(norms, (1,), 0.0)
    return full(norms, (1,), float(value))
