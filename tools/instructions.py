"""Instructions of a call, counted by callgrind: the same on a busy machine as on a quiet one.

``python -m tools.instructions`` makes the calls; ``count`` runs it under callgrind and reads what it
wrote. Only instructions of gradclip's own library count, on one thread, with the AVX2 kernels (valgrind
knows no AVX-512), so that neither Python's version nor the processor matters. A call of ``getppid``
between two phases makes callgrind write a part of its profile.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import gradclip
from bench.cases import CASES, Load
from bench.data import GradientBuffer
from gradclip import _core

__all__ = ["ISA", "PHASES", "count"]

ISA = "avx2"
CALLS = 20
# Case, and what is called: of the small cases, where everything but the kernels shows.
PHASES = tuple(
    f"{case} {what}"
    for case in ("tiny", "mlp")
    for what in ("norms", "norms of a plan", "clip", "clip nothing")
)
_ROOT = Path(__file__).resolve().parent.parent


def _calls(case: str) -> list[Callable[[], object]]:
    """In the order of ``PHASES``. A clip to 0.999 of the norm, again and again, always clips."""
    grads = GradientBuffer(Load(CASES[case])).arrays
    plan = gradclip.Plan(grads)
    threshold = [gradclip.global_norm(grads)]

    def clip() -> None:
        threshold[0] *= 0.999
        assert gradclip.clip_by_global_norm_(grads, threshold[0]).clipped

    return [
        lambda: gradclip.tensor_norms(grads),
        plan.tensor_norms,
        clip,
        lambda: gradclip.clip_by_global_norm_(grads, 1e9),
    ]


def _make_calls() -> None:
    """Every phase between two calls of ``getppid``; tables and memory are made before."""
    for case in ("tiny", "mlp"):
        for call in _calls(case):
            call()
            os.getppid()
            for _ in range(CALLS):
                call()
            os.getppid()


def count() -> dict[str, int]:
    """Instructions of one call, by phase."""
    environment = os.environ | {"GRADCLIP_ISA": ISA, "GRADCLIP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "profile"
        command = [
            "valgrind", "--tool=callgrind", "--dump-before=getppid", "--combine-dumps=no",
            f"--callgrind-out-file={output}", sys.executable, "-m", "tools.instructions",
        ]  # fmt: skip
        done = subprocess.run(
            command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"callgrind: exit status {done.returncode}: {done.stderr[-2000:]}")
        parts = sorted(Path(directory).glob("profile.*"), key=lambda part: int(part.suffix[1:]))
        costs = [
            cost_of_object(part.read_text(encoding="utf-8"), Path(_core.__file__).name) for part in parts
        ]
    # Parts end at the marks: before the first phase, the phase, between, the phase, ...
    phases = costs[1 : 2 * len(PHASES) : 2]
    if len(phases) != len(PHASES):
        raise RuntimeError(f"callgrind: expected {2 * len(PHASES)} parts, got {len(parts)}")
    return {name: round(cost / CALLS) for name, cost in zip(PHASES, phases, strict=True)}


def cost_of_object(profile: str, library: str) -> int:
    """Instructions of the functions of a library themselves, in a profile of callgrind.

    Names come in full once, as ``ob=(3) /path``, and then as ``ob=(3)``. A line after ``calls=`` has the
    cost of what was called.
    """
    names: dict[str, str] = {}
    total, here, called = 0, False, False
    for line in profile.splitlines():
        if match := re.match(r"c?ob=\((\d+)\)(?: (.*))?", line):
            number, name = match.groups()
            if name:
                names[number] = name
            if line.startswith("ob="):
                here = names[number].endswith(library)
        elif line.startswith("calls="):
            called = True
        elif re.match(r"[0-9+*-]", line):
            if here and not called:
                total += int(line.split()[-1])
            called = False
    return total


if __name__ == "__main__":
    _make_calls()
