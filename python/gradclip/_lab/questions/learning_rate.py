"""Learning rate and schedule, against clipping."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from gradclip._lab.experiment import Settings
from gradclip._lab.questions._base import (
    HOT,
    LEARNT,
    Question,
    Rows,
    count_of,
    outcomes,
    percent,
    seeds,
    spread,
)
from gradclip._report.style import COLORS, Plot, title
from gradclip._report.tables import ReportTable

__all__ = ["LearningRate"]

_RATES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_WAYS: dict[str, dict[str, Any]] = {
    "constant": {},
    "warm-up": {"schedule": "warm-up"},
    "cosine": {"schedule": "cosine"},
    "step": {"schedule": "step"},
    "constant, clipped": {"clipping": "global"},
    "warm-up, clipped": {"schedule": "warm-up", "clipping": "global"},
}


class LearningRate(Question):
    """How high the learning rate may be."""

    name = "learning-rate"
    title = "How high may the learning rate be, and what do schedules change?"
    background = (
        "The learning rate multiplies every step. Too high, a step overshoots, the loss rises, the next "
        "gradient is larger, and so on. Schedules: warm-up begins low and rises over the first tenth of the "
        "steps; cosine falls to nothing; step falls to a tenth after half of the steps. Clipped: to a "
        "global norm of 1. 20 layers, ReLU, weights of He."
    )

    def design(self, quick: bool) -> list[Settings]:
        rates = _RATES[1::3] if quick else _RATES
        return seeds(
            [replace(HOT, learning_rate=rate, **way) for way in _WAYS.values() for rate in rates], quick
        )

    def answer(self, rows: Rows) -> list[str]:
        limits = {}
        for name, way in _WAYS.items():
            median = _of(rows, way).groupby("learning_rate")["test_accuracy"].median()
            limits[name] = max(
                (rate for rate in median.index if median[rate] >= LEARNT["digits"]), default=None
            )
        plain, clipped, warm = (limits[name] for name in ("constant", "constant, clipped", "warm-up"))
        high = rows[rows["learning_rate"] >= 0.05]
        no_clip, with_clip = high[high["clipping"] == "none"], high[high["clipping"] == "global"]
        return [
            f"The highest learning rate with which half of the runs reach {percent(LEARNT['digits'])}: "
            + ", ".join(f"{name} {'none' if rate is None else f'{rate:g}'}" for name, rate in limits.items())
            + ".",
            f"{_gain(plain, clipped, 'Clipping')} {_gain(plain, warm, 'Warm-up alone')}",
            f"From a learning rate of 0.05 on, {count_of(no_clip, 'lost')} runs without clipping lost their "
            "parameters to infinity or NaN, with any schedule; with clipping "
            f"{count_of(with_clip, 'lost')}.",
        ]

    def plots(self, rows: Rows) -> Iterator[Plot]:
        figure = Figure(figsize=(10, 4), layout="constrained")
        axes = figure.subplots()
        for i, (name, way) in enumerate(_WAYS.items()):
            accuracy = spread(_of(rows, way), ["learning_rate"], "test_accuracy").sort_index()
            style = "-" if "clipping" in way else ":"
            axes.plot(
                accuracy.index,
                100 * accuracy["median"],
                style,
                marker="osD^vX"[i],
                color=COLORS[i],
                label=name,
            )
        axes.set_xscale("log")
        axes.set_xticks(_RATES, [f"{rate:g}" for rate in _RATES])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("learning rate (the highest of the schedule)")
        axes.set_ylabel("accuracy after 300 steps, %")
        axes.set_ylim(0, 101)
        figure.legend(loc="outside right center", frameon=False)
        title(figure, "Accuracy by learning rate and schedule")
        yield "learning-rate", "Medians over the seeds; solid lines are clipped", figure

    def tables(self, rows: Rows) -> Iterator[ReportTable]:
        named = [_of(rows, way).assign(way=name) for name, way in _WAYS.items()]
        by = {"way": "schedule", "learning_rate": "learning rate"}
        yield outcomes(pd.concat(named), "By learning rate", by)


def _of(rows: Rows, way: dict[str, Any]) -> Rows:
    whole = {"schedule": "constant", "clipping": "none"} | way
    return rows[(rows["schedule"] == whole["schedule"]) & (rows["clipping"] == whole["clipping"])]


def _gain(before: float | None, after: float | None, what: str) -> str:
    if before is None or after is None:
        return f"{what}: none, or nothing to compare with."
    if after > before:
        return f"{what} allows {after / before:.3g} times the learning rate."
    return (
        f"{what} allows no more than none does." if after == before else f"{what} allows less than none does."
    )
