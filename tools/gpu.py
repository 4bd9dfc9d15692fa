"""``python -m tools.gpu``: what is promised of a GPU, against its own speed, CuPy and PyTorch, in one run.

The contenders, checks and turns are those of ``python -m bench``, which also measures a GPU where there
is one; here are the cases, the promises about them, and the verdicts. A call's time is taken three ways:
on the device between two events, on the host until the call returns, and on the host until the device is
done. What is there is written after every case.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cupy

import gradclip
from bench.cases import CASES, Case, Load
from bench.data import GradientBuffer
from bench.device import FLAT_SUM, GpuLocation, describe_gpu, device_clock
from bench.errors import BenchError
from bench.jobs import CLIP, NO_CLIP, NORMS, key
from bench.peers import GPU, PEERS, present
from bench.results import check_writable
from bench.timing import Protocol, Rounds, measure
from bench.workload import READ, READ_WRITE, Workload, roofline_of
from gradclip._dispatch import why_no_gpu
from gradclip._report.tables import markdown_table

ROUNDS = 30
SECONDS = 400.0  # after which no case and no round begins
WARM_UP = 3  # calls at the start of a turn
NO_GPU = 3  # exit status

Shapes = tuple[tuple[int, ...], ...]
GPT2: Shapes = CASES["gpt2"].shapes
LARGE: Shapes = ((2500, 2000),) * 300
SHAPES: dict[str, tuple[Shapes, str]] = {
    "1.5 G elements bf16 in 300 tensors": (LARGE, "bfloat16"),
    "GPT-2 124M float32": (GPT2, "float32"),
    "GPT-2 124M bfloat16": (GPT2, "bfloat16"),
    "2000 tensors of 1000": (((1000,),) * 2000, "float32"),
    "300 tensors of 64": (((64,),) * 300, "float32"),
    "300 tensors of 4 MB": (((1024, 1024),) * 300, "float32"),
}
# What reports call the suite's jobs and contenders.
_JOBS = {"norms": NORMS, "clipping": CLIP, "not clipping": NO_CLIP}
JOBS = tuple(_JOBS)
_NAMES = {
    "gradclip": "gradclip-gpu",
    "gradclip Plan": "gradclip-gpu-plan",
    "gradclip.torch": "gradclip-torch-cuda",
    "CuPy loop": "cupy-nrm2",
    "CuPy sum": "cupy-sum",
    "torch foreach": "torch-cuda",
    "torch loop": "torch-cuda-loop",
    "optax": "optax-cuda",
    "apex": "apex",
    "TransformerEngine": "transformer-engine",
}
_KINDS = {"device": "", "host": "@host", "wall": "@done"}  # of time, and what follows a key
_PASSES = {"norms": 1, "clipping": 3, "not clipping": 1}  # over the bytes of the gradients


def _seconds(samples: dict[str, Rounds], name: str) -> dict[str, list[float]]:
    """By kind; a roofline has the device's alone."""
    return {
        kind: [seconds for turn in samples[name + suffix] for seconds in turn]
        for kind, suffix in _KINDS.items()
        if name + suffix in samples
    }


def _rooflines(samples: dict[str, Rounds], load: str, job: str) -> dict[str, Any]:
    """What the device needs to read the bytes, and where clipping, to read and write them once more."""

    def of(what: str) -> list[float]:
        return _seconds(samples, key(load, what, roofline_of(GPU)))["device"]

    if _JOBS[job] == CLIP:
        return {"ceiling": {"device": [sum(pair) for pair in zip(of(READ), of(READ_WRITE), strict=True)]}}
    return {"ceiling": {"device": of(READ)}, "CUB sum of one array": {"device": of(FLAT_SUM)}}


