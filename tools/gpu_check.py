"""Everything that only a GPU can show, by one command from the root of the repository:

    python -m tools.gpu_check [--out DIRECTORY] [--only PART ...]

Needs no network: the parts are the build for this GPU alone (by nvcc, with the packages that are there),
the tests that are marked `gpu`, those of gradclip.torch among them, compute-sanitizer over the kernels, the
benchmark and the sweep. Each has 500 seconds and leaves its report before the next begins; none stops the
others. report.json and report.md hold the machine's description and what every part gave; parts that ran
before, of the same sources, stay in them. Exit status: 0 all is well, 1 something failed, 3 there is no GPU.

With --dry-run, where there is no GPU: all is built, collected and started, up to the first call of a device.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FAILED, NO_GPU = 1, 3
TIMEOUT = 500  # seconds of a part
DRY_TIMEOUT = 1500  # where nothing is lent, and other work goes on
SANITIZERS = ("memcheck", "racecheck", "synccheck")
PARTS = ("build", "tests", "torch", *SANITIZERS, "benchmark", "sweep")
# The files that have tests marked `gpu`; no others are collected.
TESTS = tuple(
    f"tests/test_{name}.py"
    for name in (
        "gpu",
        "device_bits",
        "device_rows",
        "device_pairs",
        "device_api",
        "rounding_down",
        "bench_gpu",
        *(["jax_cuda"] if find_spec("jax") else []),
    )
)
TORCH_TESTS = tuple(f"tests/test_torch_{name}.py" for name in ("gpu", "published"))
# Under the sanitizer kernels take a hundred times as long: every kernel and dtype, but no long lists.
SANITIZED = (
    *("tests/test_device_bits.py", "tests/test_device_rows.py", "tests/test_device_pairs.py"),
    *("-k", "real and not many and not layout"),
)
# Of our kernels alone. Calls that fail are exceptions in the tests; CuPy and the runtime ask for what a
# driver need not have, which is none.
OPTIONS = ("--error-exitcode", "9", "--kernel-name", "kernel_substring=gradclip")
MEMCHECK_OPTIONS = ("--report-api-errors", "no")
TREE = "build/gpu-check"  # where gradclip is built, and the sweep finds what its variants share
DRY_CONSTANT = "kChangesBackward"  # of the sweep: two variants
COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


def architecture() -> str | None:
    """The first GPU's, such as "90", from the driver: gradclip is not built yet. None without a GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None
    version = ""
    for attribute in COMPUTE_CAPABILITY:
        number = ctypes.c_int()
        if driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device) != 0:
            return None
        version += str(number.value)
    return version


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


@dataclass(frozen=True)
class Part:
    """A command and what its output is called; several are run one after the other."""

    title: str
    commands: Sequence[Sequence[str]]
    log: str
    environment: dict[str, str] = field(default_factory=dict)
    junit: Path | None = None  # written by pytest: at least one test must have run


def parts_of(chosen: Sequence[str], out: Path, architecture: str, dry: bool) -> list[Part]:
    """The chosen parts, in order."""
    # With the packages that are there, for this GPU alone, beside whatever gradclip is installed.
    build = [
        sys.executable, "-m", "pip", "install", "--no-index", "--no-build-isolation", "--no-deps",
        "--upgrade", "--disable-pip-version-check", "--root-user-action=ignore", "--target", str(site(out)),
        "-C", f"build-dir={TREE}", "-C", "cmake.define.GRADCLIP_CUDA=ON",
        "-C", f"cmake.define.CMAKE_CUDA_ARCHITECTURES={architecture}-real", ".",
    ]  # fmt: skip
    imported = [sys.executable, "-c", "import gradclip, gradclip._cuda; gradclip.show_config()"]
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    found = [Part("build", [build, imported], "build.log")]
    for title, tests in (("tests", TESTS), ("torch", TORCH_TESTS)):
        junit = out / f"{title}.xml"
        found.append(Part(title, [[*pytest, f"--junitxml={junit}", *tests]], f"{title}.log", junit=junit))
    for kind in SANITIZERS:
        options = (*OPTIONS, *MEMCHECK_OPTIONS) if kind == "memcheck" else OPTIONS
        tool = [sanitizer() or "compute-sanitizer", "--tool", kind, *options]
        sanitized = [*pytest, *SANITIZED]
        commands = [[*tool, *sanitized]]
        if dry:  # without a driver it does not start what it is to look at, which is the same for all three
            commands = [[*tool, "--version"], *([sanitized] if kind == SANITIZERS[0] else [])]
        # Arrays end where their allocations do, and not somewhere in the memory of a pool.
        found.append(Part(kind, commands, f"{kind}.log", {"GRADCLIP_TESTS_WITHOUT_POOL": "1"}))
    bench = [sys.executable, "-m", "tools.gpu", "--out", str(out / "bench.json")]
    found.append(Part("benchmark", [bench], "bench.md"))
    sweep = [sys.executable, "-m", "tools.sweep"]
    few = ["--constants", DRY_CONSTANT] if dry else []
    built = [*sweep, "--build", "--arch", architecture, "--tree", TREE, *few]
    measured = [*sweep, "--measure", "--seconds", "240", "--out", str(out / "sweep.json")]
    found.append(Part("sweep", [built, measured], "sweep.log"))
    return [part for part in found if part.title in chosen]


