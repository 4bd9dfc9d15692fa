"""``python -m tools.sweep``: the constants of ``csrc/cuda/tuning.hpp``, tried out on the GPU that is there.

Each constant is varied by itself. Every variant is compiled for this GPU alone, has to give the CPU's bits,
and is timed in turns with the others, each in a process of its own. Needs an nvcc; ``--build`` needs no GPU,
and ``--measure`` no nvcc.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.device import describe_gpu
from bench.errors import BenchError
from bench.results import check_writable
from bench.timing import spread
from gradclip._dispatch import why_no_gpu
from tools import gpu

_ROOT = Path(__file__).resolve().parent.parent
_SOURCES = ("CMakeLists.txt", "cmake", "csrc")
_TUNING = Path("csrc", "cuda", "tuning.hpp")
_BUILT = _ROOT / "build" / "sweep"

BASE = "as committed"
_TURN_SECONDS = 120  # after which a variant hangs
# What each constant is tried at.
VALUES: dict[str, tuple[str, ...]] = {
    "rows_in_flight": ("1", "2", "4", "8", "16"),
    "vectors_in_flight": ("1", "2", "4", "8"),
    "kThreads": ("128", "256"),
    "kBlocksPerMultiprocessor": ("1", "2", "3", "4"),
    "kTileEndCost": ("1", "4", "8", "16", "32"),
    "kLeastCostPerBlock": tuple(f"{n} * kTileCost" for n in (1, 2, 4, 8)),
    "kArgumentEntries": ("160", "480", "960"),
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
    """Compile the CUDA module of every variant; why some have none, by their names.

    Raises:
        BenchError: What is committed cannot be built.
    """
    cmake = shutil.which("cmake")
    if cmake is None or importlib.util.find_spec("pybind11") is None:
        raise BenchError("building: expected cmake and pybind11: pip install cmake pybind11")
    shutil.rmtree(_BUILT, ignore_errors=True)
    tree = _BUILT / "tree"
    tree.mkdir(parents=True)
    for source in _SOURCES:
        copy = shutil.copytree if (_ROOT / source).is_dir() else shutil.copy
        copy(_ROOT / source, tree / source)
    configure = [
        cmake, "-S", str(tree), "-B", str(tree / "build"), "-DCMAKE_BUILD_TYPE=Release",
        "-DGRADCLIP_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={architecture}-real",
        f"-Dpybind11_DIR={importlib.import_module('pybind11').get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]  # fmt: skip
    problem = _run(configure)
    if problem:
        raise BenchError(f"cmake: {problem}")
    tuning = (_ROOT / _TUNING).read_text(encoding="utf-8")
    make = [cmake, "--build", str(tree / "build"), "--target", "_cuda", "-j", str(os.cpu_count() or 1)]
    left_out = {}
    for variant in track(chosen, "building", console=Console(stderr=True)):
        (tree / _TUNING).write_text(variant.applied_to(tuning), encoding="utf-8")
        problem = _run(make)
        if problem and variant.name == BASE:
            raise BenchError(f"{BASE}: {problem}")
        if problem:
            left_out[variant.name] = problem
            continue
        (module,) = (tree / "build").glob("_cuda.*.so")
        if variant.name != BASE and module.read_bytes() == Variant().module.read_bytes():
            left_out[variant.name] = f"the same code as {BASE} for this GPU"
            continue
        shutil.copy(module, variant.module)
    built = {"sources": hash_of_sources(), "left_out": left_out}
    (_BUILT / "built.json").write_text(json.dumps(built), encoding="utf-8")
    return left_out


def hash_of_sources() -> str:
    """Of all that modules are built from."""
    found = hashlib.sha256()
    for source in _SOURCES:
        path = _ROOT / source
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                found.update(str(file.relative_to(_ROOT)).encode() + b"\0" + file.read_bytes())
    return found.hexdigest()


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


def measure(
    chosen: Sequence[Variant], rounds: int, cases: Sequence[str], keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Every variant has one turn in each round, in an order drawn anew.

    ``keep`` gets what there is after every round: samples by variant, and why some have none.

    Raises:
        BenchError: What is committed fails.
    """
    order = random.Random(0)
    measured: dict[str, Any] = {"samples": {variant.name: [] for variant in chosen}, "failures": {}}
    for round_ in range(rounds):
        racing = [variant for variant in chosen if variant.name in measured["samples"]]
        turns = order.sample(racing, len(racing))
        title = f"round {round_ + 1} of {rounds}"
        for variant in track(turns, title, console=Console(stderr=True)):
            try:
                turn = _turn(variant, cases)
            except BenchError as error:
                if variant.name == BASE:
                    raise
                measured["failures"][variant.name] = str(error)
                del measured["samples"][variant.name]
                continue
            measured["samples"][variant.name].append(turn)
        keep(measured)
    return measured


