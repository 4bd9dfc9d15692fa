"""The GPU check where there is no GPU, and how it judges and reports."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from gradclip._dispatch import why_no_gpu
from tools import gpu, gpu_check

_ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("command", [["-m", "tools.gpu_check"], ["-m", "tools.gpu"]])
def test_without_a_gpu_it_says_so(command: list[str], tmp_path: Path) -> None:
    if not why_no_gpu():  # as it is: no skip, since on a GPU the command itself is what runs
        return
    told = subprocess.run(
        [sys.executable, "-W", "ignore", *command, "--out", str(tmp_path / "out")],
        cwd=_ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert told.returncode == gpu_check.NO_GPU
    assert told.stderr.startswith("no GPU: ")
    assert list(tmp_path.iterdir()) == []


def _part(title: str, code: str, **more: Any) -> gpu_check.Part:
    return gpu_check.Part(title, [[sys.executable, "-c", code]], f"{title}.log", **more)


def test_a_part_that_fails_or_hangs_is_reported(tmp_path: Path) -> None:
    """The second command of a part does not run where the first has failed."""
    parts = [_part("build", "print(5)"), _part("tests", "raise SystemExit(9)"), _part("torch", "print(6)")]
    parts[1] = replace(parts[1], commands=[*parts[1].commands, *parts[2].commands])
    results = [gpu_check.judge(gpu_check.run(part, tmp_path, 60), dry=False) for part in parts]
    late = gpu_check.run(_part("sweep", "import time; time.sleep(60)"), tmp_path, 0.2)
    absent = gpu_check.run(gpu_check.Part("memcheck", [["no-such-tool"]], "memcheck.log"), tmp_path, 60)
    results += [gpu_check.judge(each, dry=False) for each in (late, absent)]
    assert [each["status"] for each in results] == [0, 9, 0, -1, gpu_check.FAILED]
    assert [each["passed"] for each in results] == [True, False, True, False, False]
    gpu_check.report(results, {"gpu": "none"}, tmp_path)
    assert (tmp_path / "build.log").read_text() == "5\n"
    assert (tmp_path / "tests.log").read_text() == ""
    assert "no-such-tool" in (tmp_path / "memcheck.log").read_text()
    report = (tmp_path / "report.md").read_text()
    assert "| build | passed |" in report
    assert "| tests | failed (9) |" in report
    assert json.loads((tmp_path / "report.json").read_text())["parts"][3]["title"] == "sweep"


def test_what_a_late_part_has_started_is_ended_too(tmp_path: Path) -> None:
    """A sanitizer runs the tests in a process of their own."""
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    assert gpu_check.run(_part("late", code), tmp_path, 3)["status"] == -1
    status = Path("/proc", (tmp_path / "late.log").read_text().strip(), "status")
    deadline = time.monotonic() + 10
    while status.exists() and "zombie" not in status.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not status.exists() or "zombie" in status.read_text()


def test_the_parts_that_are_chosen(tmp_path: Path) -> None:
    with mock.patch.object(gpu_check, "sanitizer", return_value="cs"):
        parts = gpu_check.parts_of(("synccheck", "memcheck"), tmp_path, "90", dry=False)
    assert [part.title for part in parts] == ["memcheck", "synccheck"]
    assert list(parts[0].commands[0][:3]) == ["cs", "--tool", "memcheck"]
    assert all(part.environment == {"GRADCLIP_TESTS_WITHOUT_POOL": "1"} for part in parts)


def test_the_files_are_those_that_have_tests_for_a_gpu(request: pytest.FixtureRequest) -> None:
    """All of them and no others: each one costs minutes that are lent."""
    items = request.session.items
    if {item.path for item in items} >= set(
        _ROOT.glob("tests/test_*.py")
    ):  # the whole suite, as it was collected
        found = {f"tests/{item.path.name}" for item in items if item.get_closest_marker("gpu")}
    else:
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "tests"]
        told = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True)
        found = {line.split("::")[0] for line in told.stdout.splitlines() if "::" in line}
    assert found == {*gpu_check.TESTS, *gpu_check.TORCH_TESTS}


def test_parts_are_reported_one_by_one_beside_those_of_before(tmp_path: Path) -> None:
    """A report has what ran before, of the same commit and GPU."""
    seen: list[list[str]] = []

    def run(part: gpu_check.Part, out: Path, _: float) -> dict[str, Any]:
        report = out / "report.json"
        before = json.loads(report.read_text())["parts"] if report.exists() else []
        seen.append([part["title"] for part in before])
        return {"title": part.title, "status": 0, "seconds": 0.0, "log": part.log}

    with mock.patch.object(gpu_check, "run", run), mock.patch.object(gpu_check, "describe") as describe:
        describe.return_value = {"commit": "a", "gpu": "H100"}
        gpu_check.check(("sweep",), tmp_path, "90", False)
        gpu_check.check(("build", "benchmark"), tmp_path, "90", False)
        describe.return_value = {"commit": "b", "gpu": "H100"}
        assert [part["title"] for part in gpu_check.check(("memcheck",), tmp_path, "90", False)] == [
            "memcheck"
        ]
    assert seen == [[], ["sweep"], ["build", "sweep"], ["build", "benchmark", "sweep"]]


def test_conftest_imports_neither_cupy_nor_ml_dtypes() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests'); import conftest\n"
        "print(sorted({'cupy', 'ml_dtypes', 'torch', 'jax'} & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True, check=True)
    assert told.stdout == "[]\n"


def test_the_sanitizer_knows_its_options() -> None:
    """Where it is installed: to one that it does not know it answers with its usage."""
    tool = gpu_check.sanitizer()
    if tool is None:  # a tool of `dev`, which `test` does not bring
        return
    for kind in gpu_check.SANITIZERS:
        options = gpu_check.OPTIONS + (gpu_check.MEMCHECK_OPTIONS if kind == "memcheck" else ())
        command = [tool, "--tool", kind, *options, "true"]
        told = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "COMPUTE-SANITIZER" in told.stdout + told.stderr
        assert "Usage:" not in told.stdout + told.stderr


def test_tests_that_were_all_skipped_are_a_failure_but_in_a_dry_run() -> None:
    """There they have been collected; and a command that ends because there is no GPU has started."""
    result: dict[str, Any] = {"status": 0, "counts": {"tests": 7, "failures": 0, "errors": 0, "skipped": 7}}
    assert not gpu_check.judge(result, dry=False)["passed"]
    assert gpu_check.judge(result, dry=True)["passed"]
    assert not gpu_check.judge(result | {"counts": {}}, dry=True)["passed"]
    assert not gpu_check.judge(result | {"status": 1}, dry=True)["passed"]
    no_gpu = {"status": gpu_check.NO_GPU}
    assert [gpu_check.judge(no_gpu, dry)["passed"] for dry in (False, True)] == [False, True]


def test_targets_are_judged() -> None:
    """From samples to "reached", "missed" or "not measured", and into the table."""
    case = "GPT-2 124M float32"
    samples = {
        "ceiling": {"device": [1.0, 1.2, 9.0], "host": [1.0], "wall": [1.0]},
        "gradclip": {"device": [1.5, 1.0, 1.2], "host": [1.0], "wall": [1.0]},
        "torch foreach": {"device": [3.0, 2.4, 1.0], "host": [1.0], "wall": [1.0]},
    }
    machine = {"gpu": "A", "multiprocessors": 1, "driver_cuda": 1, "date": "d", "commit": "c"}
    results = {
        "machine": machine | {"peak_bytes_per_s": 2e6},
        "cases": {case: dict.fromkeys(gpu.JOBS, samples) | {"nbytes": 1_000_000}},
        "left_out": ["a case: too large"],
    }
    judged = {row[0]: row[1:] for row in gpu.judge(results)}
    title = f"{case}, {{}}: torch foreach / gradclip >= {{}} (device)"
    assert judged[title.format("clipping", 1.5)] == ("2.00", "reached")
    assert judged[title.format("not clipping", 2.5)] == ("2.00", "missed")
    assert len(judged) == len(gpu.TARGETS) + len(gpu.HOST_CASES) * len(gpu.HOST_TARGETS) * len(gpu.JOBS)
    assert sum(row[1] == "-" for row in judged.values()) == len(judged) - 2
    table = gpu.markdown(results)
    assert (
        "| GPT-2 124M float32 | clipping | gradclip | 1200000.0 | 1000000.0 | 1000000.0 | 1.00 | 1.25 |"
        in table
    )
    assert table.endswith("Left out: a case: too large\n")
