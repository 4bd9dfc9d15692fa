"""``python -m bench``: measure every promised speed in one process and say which are met."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROUNDS, QUICK_ROUNDS = 25, 5


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds instead of {ROUNDS}")
    parser.add_argument("--threads", type=int, help="processors for every contender (default: all allowed)")
    parser.add_argument("--only", metavar="CASE", nargs="+", default=[], help="measure these cases alone")
    parser.add_argument("--name", help="of the file in bench/results (default: by processor and threads)")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="print a result file as Markdown; end")
    return parser.parse_args()


def _set_threads(threads: int | None) -> None:
    """The same processors for all: by affinity, which every library honours (JAX nothing else)."""
    allowed = sorted(os.sched_getaffinity(0))
    if threads is not None:
        if not 1 <= threads <= len(allowed):
            sys.exit(f"--threads: expected 1 to {len(allowed)} (processors allowed here), got {threads}")
        allowed = allowed[:threads]
        os.sched_setaffinity(0, allowed)
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "GRADCLIP_NUM_THREADS"):
        os.environ[variable] = str(len(allowed))


def main() -> None:
    arguments = _arguments()
    _set_threads(arguments.threads)
    # Now: NumPy and the others count their threads when they are imported.
    from bench import run  # noqa: PLC0415

    if arguments.markdown:
        run.print_markdown(arguments.markdown)
    else:
        rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
        run.run(rounds, arguments.only, arguments.name)


if __name__ == "__main__":
    main()
