"""``python -m bench.gpu``: the CUDA engine against a GPU's own speed, CuPy and PyTorch, in one run.

Every contender has a turn in every round, in an order drawn anew. A call's time is taken three ways: on
the device between two events, on the host until the call returns, and on the host until the device is
done. All gradients of a case are views of one buffer, which is restored before every call; the norm is
compared with the CPU engine's before a time counts.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cupy
import ml_dtypes
import numpy as np

import gradclip
from bench.cases import CASES
from bench.machine import describe
from gradclip._dispatch import cuda_module, why_no_gpu

ROUNDS = 30
ALIGNMENT = 512  # bytes: what CuPy's and PyTorch's allocators give
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
}
JOBS = ("norms", "clipping", "not clipping")


@dataclass(frozen=True)
class Times:
    """Seconds of one contender, a sample for each round."""

    device: list[float]
    host: list[float]
    wall: list[float]


class Case:
    """The gradients of a case on the GPU, and how to put them back."""

    def __init__(self, shapes: Shapes, dtype: str) -> None:
        self.dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        sizes = [math.prod(shape) * self.dtype.itemsize for shape in shapes]
        starts = np.cumsum([0, *(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)])
        self.nbytes = sum(sizes)
        self.buffer = cupy.zeros(int(starts[-1]), np.uint8)
        self.grads = [
            cupy.ndarray(shape, self.dtype, self.buffer.data + int(start))
            for shape, start in zip(shapes, starts, strict=False)
        ]
        rng = np.random.default_rng(20190214)
        pattern = rng.standard_normal(max(sizes) // self.dtype.itemsize, np.float32).astype(self.dtype)
        for grad in self.grads:
            grad.set(pattern[: grad.size].reshape(grad.shape))
        self.saved = self.buffer.copy()
        host = [pattern[: grad.size] for grad in self.grads]
        self.norm = gradclip.global_norm(host)

    def restore(self) -> None:
        cupy.copyto(self.buffer, self.saved)

    def threshold(self, job: str) -> float:
        return 0.5 * self.norm if job == "clipping" else 2.0 * self.norm


Call = Callable[[], Any]


def _gradclip(case: Case, job: str, planned: bool) -> Call:
    plan = gradclip.Plan(case.grads)
    limit = case.threshold(job)
    if job == "norms":
        return plan.tensor_norms if planned else lambda: gradclip.tensor_norms(case.grads)
    if planned:
        return lambda: plan.clip_by_global_norm_(limit, nonfinite="skip")
    return lambda: gradclip.clip_by_global_norm_(case.grads, limit, nonfinite="skip")


def _ceiling(case: Case, job: str) -> Call:
    """What the device needs to read the bytes, and where clipping, to read and write them once more."""
    plan: Any = gradclip.Plan(case.grads)._plan
    if job != "clipping":
        return plan.probe_read  # type: ignore[no-any-return]

    def both() -> None:
        plan.probe_read()
        plan.probe_read_write()

    return both


def _cupy_loop(case: Case, job: str) -> Call:
    """What a user writes: a norm of each array, and a product with each."""
    limit = case.threshold(job)

    def loop() -> Any:
        squares = [cupy.vdot(g, g) for g in (grad.astype(np.float32).ravel() for grad in case.grads)]
        total = cupy.sqrt(cupy.stack(squares).sum())
        if job == "norms":
            return total
        coefficient = cupy.minimum(limit / (total + 1e-6), 1.0)
        for grad in case.grads:
            cupy.multiply(grad, coefficient.astype(grad.dtype), out=grad)
        return total

    return loop


def _torch(case: Case, job: str, foreach: bool) -> Call:
    import torch  # noqa: PLC0415 (only where it has CUDA)

    grads = [torch.utils.dlpack.from_dlpack(grad) for grad in case.grads]
    parameters = []
    for grad in grads:
        parameter = torch.nn.Parameter(torch.empty_like(grad))
        parameter.grad = grad
        parameters.append(parameter)
    if job == "norms":
        return lambda: torch.nn.utils.get_total_norm(grads, foreach=foreach)
    limit = case.threshold(job)
    return lambda: torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=foreach)


def _torch_has_cuda() -> bool:
    try:
        import torch  # noqa: PLC0415
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


def contenders(case: Case, job: str) -> dict[str, Call]:
    """By name; the ceiling is the machine's."""
    found = {
        "ceiling": _ceiling(case, job),
        "gradclip": _gradclip(case, job, planned=False),
        "gradclip Plan": _gradclip(case, job, planned=True),
    }
    if case.dtype != np.dtype(ml_dtypes.bfloat16) and len(case.grads) <= 2000:
        found["CuPy loop"] = _cupy_loop(case, job)
    if _torch_has_cuda():
        found["torch foreach"] = _torch(case, job, foreach=True)
        found["torch loop"] = _torch(case, job, foreach=False)
    return found


def time_call(case: Case, call: Call) -> tuple[float, float, float]:
    """Seconds on the device, on the host, and until all is done."""
    case.restore()
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    cupy.cuda.Device().synchronize()
    begin = time.perf_counter()
    start.record()
    call()
    end.record()
    returned = time.perf_counter()
    cupy.cuda.Device().synchronize()
    done = time.perf_counter()
    return cupy.cuda.get_elapsed_time(start, end) / 1e3, returned - begin, done - begin