def _turn(variant: Variant, cases: Sequence[str]) -> Any:
    """In a process of its own."""
    command = [sys.executable, "-m", "tools.sweep", "--turn", str(variant.module), "--cases", *cases]
    try:
        done = subprocess.run(
            command, cwd=_ROOT, capture_output=True, text=True, check=False, timeout=_TURN_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise BenchError(f"{variant.name}: no answer within {_TURN_SECONDS} s") from None
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BenchError(f"{variant.name}: {said[:300]}")
    return json.loads(done.stdout.splitlines()[-1])


# --- The tables -------------------------------------------------------------------------------------------


def ratios(samples: Mapping[str, Any], name: str, case: str, job: str) -> list[float]:
    """The time of a variant over that of what is committed, one for each round that has both."""

    def median(turn: Mapping[str, Any]) -> float | None:
        seconds = turn.get(case, {}).get(job)
        return statistics.median(seconds) if seconds else None

    pairs = [(median(ours), median(base)) for ours, base in zip(samples[name], samples[BASE], strict=False)]
    return [ours / base for ours, base in pairs if ours is not None and base is not None]


def tables(results: Mapping[str, Any]) -> Iterator[Table]:
    """For each case the medians of the ratios, with quartiles; below 1 a variant is the faster one."""
    for case in results["cases"]:
        table = Table(title=f"{case}: time over that of the committed constants", title_justify="left")
        table.add_column("variant", no_wrap=True)
        for job in gpu.JOBS:
            table.add_column(job, justify="right", no_wrap=True)
        for name in results["samples"]:
            found = [ratios(results["samples"], name, case, job) for job in gpu.JOBS]
            cells = [spread(each) if each else None for each in found]
            table.add_row(name, *(f"{s.median:.3f} ({s.low:.3f} … {s.high:.3f})" if s else "" for s in cells))
        yield table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.sweep", description=__doc__)
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
        for name, why in build(chosen, arguments.arch or _architecture()).items():
            print(f"left out: {name}: {why}")
        if arguments.build:
            return 0
    results = measure_built(chosen, arguments.rounds, arguments.cases, arguments.out)
    for table in tables(results):
        Console().print(table)
    for name, why in results["failures"].items():
        print(f"failed: {name}: {why}")
    return 0


def measure_built(chosen: Sequence[Variant], rounds: int, cases: Sequence[str], out: Path) -> dict[str, Any]:
    """What is written to the file after each round: machine, cases, samples by variant, who has none, why."""
    try:
        built = json.loads((_BUILT / "built.json").read_text(encoding="utf-8"))
    except OSError:
        raise BenchError("nothing is built: run without --measure, or with --build first") from None
    if built["sources"] != hash_of_sources():
        raise BenchError("the sources are not those that were built: build again")
    results = {"machine": describe_gpu(), "cases": list(cases), "left_out": built["left_out"]}

    def keep(measured: dict[str, Any]) -> None:
        out.write_text(json.dumps(results | measured, indent=1) + "\n", encoding="utf-8")

    there = [variant for variant in chosen if variant.module.exists()]
    return results | measure(there, rounds, cases, keep)


def _architecture() -> str:
    return str(describe_gpu()["compute_capability"]).replace(".", "")


if __name__ == "__main__":
    sys.exit(main())
