"""Clipping by every contender, alone and with what users do beside it."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.harness import time_by_pytest
from bench.jobs import CLIP, LOG, NO_CLIP, UNSCALE
from bench.workload import Workload


@pytest.mark.parametrize("job", [CLIP, NO_CLIP, UNSCALE, LOG])
def test_clip(benchmark: BenchmarkFixture, workload: Workload, peer: str, job: str) -> None:
    time_by_pytest(benchmark, workload, job, peer)
