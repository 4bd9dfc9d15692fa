"""``python -m gradclip demo``: a deep network that blows up, and the same one with its gradients clipped.

The first experiment of the laboratory. Everything printed and plotted is measured in the run itself.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import current_thread, main_thread
from time import perf_counter
from typing import Any

import numpy as np
from rich.console import Console

from gradclip._lab.demo.display import Display
from gradclip._lab.demo.plot import save_plot
from gradclip._lab.demo.report import print_blow_up, print_layers, print_summary
from gradclip._lab.demo.training import DemoSettings, Run
from gradclip._lab.training import BlowUp, one_thread
from gradclip._report.console import console_of_user

__all__ = ["DemoSettings", "run_demo", "train"]

STEPS_BETWEEN_TESTS = 25


def run_demo(settings: DemoSettings, out: Path) -> None:
    """Train both runs, report on them and draw them.

    Args:
        settings: What both runs share.
        out: Where the picture goes; its suffix says in which format.

    Raises:
        KeyboardInterrupt: Ctrl-C. If it came during the training: after the report and the picture of the
            steps that were done.
    """
    begin = perf_counter()
    console = console_of_user()
    console.print(
        f"A network of {settings.layers} layers learns scikit-learn's digits, twice: with the same initial "
        f"weights (orthogonal, times {settings.gain:g}), the same batches and the same learning rate (from "
        f"{settings.learning_rate:g}), once as it is and once with its gradients clipped to norm "
        f"{settings.max_norm:g}."
    )
    # On a busy machine, two threads need 15 s for the orthogonal matrices that one makes in 1 s.
    with one_thread(), deferred_interrupt() as interrupted:
        runs = (
            Run("without clipping", settings, max_norm=math.inf),
            Run("with gradclip", settings, max_norm=settings.max_norm),
        )
        blow_up = train(runs, console, interrupted)
    done = max(run.steps_done for run in runs)
    if interrupted():
        what = "what follows is of the steps that were done" if done else "there is nothing to report"
        console.print(f"\n[bold yellow]Interrupted[/] after step {done} of {settings.steps}: {what}.")
        if not done:
            raise KeyboardInterrupt
    elif blow_up is None:
        console.print("\nNo layer blew up. Try more layers, or another seed.")
    print_summary(console, runs)
    save_plot(runs, blow_up, out)
    # A terminal wraps a long path so that it can still be copied.
    console.print(
        f"Picture: {out}   ({perf_counter() - begin:.0f} s in all)",
        markup=False, soft_wrap=console.is_terminal,
    )  # fmt: skip
    if interrupted():
        raise KeyboardInterrupt


def train(
    runs: tuple[Run, Run], console: Console, interrupted: Callable[[], bool] = lambda: False
) -> BlowUp | None:
    """Train both runs step by step on the same batches.

    Args:
        runs: The run without clipping, and the one with.
        console: Where to show how they are doing.
        interrupted: Asked between two steps whether to end early.

    Returns:
        How the first run blew up, if it did.
    """
    steps, unclipped = runs[0].settings.steps, runs[0]
    blow_up, layers_printed, step = None, False, 0
    # Overflow on the way to NaN is what the demo is about: no warnings.
    with np.errstate(all="ignore"), Display(console, runs) as display:
        last = interrupted()
        while not last:
            step += 1
            running = [run for run in runs if not run.stopped]
            for run in running:
                run.training.step()
            last = step == steps or all(run.stopped for run in runs) or interrupted()
            for run in running:
                if step % STEPS_BETWEEN_TESTS == 1 or last or run.stopped:
                    run.evaluate()
            if blow_up is None and unclipped in running:
                blow_up = unclipped.find_blow_up()
                if blow_up:
                    print_blow_up(console, unclipped, blow_up)
            if blow_up and not layers_printed and (unclipped.stopped or last):
                print_layers(console, unclipped, blow_up)
                layers_printed = True
            display.update(step, last)
    return blow_up


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Make Ctrl-C a question to ask between two steps, so that no step is left half done.

    The second Ctrl-C raises ``KeyboardInterrupt`` as ever.
    """
    asked = False

    def handler(number: int, frame: Any) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    # Where somebody else handles the signal, or ignores it, as nohup does, it stays so.
    ours = current_thread() is main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: asked
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