def site(out: Path) -> Path:
    """Where the gradclip is installed that is checked."""
    return out / "site"


def run(part: Part, out: Path, seconds: float) -> dict[str, Any]:
    """Run a part for so long at most; its output goes to a file."""
    print(f"{part.title} ...", flush=True)
    start = time.monotonic()
    log = out / part.log
    if part.junit:
        part.junit.unlink(missing_ok=True)
    environment = os.environ | {"PYTHONPATH": str(site(out))} | part.environment
    with log.open("w") as output:
        for command in part.commands:
            left = seconds - (time.monotonic() - start)
            status = _run(command, environment, output, left)
            if status != 0:
                break
    result: dict[str, Any] = {
        "title": part.title,
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "log": part.log,
    }
    if part.junit:
        result["counts"] = counts(part.junit)
    return result


def _run(command: Sequence[str], environment: dict[str, str], output: Any, seconds: float) -> int:
    """The exit status; -1 if it took too long."""
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        print(error, file=output)
        return FAILED
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return -1
    finally:
        if process.poll() is None:  # with what it started: a sanitizer's target would keep the GPU
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def counts(junit: Path) -> dict[str, int]:
    """Numbers of tests by outcome, from pytest's own report."""
    if not junit.exists():
        return {}
    suite = ET.parse(junit).getroot().find("testsuite")
    assert suite is not None
    return {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}


def judge(result: dict[str, Any], dry: bool) -> dict[str, Any]:
    """Whether the part passed. Tests that were all skipped show nothing, but in a dry run; there a command
    that ends because there is no GPU has started as it should.
    """
    passed = result["status"] == 0 or (dry and result["status"] == NO_GPU)
    if "counts" in result:
        found = result["counts"]
        ran = found.get("tests", 0) if dry else found.get("tests", 0) - found.get("skipped", 0)
        passed = passed and ran > 0
    return result | {"passed": passed}


def describe(out: Path) -> dict[str, Any]:
    """The machine with its GPU, by the gradclip that was built."""
    code = "import json; from bench.device import describe_gpu; print(json.dumps(describe_gpu()))"
    told = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(site(out))},
    )  # fmt: skip
    if told.returncode != 0:
        return {"problem": (told.stderr.strip().splitlines() or ["no message"])[-1]}
    described: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    return described


def report(results: Sequence[dict[str, Any]], machine: dict[str, Any], out: Path) -> None:
    """report.json and report.md."""
    (out / "report.json").write_text(json.dumps({"machine": machine, "parts": results}, indent=1) + "\n")
    lines = ["# GPU check", "", *(f"* {key}: {value}" for key, value in machine.items()), ""]
    lines += ["| part | result | seconds | |", "| --- | --- | --- | --- |"]
    for part in results:
        outcome = "passed" if part["passed"] else f"failed ({part['status']})"
        lines.append(
            f"| {part['title']} | {outcome} | {part['seconds']} | {part.get('counts', part['log'])} |"
        )
    bench = out / "bench.md"
    if bench.exists() and any(part["title"] == "benchmark" for part in results):
        lines += ["", bench.read_text()]
    (out / "report.md").write_text("\n".join(lines) + "\n")


def earlier(out: Path, machine: dict[str, Any]) -> list[dict[str, Any]]:
    """What a run before has left, of the same commit and machine."""
    try:
        before: dict[str, Any] = json.loads((out / "report.json").read_text())
    except (OSError, ValueError):
        return []
    same = all(before["machine"].get(key) == machine.get(key) for key in ("commit", "gpu"))
    parts: list[dict[str, Any]] = before["parts"] if same else []
    return parts


def check(chosen: Sequence[str], out: Path, architecture: str, dry: bool) -> list[dict[str, Any]]:
    """Run the chosen parts and report after each; all results, with those of parts that ran before."""
    machine: dict[str, Any] = {}
    results: dict[str, dict[str, Any]] = {}
    for part in parts_of(chosen, out, architecture, dry):
        result = judge(run(part, out, DRY_TIMEOUT if dry else TIMEOUT), dry)
        said = "passed" if result["passed"] else f"FAILED ({result['status']})"
        print(f"  {said} in {result['seconds']} s; {out / part.log}", flush=True)
        if "gpu" not in machine:
            machine = describe(out)
            results = {old["title"]: old for old in earlier(out, machine)} | results
        results[part.title] = result
        report(sorted(results.values(), key=lambda r: PARTS.index(r["title"])), machine, out)
    return list(results.values())


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_check", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="where the report goes")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="the parts to run")
    parser.add_argument("--dry-run", action="store_true", help="as far as it goes without a GPU")
    arguments = parser.parse_args()
    found = architecture()
    if found is None and not arguments.dry_run:
        print("no GPU: the driver knows of none. Nothing was checked.", file=sys.stderr)
        return NO_GPU
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    results = check(arguments.only, out, found or "90", arguments.dry_run)
    print(f"\n{out / 'report.md'}")
    return 0 if all(result["passed"] for result in results) else FAILED


if __name__ == "__main__":
    sys.exit(main())
