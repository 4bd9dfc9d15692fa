"""The tables of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console

from bench.cases import readable_bytes
from bench.jobs import JOBS
from bench.peers import OURS, PEERS
from bench.results import Results
from bench.rows import Row, moved, rows
from bench.timing import Spread
from bench.training import MODELS, shares
from gradclip._report.tables import MARKS, ReportTable, number, print_table, readable_time

__all__ = [
    "NOTE",
    "headline",
    "losses",
    "of_load",
    "promises",
    "show",
    "summary",
    "tables",
    "traffic",
    "training",
]

NOTE = (
    "Times: median of the turns, with quartiles. Moved: what the contender moves by the way that it is "
    "written, in all and per second. Of roofline: time of the machine's own passes over the same bytes that "
    "the job cannot do without (a read; a read and a read-modify-write where something is written), divided "
    "by the contender's time. x gradclip: time over that of gradclip with a plain list of arrays; below 1, "
    "gradclip loses. All ratios are medians, with quartiles, of those within each round."
)


_TRAFFIC_OF = ("gpt2/float32", "llama-3.2-1b/bfloat16")  # a table of all would not be read


_MANY_LOADS = 12


def _with_quartiles(value: Spread, text: Any) -> str:
    low, high = text(value.low), text(value.high)
    return text(value.median) if low == high else f"{text(value.median)} ({low} … {high})"


def headline(machine: Mapping[str, Any]) -> str:
    """The machine, in a sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    changes = " with uncommitted changes" if machine["uncommitted_changes"] else ""
    commit = (machine["commit"] or "unknown")[:12] + changes
    gpu = f"GPU: {machine['gpu']}. " if machine.get("gpu") else ""
    return (
        f"{machine['cpu']}, threads of every contender: {machine['threads']}, {machine['isa']}; caches "
        f"{'; '.join(machine['caches'])}; {machine['memory_gb']} GB of memory: read "
        f"{machine['read_gb_per_s']} GB/s, read and write {machine['read_write_gb_per_s']} GB/s. {gpu}"
        f"{machine['system']}, Python {machine['python']}, {versions}. {machine['date']}, commit {commit}."
    )


def promises(results: Results) -> ReportTable | None:
    """What gradclip promises, and what was measured of it."""
    cells, marks = [], []
    for v in results.verdicts:
        unit = f" {v.unit}" if v.unit else ""
        bound = f"{'≥' if v.at_least else '≤'} {v.bound:g}{unit}"
        word = {True: "met", False: "missed", None: "not measured"}[v.met]
        measured = _with_quartiles(v.value, number) + unit if v.value else ""
        facts = results.loads.get(v.load)
        cells.append((facts.title if facts else v.load, v.job, v.what, measured, bound, word))
        marks.append({"met": "good", "missed": "bad"}.get(word, ""))
    header = ("gradients", "job", "what", "measured (quartiles)", "promise", "")
    return ReportTable("Promises", header, cells, marks) if cells else None


_HEADER = ("contender", "time (quartiles)", "moved", "GB/s", "of roofline", "x gradclip (quartiles)", "error")


def _cells(row: Row) -> tuple[str, ...]:
    title = PEERS[row.peer].title
    if row.seconds is None:
        return (title, row.failure, *[""] * (len(_HEADER) - 2))
    time = _with_quartiles(row.seconds, readable_time)
    if row.host_seconds:
        time += f"; host {readable_time(row.host_seconds.median)}"
    return (
        title,
        time,
        readable_bytes(row.nbytes),
        number(row.bytes_per_second / 1e9),
        "" if row.of_roofline is None else f"{100 * row.of_roofline:.0f} %",
        _with_quartiles(row.ratio, number) if row.ratio else "",
        "" if row.error is None else f"{row.error:.0e}",
    )


def _mark(row: Row) -> str:
    if row.failure:
        return "bad"
    return "ours" if row.peer in OURS.values() else "loss" if row.ratio and row.ratio.high < 1 else ""


def of_load(results: Results, load: str) -> Iterator[ReportTable]:
    """A table for each job that was done to a load."""
    facts = results.loads[load]
    by_job: dict[str, list[Row]] = {}
    for row in rows(results):
        if row.load == load:
            by_job.setdefault(row.job, []).append(row)
    for job, group in by_job.items():
        title = f"{facts.title}, caches {'cold' if facts.cold else 'warm'}: {JOBS[job].title}"
        yield ReportTable(title, _HEADER, list(map(_cells, group)), list(map(_mark, group)))


