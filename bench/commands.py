"""What the command line can be asked for."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import suite
from bench.cases import CASES, DTYPES, choose
from bench.compare import compare, gone, show_changes
from bench.errors import BenchError
from bench.html import write_report
from bench.jobs import JOBS
from bench.peers import OURS, PEERS, missing
from bench.results import Results, check_writable, load, save
from bench.run import run
from bench.tables import show

__all__ = ["execute"]

SLOWER, INTERRUPTED = 1, 130  # exit status


def execute(arguments: argparse.Namespace, out: Console, err: Console, directory: Path) -> int:
    """Do what was asked for; the exit status."""
    if arguments.list:
        _list(out)
        return 0
    if arguments.against and not arguments.compare:
        raise BenchError("--against: expected --compare FILE with it, the older result")
    old = (
        load(arguments.compare) if arguments.compare else None
    )  # a wrong name is reported now, not in the end
    existing = arguments.against or arguments.report
    if existing:
        if arguments.report:
            _check_name("--report", existing)
        results, path = load(existing), existing
    else:
        if arguments.out:
            _check_name("--out", arguments.out)
        check_writable(arguments.out or directory / "result.json")
        results = _measure(arguments, err)
        name = _default_name(results.machine, _kind(arguments, results))
        path = arguments.out or directory / f"{name}.json"
        save(results, path)
    if not arguments.against:
        show(results, out)
        _report(results, path, err)
    if not existing:
        err.print(f"every sample: {path}", highlight=False)
    if results.machine.get("interrupted") and not existing:
        err.print("interrupted: the rest was not measured", highlight=False)
        return INTERRUPTED
    return _compare(old, results, out) if old else 0


def _check_name(option: str, path: Path) -> None:
    """The report and its plots are written beside the file, under its name with another ending."""
    if path.suffix != ".json":
        raise BenchError(f"{option}: expected a name that ends in .json, got {path}")


def _report(results: Results, path: Path, err: Console) -> None:
    try:
        written = write_report(results, path.with_suffix(".html"))
    except OSError as error:
        why = f"{error.filename or path}: expected a report that can be written: {error.strerror}"
        raise BenchError(why) from None
    for name in written:
        err.print(f"written: {name}", highlight=False)


def _compare(old: Results, new: Results, out: Console) -> int:
    changes = compare(old, new)
    show_changes(changes, old, new, out)
    slower = any(change.verdict == "slower" for change in changes)
    return SLOWER if slower or gone(old, new) else 0


def _measure(arguments: argparse.Namespace, err: Console) -> Results:
    cases = choose("case", arguments.cases or (), CASES)
    dtypes = choose("dtype", arguments.dtypes or ("float32",), DTYPES)
    jobs = choose("job", arguments.jobs or JOBS, JOBS)
    wanted = choose("contender", arguments.contenders or PEERS, PEERS)
    if arguments.dtypes and not cases:
        raise BenchError(f"--dtypes: expected --cases with it; there are: {', '.join(CASES)}")
    # Ratios need gradclip.
    wanted = [key for key in PEERS if key in wanted or key in OURS.values()]
    if cases:
        experiments = suite.named(cases, dtypes, jobs, arguments.quick)
    else:
        experiments = suite.standard(arguments.quick, jobs)
    everything = not (cases or arguments.contenders or arguments.jobs)
    return run(experiments, wanted, err, quick=arguments.quick, everything=everything)


def _kind(arguments: argparse.Namespace, results: Results) -> str:
    """What sets a run apart from a whole one, whose file it must not take."""
    if arguments.cases or arguments.contenders or arguments.jobs or results.machine["interrupted"]:
        return "part"
    return "quick" if arguments.quick else ""


def _default_name(machine: Mapping[str, Any], kind: str) -> str:
    """Of a result file, by the machine."""
    model = str(machine["cpu"]).split("(", maxsplit=1)[0]
    words = f"{model} {machine.get('gpu', '')} {machine['threads']} threads {machine['isa']} {kind}"
    return "-".join(re.findall("[a-z0-9]+", words.lower()))


def _list(out: Console) -> None:
    absent = missing()
    out.print("[bold]cases[/]")
    for case in CASES.values():
        out.print(f"  {case.key:16} {case.title} ({case.source})", highlight=False, soft_wrap=True)
    out.print(f"[bold]dtypes[/]\n  {', '.join(DTYPES)}\n[bold]jobs[/]", highlight=False)
    for job in JOBS.values():
        out.print(f"  {job.key:16} {job.title}", highlight=False)
    out.print("[bold]contenders[/]")
    for peer in PEERS.values():
        why = f" (left out here: {absent[peer.key]})" if peer.key in absent else ""
        out.print(f"  {peer.key:18} {peer.title}{why}", highlight=False, soft_wrap=True)
