"""``python -m gradclip demo``: a deep network that blows up, and the same one with its gradients clipped.

Everything printed and plotted is measured in the run itself. Nothing outside of this package imports it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import numpy as np
from rich.console import Console
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

import gradclip
from gradclip._demo.display import Display
from gradclip._demo.plot import save_plot
from gradclip._demo.report import print_blow_up, print_layers, print_summary
from gradclip._demo.training import BlowUp, Digits, Run, Settings, batches, split_digits

__all__ = ["Settings", "run_demo", "train"]

STEPS_BETWEEN_TESTS = 25


def run_demo(settings: Settings, out: Path) -> None:
    """Train both runs, report on them and draw them.

    Args:
        settings: What both runs share.
        out: Where the picture goes.
    """
    begin = perf_counter()
    console = Console(highlight=False)
    console.print(
        f"A network of {settings.layers} layers learns scikit-learn's digits, twice: with the same initial "
        f"weights (orthogonal, times {settings.gain:g}), the same batches and the same learning rate (from "
        f"{settings.learning_rate:g}), once as it is and once with its gradients clipped to norm "
        f"{settings.max_norm:g}."
    )
    runs = (
        Run("without clipping", settings, max_norm=math.inf),
        Run("with gradclip", settings, max_norm=settings.max_norm),
    )
    blow_up = train(runs, split_digits(settings.seed), console)
    if blow_up is None:
        console.print("\nNo layer blew up. Try more layers, or another seed.")
    print_summary(console, runs)
    save_plot(runs, blow_up, out)
    console.print(f"Picture: {out}   ({perf_counter() - begin:.0f} s in all)", soft_wrap=True)


def train(runs: tuple[Run, Run], digits: Digits, console: Console) -> BlowUp | None:
    """Train both runs step by step on the same batches; return how the first one blew up, if it did."""
    settings = runs[0].settings
    indices = batches(len(digits.train_y), settings.batch, np.random.default_rng(settings.seed))
    unclipped = runs[0]
    blow_up = None
    # Overflow on the way to NaN is what the demo is about: no warnings.
    with np.errstate(all="ignore"), _one_thread(), Display(console, runs) as display:
        for step in range(1, settings.steps + 1):
            batch = next(indices)
            for run in runs:
                if run.stopped:
                    continue
                run.step(digits.train_x[batch], digits.train_y[batch])
                if step % STEPS_BETWEEN_TESTS == 1 or step == settings.steps or run.stopped:
                    run.evaluate(digits)
            running = len(unclipped.history.loss) == step
            if running and blow_up is None:
                blow_up = unclipped.history.find_blow_up()
                if blow_up:
                    print_blow_up(console, unclipped, blow_up)
            if running and blow_up and (unclipped.stopped or step == settings.steps):
                print_layers(console, unclipped, blow_up)
            display.update(step)
    return blow_up


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrix products and gradclip on the calling thread alone, where NumPy's loop is anyway.

    Arrays of 64 KB gain nothing from a second thread, and on a busy machine they wait for it: steps of
    80 ms instead of 10.
    """
    threads = gradclip.get_num_threads()
    gradclip.set_num_threads(1)
    try:
        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        gradclip.set_num_threads(threads)
