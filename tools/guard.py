"""``python -m tools.guard``: fails on a real loss of speed, also on a noisy shared machine.

Ratios of minima within one process, against the machine's own read of the same bytes and against a NumPy
loop, with bounds two to three times what a quiet machine shows; a bound that is missed has two more
chances. And instructions of small calls, counted by callgrind, against ``tools/instructions.json``: those
do not depend on who else is on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.cases import CASES, Load
from bench.jobs import CLIP, JOBS, NO_CLIP, NORMS, key
from bench.timing import Rounds, measure
from bench.workload import READ, READ_WRITE, ROOFLINE, Workload
from tools.instructions import ISA, count

__all__ = ["BOUNDS", "Bound", "check_instructions", "check_ratios", "main"]

_BASELINE = Path(__file__).resolve().parent / "instructions.json"
# Another version of the compiler moves counts by a few parts in a hundred; a loss that matters is larger.
_TOLERANCE = 1.15
_ATTEMPTS = 3
_OURS, _PLAN, _DOT, _SQUARES = "gradclip", "gradclip-plan", "numpy-dot", "numpy-sum"


@dataclass(frozen=True)
class Bound:
    """At most ``most`` times the sum of the minima of ``below``."""

    load: str
    job: str
    above: str
    below: tuple[tuple[str, str], ...]  # job and contender
    most: float

    @property
    def title(self) -> str:
        below = " + ".join(peer if peer != ROOFLINE else job for job, peer in self.below)
        return f"{self.load}, {JOBS[self.job].title}: {self.above} / ({below})"

    def value(self, samples: Mapping[str, Rounds]) -> float:
        def least(job: str, peer: str) -> float:
            return min(min(turn) for turn in samples[key(self.load, job, peer)])

        return least(self.job, self.above) / sum(least(*name) for name in self.below)


_READ, _BOTH = ((READ, ROOFLINE),), ((READ, ROOFLINE), (READ_WRITE, ROOFLINE))


def _bounds() -> list[Bound]:
    memory, mlp, tiny, many = (f"{case}/float32" for case in ("bytes-256M", "mlp", "tiny", "many"))
    return [
        Bound(memory, NORMS, _OURS, _READ, 1.6),  # quiet: 1.0
        Bound(memory, CLIP, _OURS, _BOTH, 1.6),  # 1.0
        Bound(memory, NO_CLIP, _OURS, _READ, 1.6),  # 1.0
        Bound(mlp, NORMS, _OURS, _READ, 2.6),  # 1.2
        Bound(mlp, NORMS, _OURS, ((NORMS, _SQUARES),), 0.5),  # 0.15
        Bound(mlp, CLIP, _OURS, _BOTH, 2.6),  # 1.3
        *(Bound(tiny, job, _OURS, ((job, _DOT),), 0.12) for job in (NORMS, CLIP, NO_CLIP)),  # 0.03 to 0.05
        Bound(tiny, NORMS, _PLAN, ((NORMS, _DOT),), 0.12),  # 0.03
        *(Bound(many, job, _OURS, ((job, _DOT),), 0.25) for job in (NORMS, CLIP, NO_CLIP)),  # 0.05 to 0.1
    ]


BOUNDS = _bounds()


def _samples(bounds: Sequence[Bound]) -> dict[str, Rounds]:
    samples: dict[str, Rounds] = {}
    for load in dict.fromkeys(bound.load for bound in bounds):
        case, dtype = load.split("/")
        workload = Workload(Load(CASES[case], dtype))
        pairs = {(peer, job) for b in bounds if b.load == load for job, peer in ((b.job, b.above), *b.below)}
        contenders = workload.contenders(sorted((p, j) for p, j in pairs if p != ROOFLINE))
        protocol = workload.protocol(8, 10.0)
        measured = measure([*workload.rooflines(), *contenders], protocol)
        failures = workload.failures | measured.failures
        if failures:
            raise RuntimeError(f"expected right answers, got {failures}")
        samples |= measured.samples
    return samples


def check_ratios(bounds: Sequence[Bound], attempts: int = _ATTEMPTS) -> list[str]:
    """Print every ratio; what is wrong after all attempts."""
    left = list(bounds)
    for _ in range(attempts):
        samples = _samples(left)
        missed = []
        for bound in left:
            value = bound.value(samples)
            print(f"{value:8.3f} <= {bound.most:5.2f}  {bound.title}", flush=True)
            if value > bound.most:
                missed.append(bound)
        left = missed
        if not left:
            break
    return [f"{bound.title}: expected at most {bound.most}, got more {attempts} times" for bound in left]


def check_instructions(counted: Mapping[str, int], baseline: Mapping[str, int]) -> list[str]:
    """Print every count; what is wrong."""
    problems = []
    for name, before in baseline.items():
        now = counted[name]
        print(f"{now:10} instructions, {now / before:.2f} of the baseline's  {name}", flush=True)
        if now > _TOLERANCE * before:
            problems.append(f"{name}: expected at most {_TOLERANCE} x {before} instructions, got {now}")
    return problems


def main() -> int:
    """0 if nothing was lost, 1 if something was."""
    parser = argparse.ArgumentParser(prog="python -m tools.guard", description=__doc__)
    parser.add_argument("--update", action="store_true", help=f"write {_BASELINE.name} anew")
    arguments = parser.parse_args()
    if arguments.update:
        _BASELINE.write_text(json.dumps({"isa": ISA, "counts": count()}, indent=1) + "\n", encoding="utf-8")
        return 0
    problems = check_ratios(BOUNDS)
    if platform.machine() != "x86_64" or shutil.which("valgrind") is None:
        print(f"instructions not counted: needs valgrind and x86-64 ({platform.machine()})")
    else:
        baseline = json.loads(_BASELINE.read_text(encoding="utf-8"))["counts"]
        problems += check_instructions(count(), baseline)
    print("\n".join(problems) or "nothing was lost")
    return 1 if problems else 0


if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    sys.exit(main())
