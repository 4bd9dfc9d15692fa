"""How time is taken: contenders by turns, many rounds, each call checked to have done its job."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

__all__ = [
    "Clock",
    "Contender",
    "Protocol",
    "Rounds",
    "Spread",
    "Timings",
    "describe_error",
    "host_clock",
    "measure",
    "own_clock",
    "spread_of_ratio",
    "turns",
]

# Seconds of every timed call of one contender: one list per round.
Rounds: TypeAlias = list[list[float]]


Clock: TypeAlias = Callable[[Callable[[], Any]], tuple[Any, tuple[float, ...]]]


def _nothing(*_: Any) -> None:
    pass


def host_clock(call: Callable[[], Any]) -> tuple[Any, tuple[float]]:
    """The time until the call returns."""
    start = time.perf_counter_ns()
    answer = call()
    return answer, ((time.perf_counter_ns() - start) / 1e9,)


def own_clock(call: Callable[[], float]) -> tuple[float, tuple[float]]:
    """The time that the call took itself and returns."""
    seconds = call()
    return seconds, (seconds,)


@dataclass(frozen=True)
class Contender:
    """What is timed, and what belongs to it outside of the timed region.

    Attributes:
        key: Its name in the samples.
        call: Timed.
        before_turn: Called before every turn: makes the gradients as they were.
        before: Called before every call: sets the state of the caches.
        after: Called with the answer of every call: asserts that the call did its job.
        undo: Called with an answer before the turn's next call: makes the gradients as they were.
        clock: Calls ``call`` and returns its answer with the seconds that it took, one for each name in
            ``clocks``.
        clocks: What each of the clock's times is called, after the key.
    """

    key: str
    call: Callable[[], Any]
    before_turn: Callable[[], None] = _nothing
    before: Callable[[], None] = _nothing
    after: Callable[[Any], None] = _nothing
    undo: Callable[[Any], None] = _nothing
    clock: Clock = host_clock
    clocks: tuple[str, ...] = ("",)


@dataclass(frozen=True)
class Protocol:
    """How often, and in what state.

    Attributes:
        rounds: Every contender has at most one turn in each round, in an order drawn anew.
        seconds: No round is begun after this time, beyond the first ``least_rounds``.
        calls: Most calls of a turn that are timed.
        turn_seconds: A turn ends after this time, with at least one call timed.
        warm_up: Most calls at the start of a turn that are not timed; no more than fit into
            ``turn_seconds``, but at least one unless it is 0.
        settle: Seconds of sleep before a turn. Idle threads of the contender before would share the
            processors with this one: those of GNU OpenMP, which PyTorch uses, spin for 5 to 10 ms.
        least_rounds: Rounds whatever the time.
    """

    rounds: int
    seconds: float = math.inf
    calls: int = 20
    turn_seconds: float = 0.01
    warm_up: int = 5
    settle: float = 0.02
    least_rounds: int = 3


@dataclass
class Timings:
    """The samples of contenders by turns, and what went wrong with those that have none."""

    samples: dict[str, Rounds]
    failures: dict[str, str]


def measure(
    contenders: Sequence[Contender], protocol: Protocol, tick: Callable[[str, float], None] = _nothing
) -> Timings:
    """Time the contenders by turns; one that raises is out of the race, and the others go on.

    ``tick`` is called before every turn with the key and the part of the rounds or the time that is over.
    """
    samples: dict[str, Rounds] = {c.key + name: [] for c in contenders for name in c.clocks}
    failures: dict[str, str] = {}
    order = random.Random(0)
    start = time.monotonic()
    gc.collect()
    gc.disable()
    try:
        for round_ in range(protocol.rounds):
            if round_ >= protocol.least_rounds and time.monotonic() - start > protocol.seconds:
                break
            racing = [c for c in contenders if c.key not in failures]
            for turn, contender in enumerate(order.sample(racing, len(racing))):
                in_rounds = (round_ + turn / len(racing)) / protocol.rounds
                tick(contender.key, max(in_rounds, (time.monotonic() - start) / protocol.seconds))
                time.sleep(protocol.settle)
                try:
                    taken = _turn(contender, protocol)
                except Exception as error:
                    failures[contender.key] = describe_error(error)
                    continue
                for name, seconds in zip(contender.clocks, zip(*taken, strict=True), strict=True):
                    samples[contender.key + name].append(list(seconds))
    finally:
        gc.enable()
    failed = {c.key + name for c in contenders if c.key in failures for name in c.clocks}
    return Timings({k: v for k, v in samples.items() if k not in failed}, failures)


def describe_error(error: Exception) -> str:
    """In one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:200]


def _turn(contender: Contender, protocol: Protocol) -> list[tuple[float, ...]]:
    contender.before_turn()
    answers: list[Any] = []  # of the last call: what it changed is still there

    def once() -> tuple[float, ...]:
        if answers:
            contender.undo(answers.pop())
        contender.before()
        answer, seconds = contender.clock(contender.call)
        contender.after(answer)
        answers.append(answer)
        return seconds

    if protocol.warm_up:
        _repeat(once, protocol.warm_up, protocol.turn_seconds)
    return _repeat(once, protocol.calls, protocol.turn_seconds)


def _repeat(once: Callable[[], tuple[float, ...]], calls: int, seconds: float) -> list[tuple[float, ...]]:
    end = time.perf_counter() + seconds
    taken = [once()]
    while len(taken) < calls and time.perf_counter() < end:
        taken.append(once())
    return taken


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float


def spread(values: Iterable[float]) -> Spread:
    """The median and the quartiles of the values."""
    data = list(values)
    low, median, high = statistics.quantiles(data, n=4) if len(data) > 1 else data * 3
    return Spread(median, low, high)


def turns(rounds: Rounds) -> list[float]:
    """The median of every turn."""
    return [statistics.median(seconds) for seconds in rounds]


def spread_of_ratio(above: Rounds, below: Sequence[Rounds], scale: float = 1.0) -> Spread:
    """Of ``above`` over the sum of ``below`` (over 1 if there are none) within each round.

    The turns of a round were close in time. Loads that were named by ``--cases`` take no turns with each
    other and may have other numbers of rounds: the first ones are paired.
    """
    numerators = turns(above)
    denominators = list(zip(*map(turns, below), strict=False)) or [(1.0,)] * len(numerators)
    return spread(scale * n / sum(d) for n, d in zip(numerators, denominators, strict=False))
