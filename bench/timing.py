"""How time is taken: contenders by turns, many rounds, each call checked to have done its job."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

__all__ = ["Contender", "Protocol", "Rounds", "Spread", "measure", "spread_of_ratio"]

# Seconds of every timed call of one contender: one list per round.
Rounds: TypeAlias = list[list[float]]


def _nothing(*_: Any) -> None:
    pass


@dataclass(frozen=True)
class Contender:
    """What is timed, and what belongs to it outside of the timed region.

    Attributes:
        key: Its name in the samples.
        call: Timed. Where ``returns_seconds``, it has taken the time itself.
        before: Called before every call: sets the state of the caches.
        after: Called with the answer of every call: asserts that the call did its job, and undoes it.
    """

    key: str
    call: Callable[[], Any]
    before: Callable[[], None] = _nothing
    after: Callable[[Any], None] = _nothing
    returns_seconds: bool = False

    def run(self) -> float:
        self.before()
        start = time.perf_counter_ns()
        answer = self.call()
        elapsed = (time.perf_counter_ns() - start) / 1e9
        self.after(answer)
        return float(answer) if self.returns_seconds else elapsed


@dataclass(frozen=True)
class Protocol:
    """How often, and in what state.

    Attributes:
        rounds: Every contender has one turn in each round, in an order drawn anew.
        calls: Most calls of a turn that are timed.
        turn_seconds: A turn ends after this time, with at least one call timed.
        warm_up: Most calls at the start of a turn that are not timed; no more than fit into
            ``turn_seconds``, but at least one unless it is 0.
        settle: Seconds of sleep before a turn. Idle threads of the contender before would share the
            processors with this one: those of GNU OpenMP, which PyTorch uses, spin for 5 to 10 ms.
    """

    rounds: int
    calls: int = 20
    turn_seconds: float = 0.01
    warm_up: int = 5
    settle: float = 0.02


def measure(
    contenders: Sequence[Contender], protocol: Protocol, tick: Callable[[], None] = _nothing
) -> dict[str, Rounds]:
    """Time the contenders by turns; ``tick`` is called after every turn."""
    samples: dict[str, Rounds] = {c.key: [] for c in contenders}
    order = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for _ in range(protocol.rounds):
            for contender in order.sample(contenders, len(contenders)):
                time.sleep(protocol.settle)
                samples[contender.key].append(_turn(contender, protocol))
                tick()
    finally:
        gc.enable()
    return samples


def _turn(contender: Contender, protocol: Protocol) -> list[float]:
    if protocol.warm_up:
        _repeat(contender, protocol.warm_up, protocol.turn_seconds)
    return _repeat(contender, protocol.calls, protocol.turn_seconds)


def _repeat(contender: Contender, calls: int, seconds: float) -> list[float]:
    end = time.perf_counter() + seconds
    taken = [contender.run()]
    while len(taken) < calls and time.perf_counter() < end:
        taken.append(contender.run())
    return taken


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float


def spread(values: Iterable[float], median: float | None = None) -> Spread:
    """The quartiles of the values, and their median or the one given."""
    data = list(values)
    low, middle, high = statistics.quantiles(data, n=4) if len(data) > 1 else data * 3
    return Spread(middle if median is None else median, low, high)


def turns(rounds: Rounds) -> list[float]:
    """The median of every turn."""
    return [statistics.median(seconds) for seconds in rounds]


def spread_of_ratio(above: Rounds, below: Sequence[Rounds], scale: float = 1.0) -> Spread:
    """Median of ``above`` over the sum of the medians of ``below`` (over 1 if there are none).

    The quartiles are those of the ratios within each round, whose turns were close in time.
    """
    numerators = turns(above)
    denominators = list(zip(*map(turns, below), strict=True)) or [(1.0,)] * len(numerators)
    medians = [statistics.median(column) for column in zip(*denominators, strict=True)]
    ratios = (scale * n / sum(d) for n, d in zip(numerators, denominators, strict=True))
    return spread(ratios, scale * statistics.median(numerators) / sum(medians))
