"""What was measured, as a file and as tables for the terminal and for Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from bench.cases import CASES
from bench.jobs import CLIPPING, NORMS, NOT_CLIPPING, READ, READ_WRITE, key
from bench.targets import Outcome
from bench.timing import Rounds, Spread, spread_of_ratio

__all__ = ["Results", "load", "save", "show", "to_markdown"]

_JOBS = (NORMS, CLIPPING, NOT_CLIPPING)
# What a job asks of memory at least: passes over the gradients' bytes, and the probes of the same.
_PASSES = {NORMS: 1, CLIPPING: 3, NOT_CLIPPING: 1}
_PROBES = {NORMS: (READ,), CLIPPING: (READ, READ_WRITE), NOT_CLIPPING: (READ,)}
_LARGE = 100_000_000  # bytes from which on GB/s says more than microseconds


@dataclass(frozen=True)
class Results:
    """One run.

    Attributes:
        machine: What it ran on.
        outcomes: The promises, in order.
        samples: Seconds of every timed call, by contender and round.
        errors: Relative error of the global norm that each contender answered.
    """

    machine: dict[str, Any]
    outcomes: list[Outcome]
    samples: Mapping[str, Rounds]
    errors: Mapping[str, float]


def save(results: Results, path: Path) -> None:
    """Write a run as JSON, one line per contender: samples in nanoseconds, a list per round."""
    cases = {
        c.key: {"title": c.title, "source": c.source, "arrays": len(c.shapes), "bytes": c.nbytes}
        for c in CASES.values()
    }
    samples = {
        name: [[round(seconds * 1e9) for seconds in turn] for turn in rounds]
        for name, rounds in results.samples.items()
    }
    sections = {
        "machine": json.dumps(results.machine, indent=1),
        "cases": _lines(cases),
        "targets": "[\n" + ",\n".join(json.dumps(asdict(o)) for o in results.outcomes) + "\n]",
        "relative_errors": _lines(results.errors),
        "samples_ns": _lines(samples),
    }
    text = ",\n".join(f'"{name}": {section}' for name, section in sections.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + text + "\n}\n", encoding="utf-8")


def _lines(mapping: Mapping[str, Any]) -> str:
    lines = (f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in mapping.items())
    return "{\n" + ",\n".join(lines) + "\n}"


def load(path: Path) -> Results:
    """Read what ``save`` wrote."""
    data = json.loads(path.read_text(encoding="utf-8"))
    outcomes = []
    for row in data["targets"]:
        value = Spread(**row.pop("value")) if row["value"] else row.pop("value")
        outcomes.append(Outcome(**row, value=value))
    samples = {
        name: [[ns / 1e9 for ns in turn] for turn in rounds] for name, rounds in data["samples_ns"].items()
    }
    return Results(data["machine"], outcomes, samples, data["relative_errors"])


@dataclass(frozen=True)
class _Table:
    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 or value == 0 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def _targets_table(outcomes: Iterable[Outcome]) -> _Table:
    rows: list[tuple[str, ...]] = []
    for o in outcomes:
        bound = f"{'≥' if o.at_least else '≤'} {o.bound:g}{_suffix(o.unit)}"
        verdict = {True: "met", False: "missed", None: "not measured"}[o.met]
        if o.value is None:
            measured = quartiles = ""
        else:
            measured = f"{_number(o.value.median)}{_suffix(o.unit)}"
            low, high = _number(o.value.low), _number(o.value.high)
            quartiles = "" if low == high else f"{low} … {high}"
        rows.append((o.case, o.job, o.what, measured, quartiles, bound, verdict))
    header = ("case", "job", "what", "measured", "quartiles", "target", "")
    return _Table("Targets", header, rows)


def _suffix(unit: str) -> str:
    return "" if not unit else f" {unit}"


def _time_table(case: str, samples: Mapping[str, Rounds], errors: Mapping[str, float]) -> _Table | None:
    """Median times of all contenders of a case, and of the machine's own passes over the same bytes."""
    names = dict.fromkeys(
        name.split("/", 2)[2] for job in _JOBS for name in samples if name.startswith(f"{case}/{job}/")
    )
    if not names:
        return None
    rooflines = (_cell(case, job, [key(case, p) for p in _PROBES[job]], samples) for job in _JOBS)
    rows = [("roofline", *rooflines, "")]
    for name in names:
        times = (_cell(case, job, [key(case, job, name)], samples) for job in _JOBS)
        error = errors.get(key(case, NORMS, name))
        rows.append((name, *times, "" if error is None else f"{error:.0e}"))
    return _Table(CASES[case].title, ("contender", *_JOBS, "error of the norm"), rows)


def _cell(case: str, job: str, keys: list[str], samples: Mapping[str, Rounds]) -> str:
    """The sum of the medians, with the bytes that the job has to move per second."""
    if any(name not in samples for name in keys):
        return ""
    seconds = sum(spread_of_ratio(samples[name], ()).median for name in keys)
    nbytes = CASES[case].nbytes
    time = f"{_number(seconds * 1e6)} µs" if seconds < 1e-3 else f"{_number(seconds * 1e3)} ms"
    if nbytes < _LARGE:
        return time
    return f"{time} ({_number(_PASSES[job] * nbytes / seconds / 1e9)} GB/s)"


def _tables(results: Results) -> list[_Table]:
    times = (_time_table(case, results.samples, results.errors) for case in CASES)
    return [_targets_table(results.outcomes), *(table for table in times if table)]


def _headline(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    changes = " with uncommitted changes" if machine["uncommitted_changes"] else ""
    commit = (machine["commit"] or "unknown")[:12] + changes
    return (
        f"{machine['cpu']}, threads: {machine['threads']}, {machine['isa']}; caches "
        f"{'; '.join(machine['caches'])}; memory: read {machine['read_gb_per_s']} GB/s, read and write "
        f"{machine['read_write_gb_per_s']} GB/s. Python {machine['python']}, {versions}. "
        f"{machine['date']}, commit {commit}."
    )


_NOTE = (
    "Medians; quartiles of the ratio within each round. Roofline: a plain vector read of the same bytes "
    "by the same threads, plus a plain read-modify-write where something is clipped. GB/s: the bytes that "
    "the job has to move (the gradients once; three times when clipping) per second."
)


def show(results: Results, console: Console) -> None:
    """Print a run."""
    console.print(_headline(results.machine), highlight=False)
    for table in _tables(results):
        view = RichTable(title=table.title, title_justify="left")
        for i, column in enumerate(table.header):
            view.add_column(column, justify="left" if i == 0 else "right")
        for row in table.rows:
            style = {"missed": "red", "met": "green"}.get(row[-1])
            view.add_row(*row[:-1], f"[{style}]{row[-1]}[/]" if style else row[-1])
        console.print(view)
    console.print(_NOTE, highlight=False)


def to_markdown(results: Results) -> str:
    """The same tables for the documentation."""
    parts = [_headline(results.machine)]
    for table in _tables(results):
        lines = [table.header, ("---",) * len(table.header), *table.rows]
        parts.append(f"**{table.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join([*parts, _NOTE]) + "\n"
