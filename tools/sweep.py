"""``python -m tools.sweep``: the constants of ``csrc/cuda/tuning.hpp``, tried out on the GPU that is there.

Each constant is varied by itself, and some together. Every variant is compiled for this GPU alone, has to
give the CPU's bits, and is timed in turns with the others, each in a process of its own. Needs an nvcc;
``--build`` needs no GPU, and ``--measure`` no nvcc.
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
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

import gradclip
from bench.device import GpuBuffer, describe_gpu, device_clock
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
_CALLS = 7  # of each job in a turn
_TURN_SECONDS = 120  # after which a variant hangs
# What each constant is tried at.
VALUES: dict[str, tuple[str, ...]] = {
    "rows_in_flight": ("1", "2", "4", "8", "16"),
    "vectors_in_flight": ("1", "2", "4", "8"),
    "kThreads": ("128", "256"),
    "kBlocksPerMultiprocessor": ("1", "2", "3", "4"),
    "kTileEndCost": ("1", "4", "8", "16", "32"),
    "kLeastCostPerBlock": tuple(f"{n} * kTileCost" for n in (1, 2, 4, 8)),
    "kTilesToKeepBack": ("5", "20", "1000000"),  # the last: nothing is kept back
    "kFewEntries": ("32", "96", "320"),
    "kMostEntries": ("320", "960"),
    "kChangesBackward": ("false", "true"),
}
Settings = tuple[tuple[str, str], ...]
# And together: the same warps in more blocks; registers for more bytes in flight, or for more warps.
COMBINATIONS: tuple[Settings, ...] = (
    (("kThreads", "128"), ("kBlocksPerMultiprocessor", "6")),
    (("kThreads", "128"), ("kBlocksPerMultiprocessor", "8")),
    (("rows_in_flight", "4"), ("kBlocksPerMultiprocessor", "4")),
    (("rows_in_flight", "16"), ("kBlocksPerMultiprocessor", "2")),
    (("vectors_in_flight", "8"), ("kBlocksPerMultiprocessor", "2")),
    (("rows_in_flight", "4"), ("vectors_in_flight", "2"), ("kBlocksPerMultiprocessor", "4")),
)


@dataclass(frozen=True)
class Variant:
    """Constants of other values; none for what is committed."""

    settings: Settings = ()

    @property
    def name(self) -> str:
        return ", ".join(f"{constant} = {value}" for constant, value in self.settings) or BASE

    @property
    def folder(self) -> Path:
        """Where it is built."""
        return _BUILT / re.sub(r"[^A-Za-z0-9]+", "_", self.name)

    @property
    def module(self) -> Path:
        """Its CUDA module, once it is built."""
        return self.folder / "_cuda.so"

    def applied_to(self, tuning: str) -> str:
        """The header with the constants changed, wherever they are set."""
        for constant, value in self.settings:
            tuning, count = re.subn(rf"\b({constant} = )[^;,}}]+", rf"\g<1>{value}", tuning)
            if count == 0:
                raise BenchError(f"{constant}: expected a constant that {_TUNING} sets")
        return tuning


def variants(constants: Sequence[str], tuning: str) -> list[Variant]:
    """What is committed, each value of each constant, and combinations of these; what makes a difference."""
    unknown = sorted(set(constants) - set(VALUES))
    if unknown:
        raise BenchError(f"unknown constant {', '.join(unknown)}; there are {', '.join(VALUES)}")
    alone = [Variant(((constant, value),)) for constant in constants for value in VALUES[constant]]
    together = [Variant(each) for each in COMBINATIONS if all(constant in constants for constant, _ in each)]
    return [
        Variant(),
        *(variant for variant in alone + together if variant.applied_to(tuning) != tuning),
    ]


# --- Building -------------------------------------------------------------------------------------------


def build(chosen: Sequence[Variant], architecture: str, tree: Path) -> dict[str, str]:
    """Compile the CUDA module of every variant, several at a time; why some have none, by their names.

    ``tree``: where what they share is built, unless it is there.

    Raises:
        BenchError: What is committed cannot be built.
    """
    cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
    if cmake is None or ninja is None or importlib.util.find_spec("pybind11") is None:
        raise BenchError("building: expected cmake, ninja and pybind11: pip install cmake ninja pybind11")
    shutil.rmtree(_BUILT, ignore_errors=True)
    configure = [
        cmake, "-G", "Ninja", "-S", str(_ROOT), "-B", str(tree), "-DCMAKE_BUILD_TYPE=Release",
        "-DGRADCLIP_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={architecture}-real",
        f"-Dpybind11_DIR={importlib.import_module('pybind11').get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]  # fmt: skip
    steps = [] if (tree / "build.ninja").exists() else [configure]
    for command in (*steps, [cmake, "--build", str(tree), "--target", "_cuda"]):
        problem = _run(command)
        if problem:
            raise BenchError(f"{BASE}: {problem}")
    listing = [ninja, "-C", str(tree), "-t", "commands", "_cuda"]
    told = subprocess.run(listing, capture_output=True, text=True, check=True)
    commands = told.stdout.splitlines()
    (compiling,) = (line for line in commands if "-c " in line and "/engine.cu.o" in line)
    linking = commands[-1]
    tuning = (_ROOT / _TUNING).read_text(encoding="utf-8")
    for variant in chosen:
        header = variant.folder / "include" / "cuda" / "tuning.hpp"
        header.parent.mkdir(parents=True)
        header.write_text(variant.applied_to(tuning), encoding="utf-8")
    make = partial(_build_variant, tree=tree, compiling=compiling, linking=linking)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        problems = dict(zip(chosen, track(pool.map(make, chosen), "building", len(chosen)), strict=True))
    if problems[Variant()]:
        raise BenchError(f"{BASE}: {problems[Variant()]}")
    base = Variant().module.read_bytes()
    left_out = {variant.name: problem for variant, problem in problems.items() if problem}
    for variant in chosen:
        if variant != Variant() and variant.module.exists() and variant.module.read_bytes() == base:
            left_out[variant.name] = f"the same code as {BASE} for this GPU"
            variant.module.unlink()
    built = {"sources": hash_of_sources(), "left_out": left_out}
    (_BUILT / "built.json").write_text(json.dumps(built), encoding="utf-8")
    return left_out


def _build_variant(variant: Variant, tree: Path, compiling: str, linking: str) -> str:
    """By the commands of what is committed: its header is found first, its object before the library's."""
    folder = variant.folder
    own = re.sub(r" -o \S+| -MF \S+| -MD| -MT \S+", "", compiling)
    # Before the other folders, and not after the first word: that may be ccache.
    own = own.replace(" -I", f" -I{folder / 'include'} -I", 1) + f" -o {folder / 'engine.o'}"
    link = linking.split(" && cd ", maxsplit=1)[0]  # what follows strips the module of names
    link = re.sub(r" -o \S+", f" -o {variant.module}", link)
    link = re.sub(r" (\S*libgradclip_cuda\.a)", rf" {folder / 'engine.o'} \1", link)
    for command in (own, link):
        problem = _run(["bash", "-c", command], tree)
        if problem:
            return problem
    return ""


