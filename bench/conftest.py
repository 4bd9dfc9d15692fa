"""One workload at a time, the large ones fill gigabytes; which cases, the command line says."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from bench.cases import CASES, Load
from bench.harness import PYTEST_CASES, axes, fitting
from bench.workload import Workload


def pytest_addoption(parser: pytest.Parser) -> None:
    known = ", ".join(CASES)
    parser.addoption(
        "--cases", default=",".join(PYTEST_CASES), help=f"by commas, or 'all' (default: %(default)s): {known}"
    )


def _cases(config: pytest.Config) -> Sequence[str]:
    named = str(config.getoption("--cases"))
    cases = list(CASES) if named == "all" else named.split(",")
    unknown = [case for case in cases if case not in CASES]
    if unknown:
        raise pytest.UsageError(f"--cases: expected some of {', '.join(CASES)}, got {', '.join(unknown)}")
    return cases


def pytest_report_header(config: pytest.Config) -> str:
    cases = _cases(config)
    found = fitting(cases)
    left_out = [case for case in cases if case not in found]
    return f"cases: {', '.join(found)}; left out for want of memory: {', '.join(left_out) or 'none'}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "workload" not in metafunc.fixturenames:
        return
    cases = fitting(_cases(metafunc.config))
    if "peer" in metafunc.fixturenames:
        metafunc.parametrize(("workload", "peer"), axes(cases), indirect=["workload"], scope="session")
    else:
        metafunc.parametrize("workload", cases, indirect=True, scope="session")


@pytest.fixture(scope="session")
def workload(request: pytest.FixtureRequest) -> Workload:
    return Workload(Load(CASES[request.param]))
