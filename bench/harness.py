"""The same contenders under pytest-benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import CASES, Load
from bench.jobs import JOBS, NORMS, key
from bench.peers import CPU, PEERS, present
from bench.timing import Contender
from bench.workload import Location, Workload, bytes_needed

__all__ = ["PYTEST_CASES", "axes", "fitting", "time_by_pytest", "time_roofline"]

PYTEST_CASES = ("gpt2", "mlp", "tiny", "many")  # one of each kind, for who names none


def fitting(cases: Sequence[str]) -> list[str]:
    """Those of the cases for which there is memory, one contender at a time."""
    free = Location.free_memory()
    return [
        case
        for case in cases
        if max(bytes_needed(Load(CASES[case]), [peer]) for peer in _on_the_host()) <= free
    ]


def axes(cases: Sequence[str]) -> list[tuple[str, str]]:
    """Cases, and the contenders that take part in them."""
    pairs = []
    for case in cases:
        for peer in _on_the_host():
            if PEERS[peer].takes(len(CASES[case].shapes)):
                pairs.append((case, peer))
    return pairs


def _on_the_host() -> list[str]:
    return [peer for peer in present() if PEERS[peer].place == CPU]


def time_by_pytest(benchmark: BenchmarkFixture, workload: Workload, job: str, peer: str) -> None:
    """Time a contender that answers rightly; every call is confirmed and undone."""
    contender = workload.contender(peer, JOBS[job])
    error = workload.errors.get(key(workload.load.key, job, peer))
    _time(benchmark, workload, JOBS[job].title, contender, relative_error=error)


def time_roofline(benchmark: BenchmarkFixture, workload: Workload) -> None:
    """Time the machine's own read of the same bytes."""
    _time(benchmark, workload, JOBS[NORMS].title, workload.rooflines()[0])


def _time(
    benchmark: BenchmarkFixture, workload: Workload, job: str, contender: Contender, **facts: Any
) -> None:
    answers: list[Any] = []
    contender.before_turn()

    def settle() -> None:
        while answers:
            answer = answers.pop()
            contender.after(answer)
            contender.undo(answer)
        contender.before()

    def call() -> None:
        answers.append(contender.call())

    load = workload.load
    benchmark.group = f"{load.title}: {job}"
    benchmark.extra_info.update(bytes=load.nbytes, **facts)
    rounds, warm_up = (7, 1) if load.case.cold else (200, 5)
    benchmark.pedantic(  # type: ignore[no-untyped-call]
        call, setup=settle, rounds=rounds, warmup_rounds=warm_up
    )
    settle()
