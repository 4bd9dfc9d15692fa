"""The GPU check where there is no GPU, and how it judges and reports."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
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


def test_a_part_that_fails_or_hangs_is_reported(tmp_path: Path) -> None:
    good = gpu_check.run("good", [sys.executable, "-c", "print(5)"], tmp_path / "good.log")
    bad = gpu_check.run("bad", [sys.executable, "-c", "raise SystemExit(9)"], tmp_path / "bad.log")
    with mock.patch.object(gpu_check, "TIMEOUT", 0.2):
        late = gpu_check.run("late", [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "l")
    assert [part["status"] for part in (good, bad, late)] == [0, 9, -1]
    gpu_check.report([good, bad, late], {"gpu": "none"}, tmp_path)
    assert (tmp_path / "good.log").read_text() == "5\n"
    report = (tmp_path / "report.md").read_text()
    assert "| good | passed |" in report
    assert "| bad | failed (9) |" in report
    assert json.loads((tmp_path / "report.json").read_text())["parts"][2]["title"] == "late"


def test_what_a_late_part_has_started_is_ended_too(tmp_path: Path) -> None:
    """A sanitizer runs the tests in a process of their own."""
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with mock.patch.object(gpu_check, "TIMEOUT", 3):
        assert gpu_check.run("late", [sys.executable, "-c", code], tmp_path / "log")["status"] == -1
    status = Path("/proc", (tmp_path / "log").read_text().strip(), "status")
    deadline = time.monotonic() + 10
    while status.exists() and "zombie" not in status.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not status.exists() or "zombie" in status.read_text()


def test_the_parts_that_are_chosen(tmp_path: Path) -> None:
    ran: list[tuple[str, list[str], dict[str, str]]] = []

    def note(title: str, command: list[str], log: Path, **environment: str) -> dict[str, object]:
        ran.append((title, command, environment))
        return {"title": title, "status": 0, "seconds": 0.0, "log": log.name}

    with (
        mock.patch.object(gpu_check, "run", note),
        mock.patch.object(gpu_check, "sanitizer", return_value="cs"),
    ):
        gpu_check.check(tmp_path, ("synccheck", "memcheck"))
    assert [title for title, _, _ in ran] == ["memcheck", "synccheck"]
    assert ran[0][1][:3] == ["cs", "--tool", "memcheck"]
    assert all(environment == {"GRADCLIP_TESTS_WITHOUT_POOL": "1"} for _, _, environment in ran)


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


def test_tests_that_were_all_skipped_are_a_failure(tmp_path: Path) -> None:
    def skipped(title: str, command: object, log: Path, **environment: str) -> dict[str, object]:
        (tmp_path / "tests.xml").write_text(
            '<testsuites><testsuite tests="7" failures="0" errors="0" skipped="7"/></testsuites>'
        )
        return {"title": title, "status": 0, "seconds": 0.0, "log": log.name}

    with mock.patch.object(gpu_check, "run", skipped):
        parts = gpu_check.check(tmp_path)
    assert parts[0]["status"] == gpu_check.FAILED
    assert [part["title"] for part in parts[1:]] == [*gpu_check.SANITIZERS, "benchmark"]


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
        "machine": machine,
        "cases": {case: dict.fromkeys(gpu.JOBS, samples)},
        "left_out": ["a case: too large"],
    }
    judged = {row[0]: row[1:] for row in gpu.judge(results)}
    title = f"{case}, {{}}: torch foreach / gradclip >= {{}} (device)"
    assert judged[title.format("clipping", 1.5)] == ("2.00", "reached")
    assert judged[title.format("not clipping", 2.5)] == ("2.00", "missed")
    assert len(judged) == len(gpu.TARGETS) + len(gpu.HOST_TARGETS) * len(gpu.JOBS)
    assert sum(row[1] == "-" for row in judged.values()) == len(judged) - 2
    table = gpu.markdown(results)
    assert "| GPT-2 124M float32 | clipping | gradclip | 1200000.0 | 1000000.0 | 1000000.0 | 1.00 |" in table
    assert table.endswith("Left out: a case: too large\n")
