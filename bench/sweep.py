"""``python -m bench.sweep``: the constants of ``csrc/cuda/tuning.hpp``, tried out on the GPU that is there.

Each constant is varied by itself. Every variant is compiled for this GPU alone, has to give the CPU's bits,
and is timed in turns with the others, each in a process of its own. Needs an nvcc; ``--build`` needs no GPU,
and ``--measure`` no nvcc.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import gpu
from bench.errors import BenchError
from bench.machine import describe
from bench.results import check_writable
from bench.timing import spread
from gradclip._dispatch import why_no_gpu

_ROOT = Path(__file__).resolve().parent.parent
_SOURCES = ("CMakeLists.txt", "cmake", "csrc")
_TUNING = Path("csrc", "cuda", "tuning.hpp")
_BUILT = _ROOT / "build" / "sweep"

BASE = "as committed"
# What each constant may be besides what it is.
VALUES: dict[str, tuple[str, ...]] = {
    "rows_in_flight": ("1", "2", "4", "8", "16"),
    "vectors_in_flight": ("1", "2", "4", "8"),
    "kThreads": ("128", "256"),
    "kBlocksPerMultiprocessor": ("1", "2", "3", "4"),
    "kBlocksOfLargeKernels": ("1", "2", "3"),
    "kTileEndCost": ("0", "4", "8", "16", "32"),
    "kLeastCostPerBlock": tuple(f"{n} * kTileCost" for n in (1, 2, 4, 8)),
    "kArgumentEntries": ("120", "480", "960"),
    "kChangesBackward": ("false", "true"),
}


@dataclass(frozen=True)
class Variant:
    """One constant of another value; none for what is committed."""

    constant: str = ""
    value: str = ""

    @property
    def name(self) -> str:
        return f"{self.constant} = {self.value}" if self.constant else BASE

    @property
    def module(self) -> Path:
        """Where its CUDA module lies once it is built."""
        return _BUILT / f"{re.sub(r'[^A-Za-z0-9]+', '_', self.name)}.so"

    def applied_to(self, tuning: str) -> str:
        """The header with the constant changed, wherever it is set."""
        if not self.constant:
            return tuning
        changed, count = re.subn(rf"\b({self.constant} = )[^;,}}]+", rf"\g<1>{self.value}", tuning)
        if count == 0:
            raise BenchError(f"{self.constant}: expected a constant that {_TUNING} sets")
        return changed


def variants(constants: Sequence[str], tuning: str) -> list[Variant]:
    """What is committed, and each value of each constant that makes a difference."""
    unknown = sorted(set(constants) - set(VALUES))
    if unknown:
        raise BenchError(f"unknown constant {', '.join(unknown)}; there are {', '.join(VALUES)}")
    found = [Variant(constant, value) for constant in constants for value in VALUES[constant]]
    return [Variant(), *(variant for variant in found if variant.applied_to(tuning) != tuning)]


# --- Building -------------------------------------------------------------------------------------------


def build(chosen: Sequence[Variant], architecture: str) -> dict[str, str]:
    """Compile the CUDA module of every variant; those that fail, with the reason."""
    cmake = shutil.which("cmake")
    if cmake is None or importlib.util.find_spec("pybind11") is None:
        raise BenchError("building: expected cmake and pybind11: pip install cmake pybind11")
    import pybind11  # noqa: PLC0415 (only here)

    shutil.rmtree(_BUILT, ignore_errors=True)
    tree = _BUILT / "tree"
    tree.mkdir(parents=True)
    for source in _SOURCES:
        copy = shutil.copytree if (_ROOT / source).is_dir() else shutil.copy
        copy(_ROOT / source, tree / source)
    configure = [
        cmake, "-S", str(tree), "-B", str(tree / "build"), "-DCMAKE_BUILD_TYPE=Release",
        "-DGRADCLIP_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={architecture}-real",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}",
    ]  # fmt: skip
    problem = _run(configure)
    if problem:
        raise BenchError(f"cmake: {problem}")
    tuning = (_ROOT / _TUNING).read_text(encoding="utf-8")
    failures = {}
    for variant in track(chosen, "building", console=Console(stderr=True)):
        (tree / _TUNING).write_text(variant.applied_to(tuning), encoding="utf-8")
        jobs = str(os.cpu_count() or 1)
        problem = _run([cmake, "--build", str(tree / "build"), "--target", "_cuda", "-j", jobs])
        if problem:
            failures[variant.name] = problem
            continue
        (module,) = (tree / "build").glob("_cuda.*.so")
        shutil.copy(module, variant.module)
    (_BUILT / "built.json").write_text(json.dumps({"commit": describe()["commit"], "failures": failures}))
    return failures


def _run(command: Sequence[str]) -> str:
    """Nothing if the command ends well, else what it says of its first error."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    lines = (done.stdout + done.stderr).splitlines()
    said = next((line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)), "no error told")
    return said.strip()[:300]


# --- Measuring ------------------------------------------------------------------------------------------


