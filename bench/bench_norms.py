"""Norms by every contender: ``pytest bench``."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.harness import PYTEST_CASES, axes, time_by_pytest, time_roofline
from bench.jobs import NORMS
from bench.workload import Workload


@pytest.mark.parametrize(("workload", "peer"), axes(), indirect=["workload"])
def test_norms(benchmark: BenchmarkFixture, workload: Workload, peer: str) -> None:
    time_by_pytest(benchmark, workload, NORMS, peer)


@pytest.mark.parametrize("workload", PYTEST_CASES, indirect=True)
def test_roofline(benchmark: BenchmarkFixture, workload: Workload) -> None:
    time_roofline(benchmark, workload)
