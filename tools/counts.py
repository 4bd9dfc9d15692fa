"""``python -m tools.counts MODULE [--check]``: the CUDA engine by count, in docs/cuda.md.

What can be said of its speed without a GPU: registers and instructions from the machine code of the module
that is named, loads that wait for one another from the geometry of the walk, launches and calls of the CUDA
runtime from the emulator; and what the figures of ``python -m tools.gpu`` should be if nothing else counts.
``--check`` compares the page with what is found, and changes nothing.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gradclip._report.tables import markdown_table
from tools import sass

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "cuda.md"
MARKS = ("<!-- counts: python -m tools.counts -->\n", "<!-- end of counts -->\n")

ROW, TILE_ROWS = 512, 32  # bytes; csrc/core/reduction_order.hpp
WARPS = sass.THREADS // 32
GRANULE = 2 << 20  # of a device's memory
SQUARES = "measure_kernelILNS0_7MeasureE0"
KERNELS = {
    "norms, 2": SQUARES,
    "norms, 1": "measure_kernelILNS0_7MeasureE1",
    "norms, infinity": "measure_kernelILNS0_7MeasureE2",
    "norms, other orders": "measure_kernelILNS0_7MeasureE3",
    "clip and scale": "change_kernel",
    "value clip": "clip_by_value_kernel",
}
# Bytes a second of memory by its clock and width, and multiprocessors.
CARDS = {"H100": (3.35e12, 132), "H200": (4.8e12, 132)}
READ, READ_WRITE = 0.93, 0.90  # of that, what a plain kernel reaches: taken from copies of 3.0 and 4.3 TB/s
LAUNCH = 2.5e-6  # seconds of the device between two launches, and before and after them
SIZES = (100, 1000, 10_000, 10_000_000)


def tuning(name: str) -> int:
    """A constant of csrc/cuda/tuning.hpp; of those by architecture that of high-bandwidth memory."""
    text = (ROOT / "csrc" / "cuda" / "tuning.hpp").read_text(encoding="utf-8")
    found = re.search(rf"\b{name} = (\d+)", text)
    assert found is not None, name
    return int(found[1])


def dtype_of(loop: list[str]) -> str:
    """Whose elements a hot loop of the 2-norm squares."""
    opcodes = Counter(re.sub(r"^@\S+ ", "", text).split()[0].split(".")[0] for text in loop)
    if opcodes["DMUL"]:
        return "float64"
    if opcodes["HADD2"]:
        return "float16"
    return "bfloat16" if opcodes["FMUL"] > 4 * tuning("rows_in_flight") else "float32"


def kernel_table(file: str) -> str:
    """Registers, resident blocks, instructions of a row."""
    usage = sass.usage(file, sass.LOOPS_OF)
    code = sass.functions(file, sass.LOOPS_OF)
    rows = tuning("rows_in_flight")
    cells = []
    for title, part in KERNELS.items():
        name = next(name for name in usage if part in name and "InMemory" in name)
        registers = -(-usage[name][0] // 8) * 8
        blocks = sass.BLOCKS_OF_LARGE_KERNELS if part in sass.LARGE_KERNELS else sass.BLOCKS
        reads = part != KERNELS["clip and scale"]
        at_once = rows if reads else tuning("vectors_in_flight")
        in_flight = blocks * WARPS * at_once * ROW
        fitting = sass.REGISTERS // (sass.THREADS * registers)
        cells.append((title, str(registers), str(blocks), str(fitting), f"{in_flight // 1024} KB"))
    name = next(name for name in code if SQUARES in name and "InMemory" in name)
    loops = {
        dtype_of(loop): len(loop) / rows
        for loop in sass.hot_loops(code[name], {"LDG.E.128": rows, "SHFL": 4 * rows})
    }
    header = ("kernel", "registers", "blocks of a multiprocessor", "that would fit", "bytes in flight there")
    of_a_row = ", ".join(f"{loops[dtype]:.1f} of {dtype}" for dtype in sorted(loops))
    table = markdown_table(header, cells)
    return f"{table}\n\nInstructions of a warp for a row of {ROW} bytes, 2-norm:\n{of_a_row}."


def waits(size: int) -> tuple[int, int]:
    """Loads that wait for one another in the warp that takes longest at a float32 tensor of that size, which
    is alone on an H100: now, and if each row that is left over from 8 waited for the one before.
    """
    tiles = -(-4 * size // (ROW * TILE_ROWS))
    warps = CARDS["H100"][1] * tuning("kBlocksPerMultiprocessor") * WARPS
    most = -(-tiles // min(tiles, warps))
    at_once = tuning("rows_in_flight")
    at_once_late = at_once // 2
    now = before = 0
    for tile in range(most):
        nbytes = min(4 * size - tile * ROW * TILE_ROWS, ROW * TILE_ROWS)
        full = nbytes // (at_once * ROW)
        left = -(-(nbytes - full * at_once * ROW) // ROW)
        now += full + -(-left // at_once_late)
        before += full + left
    return now, before


def wait_table() -> str:
    """Dependent loads of tensors."""
    few, many = math.ceil(math.log2(tuning("kFewEntries"))), math.ceil(math.log2(tuning("kMostEntries")))
    cells = [(f"{size:,}", *map(str, waits(size))) for size in SIZES]
    header = ("float32 elements", "loads that wait", "with one row at a time for what is left")
    return f"""{markdown_table(header, cells)}