def take_module(path: Path) -> None:
    """Make gradclip use the CUDA module in that file."""
    spec = importlib.util.spec_from_file_location("gradclip._cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["gradclip._cuda"] = module


def measure_here(path: Path, cases: Sequence[str]) -> dict[str, Any]:
    """Seconds on the device of each case and job, with that module: a turn of one variant."""
    take_module(path)
    results = gpu.run(rounds=5, cases=cases, only=["gradclip-gpu"])
    for case, rows in results["cases"].items():
        if rows["failures"]:
            raise AssertionError(f"{case}: {rows['failures']}")
    return {
        case: {job: rows[job]["gradclip"]["device"] for job in gpu.JOBS}
        for case, rows in results["cases"].items()
    }


def measure(chosen: Sequence[Variant], rounds: int, cases: Sequence[str]) -> dict[str, Any]:
    """Every variant has one turn in each round, in an order drawn anew."""
    order = random.Random(0)
    samples: dict[str, Any] = {variant.name: [] for variant in chosen}
    failures: dict[str, str] = {}
    turns = [variant for _ in range(rounds) for variant in order.sample(chosen, len(chosen))]
    for variant in track(turns, "measuring", console=Console(stderr=True)):
        if variant.name in failures:
            continue
        command = [sys.executable, "-m", "bench.sweep", "--turn", str(variant.module), "--cases", *cases]
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            failures[variant.name] = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
            continue
        samples[variant.name].append(json.loads(done.stdout))
    return {"samples": {name: turns for name, turns in samples.items() if turns}, "failures": failures}


# --- The table --------------------------------------------------------------------------------------------


def ratios(samples: Mapping[str, Any], name: str, case: str, job: str) -> list[float]:
    """The time of a variant over that of what is committed, one for each round."""

    def medians(variant: str) -> list[float]:
        turns = (turn.get(case, {}).get(job) for turn in samples[variant])
        return [spread(seconds).median for seconds in turns if seconds]

    return [ours / base for ours, base in zip(medians(name), medians(BASE), strict=False)]


def table(results: Mapping[str, Any]) -> Table:
    """The median of the ratios, with the quartiles; below 1 a variant is faster than what is committed."""
    samples = results["samples"]
    columns = [(case, job) for case in results["cases"] for job in gpu.JOBS]
    made = Table(title="Time over that of the committed constants")
    made.add_column("variant")
    for case, job in columns:
        made.add_column(f"{case}, {job}", justify="right")
    for name in samples:
        cells = []
        for case, job in columns:
            found = ratios(samples, name, case, job)
            s = spread(found) if found else None
            cells.append(f"{s.median:.3f} ({s.low:.3f} … {s.high:.3f})" if s else "")
        made.add_row(name, *cells)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sweep", description=__doc__)
    parser.add_argument(
        "--constants", nargs="+", default=list(VALUES), metavar="NAME", help="all, if not given"
    )
    parser.add_argument("--cases", nargs="+", choices=gpu.SHAPES, default=list(gpu.SHAPES), metavar="CASE")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each variant")
    parser.add_argument("--arch", help="to build for, such as 90; this GPU's, if not given")
    parser.add_argument("--out", type=Path, default=Path("gpu-sweep.json"), help="where every sample goes")
    stage = parser.add_mutually_exclusive_group()
    stage.add_argument("--build", action="store_true", help="build only: needs --arch, and no GPU")
    stage.add_argument("--measure", action="store_true", help="measure what was built before")
    stage.add_argument("--turn", type=Path, help=argparse.SUPPRESS)  # the module of a variant
    arguments = parser.parse_args()
    if arguments.turn:
        print(json.dumps(measure_here(arguments.turn, arguments.cases)))
        return 0
    if arguments.rounds < 1:
        parser.error(f"--rounds: expected 1 or more, got {arguments.rounds}")
    if arguments.build and not arguments.arch:
        parser.error("--build: expected --arch with it")
    if arguments.measure and Variant().module.exists():
        take_module(Variant().module)  # gradclip itself may have been built without an nvcc
    missing = why_no_gpu()
    if missing and not arguments.build:
        print(f"no GPU: {missing}", file=sys.stderr)
        return gpu.NO_GPU
    try:
        return _sweep(arguments)
    except BenchError as error:
        parser.error(str(error))


def _sweep(arguments: argparse.Namespace) -> int:
    tuning = (_ROOT / _TUNING).read_text(encoding="utf-8")
    chosen = variants(arguments.constants, tuning)
    check_writable(arguments.out)
    if not arguments.measure:
        failures = build(chosen, arguments.arch or _architecture())
        for name, why in failures.items():
            print(f"not built: {name}: {why}")
        if arguments.build:
            return 1 if BASE in failures else 0
    results = measure_built(chosen, arguments.rounds, arguments.cases)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    Console(width=250).print(table(results))
    for name, why in results["failures"].items():
        print(f"failed: {name}: {why}")
    return 1 if BASE in results["failures"] else 0


def measure_built(chosen: Sequence[Variant], rounds: int, cases: Sequence[str]) -> dict[str, Any]:
    """What is written to the file: machine, cases, samples by variant, failures with their reasons."""
    machine = gpu.describe_gpu()
    try:
        built = json.loads((_BUILT / "built.json").read_text(encoding="utf-8"))
    except OSError:
        raise BenchError("nothing is built: run without --measure, or with --build first") from None
    if built["commit"] != machine["commit"]:
        raise BenchError(f"built from commit {built['commit']}, this is {machine['commit']}: build again")
    there = [variant for variant in chosen if variant.module.exists()]
    measured = measure(there, rounds, cases)
    failures = built["failures"] | measured["failures"]
    return {"machine": machine, "cases": list(cases), "samples": measured["samples"], "failures": failures}


def _architecture() -> str:
    return str(gpu.describe_gpu()["compute_capability"]).replace(".", "")


if __name__ == "__main__":
    sys.exit(main())
