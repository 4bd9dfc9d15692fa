"""Policies at work: one network trained under each of them, with batches that are broken.

    python -m tools.policies docs/policies.md    # puts the table there, and the picture beside it

The digits of scikit-learn, the demo's network with 8 layers, momentum. One batch in 40 is broken: its pixels
are 30 times too large and its labels random.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

import gradclip
from gradclip._lab.data import Data, batches, split_digits
from gradclip._lab.networks import multilayer
from gradclip._lab.training import Momentum
from gradclip._report.style import GREY, INK, OURS, STYLE
from gradclip._report.tables import markdown_table
from gradclip.policies import AGC, SPAM, AdaGC, AutoClip, Lowest, Percentile, SkipStep, WarmUp, ZClip

__all__ = ["PICTURE", "Training", "main", "train"]

PICTURE = "images/policies.png"
STEPS, EVERY, FACTOR = 600, 40, 30.0
_BEGIN, _END = "<!-- run: python -m tools.policies -->\n", "<!-- end of run -->\n"

# By name: what makes it, of the parameters.
_POLICIES: dict[str, Callable[[Any], Any]] = {
    "no clipping": lambda _: np.inf,
    "0.5": lambda _: 0.5,
    "AutoClip()": lambda _: AutoClip(),
    "Percentile(50)": lambda _: Percentile(50),
    "WarmUp(0.5, 25, ZClip())": lambda _: WarmUp(0.5, 25, ZClip()),
    "AdaGC()": lambda _: AdaGC(),
    "SPAM(theta=25)": lambda _: SPAM(theta=25),
    "AGC(params, 0.1)": lambda params: AGC(params, 0.1, axis=-1),
    "Lowest(SkipStep(), 0.5)": lambda _: Lowest(SkipStep(), 0.5),
}


@dataclass
class Training:
    """What there is to tell of one run."""

    name: str
    norms: list[float] = field(default_factory=list)  # before clipping
    clipped: list[float] = field(default_factory=list)  # after it
    acted: int = 0  # steps that were clipped
    skipped: int = 0
    accuracy: float = 0.0


def train(name: str, make: Callable[[Any], Any], digits: Data, steps: int = STEPS) -> Training:
    """Train a network with its gradients clipped by a policy."""
    training, rng = Training(name), np.random.default_rng(0)
    network = multilayer([64] + [64] * 7 + [10], "sine", "orthogonal", rng)
    optimizer, policy = Momentum(network.parameters), make(network.parameters)
    for step, batch in zip(range(steps), batches(len(digits.train_y), 64, rng), strict=False):
        x, labels = digits.train_x[batch], digits.train_y[batch]
        if step % EVERY == EVERY - 1:
            x, labels = FACTOR * x, rng.permutation(labels)
        _, gradients = network.loss_and_gradients(x, labels)
        result = gradclip.clip_by_global_norm_(gradients, policy, nonfinite="propagate")
        training.norms.append(result.total_norm)
        training.clipped.append(gradclip.global_norm(gradients))
        training.acted += result.clipped
        training.skipped += result.skipped
        if not result.skipped:
            optimizer.step(gradients, 0.05)
    _, training.accuracy = network.evaluate(digits.test_x, digits.test_y)
    return training


def picture(trainings: list[Training]) -> Figure:
    """Norms before and after, a panel for each."""
    columns = 3
    rows = -(-len(trainings) // columns)
    figure = Figure(figsize=(11, 2.3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True).ravel()
    for ax, training in zip(axes, trainings, strict=False):
        steps = np.arange(1, len(training.norms) + 1)
        ax.plot(steps, training.norms, color=GREY, linewidth=0.7, label="norm before")
        ax.plot(steps, training.clipped, color=OURS, linewidth=0.9, label="after clipping")
        ax.set_yscale("log")
        ax.set_ylim(1e-3, 1e3)
        ax.set_title(f"{training.name}: {training.accuracy:.1%}", color=INK)
    axes[0].legend(loc="lower left", frameon=False, fontsize=8)
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("global norm", fontsize=9)
    return figure


def table(trainings: list[Training]) -> str:
    """The same in numbers."""
    return markdown_table(
        ["", "test accuracy", "steps clipped", "left out"],
        [[f"`{t.name}`", f"{t.accuracy:.1%}", str(t.acted), str(t.skipped or "")] for t in trainings],
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", type=Path, help="the page that gets the table, between its markers")
    page: Path = parser.parse_args(arguments).page
    digits = split_digits(seed=0)
    trainings = [train(name, make, digits) for name, make in _POLICIES.items()]
    with mpl.rc_context(STYLE):
        picture(trainings).savefig(page.parent / PICTURE, dpi=110)
    before, rest = page.read_text().split(_BEGIN)
    page.write_text(before + _BEGIN + table(trainings) + "\n" + _END + rest.split(_END)[1])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