Before the first of them a warp looks for its tensor: at most {few} loads of constant memory in a list of
{tuning("kFewEntries")} and {many} of {tuning("kMostEntries")} (two steps of 32 lanes
at 32 addresses would be 64), one of memory for every factor of 32 otherwise."""


def call_table() -> str:
    """Launches and runtime calls of API calls, by the emulator."""
    sys.path.insert(0, str(ROOT / "tests"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from device import emulated_device  # noqa: PLC0415 (needs CuPy and the emulated kernels)
    import gradclip  # noqa: PLC0415

    cells = []
    with emulated_device() as device:
        # On one page of 2 MB, for which the driver is asked once.
        whole = device.array(np.ones(2 * GRANULE // 4, np.float32))
        first = -whole.data.ptr % GRANULE // 4
        many = [whole[at : at + 8] for at in range(first, first + 2000 * 128, 128)]
        few = many[:300]
        plan = gradclip.Plan(few)
        tasks: Mapping[str, Callable[[], Any]] = {
            "`global_norm`, 300 arrays": lambda: gradclip.global_norm(few),
            "`global_norm`, 2000": lambda: gradclip.global_norm(many),
            "`global_norm`, `Plan` of 300": plan.global_norm,
            "`clip_by_global_norm_`, `'skip'`, 300": lambda: gradclip.clip_by_global_norm_(
                few, 0.5, nonfinite="skip"
            ),
            "`clip_by_global_norm_`, `'skip'`, 2000": lambda: gradclip.clip_by_global_norm_(
                many, 0.5, nonfinite="skip"
            ),
            "`clip_by_global_norm_`, `'skip'`, `Plan` of 300": lambda: plan.clip_by_global_norm_(
                0.5, nonfinite="skip"
            ),
            "`clip_by_global_norm_`, `'raise'`, 300": lambda: gradclip.clip_by_global_norm_(few, 0.5),
            "`measure` and `clip_`, `'skip'`, 300": lambda: gradclip.measure(few).clip_(
                0.5, nonfinite="skip"
            ),
            "`clip_by_value_`, 300": lambda: gradclip.clip_by_value_(few, 0.5),
            "`scale_`, 300": lambda: gradclip.scale_(few, 1.5),
        }
        for title, call in [*tasks.items()]:
            call()  # work memory is made
            before = Counter(device.cuda.calls())
            call()
            made = Counter(device.cuda.calls()) - before
            cells.append((title, str(made.pop("cudaLaunchKernel")), str(made.total()), _names(made)))
    return markdown_table(("call", "launches", "other calls of the runtime", "which"), cells)


def _names(made: Counter[str]) -> str:
    return ", ".join(f"{name}{f' x {count}' if count > 1 else ''}" for name, count in sorted(made.items()))


def predictions() -> str:
    """What `python -m tools.gpu` should find on the device."""
    cases = {
        "1.5 G elements bf16 in 300 tensors": 3.0e9,
        "GPT-2 124M float32": 497.8e6,
        "GPT-2 124M bfloat16": 248.9e6,
        "2000 tensors of 1000": 8e6,
        "300 tensors of 64": 76.8e3,
    }
    cells = []
    for case, nbytes in cases.items():
        for job, passes, launches in (
            ("norms", (1, 0), 1),
            ("clipping", (1, 2), 2),
            ("not clipping", (1, 0), 2),
        ):
            times = []
            for peak, _ in CARDS.values():
                read, both = passes[0] * nbytes / (READ * peak), passes[1] * nbytes / (READ_WRITE * peak)
                times.append(f"{1e6 * (max(read + both, 3e-6) + launches * LAUNCH):.0f} µs")
            cells.append((case, job, *times))
    return markdown_table(("case", "job", *CARDS), cells)


def section(file: str) -> str:
    """What stands between the marks."""
    return f"""
{kernel_table(file)}

{wait_table()}

{call_table()}

What the device should take if memory is all that counts ({100 * READ:.0f} % of its peak when read,
{100 * READ_WRITE:.0f} % when read and written, {LAUNCH * 1e6:.1f} µs a launch, 3 µs for one tensor's chain of
loads). Nothing of this table has been measured; it was written first, for the measurement to judge:

{predictions()}

"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.counts", description=__doc__)
    parser.add_argument("module", help="the CUDA module, or an object file with code for sm_90")
    parser.add_argument("--check", action="store_true", help="compare only; exit status 1 if the page is old")
    arguments = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    begin, end = (text.index(mark) for mark in MARKS)
    new = text[: begin + len(MARKS[0])] + section(arguments.module) + text[end:]
    if arguments.check:
        if new != text:
            print(f"{PAGE.relative_to(ROOT)}: expected what `python -m tools.counts` finds", file=sys.stderr)
        return int(new != text)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
