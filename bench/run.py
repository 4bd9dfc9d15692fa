"""One run of the suite: a worker measures, this process shows how far it is and survives it."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Collection, Sequence
from multiprocessing.connection import Connection
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from bench import checks, machine, peers
from bench.results import LoadFacts, Results
from bench.suite import Experiment, Training, trainings
from bench.targets import TARGETS, judge
from bench.worker import Outcome, work

__all__ = ["run"]

# Without a word from the worker. XLA takes longest: 10 to 30 s to compile a clip of 1 000 gradients.
_PATIENCE_SECONDS = 180.0

# What a worker runs: pipe, tasks, contenders, and the keys to skip.
Work = Callable[[Any, Sequence[tuple[int, Experiment | Training]], Sequence[str], Collection[str]], None]


class _Display:
    """Drawn by this process only when the worker is about to sleep or to check, not by a timer."""

    def __init__(self, console: Console, titles: Sequence[str]) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=console, auto_refresh=False)
        self._titles, self._count = titles, len(titles)
        self._all = self.progress.add_task("suite", total=len(titles))
        self._one = self.progress.add_task("", total=1.0)
        self._drawn = 0.0

    def end(self, number: int, seconds: float) -> None:
        """A log has no use for bars, but for a line."""
        if not self.progress.console.is_terminal:
            line = f"{number + 1}/{self._count} {self._titles[number]}: {seconds:.0f} s"
            self.progress.console.print(line, highlight=False)

    def show(self, number: int, what: str, name: str, done: float) -> None:
        done = min(done, 1.0)  # the first rounds may take longer than there is time
        self.progress.update(self._all, completed=number + done)
        description = f"{number + 1}/{self._count} {what}: {name}"
        self.progress.update(self._one, description=description, completed=done)
        if time.monotonic() - self._drawn > 0.2:
            self.progress.refresh()
            self._drawn = time.monotonic()


def _follow(pipe: Connection, display: _Display, state: dict[str, Any]) -> None:
    """Take what the worker says into ``state``; raises EOFError when it has gone, or TimeoutError."""
    while True:
        if not pipe.poll(_PATIENCE_SECONDS):
            raise TimeoutError
        kind, *rest = pipe.recv()
        if kind == "begin":
            state["number"], state["turn"] = rest[0], ""
        elif kind == "turn":
            state["turn"] = rest[1]
            display.show(state["number"], *rest)
        else:
            state["outcomes"][rest[0]] = rest[1]
            display.end(rest[0], rest[1].seconds)


def _run_worker(
    tasks: Sequence[tuple[int, Experiment | Training]],
    wanted: Sequence[str],
    skip: set[str],
    display: _Display,
    outcomes: dict[int, Outcome],
    target: Work,
) -> tuple[int, str, str] | None:
    """Run tasks until all are done, or the worker dies: then in which task, whose turn it was, and how."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(theirs, tasks, wanted, frozenset(skip)), daemon=True)
    # Inherited: Ctrl-C is for this process, which ends the worker.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, handler)
    theirs.close()
    state: dict[str, Any] = {"number": tasks[0][0], "turn": "", "outcomes": outcomes}
    hangs = False
    try:
        _follow(ours, display, state)
    except EOFError:
        process.join()
    except TimeoutError:
        hangs = True
    finally:
        process.kill()
        process.join()
    if all(number in outcomes for number, _ in tasks):
        return None
    code = process.exitcode or 0
    how = f"crashed: signal {-code}" if code < 0 else f"crashed: exit status {code}"
    if hangs:
        how = f"hangs: no answer in {_PATIENCE_SECONDS:.0f} s"
    return state["number"], state["turn"], how


def _measure(
    tasks: Sequence[Experiment | Training], wanted: Sequence[str], console: Console, target: Work
) -> tuple[dict[int, Outcome], dict[str, str], bool]:
    """What every task gave, who broke a worker, and whether the user had enough."""
    outcomes: dict[int, Outcome] = {}
    crashed: dict[str, str] = {}
    display = _Display(console, [task.title for task in tasks])
    try:
        with display.progress:
            while len(outcomes) < len(tasks):
                left = [(i, e) for i, e in enumerate(tasks) if i not in outcomes]
                died = _run_worker(left, wanted, set(crashed), display, outcomes, target)
                if died is None:
                    break
                number, name, how = died
                if name and name not in crashed:
                    crashed[name] = how
                    console.print(f"{name} {how}: measuring again without it", highlight=False)
                else:  # nobody's turn
                    outcomes[number] = Outcome(left_out=[f"{tasks[number].title}: its process {how}"])
    except KeyboardInterrupt:
        for number, task in enumerate(tasks):
            outcomes.setdefault(number, Outcome(left_out=[f"{task.title}: interrupted"]))
        return outcomes, crashed, True
    return outcomes, crashed, False


def _describe() -> dict[str, Any]:
    if peers.GPU in {peers.PEERS[key].place for key in peers.present()}:
        from bench.device import describe_gpu  # noqa: PLC0415 (needs CuPy)

        return describe_gpu()
    return machine.describe()


def run(
    experiments: Sequence[Experiment],
    wanted: Sequence[str],
    console: Console,
    quick: bool,
    everything: bool,
    target: Work = work,
) -> Results:
    """Measure; ``everything`` also looks at memory and threads and trains the models."""
    start = time.monotonic()
    absent = peers.missing()
    left_out = [f"{peers.PEERS[key].title}: {absent[key]}" for key in wanted if key in absent]
    taking_part = [key for key in wanted if key not in absent]
    for line in left_out:
        console.print(f"left out: {line}", highlight=False, markup=False)
    described = _describe()
    results = Results(described, left_out=left_out)
    for experiment in experiments:
        results.loads |= {load.key: LoadFacts.of(load) for load in experiment.loads}
    tasks: list[Experiment | Training] = [*experiments, *(trainings(quick) if everything else [])]
    outcomes, crashed, interrupted = _measure(tasks, taking_part, console, target)
    described["tasks"] = [
        {
            "task": task.title,
            "seconds": round(outcomes[i].seconds, 1),
            "checking": round(outcomes[i].checking, 1),
        }
        for i, task in enumerate(tasks)
    ]
    for _, outcome in sorted(outcomes.items()):
        results.training |= outcome.training
        results.samples |= outcome.samples
        results.errors |= outcome.errors
        results.failures |= outcome.failures
        results.left_out += outcome.left_out
        for line in outcome.left_out:
            console.print(f"left out: {line}", highlight=False, markup=False)
    results.failures |= crashed
    results.verdicts = [judge(target, results.samples) for target in TARGETS if target.load in results.loads]
    if everything and not interrupted:
        results.verdicts += checks.run_checks()
    described["seconds"] = round(time.monotonic() - start)
    described["interrupted"] = interrupted
    return results