def summary(results: Results, load: str) -> ReportTable:
    """A line for each contender: its time in every job, and over gradclip's."""
    found = {(row.peer, row.job): row for row in rows(results) if row.load == load}
    jobs = [job for job in JOBS if any(j == job for _, j in found)]
    cells, marks = [], []
    for peer in PEERS:
        if any(p == peer for p, _ in found):
            of_peer = [found.get((peer, job)) for job in jobs]
            cells.append((PEERS[peer].title, *map(_short, of_peer)))
            marks.append("ours" if peer in OURS.values() else "")
    return ReportTable(results.loads[load].title, ("", *(JOBS[job].title for job in jobs)), cells, marks)


def _short(row: Row | None) -> str:
    if row is None:
        return ""
    if row.seconds is None:
        return row.reason
    ratio = f" ({number(row.ratio.median)} x)" if row.ratio and row.peer not in OURS.values() else ""
    return readable_time(row.seconds.median) + ratio


def losses(results: Results) -> ReportTable:
    """Rows in which somebody else took less time than gradclip with a list."""
    cells, marks = [], []
    for row in rows(results):
        if row.ratio and row.ratio.median < 1 and "gradclip" not in row.peer:
            clearly = row.ratio.high < 1
            cells.append(
                (
                    results.loads[row.load].title, JOBS[row.job].title, PEERS[row.peer].title,
                    _with_quartiles(row.ratio, number), "clearly" if clearly else "within the noise",
                )
            )  # fmt: skip
            marks.append("bad" if clearly else "")
    header = ("gradients", "job", "faster", "its time over gradclip's (quartiles)", "")
    return ReportTable("Where gradclip is not first", header, cells, marks)


def traffic(results: Results) -> ReportTable | None:
    """What every contender moves, held against the clock."""
    header = ("gradients", "job", "contender", "must move", "is written to move", "moved at most", "so it")
    found = moved(results)
    chosen = [m for m in found if m.load in _TRAFFIC_OF] or found
    cells = [
        (
            m.load, JOBS[m.job].title, PEERS[m.peer].title, f"{m.floor} N", f"{m.written} N",
            f"{m.at_most:.1f} N", m.verdict,
        )
        for m in chosen
    ]  # fmt: skip
    return (
        ReportTable("The rule of traffic, by the clock", header, cells, [""] * len(cells)) if cells else None
    )


def training(results: Results) -> ReportTable | None:
    """What clipping costs in a training step."""
    cells, marks = [], []
    for share in shares(results.training):
        cells.append(
            (
                share.model, share.way, readable_time(share.step), readable_time(share.clip),
                f"{100 * share.share:.2g} %",
            )
        )  # fmt: skip
        marks.append("ours" if "gradclip" in share.way else "")
    for model, (title, _, _) in MODELS.items():
        if why := results.failures.get(f"training/{model}"):
            cells.append((title, why, "", "", ""))
            marks.append("bad")
    header = ("model", "clip by", "step", "clip in it", "share of the step")
    return ReportTable("In a training step", header, cells, marks) if cells else None


def tables(results: Results) -> list[ReportTable]:
    """All tables of a run; the first ones are the ones to read."""
    found = [promises(results), training(results), losses(results), traffic(results)]
    of_loads = [table for load in results.loads for table in of_load(results, load)]
    return [table for table in (*found, *of_loads) if table and table.rows]


_STYLES = MARKS | {"loss": "yellow"}


def show(results: Results, console: Console) -> None:
    """Print a run: of many loads a line for each contender, whose columns are in the report."""
    console.print(headline(results.machine), highlight=False, markup=False)
    chosen = tables(results)
    if len(results.loads) > _MANY_LOADS:
        first = [promises(results), training(results), losses(results)]
        chosen = [t for t in (*first, *(summary(results, load) for load in results.loads)) if t and t.rows]
    for table in chosen:
        print_table(table, console, _STYLES)
    for line in results.left_out:
        console.print(f"left out: {line}", highlight=False, markup=False)
    console.print(NOTE, highlight=False)
