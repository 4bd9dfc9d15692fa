"""What is not a time: peak memory of a call, and threads started for small work.

Each in a process of its own, with a history of nothing else: ``python -m bench.checks NAME``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gradclip
from bench.cases import CASES, Load
from bench.data import GradientBuffer
from bench.jobs import CLIP, JOBS, NORMS
from bench.targets import Verdict
from bench.timing import Spread
from gradclip import _core

__all__ = ["run_checks"]

_ROOT = Path(__file__).resolve().parent.parent


def _status(field: str) -> int:
    """A field of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise KeyError(field)


def _peak_growth(call: Callable[[], object]) -> float:
    """MB by which the peak of resident memory during the call exceeds what was resident before."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is what is resident now
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / 1e6


def memory_of_norms() -> float:
    """Of the first call in the process, so that threads and tables are counted."""
    grads = GradientBuffer(Load(CASES["gpt2"])).arrays
    return _peak_growth(lambda: gradclip.tensor_norms(grads))


def memory_of_clip() -> float:
    grads = GradientBuffer(Load(CASES["gpt2"])).arrays
    return _peak_growth(lambda: gradclip.clip_by_global_norm_(grads, 1.0))


def threads_for_tiny() -> float:
    """Threads that were started by calls over 77 KB."""
    grads = GradientBuffer(Load(CASES["tiny"])).arrays
    plan = gradclip.Plan(grads)
    for _ in range(100):
        gradclip.tensor_norms(grads)
        gradclip.clip_by_global_norm_(grads, 1.0)
        plan.clip_by_global_norm_(0.5)
    return float(_core.num_started_threads())


def _in_own_process(check: Callable[[], float]) -> Spread | None:
    if not sys.platform.startswith("linux"):
        return None
    command = [sys.executable, "-m", "bench.checks", check.__name__]
    done = subprocess.run(command, cwd=_ROOT, check=True, capture_output=True, text=True)
    value = float(json.loads(done.stdout))
    return Spread(value, value, value)


def run_checks() -> list[Verdict]:
    """The rows of the table that are not times."""
    gpt2, tiny = Load(CASES["gpt2"]).key, Load(CASES["tiny"]).key
    norms, clip = JOBS[NORMS].title, JOBS[CLIP].title
    memory = "growth of peak memory"
    return [
        Verdict(gpt2, norms, memory, _in_own_process(memory_of_norms), 1.0, False, "MB"),
        Verdict(gpt2, clip, memory, _in_own_process(memory_of_clip), 1.0, False, "MB"),
        Verdict(tiny, "norms and clip", "threads started", _in_own_process(threads_for_tiny), 0.0, False, ""),
    ]


if __name__ == "__main__":
    _CHECKS = {check.__name__: check for check in (memory_of_norms, memory_of_clip, threads_for_tiny)}
    print(json.dumps(_CHECKS[sys.argv[1]]()))
