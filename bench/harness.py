"""The same contenders under pytest-benchmark."""

from __future__ import annotations

from typing import Any

from pytest_benchmark.fixture import BenchmarkFixture

from bench.jobs import Workload
from bench.timing import Contender

__all__ = ["time_by_pytest"]


def time_by_pytest(benchmark: BenchmarkFixture, workload: Workload, job: str, contender: Contender) -> None:
    """Time a contender, whose answer has been checked; every call is confirmed and undone."""
    answers: list[Any] = []

    def settle() -> None:
        while answers:
            contender.after(answers.pop())
        contender.before()

    def call() -> None:
        answers.append(contender.call())

    case = workload.case
    benchmark.group = f"{case.title}: {job}"
    benchmark.extra_info.update(bytes=case.nbytes, relative_error=workload.errors.get(contender.key))
    rounds, warm_up = (200, 5) if case.in_cache else (7, 1)
    benchmark.pedantic(  # type: ignore[no-untyped-call]
        call, setup=settle, rounds=rounds, warmup_rounds=warm_up
    )
    settle()
