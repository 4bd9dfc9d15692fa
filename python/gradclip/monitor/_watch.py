"""What is remembered of norms, and what they say: a row of numbers for each step, one for each gradient."""

from __future__ import annotations

import math
from collections import deque
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Floats", "LossWatch", "Watch"]

Floats: TypeAlias = npt.NDArray[np.float64]

_TREND = 8  # steps that a line is laid through
_FEWEST = 4  # steps before which nothing is said
_MEMORY = 100  # steps of what is usual
_SMALLEST = 5e-324


class Watch:
    """The logarithm of each norm: what is usual, how far away it is, where it is going.

    What is usual is a mean over some 100 steps. It follows what rises by at most twice the usual distance, so
    that an explosion does not become usual while it happens. Where it is going: a line through the last 8
    logarithms (least squares), and where that is ``horizon`` steps later.
    """

    def __init__(self, width: int, horizon: int) -> None:
        self.mean = np.zeros(width)  # of logarithms
        self.spread = np.zeros(width)  # their mean distance from it
        # Of the step that was added last, before it became usual:
        self.off = np.zeros(width)  # above the mean
        self.slope = np.zeros(width)  # of the line, per step
        self.up = np.zeros(width)  # the line's end above the mean
        self.ahead = np.zeros(width)  # and later
        self._horizon = horizon
        self._count = 0
        self._seen = np.zeros(width, bool)  # whether there was a norm that is not 0
        self._all_seen = False
        self._logs = np.zeros((_TREND, width))  # a ring of the last
        self._log, self._step, self._moved = np.empty((3, width))

    @property
    def is_ready(self) -> bool:
        """Whether there are enough steps to say anything."""
        return self._count >= _FEWEST

    def add(self, norms: Floats) -> None:
        log, step, limit = self._log, self._step, self._moved
        np.maximum(norms, _SMALLEST, out=log)
        np.log(log, out=log)
        if not self._all_seen or norms.min(initial=1.0) == 0.0:
            self._pass_over_zeros(norms)
        self._logs[self._count % _TREND] = log
        self._count += 1
        is_full = self._count >= _TREND
        line = _FULL[(self._count - 1) % _TREND] if is_full else _FILLING[self._count]
        self.slope, end = line @ self._logs
        np.subtract(end, self.mean, out=self.up)
        np.multiply(self.slope, self._horizon, out=self.ahead)
        self.ahead += self.up
        np.subtract(log, self.mean, out=self.off)
        np.multiply(self.spread, 2.0, out=limit)
        np.maximum(limit, 0.5, out=limit)
        np.minimum(self.off, limit, out=step)
        weight = max(1 / self._count, 1 / _MEMORY)
        np.multiply(step, weight, out=limit)
        self.mean += limit
        np.abs(step, out=step)
        step -= self.spread
        step *= weight
        self.spread += step

    def _pass_over_zeros(self, norms: Floats) -> None:
        """A norm of 0 changes nothing: what is usual begins with the first that is not."""
        is_zero = norms == 0
        self._log[is_zero] = self.mean[is_zero]
        is_first = ~self._seen & ~is_zero
        self.mean[is_first] = self._logs[:, is_first] = self._log[is_first]
        self._seen |= is_first
        self._all_seen = bool(self._seen.all())

    def hold(self, which: npt.NDArray[np.bool_]) -> None:
        """What is usual stays as it was before the step that was added last."""
        self.mean[: len(which)][which] -= self._moved[: len(which)][which]


def _line(n: int) -> Floats:
    """What makes slope and end of a least-squares line out of n numbers, one a step."""
    at = np.arange(n) - (n - 1) / 2
    slope = at / max(float(at @ at), 1.0)
    return np.array([slope, 1 / max(n, 1) + slope * (n - 1) / 2])


def _in_ring(held: int, newest: int) -> Floats:
    """The same for the rows of a ring."""
    line = np.zeros((2, _TREND))
    line[:, np.arange(newest - held + 1, newest + 1) % _TREND] = _line(held)
    return line


# By how many rows were added: while the ring fills up, and from then on by the place of the newest.
_FILLING = [_in_ring(count, count - 1) for count in range(_TREND + 1)]
_FULL = [_in_ring(_TREND, newest) for newest in range(_TREND)]


class LossWatch:
    """Whether the loss goes up and down from step to step: looked at in every eighth."""

    def __init__(self, window: int = 32) -> None:
        self._losses: deque[float] = deque(maxlen=window)
        self._count = 0
        self._line = _line(window)
        self._back = np.arange(window - 1.0, -1.0, -1.0)

    def add(self, loss: float) -> float:
        """How the loss of a step goes with the one before, about a line through the last 32: from -1 to 1.

        Near -1 where it oscillates, near 0 where it is noise; 0 before there are so many.
        """
        self._losses.append(loss)
        self._count += 1
        if len(self._losses) < len(self._back) or self._count % 8:
            return 0.0
        losses = np.array(self._losses)
        with np.errstate(all="ignore"):  # losses may be infinite
            slope, end = self._line @ losses
            off = losses - end + slope * self._back
            square = float(off @ off)
            return float(off[1:] @ off[:-1]) / square if 0 < square < math.inf else 0.0
