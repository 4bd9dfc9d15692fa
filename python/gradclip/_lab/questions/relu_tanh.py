"""Does ReLU prevent explosions, or cause them? Do sigmoid and tanh help?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from matplotlib.figure import Figure

from gradclip._lab.experiment import Settings
from gradclip._lab.questions._base import (
    LEARNT,
    Question,
    Rows,
    count_of,
    listed,
    outcomes,
    percent,
    seeds,
    spread,
    times,
)
from gradclip._report.style import COLORS, DASHED, Plot, title
from gradclip._report.tables import ReportTable

__all__ = ["ReluTanh"]

_ACTIVATIONS = ("relu", "tanh", "sigmoid")
_GAINS = (0.25, 0.5, 1.0, 1.41, 2.0, 2.83, 4.0)
_CRITICAL = 1.41  # of ReLU, by theory: the weights of He et al.


class ReluTanh(Question):
    """Activation function against the size of the weights."""

    name = "relu-or-tanh"
    title = "Does ReLU prevent explosions, or does it cause them?"
    background = (
        "One textbook says that ReLU prevents explosions, because its slope is never more than 1. Another "
        "says that ReLU causes them, because its slope is large, and that sigmoid and tanh help. Both leave "
        "out the weights. Here 20 layers start with the weights of Xavier times a factor, from a quarter to "
        "four; learning rate 0.01, as it is and with gradients clipped to a global norm of 1."
    )

    def design(self, quick: bool) -> list[Settings]:
        base = Settings(initialisation="xavier", learning_rate=0.01)
        points = [
            replace(base, activation=activation, gain=gain, clipping=clipping)
            for activation in _ACTIVATIONS
            for gain in (_GAINS[1::2] if quick else _GAINS)
            for clipping in ("none", "global")
        ]
        return seeds(points, quick)

    def answer(self, rows: Rows) -> list[str]:
        plain = rows[rows["clipping"] == "none"]
        norm = spread(plain, ["activation", "gain"], "first_norm")["median"]
        largest = rows["gain"].max()
        small, large = (
            plain[(plain["activation"] == "relu") & mask]
            for mask in (plain["gain"] <= 1.0, plain["gain"] > _CRITICAL)
        )
        tanh = plain[(plain["activation"] == "tanh") & (plain["gain"] > _CRITICAL)]
        sigmoid = rows[rows["activation"] == "sigmoid"]
        return [
            "Neither text is right without the weights. ReLU with weights up to those of Xavier: "
            f"{count_of(small, 'exploded')} runs exploded. ReLU with weights above those of He: "
            f"{count_of(large, 'exploded')}.",
            "It is not the slope, it is that nothing else holds the signal back. With weights of "
            f"{largest:g} times Xavier the norm of all gradients in the first step is "
            f"{times(norm['relu', largest])} with ReLU, {times(norm['tanh', largest])} with tanh and "
            f"{times(norm['sigmoid', largest])} with sigmoid: tanh and sigmoid saturate, and a saturated "
            f"unit has a slope near 0. With tanh and the same weights {count_of(tanh, 'exploded')} runs "
            "exploded.",
            f"Saturation has its price. Of {len(sigmoid)} runs with sigmoid {int(sigmoid['learnt'].sum())} "
            f"learnt (best accuracy {percent(sigmoid['test_accuracy'].max())}, a guess has 10 %): its slope "
            "is at most a quarter, and 20 quarters multiply to a millionth of a millionth.",
            f"{_where(rows, 'relu')} {_where(rows, 'tanh')}",
        ]

    def plots(self, rows: Rows) -> Iterator[Plot]:
        figure = Figure(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for color, activation in zip(COLORS, _ACTIVATIONS, strict=False):
            chosen = rows[rows["activation"] == activation]
            norm = spread(chosen[chosen["clipping"] == "none"], ["gain"], "first_norm")
            x = norm.index.to_numpy()
            left.plot(x, norm["median"], "o-", color=color, label=activation)
            left.fill_between(x, norm["min"], norm["max"], color=color, alpha=0.2, linewidth=0)
            for clipping, style in (("none", ":"), ("global", "-")):
                accuracy = spread(chosen[chosen["clipping"] == clipping], ["gain"], "test_accuracy")
                name = f"{activation}, {'clipped' if clipping == 'global' else 'as it is'}"
                right.plot(
                    accuracy.index, 100 * accuracy["median"], style, marker="o", color=color, label=name
                )
        left.axhline(1000, **DASHED)
        left.set_yscale("log")
        left.set_ylabel("norm of all gradients, first step")
        right.set_ylabel("accuracy after training, %")
        right.set_ylim(0, 101)
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_xticks(_GAINS, [f"{gain:g}" for gain in _GAINS])
            axes.set_xlabel("weights, times those of Xavier")
            axes.legend(frameon=False, fontsize=8)
        title(figure, "ReLU against tanh and sigmoid, by the size of the weights")
        what = "Medians over the seeds, bands from lowest to highest. Above the dashed line: an explosion"
        yield "relu-or-tanh", what, figure

    def tables(self, rows: Rows) -> Iterator[ReportTable]:
        by = {"activation": "activation", "gain": "weights, times Xavier", "clipping": "clipping"}
        yield outcomes(rows, "By the size of the weights", by, {"norm, first step": _first_norm})


def _first_norm(rows: Rows) -> str:
    return f"{rows['first_norm'].astype(float).fillna(math.inf).median():.3g}"


def _where(rows: Rows, activation: str) -> str:
    """At which weights a majority learns, with clipping and without."""
    shares = rows[rows["activation"] == activation].groupby(["clipping", "gain"])["learnt"].mean()
    found = {
        kind: [f"{gain:g}" for gain in _GAINS if shares.get((kind, gain), 0.0) > 0.5]
        for kind in ("none", "global")
    }
    return (
        f"With {activation} more than half of the runs reach {percent(LEARNT['digits'])} at these sizes of "
        f"the weights: {listed(found['none'])} as it is, {listed(found['global'])} clipped."
    )
