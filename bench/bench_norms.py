"""Norms of every case by every contender: ``pytest bench --benchmark-only``."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.baselines import Peer, peers_for
from bench.cases import CASES
from bench.harness import time_by_pytest
from bench.jobs import NORMS, Workload

_AXES = [pytest.param(c.key, p, id=f"{c.key}-{p.name}") for c in CASES.values() for p in peers_for(c)]


@pytest.mark.parametrize(("workload", "peer"), _AXES, indirect=["workload"])
def test_norms(benchmark: BenchmarkFixture, workload: Workload, peer: type[Peer]) -> None:
    time_by_pytest(benchmark, workload, NORMS, workload.norms_of(workload.peer(peer)))


@pytest.mark.parametrize("workload", CASES, indirect=True)
def test_roofline(benchmark: BenchmarkFixture, workload: Workload) -> None:
    read, _ = workload.rooflines()
    time_by_pytest(benchmark, workload, NORMS, read)
