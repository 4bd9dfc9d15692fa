"""Runs Python code in a process of its own: for tests that may crash, hang, fork or need a fresh start."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

HANGS_AFTER = 900  # seconds of a process, however much else its machine has to do

_OURS = ("GRADCLIP_NUM_THREADS", "GRADCLIP_ISA", "OMP_NUM_THREADS")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` with no gradclip variable set but those given; the caller looks at the outcome."""
    env = {key: value for key, value in os.environ.items() if key not in _OURS}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env=env | environment,
        capture_output=True,
        text=True,
        timeout=HANGS_AFTER,
        check=False,
    )


def output_of(code: str, **environment: str) -> str:
    """Standard output of ``code``, which must end well."""
    done = run_python(code, **environment)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout.strip()
