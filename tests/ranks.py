"""Runs checks on several ranks of ``torch.distributed``: ``python tests/ranks.py DIRECTORY WORLD...``.

One process imports everything and forks the ranks of each world, one world after the other. Every rank
writes what became of its checks into the directory, and is killed when its time is up.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeAlias

from processes import HANGS_AFTER

SECONDS_TO_WAIT = 300  # of one rank for the others in a collective

Check: TypeAlias = Callable[[], None]
# check -> what went wrong on each rank: "" is well.
Outcomes: TypeAlias = dict[str, list[str]]


def outcomes_of(directory: Path, *worlds: int) -> dict[int, Outcomes]:
    """Run all checks in worlds of so many ranks, in processes that have ended when this returns."""
    command = [sys.executable, "-W", "error", __file__, str(directory), *map(str, worlds)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with subprocess.Popen(command, env=environment, start_new_session=True) as launcher:
        try:
            launcher.wait(HANGS_AFTER * (len(worlds) + 1))
        finally:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)
    return {world: _read(directory, world) for world in worlds}


def _read(directory: Path, world: int) -> Outcomes:
    outcomes: Outcomes = {}
    silent = f"this rank did not get there: it ended, or its world was killed after {HANGS_AFTER} s"
    for rank in range(world):
        path = _path(directory, world, rank)
        lines = path.read_text().splitlines() if path.exists() else []
        told = dict(json.loads(line) for line in lines)
        for name, text in told.items():
            outcomes.setdefault(name, [silent] * world)[rank] = text
    return outcomes


def _path(directory: Path, world: int, rank: int) -> Path:
    return directory / f"{world}-{rank}.jsonl"


def _run_rank(directory: Path, world: int, rank: int, checks: list[Check]) -> None:
    import torch.distributed as dist  # noqa: PLC0415 (the launcher alone needs it)

    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store-{world}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=SECONDS_TO_WAIT),
    )
    with _path(directory, world, rank).open("w") as file:
        for check in checks:
            text = ""
            try:
                check()
            except BaseException:
                text = traceback.format_exc()
            file.write(json.dumps([check.__name__, text]) + "\n")
            file.flush()
    dist.destroy_process_group()


def _run_world(directory: Path, world: int, checks: list[Check]) -> None:
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            try:
                _run_rank(directory, world, rank, checks)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(0)
        children.append(child)
    deadline = time.monotonic() + HANGS_AFTER
    while children and time.monotonic() < deadline:
        children = [child for child in children if os.waitpid(child, os.WNOHANG) == (0, 0)]
        time.sleep(0.05)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    import rank_checks

    for argument in sys.argv[2:]:
        _run_world(Path(sys.argv[1]), int(argument), rank_checks.checks_for(int(argument)))