def _measure(
    workload: Workload, rounds: int, taking_part: Collection[str], seconds: float = SECONDS
) -> dict[str, Any]:
    """The samples of every job and contender, and what went wrong."""
    load = workload.load.key
    contenders = workload.contenders((peer, job) for peer in taking_part for job in _JOBS.values())
    protocol = Protocol(rounds, seconds, calls=1, warm_up=WARM_UP, settle=0.0)
    measured = measure([*workload.rooflines(), *contenders], protocol)
    found: dict[str, Any] = {"failures": workload.failures | measured.failures}
    for job, suite_job in _JOBS.items():
        found[job] = _rooflines(measured.samples, load, job)
        for name, peer in _NAMES.items():
            if key(load, suite_job, peer) in measured.samples:
                found[job][name] = _seconds(measured.samples, key(load, suite_job, peer))
    return found


def check(gradients: GradientBuffer) -> float:
    """The global norm, which has the same bits as the CPU's."""
    grads = gradients.arrays
    result = gradclip.clip_by_global_norm_(grads, math.inf, nonfinite="skip").to_host()
    expected = gradclip.global_norm([gradients.to_host(grad) for grad in grads])
    if result.total_norm != expected:
        raise AssertionError(f"norm: expected the CPU's {expected!r}, got {result.total_norm!r}")
    return expected


def copy_speed(nbytes: int) -> float:
    """Bytes read and written a second by the driver's own copy: what the ceilings are held against."""
    buffer, other = cupy.zeros(nbytes, "u1"), cupy.empty(nbytes, "u1")
    seconds = [device_clock(lambda: cupy.copyto(other, buffer))[1][0] for _ in range(10)]
    return 2 * nbytes / statistics.median(seconds)


@dataclass(frozen=True)
class Target:
    """A promise about one case: at least ``least``, by the kind of time that is named."""

    case: str
    job: str
    of: str  # the contender whose time is divided by ours
    ours: str
    least: float
    kind: str = "device"


TARGETS = (
    Target("1.5 G elements bf16 in 300 tensors", "norms", "ceiling", "gradclip", 0.92),
    Target("1.5 G elements bf16 in 300 tensors", "clipping", "ceiling", "gradclip", 0.90),
    Target("1.5 G elements bf16 in 300 tensors", "clipping", "torch foreach", "gradclip", 1.5),
    Target("1.5 G elements bf16 in 300 tensors", "not clipping", "torch foreach", "gradclip", 2.7),
    *(
        Target(f"GPT-2 124M {dtype}", job, "torch foreach", "gradclip", least)
        for dtype in ("float32", "bfloat16")
        for job, least in (("clipping", 1.5), ("not clipping", 2.5))
    ),
    Target("2000 tensors of 1000", "clipping", "torch foreach", "gradclip", 10.0, "wall"),
    Target("2000 tensors of 1000", "clipping", "CuPy loop", "gradclip", 50.0, "wall"),
)
# Seconds of host time of a call, also where each tensor has pages of its own.
HOST_TARGETS = {"gradclip": 60e-6, "gradclip Plan": 10e-6}
HOST_CASES = ("300 tensors of 64", "300 tensors of 4 MB")


def _median(results: dict[str, Any], case: str, job: str, name: str, kind: str) -> float | None:
    samples = results["cases"].get(case, {}).get(job, {}).get(name, {}).get(kind)
    return statistics.median(samples) if samples else None


