"""One workload at a time: the large ones fill gigabytes."""

from __future__ import annotations

import pytest

from bench.cases import CASES, Load
from bench.workload import Workload


@pytest.fixture(scope="session")
def workload(request: pytest.FixtureRequest) -> Workload:
    return Workload(Load(CASES[request.param]))
