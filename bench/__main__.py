"""``python -m bench``: every contender on the same gradients in one run; tables, plots, every sample."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.errors import BenchError

RESULTS = Path(__file__).resolve().parent / "results"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer cases and rounds: within two minutes on two cores")
    add("--threads", type=int, help="processors for every contender (default: all allowed)")
    add("--cases", metavar="CASE", nargs="+", help="these alone, each in --dtypes")
    add("--dtypes", metavar="DTYPE", nargs="+", help="of --cases (default: float32)")
    add("--contenders", metavar="NAME", nargs="+", help="these alone, and gradclip")
    add("--jobs", metavar="JOB", nargs="+", help="these alone")
    add("--out", metavar="FILE", type=Path, help="result file, .json (default: in bench/results, by machine)")
    add(
        "--compare",
        metavar="FILE",
        type=Path,
        help="an older result: say what got slower or fails; 1 if something does",
    )
    add("--against", metavar="FILE", type=Path, help="with --compare: compare this file; measure nothing")
    add(
        "--report", metavar="FILE", type=Path, help="make tables, plots and HTML of a result; measure nothing"
    )
    add("--list", action="store_true", help="cases, dtypes, jobs and contenders; measure nothing")
    return parser


def _set_threads(threads: int | None) -> None:
    """The same processors for all: by affinity, which every library honours (JAX nothing else)."""
    allowed = sorted(os.sched_getaffinity(0))
    if threads is not None:
        if not 1 <= threads <= len(allowed):
            raise BenchError(
                f"--threads: expected 1 to {len(allowed)} (processors allowed here), got {threads}"
            )
        allowed = allowed[:threads]
        os.sched_setaffinity(0, allowed)
    names = ("OMP", "OPENBLAS", "MKL", "NUMBA", "GRADCLIP")
    os.environ.update({f"{name}_NUM_THREADS": str(len(allowed)) for name in names})
    os.environ["JAX_ENABLE_X64"] = "1"  # or JAX has no float64


def _main(arguments: argparse.Namespace) -> int:
    _set_threads(arguments.threads)
    # Now: NumPy and the others count their threads when they are imported.
    try:
        from rich.console import Console  # noqa: PLC0415

        from bench import commands  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise BenchError(f"{error}; pip install '.[bench]' brings what the suite needs") from None
    width = shutil.get_terminal_size((140, 50)).columns
    return commands.execute(arguments, Console(width=width), Console(stderr=True), RESULTS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite; 0: well, 1: slower than before, 2: a mistake of the user's, 130: interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        return _main(arguments)
    except BenchError as error:
        print(f"python -m bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("python -m bench: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
