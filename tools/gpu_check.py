"""Everything that only a GPU can show, by one command from the root of the repository:

    python -m tools.gpu_check [--out DIRECTORY] [--only PART ...]

Runs the tests that are marked `gpu`, compute-sanitizer (memcheck, racecheck, synccheck) over the kernels,
and the benchmark of the GPU; writes report.json and report.md with the machine's description. Exit
status: 0 all is well, 1 something failed, 3 there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

from gradclip._dispatch import why_no_gpu

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = ("memcheck", "racecheck", "synccheck")
FAILED, NO_GPU = 1, 3
# Under the sanitizer kernels take a hundred times as long: every kernel and dtype, but no long lists.
SANITIZED = ("tests/test_device_bits.py", "-k", "real and not many and not layout")
# Of our kernels alone. Calls that fail are exceptions in the tests; CuPy and the runtime ask for what a
# driver need not have, which is none.
OPTIONS = ("--error-exitcode", "9", "--kernel-name", "kernel_substring=gradclip")
MEMCHECK_OPTIONS = ("--report-api-errors", "no")
PARTS = ("tests", *SANITIZERS, "benchmark")
TIMEOUT = 900  # seconds for each part


def sanitizer() -> str | None:
    """compute-sanitizer, from the path or from its package."""
    found = shutil.which("compute-sanitizer")
    if found is not None:
        return found
    try:
        parts = files("nvidia-cuda-sanitizer-api") or []
    except PackageNotFoundError:
        return None
    for part in parts:
        if part.name == "compute-sanitizer":
            path = Path(str(part.locate()))
            path.chmod(path.stat().st_mode | 0o111)
            return str(path)
    return None


def run(title: str, command: Sequence[str], log: Path, **environment: str) -> dict[str, Any]:
    """Run a part; its output goes to a file."""
    print(f"{title} ...", flush=True)
    start = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
            start_new_session=True,
        )
        try:
            status = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            status = -1
        finally:
            if process.poll() is None:  # with what it started: a sanitizer's target would keep the GPU
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    seconds = round(time.monotonic() - start, 1)
    part = {"title": title, "status": status, "seconds": seconds, "log": log.name}
    print(f"  {'passed' if status == 0 else f'FAILED ({status})'} in {seconds} s; {log}", flush=True)
    return part


def counts(junit: Path) -> dict[str, int]:
    """Numbers of tests by outcome, from pytest's own report."""
    if not junit.exists():
        return {}
    suite = ET.parse(junit).getroot().find("testsuite")
    assert suite is not None
    return {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}


def check(out: Path, chosen: Sequence[str] = PARTS) -> list[dict[str, Any]]:
    """The chosen parts, in order; none stops the others."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    parts = []
    if "tests" in chosen:
        junit = out / "tests.xml"
        junit.unlink(missing_ok=True)
        tests = run("tests", [*pytest, f"--junitxml={junit}"], out / "tests.log")
        tests["counts"] = found = counts(junit)
        if tests["status"] == 0 and (not found or found["tests"] == found["skipped"]):
            tests["status"] = FAILED  # nothing ran: nothing is shown
        parts.append(tests)
    tool = sanitizer()
    for kind in SANITIZERS:
        if kind not in chosen:
            continue
        if tool is None:
            part = {
                "title": kind,
                "status": FAILED,
                "seconds": 0.0,
                "log": "no compute-sanitizer found",
            }
        else:
            options = (*OPTIONS, *MEMCHECK_OPTIONS) if kind == "memcheck" else OPTIONS
            command = [tool, "--tool", kind, *options, *pytest, *SANITIZED]
            # Arrays end where their allocations do, and not somewhere in the memory of a pool.
            part = run(kind, command, out / f"{kind}.log", GRADCLIP_TESTS_WITHOUT_POOL="1")
        parts.append(part)
    if "benchmark" in chosen:
        bench = [sys.executable, "-m", "tools.gpu", "--out", str(out / "bench.json")]
        parts.append(run("benchmark", bench, out / "bench.md"))
    return parts


def report(parts: list[dict[str, Any]], machine: dict[str, Any], out: Path) -> None:
    """report.json and report.md."""
    (out / "report.json").write_text(json.dumps({"machine": machine, "parts": parts}, indent=1) + "\n")
    lines = ["# GPU check", "", *(f"* {key}: {value}" for key, value in machine.items()), ""]
    lines += ["| part | result | seconds | |", "| --- | --- | --- | --- |"]
    for part in parts:
        outcome = "passed" if part["status"] == 0 else f"failed ({part['status']})"
        lines.append(
            f"| {part['title']} | {outcome} | {part['seconds']} | {part.get('counts', part['log'])} |"
        )
    bench = out / "bench.md"
    if bench.exists() and any(part["title"] == "benchmark" for part in parts):
        lines += ["", bench.read_text()]
    (out / "report.md").write_text("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="where the report goes")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="the parts to run")
    arguments = parser.parse_args()
    missing = why_no_gpu()
    if missing:
        print(f"no GPU: {missing}. Nothing was checked.", file=sys.stderr)
        return NO_GPU
    from bench.device import describe_gpu  # noqa: PLC0415 (needs a GPU)

    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    parts = check(out, arguments.only)
    report(parts, describe_gpu(), out)
    print(f"\n{out / 'report.md'}")
    return FAILED if any(part["status"] != 0 for part in parts) else 0


if __name__ == "__main__":
    sys.exit(main())
