"""Thresholds that adapt themselves, each by the formula of its paper."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from gradclip._api import GradientArrays, row_norms
from gradclip._measured import Measured
from gradclip._result import ClipResult
from gradclip.policies._base import (
    StatefulPolicy,
    count,
    in_range,
    like,
    limits_of,
    norms_of,
    operations_of,
)

__all__ = ["AGC", "AdaGC", "AutoClip", "Percentile", "ZClip"]


class Percentile(StatefulPolicy):
    """A percentile of the norms of the last calls, this one included.

    What bitsandbytes called percentile clipping. Until there are two norms nothing is clipped. A norm that is not
    finite counts as the largest there is.

    Args:
        percentile: From 0 to 100, between two norms by linear interpolation.
        window: How many norms of each group are kept.
    """

    _state: ClassVar = ("_history", "_steps")
    _options: ClassVar = ("percentile", "window")

    def __init__(self, percentile: float = 5.0, window: int = 100) -> None:
        self.percentile = in_range("percentile", percentile, 0, 100)
        self.window = count("window", window, 2)
        self._history: Any = None  # of shape (window, groups); row step % window is the last one
        self._steps = 0

    def thresholds(self, measured: Measured) -> Any:
        norms = norms_of(measured)
        self._check_groups(self._history, norms)
        operations = operations_of(norms)
        held = min(self._steps, self.window - 1)
        here = operations.where(operations.isfinite(norms), norms, math.inf)
        if held == 0:
            return limits_of(measured, operations.where(here == here, math.inf, math.inf))
        rows = [self._row(self._steps - back, norms) for back in range(1, held + 1)]
        ordered = _sorted(operations, operations.stack([*rows, here]))
        place = held * self.percentile / 100
        low = math.floor(place)
        lower = ordered[low]
        if place == low:
            return limits_of(measured, lower)
        upper = ordered[low + 1]
        # Where both are infinite there is nothing between them.
        begin = operations.where(operations.isfinite(lower), lower, 0.0)
        between = begin + (place - low) * (upper - begin)
        return limits_of(measured, operations.where(lower == upper, lower, between))

    def observe(self, result: ClipResult) -> None:
        norms = norms_of(result)
        operations = operations_of(norms)
        here = operations.where(operations.isfinite(norms), norms, math.inf)
        if self._history is None:
            self._history = operations.stack([here] * self.window)
        self._history = like(self._history, norms)
        self._history[self._steps % self.window] = here
        self._steps += 1

    def _row(self, step: int, norms: Any) -> Any:
        self._history = like(self._history, norms)
        return self._history[step % self.window]


class AutoClip(Percentile):
    """The p-th percentile of the norms seen so far (Seetharaman et al. 2020, arXiv:2007.14469).

    The paper keeps all norms of a training; here the last ``window``, so that memory is bounded.
    """

    def __init__(self, percentile: float = 10.0, window: int = 10_000) -> None:
        super().__init__(percentile, window)


def _sorted(operations: Any, values: Any) -> Any:
    ordered = operations.sort(values, 0)
    return ordered[0] if operations.__name__ == "torch" else ordered


class ZClip(StatefulPolicy):
    """Norms that are z standard deviations above their moving average (Kumar et al. 2025, arXiv:2504.02507).

    Where ``z = (norm - mean) / deviation`` is above ``z``, the threshold is ``mean + z_max**2 / z * deviation``. Mean
    and variance are moving averages of the norms as they are after clipping; they begin with those of the first
    ``warmup`` calls, in which nothing is clipped. Norms that are not finite teach nothing.

    Args:
        z: The highest that is let through.
        alpha: What stays of the averages in each call.
        warmup: How many calls are watched first.
    """

    _state: ClassVar = ("_mean", "_variance", "_first", "_steps")
    _options: ClassVar = ("z", "alpha", "warmup")

    def __init__(self, z: float = 2.5, alpha: float = 0.97, warmup: int = 25) -> None:
        self.z = in_range("z", z, 0, math.inf, is_open=True)
        self.alpha = in_range("alpha", alpha, 0, 1, is_open=True)
        self.warmup = count("warmup", warmup, 1)
        self._mean: Any = None
        self._variance: Any = None
        self._first: Any = None  # norms of the first calls, of shape (calls, groups)
        self._steps = 0

    def thresholds(self, measured: Measured) -> Any:
        return limits_of(measured, self._limits(norms_of(measured)))

    def _limits(self, norms: Any) -> Any:
        operations = operations_of(norms)
        self._check_groups(self._mean if self._first is None else self._first, norms)
        if self._mean is None:
            return operations.where(norms == norms, math.inf, math.inf)
        self._mean, self._variance = like(self._mean, norms), like(self._variance, norms)
        deviation = operations.sqrt(self._variance)
        excess = norms - self._mean
        # z is excess / deviation; written without it, so that a deviation of 0 divides nothing.
        limits = self._mean + self.z * self.z * self._variance / operations.where(excess > 0, excess, 1.0)
        return operations.where(excess > self.z * deviation, limits, math.inf)

    def observe(self, result: ClipResult) -> None:
        norms = norms_of(result)
        operations = operations_of(norms)
        if self._mean is None:
            first = norms[None] if self._first is None else self._first
            self._first = first if self._first is None else _appended(operations, like(first, norms), norms)
            self._steps += 1
            if self._steps == self.warmup:
                self._mean, self._variance = _moments(operations, self._first)
                self._first = None
            return
        limits = self._limits(norms)
        clipped = operations.where(norms > limits, limits, norms)
        mean = self.alpha * self._mean + (1 - self.alpha) * clipped
        off = clipped - mean
        variance = self.alpha * self._variance + (1 - self.alpha) * (off * off)
        is_finite = operations.isfinite(norms)
        self._mean = operations.where(is_finite, mean, self._mean)
        self._variance = operations.where(is_finite, variance, self._variance)
        self._steps += 1


def _appended(operations: Any, rows: Any, row: Any) -> Any:
    return operations.stack([*rows, row])


def _moments(operations: Any, rows: Any) -> tuple[Any, Any]:
    """Mean and variance of each group, of norms that are finite; added one after the other on every device."""
    number = total = rows[0] * 0
    number = operations.where(number == number, 0.0, 0.0)
    total = number
    for row in rows:
        is_finite = operations.isfinite(row)
        total = total + operations.where(is_finite, row, 0.0)
        number = number + operations.where(is_finite, 1.0, 0.0)
    number = operations.where(number > 0, number, 1.0)
    mean = total / number
    squares = total * 0
    for row in rows:
        off = operations.where(operations.isfinite(row), row - mean, 0.0)
        squares = squares + off * off
    return mean, squares / number


class AdaGC(StatefulPolicy):
    """Each tensor by a moving average of its own clipped norm (Wang et al. 2025, arXiv:2502.11034).

    In the first ``warmup`` calls all are clipped together, by their global norm at ``warmup_norm``, and the average is
    the lowest clipped norm so far; then a tensor is clipped to ``lam`` times its average.

    Args:
        lam: How far above its average a norm may be.
        beta: What stays of the average in each call.
        warmup: How many calls are clipped together first.
        warmup_norm: To what norm.
    """

    groups: ClassVar[str | None] = "tensor"
    _state: ClassVar = ("_average", "_steps")
    _options: ClassVar = ("lam", "beta", "warmup", "warmup_norm")

    def __init__(
        self, lam: float = 1.05, beta: float = 0.98, warmup: int = 100, warmup_norm: float = 1.0
    ) -> None:
        self.lam = in_range("lam", lam, 0, math.inf, is_open=True)
        self.beta = in_range("beta", beta, 0, 1, is_open=True)
        self.warmup = count("warmup", warmup, 0)
        self.warmup_norm = in_range("warmup_norm", warmup_norm, 0, math.inf, is_open=True)
        self._average: Any = None
        self._steps = 0

    def thresholds(self, measured: Measured) -> Any:
        norms = norms_of(measured)
        self._check_groups(self._average, norms)
        return limits_of(measured, self._limits(norms, measured.total_norm))

    def _limits(self, norms: Any, total: Any) -> Any:
        operations = operations_of(norms)
        if self._average is None or self._steps < self.warmup:
            coefficient = self.warmup_norm / operations.where(norms == norms, total, total)
            return operations.where(coefficient < 1, norms * coefficient, math.inf)
        self._average = like(self._average, norms)
        # A tensor that has had no gradient yet has no average.
        return operations.where(self._average > 0, self.lam * self._average, math.inf)

    def observe(self, result: ClipResult) -> None:
        norms = norms_of(result)
        operations = operations_of(norms)
        limits = self._limits(norms, result.total_norm)
        clipped = operations.where(norms > limits, limits, norms)
        if self._average is None:
            average = clipped
        else:
            held = like(self._average, norms)
            if self._steps < self.warmup:
                average = operations.where(clipped < held, clipped, held)
            else:
                average = self.beta * held + (1 - self.beta) * clipped
            average = operations.where(held > 0, average, clipped)
            average = operations.where(operations.isfinite(norms), average, held)
        self._average = average
        self._steps += 1


class AGC(StatefulPolicy):
    """Each row in proportion to the row of its parameter (Brock et al. 2021, arXiv:2102.06171, of NFNets).

    A row is an output unit: one index of the first axis, as PyTorch lays parameters out. Its threshold is
    ``clipping * max(norm of the parameter's row, eps)``.

    Args:
        params: The parameters, one for each gradient; a mapping as that of the gradients, if that is one.
        clipping: The factor, lambda in the paper.
        eps: For parameters that are zero.
    """

    groups: ClassVar[str | None] = "row"
    _options: ClassVar = ("clipping", "eps")

    def __init__(self, params: GradientArrays, clipping: float = 0.01, eps: float = 1e-3) -> None:
        self._params = params
        self.clipping = in_range("clipping", clipping, 0, math.inf, is_open=True)
        self.eps = in_range("eps", eps, 0, math.inf)

    def thresholds(self, measured: Measured) -> Any:
        rows = row_norms(self._params)
        norms: Any = np.concatenate(rows) if rows and isinstance(rows[0], np.ndarray) else None
        if norms is None:
            operations = operations_of(rows[0])
            norms = operations.cat(rows) if operations.__name__ == "torch" else operations.concatenate(rows)
        if norms.shape != norms_of(measured).shape:
            raise ValueError(
                f"params: expected {norms_of(measured).shape[0]} rows, as the gradients have, got {norms.shape[0]}"
            )
        operations = operations_of(norms)
        return self.clipping * operations.where(norms > self.eps, norms, self.eps)