def measure(case: Case, calls: dict[str, Call], rounds: int) -> dict[str, Times]:
    """All contenders by turns; the first three rounds warm up and do not count."""
    times = {name: Times([], [], []) for name in calls}
    order = list(calls)
    for round_ in range(-3, rounds):
        random.shuffle(order)
        for name in order:
            sample = time_call(case, calls[name])
            if round_ >= 0:
                for samples, seconds in zip(vars(times[name]).values(), sample, strict=True):
                    samples.append(seconds)
    return times


def check(case: Case) -> None:
    """The same bits as the CPU's."""
    result = gradclip.clip_by_global_norm_(case.grads, case.threshold("not clipping")).to_host()
    if result.total_norm != case.norm:
        raise AssertionError(f"norm: expected the CPU's {case.norm!r}, got {result.total_norm!r}")


def copy_speed(case: Case) -> float:
    """Bytes read and written a second by the driver's own copy: what the ceilings are held against."""
    other = cupy.empty_like(case.buffer)
    seconds = [time_call(case, lambda: cupy.copyto(other, case.buffer))[0] for _ in range(10)]
    return 2 * int(case.buffer.nbytes) / statistics.median(seconds)


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
    Target("1.5 G elements bf16 in 300 tensors", "clipping", "torch foreach", "gradclip", 1.0),
    Target("1.5 G elements bf16 in 300 tensors", "not clipping", "torch foreach", "gradclip", 2.7),
    *(
        Target(f"GPT-2 124M {dtype}", job, "torch foreach", "gradclip", least)
        for dtype in ("float32", "bfloat16")
        for job, least in (("clipping", 1.5), ("not clipping", 2.5))
    ),
    Target("2000 tensors of 1000", "clipping", "torch foreach", "gradclip", 10.0, "wall"),
    Target("2000 tensors of 1000", "clipping", "CuPy loop", "gradclip", 50.0, "wall"),
)
# Seconds of host time of a call.
HOST_TARGETS = {"gradclip": 60e-6, "gradclip Plan": 10e-6}
HOST_CASE = "300 tensors of 64"


def _median(results: dict[str, Any], case: str, job: str, name: str, kind: str) -> float | None:
    samples = results["cases"].get(case, {}).get(job, {}).get(name)
    return None if samples is None else statistics.median(samples[kind])


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
    for name, most in HOST_TARGETS.items():
        for job in JOBS:
            host = _median(results, HOST_CASE, job, name, "host")
            title = f"{HOST_CASE}, {job}: host time of {name} <= {most * 1e6:.0f} us"
            if host is None:
                rows.append((title, "not measured", "-"))
            else:
                rows.append((title, f"{host * 1e6:.1f} us", "reached" if host <= most else "missed"))
    return rows


def describe_gpu() -> dict[str, Any]:
    """The machine, its GPU and what is installed."""
    cuda = cuda_module()
    assert cuda is not None
    name, major, minor, multiprocessors, memory = cuda.device_info(0)
    return describe() | {
        "gpu": name,
        "compute_capability": f"{major}.{minor}",
        "multiprocessors": multiprocessors,
        "gpu_memory_gb": round(memory / 1e9, 1),
        "driver_cuda": cuda.driver_version(),
        "runtime_cuda": cuda.runtime_version(),
        "cupy": cupy.__version__,
    }


def run(rounds: int) -> dict[str, Any]:
    """Measure every case and job that fits into the device's memory."""
    results: dict[str, Any] = {"machine": describe_gpu(), "rounds": rounds, "cases": {}, "left_out": []}
    for title, (shapes, dtype) in SHAPES.items():
        itemsize = 2 if dtype == "bfloat16" else 4
        needed = 3 * sum(math.prod(shape) for shape in shapes) * itemsize
        if needed > cupy.cuda.Device().mem_info[0]:
            results["left_out"].append(f"{title}: {needed / 1e9:.1f} GB do not fit into the GPU's memory")
            continue
        case = Case(shapes, dtype)
        check(case)
        rows: dict[str, Any] = {"nbytes": case.nbytes, "copy_bytes_per_s": copy_speed(case)}
        for job in JOBS:
            times = measure(case, contenders(case, job), rounds)
            rows[job] = {name: vars(samples) for name, samples in times.items()}
        results["cases"][title] = rows
        del case
        cupy.get_default_memory_pool().free_all_blocks()
    return results


def markdown(results: dict[str, Any]) -> str:
    """The tables of a result."""
    machine = results["machine"]
    lines = [
        f"{machine['gpu']} ({machine['multiprocessors']} multiprocessors), driver for CUDA "
        f"{machine['driver_cuda']}, {machine['date']}, commit {machine['commit']}",
        "",
        "| case | job | contender | device µs | host µs | until done µs | ceiling / time |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case, rows in results["cases"].items():
        for job in JOBS:
            ceiling = statistics.median(rows[job]["ceiling"]["device"])
            for name, samples in rows[job].items():
                device, host, wall = (statistics.median(samples[kind]) for kind in ("device", "host", "wall"))
                cells = [f"{seconds * 1e6:.1f}" for seconds in (device, host, wall)]
                lines.append(f"| {case} | {job} | {name} | {' | '.join(cells)} | {ceiling / device:.2f} |")
    lines += ["", "| target | measured | |", "| --- | --- | --- |"]
    lines += [f"| {' | '.join(row)} |" for row in judge(results)]
    lines += ["", *(f"Left out: {line}" for line in results["left_out"])]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="samples of each contender")
    parser.add_argument("--out", type=Path, default=Path("gpu-bench.json"), help="where every sample goes")
    arguments = parser.parse_args()
    missing = why_no_gpu()
    if missing:
        print(f"no GPU: {missing}", file=sys.stderr)
        return NO_GPU
    results = run(arguments.rounds)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