def hash_of_sources() -> str:
    """Of all that modules are built from."""
    found = hashlib.sha256()
    for source in _SOURCES:
        path = _ROOT / source
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                found.update(str(file.relative_to(_ROOT)).encode() + b"\0" + file.read_bytes())
    return found.hexdigest()


def _run(command: Sequence[str], where: Path = _ROOT) -> str:
    """Nothing if the command ends well, else what it says of its first error."""
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
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
    """Seconds on the device of each case and job, by a `Plan`, with that module: a turn of one variant."""
    take_module(path)
    found: dict[str, Any] = {}
    for case in cases:
        gradients = GpuBuffer(gpu.load_of(case))
        total = gpu.check(gradients)
        plan = gradclip.Plan(gradients.arrays)
        jobs: dict[str, Callable[[], Any]] = {
            "norms": plan.tensor_norms,
            "clipping": partial(plan.clip_by_global_norm_, total / 2, nonfinite="skip"),
            "not clipping": partial(plan.clip_by_global_norm_, total * 2, nonfinite="skip"),
        }
        found[case] = {job: _seconds(call, gradients) for job, call in jobs.items()}
    return found


def _seconds(call: Callable[[], Any], gradients: GpuBuffer) -> list[float]:
    taken = []
    for _ in range(_CALLS + 1):  # the first one is warm-up
        gradients.restore()
        taken.append(device_clock(call)[1][0])
    return taken[1:]


def measure(
    chosen: Sequence[Variant],
    rounds: int,
    cases: Sequence[str],
    seconds: float,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Every variant has one turn in each round, in an order drawn anew; after ``seconds`` no turn begins.

    ``keep`` gets what there is after every round: samples by variant, and why some have none.

    Raises:
        BenchError: What is committed fails.
    """
    order = random.Random(0)
    end = time.monotonic() + seconds
    measured: dict[str, Any] = {"samples": {variant.name: [] for variant in chosen}, "failures": {}}
    for round_ in range(rounds):
        racing = [variant for variant in chosen if variant.name in measured["samples"]]
        turns = order.sample(racing, len(racing))
        title = f"round {round_ + 1} of {rounds}"
        for variant in track(turns, title, console=Console(stderr=True)):
            if time.monotonic() > end:
                break
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
        if time.monotonic() > end:
            break
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
    """The time of a variant over that of what is committed, one for each round that has both.

    Of a round that was cut short some have no turn, which is the last one: pairs are counted from the first.
    """

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
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="of measuring, after which no turn begins"
    )
    parser.add_argument("--arch", help="to build for, such as 90; this GPU's, if not given")
    parser.add_argument("--out", type=Path, default=Path("gpu-sweep.json"), help="where every sample goes")
    parser.add_argument(
        "--tree", type=Path, default=_BUILT / "tree",
        help="where pip has built these sources for this GPU alone (-C build-dir=...), if it has",
    )  # fmt: skip
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
        for name, why in build(chosen, arguments.arch or _architecture(), arguments.tree.resolve()).items():
            print(f"left out: {name}: {why}")
        if arguments.build:
            return 0
    results = measure_built(chosen, arguments.rounds, arguments.cases, arguments.seconds, arguments.out)
    for table in tables(results):
        Console().print(table)
    for name, why in results["failures"].items():
        print(f"failed: {name}: {why}")
    return 0


def measure_built(
    chosen: Sequence[Variant], rounds: int, cases: Sequence[str], seconds: float, out: Path
) -> dict[str, Any]:
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
    return results | measure(there, rounds, cases, seconds, keep)


def _architecture() -> str:
    return str(describe_gpu()["compute_capability"]).replace(".", "")


if __name__ == "__main__":
    sys.exit(main())
