"""One comparison: the framework's own way and gradclip's, taken in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Comparison", "compare"]


@dataclass
class Comparison:
    """Times of one job, done by a framework itself and with gradclip.

    Attributes:
        where: The framework with its version, "Keras 3.15 on PyTorch".
        what: The job, "`global_clipnorm`".
        load: What it is done to, "160 tensors, 25 M elements".
        theirs: Seconds of each sample.
        ours: Seconds of each sample, each taken right after one of theirs.
        note: What else was measured, "peak memory 0.48 x"; or nothing.
    """

    where: str
    what: str
    load: str
    theirs: list[float]
    ours: list[float]
    note: str = ""

    @property
    def ratio(self) -> float:
        """How many times as long the framework takes: the median of the ratios of neighbours."""
        return statistics.median(a / b for a, b in zip(self.theirs, self.ours, strict=True))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    where: str,
    what: str,
    load: str,
    theirs: Callable[[], object],
    ours: Callable[[], object],
    *,
    prepare: Callable[[], object] = lambda: None,
    note: str = "",
    seconds: float = 3.0,
    least: int = 9,
) -> Comparison:
    """Time both, in turns, for about so many seconds; the caller has compared their answers before.

    Args:
        where: As in :class:`Comparison`.
        what: The same.
        load: The same.
        theirs: Does the job as the framework does.
        ours: Does it with gradclip.
        prepare: Called before each sample, without being timed: puts fresh numbers in place.
        note: As in :class:`Comparison`.
        seconds: When to stop, once there are enough samples.
        least: Samples of each, at least.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for job in (theirs, ours):  # warm
        prepare()
        job()
    end = time.perf_counter() + seconds
    while len(times[1]) < least or time.perf_counter() < end:
        for job, samples in zip((theirs, ours), times, strict=True):
            prepare()
            start = time.perf_counter()
            job()
            samples.append(time.perf_counter() - start)
    return Comparison(where, what, load, *times, note)