def judge(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(target, what was measured, whether it was reached) as text."""
    rows = []
    for target in TARGETS:
        ours = _median(results, target.case, target.job, target.ours, target.kind)
        other = _median(results, target.case, target.job, target.of, target.kind)
        title = f"{target.case}, {target.job}: {target.of} / {target.ours} >= {target.least} ({target.kind})"
        if ours is None or other is None:
            rows.append((title, "not measured", "-"))
        else:
            ratio = other / ours
            rows.append((title, f"{ratio:.2f}", "reached" if ratio >= target.least else "missed"))
    for case, (name, most), job in itertools.product(HOST_CASES, HOST_TARGETS.items(), JOBS):
        host = _median(results, case, job, name, "host")
        title = f"{case}, {job}: host time of {name} <= {most * 1e6:.0f} us"
        if host is None:
            rows.append((title, "not measured", "-"))
        else:
            rows.append((title, f"{host * 1e6:.1f} us", "reached" if host <= most else "missed"))
    return rows


def load_of(title: str) -> Load:
    """The gradients of a case."""
    shapes, dtype = SHAPES[title]
    return Load(Case(title, title, "a promise about a GPU", shapes), dtype)


def run(rounds: int, seconds: float, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure each job and case that fits into the device's memory; ``keep`` gets what there is after it."""
    results: dict[str, Any] = {"machine": describe_gpu(), "rounds": rounds, "cases": {}, "left_out": []}
    on_gpu = [name for name in present() if PEERS[name].place == GPU]
    end = time.monotonic() + seconds
    for at, title in enumerate(SHAPES):
        load = load_of(title)
        shapes = load.case.shapes
        left = end - time.monotonic()
        if left <= 0:
            results["left_out"].append(f"{title}: {seconds:.0f} s were over")
            continue
        needed = 3 * load.nbytes  # the gradients, and two buffers that measure a copy
        if needed > GpuLocation.free_memory():
            results["left_out"].append(f"{title}: {needed / 1e9:.1f} GB do not fit into the GPU's memory")
            continue
        taking_part = [name for name in on_gpu if PEERS[name].takes(len(shapes))]
        results["left_out"] += [
            f"{title}: {PEERS[name].title}: more than {PEERS[name].most_tensors} tensors"
            for name in on_gpu
            if name not in taking_part
        ]
        workload = Workload(load, GpuLocation)
        check(workload.gradients)
        results["cases"][title] = {
            "nbytes": load.nbytes,
            "copy_bytes_per_s": copy_speed(load.nbytes),
            **_measure(workload, rounds, taking_part, left / (len(SHAPES) - at)),
        }
        keep(results)
        del workload
        cupy.get_default_memory_pool().free_all_blocks()
    return results


def markdown(results: dict[str, Any]) -> str:
    """The tables of a result."""
    machine = results["machine"]
    cells = []
    for case, rows in results["cases"].items():
        for job in JOBS:
            ceiling = statistics.median(rows[job]["ceiling"]["device"])
            at_peak = _PASSES[job] * rows["nbytes"] / machine["peak_bytes_per_s"]
            for name in rows[job]:
                medians = [_median(results, case, job, name, kind) for kind in _KINDS]
                times = ("-" if seconds is None else f"{seconds * 1e6:.1f}" for seconds in medians)
                device = medians[0]
                parts = (
                    ("-", "-") if device is None else (f"{ceiling / device:.2f}", f"{at_peak / device:.2f}")
                )
                cells.append((case, job, name, *times, *parts))
    header = (
        "case", "job", "contender", "device µs", "host µs", "until done µs", "ceiling / time", "of the peak",
    )  # fmt: skip
    lines = [
        f"{machine['gpu']} ({machine['multiprocessors']} multiprocessors, memory of "
        f"{machine['peak_bytes_per_s'] / 1e12:.2f} TB/s), driver for CUDA {machine['driver_cuda']}, "
        f"{machine['date']}, commit {machine['commit']}",
        "",
        markdown_table(header, cells),
        "",
        markdown_table(("target", "measured", ""), judge(results)),
        "",
        *(f"Left out: {line}" for line in results["left_out"]),
    ]
    for case, rows in results["cases"].items():
        lines += [f"Failed: {case}, {name}: {why}" for name, why in rows.get("failures", {}).items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="samples of each contender")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="after which no case and no round begins"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-bench.json"), help="where every sample goes")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds: expected 1 or more, got {arguments.rounds}")
    try:
        check_writable(arguments.out)
    except BenchError as error:
        parser.error(str(error))
    missing = why_no_gpu()
    if missing:
        print(f"no GPU: {missing}", file=sys.stderr)
        return NO_GPU

    def keep(results: dict[str, Any]) -> None:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    print(markdown(run(arguments.rounds, arguments.seconds, keep)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
