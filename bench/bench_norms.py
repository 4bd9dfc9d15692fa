"""Norms by every contender: ``pytest bench``."""

from __future__ import annotations

from pytest_benchmark.fixture import BenchmarkFixture

from bench.harness import time_by_pytest, time_roofline
from bench.jobs import NORMS
from bench.workload import Workload


def test_norms(benchmark: BenchmarkFixture, workload: Workload, peer: str) -> None:
    time_by_pytest(benchmark, workload, NORMS, peer)


def test_roofline(benchmark: BenchmarkFixture, workload: Workload) -> None:
    time_roofline(benchmark, workload)
