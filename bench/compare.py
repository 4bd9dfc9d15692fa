"""What got slower or faster between two runs.

Another day the same machine is faster or slower as a whole, so a time is compared in units of the
roofline of its own run: what the same bytes cost the machine at that time. But the roofline itself may
have been disturbed, so the time in seconds has to say the same. A row has changed only if, in both units,
the medians differ by more than a tenth and the spreads say that it is no accident: the probability that
two turns, one of each run, are in this order is 95 % or more (Mann and Whitney's U).
"""

from __future__ import annotations

import bisect
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from bench.jobs import JOBS, key
from bench.peers import PEERS
from bench.results import Results
from bench.rows import roofline_seconds
from bench.tables import headline
from bench.timing import Spread, spread, turns
from gradclip._report.tables import ReportTable, number, print_table

__all__ = ["SAME", "Change", "compare", "gone", "show_changes"]

SAME = "same"
_LEAST_CHANGE = 1.10
_CERTAIN = 0.95


@dataclass(frozen=True)
class Change:
    """A row of both runs, in units of each run's roofline.

    Attributes:
        ratio: New over old, of the medians.
        certainty: How often a turn of the new run took longer than one of the old run, from 0 to 1.
        verdict: "slower", "faster" or "same".
    """

    load: str
    job: str
    peer: str
    old: Spread
    new: Spread
    ratio: float
    certainty: float
    verdict: str


def compare(old: Results, new: Results) -> list[Change]:
    """All rows that both runs have, those that got slower first."""
    changes = []
    for load, job, peer in itertools.product(new.loads, JOBS, PEERS):
        name = key(load, job, peer)
        if name not in new.samples or name not in old.samples:
            continue
        olds, news = (_relative(results, load, job, peer, name) for results in (old, new))
        if olds and news:
            in_seconds = _verdict(turns(old.samples[name]), turns(new.samples[name]))
            changes.append(_change(load, job, peer, olds, news, in_seconds))
    return sorted(changes, key=lambda change: -change.ratio)


def _relative(results: Results, load: str, job: str, peer: str, name: str) -> list[float] | None:
    floor = roofline_seconds(results, load, JOBS[job].floor, PEERS[peer].place)
    return [seconds / floor for seconds in turns(results.samples[name])] if floor else None


def _change(
    load: str, job: str, peer: str, olds: Sequence[float], news: Sequence[float], in_seconds: str
) -> Change:
    old, new = spread(olds), spread(news)
    verdict = _verdict(olds, news)
    return Change(
        load, job, peer, old, new, new.median / old.median, _probability_of_greater(news, olds),
        verdict if verdict == in_seconds else SAME,
    )  # fmt: skip


def _verdict(olds: Sequence[float], news: Sequence[float]) -> str:
    ratio = statistics.median(news) / statistics.median(olds)
    certainty = _probability_of_greater(news, olds)
    if ratio > _LEAST_CHANGE and certainty >= _CERTAIN:
        return "slower"
    if ratio < 1 / _LEAST_CHANGE and certainty <= 1 - _CERTAIN:
        return "faster"
    return SAME


def _probability_of_greater(these: Sequence[float], those: Sequence[float]) -> float:
    """How often one of these is greater than one of those; a tie counts half."""
    ordered = sorted(those)
    below = sum(bisect.bisect_left(ordered, x) + bisect.bisect_right(ordered, x) for x in these)
    return below / (2 * len(these) * len(those))


def gone(old: Results, new: Results) -> list[str]:
    """Rows of loads of both runs that had a time in the old one and have failed in the new one."""
    return [name for name in old.samples if name not in new.samples and name in new.failures]


def show_changes(changes: Sequence[Change], old: Results, new: Results, console: Console) -> None:
    """Print what changed, and how much did not."""
    console.print(
        f"old: {headline(old.machine)}\nnew: {headline(new.machine)}", highlight=False, markup=False
    )
    for name in gone(old, new):
        console.print(f"failed: {name}: {new.failures[name]}", style="red", highlight=False, markup=False)
    if not changes:
        console.print("the two runs have no row in common")
        return
    styles = {"slower": "red", "faster": "green"}
    changed = [change for change in changes if change.verdict in styles]
    if changed:
        what = "Times in units of each run's roofline: medians (quartiles)"
        header = ("gradients", "job", "contender", "old", "new", "new / old", "longer in", "")
        marks = [change.verdict for change in changed]
        print_table(ReportTable(what, header, list(map(_cells, changed)), marks), console, styles, left=3)
    counts = {verdict: sum(c.verdict == verdict for c in changes) for verdict in ("slower", "faster", SAME)}
    console.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()), highlight=False)


def _cells(change: Change) -> tuple[str, ...]:
    return (
        change.load, JOBS[change.job].title, PEERS[change.peer].title, _text(change.old), _text(change.new),
        f"{change.ratio:.2f} x", f"{100 * change.certainty:.0f} %", change.verdict,
    )  # fmt: skip


def _text(value: Spread) -> str:
    return f"{number(value.median)} ({number(value.low)} … {number(value.high)})"
