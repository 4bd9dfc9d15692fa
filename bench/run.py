"""One run of the suite: measure, judge, save, show."""

from __future__ import annotations

import re
import shutil
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import baselines, checks, machine, report
from bench.cases import CASES
from bench.jobs import Workload
from bench.targets import TARGETS, judge
from bench.timing import Rounds, measure

__all__ = ["print_markdown", "run"]

_RESULTS = Path(__file__).resolve().parent / "results"
# Cases that are compared in a ratio are measured by turns with each other.
_EXPERIMENTS = (("gpt2",), ("mlp",), ("tiny",), ("many", "fewer"), ("float32", "bfloat16", "float16"))


class _Experiment:
    """Cases measured together."""

    def __init__(self, cases: list[str], progress: Progress) -> None:
        self.title = "; ".join(CASES[case].title for case in cases)
        self._progress = progress
        self._task = progress.add_task(f"{self.title}: checking answers", total=None)
        progress.refresh()
        self._workloads = [Workload(CASES[case]) for case in cases]
        self._contenders = [c for workload in self._workloads for c in workload.contenders()]

    @property
    def errors(self) -> dict[str, float]:
        return {key: error for workload in self._workloads for key, error in workload.errors.items()}

    def measure(self, rounds: int) -> dict[str, Rounds]:
        turns = rounds * len(self._contenders)
        self._progress.update(self._task, description=self.title, total=turns, refresh=True)
        return measure(self._contenders, self._workloads[0].protocol(rounds), self._tick)

    def _tick(self) -> None:
        # Between turns, by this thread: a display that draws itself would do so during a timed call.
        self._progress.update(self._task, advance=1, refresh=True)


def run(rounds: int, only: list[str], name: str | None) -> None:
    """Measure all cases, or those named, print the tables and write ``bench/results/<name>.json``."""
    unknown = sorted(set(only) - set(CASES))
    if unknown:
        sys.exit(f"--only: expected some of {', '.join(CASES)}, got {', '.join(unknown)}")
    start = time.monotonic()
    console = Console(stderr=True)
    for library in baselines.missing():
        console.print(f"{library} is not installed: left out")
    described = machine.describe()
    outcomes = [] if only else checks.run_checks()
    samples: dict[str, Rounds] = {}
    errors: dict[str, float] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        for experiment_cases in _EXPERIMENTS:
            cases = [case for case in experiment_cases if case in only or not only]
            if cases:
                experiment = _Experiment(cases, progress)
                samples |= experiment.measure(rounds)
                errors |= experiment.errors
    described |= {"rounds": rounds, "seconds": round(time.monotonic() - start)}
    judged = [judge(target, samples) for target in TARGETS if target.case in only or not only]
    results = report.Results(described, [*judged, *outcomes], samples, errors)

    report.show(results, Console(width=shutil.get_terminal_size((120, 50)).columns))
    path = _RESULTS / f"{name or _default_name(described)}.json"
    report.save(results, path)
    console.print(f"written to {path}", highlight=False)


def print_markdown(path: Path) -> None:
    """Print a result file as Markdown."""
    print(report.to_markdown(report.load(path)), end="")


def _default_name(described: dict[str, object]) -> str:
    model = str(described["cpu"]).split("(", maxsplit=1)[0]
    words = re.findall("[a-z0-9]+", f"{model} {described['threads']} threads {described['isa']}".lower())
    return "-".join(words)
