"""Runs in as many processes as there are processors, with the time that is left."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from threading import current_thread, main_thread
from time import monotonic
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from gradclip._lab.experiment import Settings, run
from gradclip._lab.store import LabError, Store
from gradclip._lab.training import one_thread

__all__ = ["run_all"]

_SECONDS_BETWEEN_LINES = 15


def run_all(settings: Sequence[Settings], store: Store, console: Console) -> None:
    """Run each and store its row as soon as it is there.

    Raises:
        LabError: A row cannot be written, or a process died.
        KeyboardInterrupt: Ctrl-C; runs that had begun are stored.
    """
    pool = ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn"))  # a fork may hang
    waiting: set[Future[dict[str, Any]]] = set()
    try:
        with pool, _shown(console, len(settings)) as advance:
            try:
                with _no_interrupts():
                    waiting = {pool.submit(_run, one) for one in settings}
                while waiting:
                    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                        store.add(future.result())
                        waiting.remove(future)
                        advance()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                for future in waiting:
                    if future.done() and not future.cancelled() and future.exception() is None:
                        store.add(future.result())
                raise
    except BrokenProcessPool:
        raise LabError(
            "a process of the laboratory was killed (for memory?); the rows so far are kept"
        ) from None


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Ctrl-C is for this process alone: those that are started in here ignore it."""
    before = signal.getsignal(signal.SIGINT)
    if current_thread() is main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        if current_thread() is main_thread():
            signal.signal(signal.SIGINT, before)


def _run(settings: Settings) -> dict[str, Any]:
    with one_thread():
        return run(settings)


@contextmanager
def _shown(console: Console, total: int) -> Iterator[Any]:
    """A bar on a terminal, elsewhere a line now and then; yields what is called after each run."""
    begin = last = monotonic()
    done = 0
    if console.is_terminal:
        columns = (
            TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
            TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=total)
            yield lambda: progress.advance(task)
        return

    def advance() -> None:
        nonlocal done, last
        done += 1
        now = monotonic()
        if done == total or now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            left = (now - begin) / done * (total - done)
            console.print(f"{done} of {total} runs, {now - begin:.0f} s, about {left:.0f} s left")

    yield advance
