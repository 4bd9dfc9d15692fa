"""Measures one experiment after the other, in a process of its own.

Whatever a contender does to its process, the run goes on: ``bench.run`` knows who had its turn, starts
another worker, and leaves that one out.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench import peers
from bench.cases import Load, readable_bytes
from bench.jobs import key
from bench.suite import Experiment, Training
from bench.timing import Contender, Rounds, describe_error, measure
from bench.training import Steps, missing, train
from bench.workload import Location, Workload, bytes_needed

__all__ = ["Outcome", "Tell", "measure_experiment", "train_model", "work"]

_SPARE = 0.8  # of the memory that is free

# What is being done, with whose key, and how far: fraction of the experiment.
Tell = Callable[[str, str, float], None]


@dataclass
class Outcome:
    """What one experiment or training gave."""

    samples: dict[str, Rounds] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    training: dict[str, Steps] = field(default_factory=dict)
    checking: float = 0.0  # seconds until the first timed call
    seconds: float = 0.0  # in all


def places() -> list[type[Location]]:
    """Where gradients can live here."""
    found = [Location]
    if peers.GPU in {peers.PEERS[peer].place for peer in peers.present()}:
        from bench.device import GpuLocation  # noqa: PLC0415 (needs CuPy)

        found.append(GpuLocation)
    return found


def fitting(
    load: Load, place: type[Location], wanted: Sequence[str], jobs: Sequence[str], outcome: Outcome
) -> list[str] | None:
    """The contenders for which there is memory now; None if there is not even for the gradients.

    Who is left out, and why, goes into the outcome.
    """
    free = int(place.free_memory() * _SPARE)
    if bytes_needed(load, (), jobs) > free:
        outcome.left_out.append(
            f"{load.key}, {place.name}: needs {readable_bytes(bytes_needed(load, (), jobs))}, "
            f"{readable_bytes(free)} are free"
        )
        return None
    chosen: list[str] = []
    for peer in wanted:
        kind = peers.PEERS[peer]
        if kind.place != place.name:
            continue
        if not kind.takes(len(load.case.shapes)):
            outcome.left_out.append(f"{load.key}: {kind.title}: more than {kind.most_tensors} tensors")
        elif bytes_needed(load, [*chosen, peer], jobs) > free:
            need = readable_bytes(load.nbytes * kind.copies)
            outcome.left_out.append(f"{load.key}: {kind.title}: needs {need} more memory than is free")
        else:
            chosen.append(peer)
    return chosen


def measure_experiment(
    experiment: Experiment, wanted: Sequence[str], skip: Collection[str], tell: Tell
) -> Outcome:
    """Check and time everybody; ``skip`` has the keys of those who broke a process."""
    outcome = Outcome()
    start = time.monotonic()
    workloads: list[Workload] = []
    contenders: list[Contender] = []
    for load in experiment.loads:
        for place in places():
            tell("making gradients", "", 0.0)
            chosen = fitting(load, place, wanted, experiment.jobs_of(load), outcome)
            if not chosen:
                continue
            workload = Workload(load, place)
            workloads.append(workload)
            contenders += workload.rooflines()
            pairs = [
                (p, j)
                for p in chosen
                for j in experiment.jobs_of(load)
                if j in peers.PEERS[p].traffic and key(load.key, j, p) not in skip
            ]
            contenders += workload.contenders(pairs, lambda name: tell("checking answers", name, 0.0))
    outcome.checking = time.monotonic() - start
    if workloads:
        measured = measure(
            contenders,
            workloads[0].protocol(experiment.rounds, experiment.seconds),
            lambda name, done: tell("timing", name, done),
        )
        outcome.samples, outcome.failures = measured.samples, measured.failures
    for workload in workloads:
        outcome.errors |= workload.errors
        outcome.failures |= workload.failures
    return outcome


def train_model(training: Training, skip: Collection[str], tell: Tell) -> Outcome:
    """Train a model, unless it broke a process."""
    name = f"training/{training.model}"
    absent = missing(training.model)
    if absent:
        return Outcome(left_out=[f"{name}: {', '.join(absent)} not installed"])
    if name in skip:
        return Outcome()
    try:
        steps = train(training.model, training.rounds, lambda done: tell("training", name, done))
    except Exception as error:
        return Outcome(failures={name: describe_error(error)})
    return Outcome(training={training.model: steps})


def work(
    pipe: Any,
    tasks: Sequence[tuple[int, Experiment | Training]],
    wanted: Sequence[str],
    skip: Collection[str],
) -> None:
    """Send what happens through the pipe: ("turn", ...) before anything that may end this process."""
    warnings.simplefilter("ignore")  # of the peers: their affairs, and the display is the parent's

    def tell(what: str, name: str, done: float) -> None:
        pipe.send(("turn", what, name, done))

    for number, task in tasks:
        start = time.monotonic()
        pipe.send(("begin", number))
        if isinstance(task, Training):
            outcome = train_model(task, skip, tell)
        else:
            outcome = measure_experiment(task, wanted, skip, tell)
        gc.collect()  # the gradients are in cycles, and the next task asks how much memory is free
        outcome.seconds = time.monotonic() - start
        pipe.send(("end", number, outcome))
    pipe.close()
