"""From samples to what a table or a plot shows: all that is derived is derived here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from bench.jobs import JOBS, Traffic, key
from bench.peers import CPU, OURS, PEERS
from bench.results import Results
from bench.timing import Rounds, Spread, spread, spread_of_ratio, turns
from bench.workload import READ, READ_WRITE, roofline_of

__all__ = ["Moved", "Row", "moved", "roofline_seconds", "rows"]


@dataclass(frozen=True)
class Row:
    """A contender, doing a job to a load.

    Attributes:
        failure: What went wrong; then there is nothing else.
        seconds: Median and quartiles of the turns.
        nbytes: What it moves, by the way that it is written.
        of_roofline: The time of the machine's own passes that the job cannot do without, over its time.
        ratio: Its time over that of gradclip with a plain list of arrays: below 1, gradclip loses.
        error: Relative error of the norm that it answered.
        host_seconds: On a GPU, the time until the call returned.
    """

    load: str
    job: str
    peer: str
    failure: str = ""
    seconds: Spread | None = None
    nbytes: int = 0
    of_roofline: float | None = None
    ratio: Spread | None = None
    error: float | None = None
    host_seconds: Spread | None = None

    @property
    def reason(self) -> str:
        """Why there is no time, in a few words."""
        return "wrong answer" if self.failure.startswith("WrongAnswer") else self.failure.split(":")[0]

    @property
    def bytes_per_second(self) -> float:
        return self.nbytes / self.seconds.median if self.seconds else 0.0


def _passes(results: Results, load: str, traffic: Traffic, place: str) -> list[Rounds] | None:
    """The samples of the machine's own passes over the load's bytes; None if they were not measured."""
    read = results.samples.get(key(load, READ, roofline_of(place)))
    read_write = results.samples.get(key(load, READ_WRITE, roofline_of(place)))
    if not read or not read_write:
        return None
    return [read] * traffic.reads + [read_write] * traffic.read_writes


def roofline_seconds(
    results: Results, load: str, traffic: Traffic, place: str = CPU, undisturbed: bool = False
) -> float | None:
    """The time of the machine's own passes over the load's bytes: median, or lower quartile."""
    passes = _passes(results, load, traffic, place)
    if passes is None:
        return None
    times = [spread(turns(rounds)) for rounds in passes]
    return sum(time.low if undisturbed else time.median for time in times)


def rows(results: Results) -> Iterator[Row]:
    """All rows, in the order of loads, jobs and contenders."""
    for load in results.loads:
        for job in JOBS:
            for peer in PEERS:
                row = _row(results, load, job, peer)
                if row:
                    yield row


def _row(results: Results, load: str, job: str, peer: str) -> Row | None:
    name = key(load, job, peer)
    if name in results.failures:
        return Row(load, job, peer, results.failures[name])
    samples = results.samples.get(name)
    if not samples:
        return None
    place = PEERS[peer].place
    ours = results.samples.get(key(load, job, OURS[place]))
    floor = _passes(results, load, JOBS[job].floor, place)
    host = results.samples.get(f"{name}@host")
    return Row(
        load, job, peer,
        seconds=spread(turns(samples)),
        nbytes=PEERS[peer].traffic[job].passes * results.loads[load].nbytes,
        of_roofline=1 / spread_of_ratio(samples, floor).median if floor else None,
        ratio=spread_of_ratio(samples, [ours]) if ours else None,
        error=results.errors.get(name),
        host_seconds=spread(turns(host)) if host else None,
    )  # fmt: skip


@dataclass(frozen=True)
class Moved:
    """The rule of traffic, held against the clock, for a contender and a job from memory.

    Attributes:
        floor: N that the job has to move.
        written: N that the contender moves, by the way that it is written.
        at_most: N that could have been moved in its time: it cannot have moved more.
        verdict: What follows.
    """

    load: str
    job: str
    peer: str
    floor: int
    written: int
    at_most: float
    verdict: str


_NOISE = 1.15  # between two passes of the same bytes at different times of a run


def moved(results: Results) -> list[Moved]:
    """Of every contender over every load that comes from memory."""
    found = []
    for row in rows(results):
        if row.seconds is None or not results.loads[row.load].cold or row.load not in _from_memory(results):
            continue
        peer = PEERS[row.peer]
        floor, written = JOBS[row.job].floor, peer.traffic[row.job]
        allowed = roofline_seconds(results, row.load, written, peer.place, undisturbed=True)
        least = roofline_seconds(results, row.load, floor, peer.place, undisturbed=True)
        if allowed is None or least is None:
            continue
        seconds = row.seconds.low  # whoever else is on the machine can only make it slower
        at_most = floor.passes * seconds / least
        found.append(
            Moved(
                row.load, row.job, row.peer, floor.passes, written.passes, at_most,
                _verdict(seconds, least, allowed, written.passes, floor.passes),
            )
        )  # fmt: skip
    return found


def _from_memory(results: Results) -> Mapping[str, bool]:
    """Loads so large that hardly any of it stays in a cache."""
    return {name: True for name, facts in results.loads.items() if facts.nbytes >= 100e6}


def _verdict(seconds: float, least: float, allowed: float, written: int, floor: int) -> str:
    if seconds * _NOISE < allowed:
        return f"moves less than {written} N: faster than memory allows for that"
    if seconds <= least * _NOISE:
        return "moves no more than it must"
    if written > floor and seconds <= allowed * _NOISE:
        return f"moves {written} N at the speed of memory"
    if written > floor:
        return f"moves {written} N and is slower than memory"
    return "slower than memory"
