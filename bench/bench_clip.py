"""Clipping of every case by every contender, when it clips and when there is nothing to clip."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.baselines import Peer, peers_for
from bench.cases import CASES
from bench.harness import time_by_pytest
from bench.jobs import CLIPPING, NOT_CLIPPING, Workload

_AXES = [pytest.param(c.key, p, id=f"{c.key}-{p.name}") for c in CASES.values() for p in peers_for(c)]


@pytest.mark.parametrize("job", [CLIPPING, NOT_CLIPPING])
@pytest.mark.parametrize(("workload", "peer"), _AXES, indirect=["workload"])
def test_clip(benchmark: BenchmarkFixture, workload: Workload, peer: type[Peer], job: str) -> None:
    contender = workload.clip_of(workload.peer(peer), clipping=job == CLIPPING)
    time_by_pytest(benchmark, workload, job, contender)
