"""Questions whose answer is a grid: one thing along one side, one along the other, accuracy in the cells."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from textwrap import fill
from typing import Any, ClassVar

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from gradclip._lab.experiment import Settings
from gradclip._lab.layers import INITIALISATIONS
from gradclip._lab.questions._base import (
    CALM,
    HOT,
    LEARNT,
    Question,
    Rows,
    count_of,
    listed,
    outcomes,
    percent,
    seeds,
    size,
    spread,
)
from gradclip._report.style import GREY, INK, Plot, title
from gradclip._report.tables import ReportTable

__all__ = ["Depth", "Initialisation", "Normalisation", "Regularisation", "grid"]

_SIDES = {
    "kind": "network",
    "depth": "layers",
    "learning_rate": "learning rate",
    "initialisation": "initial weights",
}
_DEPTHS = (5, 10, 20, 40)
_ACTIVATIONS = ("relu", "leaky relu", "gelu", "tanh", "sigmoid")
_CLIPPED = {"none": "as it is", "global": "clipped"}


class _Grid(Question):
    """One or more grids of accuracies.

    Attributes:
        down, across: The columns of the rows that are along the sides.
        panel: The column whose values have a grid each.
        caption: What the picture shows.
    """

    down: str
    across: str
    panel: str = "clipping"
    panels: ClassVar[dict[Any, str]] = _CLIPPED
    caption: str

    def named(self, rows: Rows) -> Rows:
        """The rows, with columns that the question makes of others."""
        return rows

    def plots(self, rows: Rows) -> Iterator[Plot]:
        rows = self.named(rows)
        yield (
            self.name,
            self.caption,
            grid(rows, self.down, self.across, self.panel, self.panels, "Accuracy in %, median of the seeds"),
        )

    def tables(self, rows: Rows) -> Iterator[ReportTable]:
        by = {name: _SIDES.get(name, name) for name in (self.down, self.across, self.panel)}
        yield outcomes(self.named(rows), self.title, by)


def grid(
    rows: Rows,
    down: str,
    across: str,
    panel: str,
    panels: dict[Any, str],
    what: str,
    *,
    by_share: bool = False,
) -> Figure:
    """Medians of the accuracy in cells, coloured from none (dark) to all (light); a panel for each value.

    Args:
        rows: Of the runs.
        down: The column of which each value is a line.
        across: The column of which each value is a column.
        panel: The column of which each value that is named in ``panels`` is a panel.
        panels: Titles.
        what: The title of all.
        by_share: Colours by the share of runs that learnt, not by the accuracy.
    """
    lines, columns = list(rows[down].unique()), list(rows[across].unique())
    size = (2.2 + len(panels) * (0.6 + 0.85 * len(columns)), 1.4 + 0.32 * len(lines))
    figure = Figure(figsize=size, layout="constrained")
    for axes, (value, name) in zip(
        figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True
    ):
        chosen = rows[rows[panel] == value].groupby([down, across])
        accuracy, learnt = chosen["test_accuracy"].median(), chosen["learnt"].mean()
        cells = np.array([[accuracy.get((i, j), np.nan) for j in columns] for i in lines], dtype=float)
        shown = (
            np.array([[learnt.get((i, j), np.nan) for j in columns] for i in lines], float)
            if by_share
            else cells
        )
        colors = mpl.colormaps["viridis"].with_extremes(bad="#f3f3f3")
        axes.imshow(np.ma.masked_invalid(shown), cmap=colors, vmin=0, vmax=1, aspect="auto")
        for (i, j), cell in np.ndenumerate(cells):
            text = "" if np.isnan(cell) else f"{100 * cell:.0f}"
            axes.text(j, i, text, ha="center", va="center", color=INK if shown[i, j] > 0.6 else "white")
        axes.set_xticks(range(len(columns)), [_label(column, 13) for column in columns], fontsize=8)
        axes.set_yticks(range(len(lines)), [_label(line, 40) for line in lines], fontsize=8)
        axes.set_xlabel(_SIDES.get(across, ""), color=GREY)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(name)
    title(figure, what)
    return figure


def _label(value: Any, width: int) -> str:
    return fill(value, width, break_on_hyphens=False) if isinstance(value, str) else f"{value:g}"


class Initialisation(_Grid):
    """Activation function by initial weights."""

    name = "initialisation"
    title = "Which initial weights go with which activation function?"
    background = (
        "Initial weights decide what the gains of all layers are before the first step. Near zero: a "
        "standard deviation of 0.01. Xavier (Glorot and Bengio): made for tanh. He et al.: made for ReLU. "
        "Too large: twice those of He. Orthogonal (Saxe et al.): a random rotation. Learning rate 0.01, 20 "
        "layers."
    )
    down, across = "activation", "initialisation"
    caption = "What 20 layers have learnt after 300 steps; a guess has 10 %"

    def design(self, quick: bool) -> list[Settings]:
        points = [
            Settings(activation=activation, initialisation=weights, learning_rate=0.01, clipping=clipping)
            for activation in (("relu", "tanh", "sigmoid") if quick else _ACTIVATIONS)
            for weights in INITIALISATIONS
            for clipping in _CLIPPED
        ]
        return seeds(points, quick)

    def answer(self, rows: Rows) -> list[str]:
        sentences = []
        for activation in ("relu", "tanh"):
            chosen = rows[(rows["activation"] == activation) & (rows["clipping"] == "none")]
            median = chosen.groupby("initialisation", sort=False)["test_accuracy"].median()
            best = str(median.idxmax())
            sentences.append(
                f"{_NAMES[activation]} learns best with {_NAMES[best]} ({percent(median[best])}; "
                + listed([f"{name} {percent(median[name])}" for name in INITIALISATIONS if name != best])
                + ")."
            )
        zero = rows[rows["initialisation"] == "near zero"]
        large = rows[rows["initialisation"] == "too large"]
        sigmoid = rows[rows["activation"] == "sigmoid"]
        sentences += [
            f"Weights near zero learnt in {count_of(zero, 'learnt')} runs, with and without clipping"
            + ("." if zero["learnt"].any() else ': "weights close to zero" is no remedy in a deep network.'),
            f"With weights that are too large, {count_of(large[large['clipping'] == 'none'], 'trouble')} "
            "runs came to grief as they were; clipped, "
            f"{count_of(large[large['clipping'] == 'global'], 'lost')} lost their parameters, and "
            f"{count_of(large[large['clipping'] == 'global'], 'learnt')} learnt.",
            f"Sigmoid learnt in {count_of(sigmoid, 'learnt')} runs"
            + ("." if sigmoid["learnt"].any() else ": no initialisation here saves 20 layers of it."),
        ]
        return sentences


_NAMES = {
    "relu": "ReLU", "tanh": "Tanh", "near zero": "weights near zero", "xavier": "those of Xavier",
    "he": "those of He", "too large": "too large ones", "orthogonal": "orthogonal ones",
}  # fmt: skip


class Depth(_Grid):
    """Depth by what is done about it."""

    name = "depth"
    title = "How deep can it be?"
    background = (
        "Every layer multiplies. What works in 5 layers may not in 40. Against that, architectures have "
        "ways of their own: a residual layer adds its input to its output, so that the gradient has a way "
        "around it; normalisation gives every layer inputs of the same size. Weights of He, ReLU, learning "
        "rate 0.01."
    )
    down, across = "kind", "depth"
    panel, panels = "schedule", {"constant": "300 steps"}
    caption = "Accuracy by the number of layers; a guess has 10 %"
    _kinds: ClassVar[dict[str, dict[str, Any]]] = {
        "plain": {},
        "plain, clipped": {"clipping": "global"},
        "batch norm": {"normalisation": "batch"},
        "residual": {"network": "residual"},
        "residual, clipped": {"network": "residual", "clipping": "global"},
        "residual, layer norm": {"network": "residual", "normalisation": "layer"},
    }

    def design(self, quick: bool) -> list[Settings]:
        base = replace(HOT, learning_rate=0.01)
        points = [
            replace(base, depth=depth, **more)
            for more in self._kinds.values()
            for depth in ((5, 40) if quick else _DEPTHS)
        ]
        return seeds(points, quick)

    def named(self, rows: Rows) -> Rows:
        return rows.assign(kind=[_kind_of(row, self._kinds) for row in rows.to_dict("records")])

    def answer(self, rows: Rows) -> list[str]:
        found = self.named(rows).groupby(["kind", "depth"])["test_accuracy"].median()
        explode = spread(self.named(rows), ["kind", "depth"], "first_norm")["median"].map(size)
        deepest = {
            kind: max(
                (depth for depth in _DEPTHS if found.get((kind, depth), 0.0) >= LEARNT["digits"]), default=0
            )
            for kind in self._kinds
        }
        return [
            f"The deepest network that reaches {percent(LEARNT['digits'])}: "
            + listed([f"{kind} {depth or 'none'}" for kind, depth in deepest.items()])
            + " layers.",
            "A residual layer adds to the signal, and with weights of He it adds much: the norm of the "
            f"gradients in the first step goes from {explode['residual', 5]} in 5 layers to "
            f"{explode['residual', 40]} in 40 (plain: {explode['plain', 5]} and "
            f"{explode['plain', 40]}). With a normalisation in every layer it is "
            f"{explode['residual, layer norm', 40]}, and 40 layers reach "
            f"{percent(found['residual, layer norm', 40])}.",
            f"Clipping takes 40 plain layers from {percent(found['plain', 40])} to "
            f"{percent(found['plain, clipped', 40])}.",
        ]


class Regularisation(_Grid):
    """Weight regularisation, with and without clipping."""

    name = "regularisation"
    title = "Does weight regularisation prevent explosions?"
    background = (
        "L2 adds half of 0.001 times the squared weights to the loss, L1 adds 0.0001 times their absolute "
        "values: large weights cost, so they should stay small, and gradients with them. In gradclip both "
        "are part of the gradient that is measured and clipped. Two learning rates: 0.005, at which this "
        "network trains, and 0.05, at which it blows up."
    )
    down, across = "regularisation", "learning_rate"
    caption = "Accuracy by kind of regularisation and learning rate; a guess has 10 %"

    def design(self, quick: bool) -> list[Settings]:
        points = [
            replace(base, regularisation=kind, clipping=clipping)
            for kind in ("none", "l2", "l1")
            for base in (CALM, HOT)
            for clipping in _CLIPPED
        ]
        return seeds(points, quick)

    def answer(self, rows: Rows) -> list[str]:
        hot = rows[rows["learning_rate"] == HOT.learning_rate]
        plain, clipped = hot[hot["clipping"] == "none"], hot[hot["clipping"] == "global"]
        learnt = {
            kind: count_of(plain[plain["regularisation"] == kind], "learnt") for kind in ("none", "l2", "l1")
        }
        accuracy = plain.groupby("regularisation")["test_accuracy"].median()
        with_clip = clipped.groupby("regularisation")["test_accuracy"].median()
        helped = min(accuracy["l2"], accuracy["l1"]) >= LEARNT["digits"]
        sentences = [
            f"It {'helped' if helped else 'did not help'} at the higher learning rate: {learnt['none']} "
            f"runs learnt without regularisation, {learnt['l2']} with L2, {learnt['l1']} with L1; "
            f"accuracies {percent(accuracy['none'])}, {percent(accuracy['l2'])} and "
            f"{percent(accuracy['l1'])}.",
            f"With clipping the same runs reach {percent(with_clip['none'])}, {percent(with_clip['l2'])} "
            f"and {percent(with_clip['l1'])}.",
        ]
        if not helped:
            sentences.append(
                "Regularisation pulls at the weights a little in every step, and an explosion takes but a "
                "few."
            )
        return sentences


class Normalisation(_Grid):
    """Normalisation by learning rate."""

    name = "normalisation"
    title = "Does normalisation make clipping unnecessary?"
    background = (
        "Batch normalisation and layer normalisation give the activation function of every layer inputs "
        "with mean 0 and variance 1, the one over the batch, the other over the units. What is normalised "
        "cannot grow from layer to layer on its way forward. Backward is another matter."
    )
    down, across = "normalisation", "learning_rate"
    caption = "Accuracy by normalisation and learning rate, 20 layers of ReLU; a guess has 10 %"

    def design(self, quick: bool) -> list[Settings]:
        points = [
            replace(HOT, normalisation=kind, learning_rate=rate, clipping=clipping)
            for kind in ("none", "layer", "batch")
            for rate in ((0.05,) if quick else (0.005, 0.05, 0.2))
            for clipping in _CLIPPED
        ]
        return seeds(points, quick)

    def answer(self, rows: Rows) -> list[str]:
        learnt = rows.groupby(["normalisation", "clipping"])["learnt"]
        share = {key: f"{int(runs.sum())} of {len(runs)}" for key, runs in learnt}
        first = spread(rows, ["normalisation"], "first_norm")["median"].map(size)
        return [
            f"As they are, {share['none', 'none']} runs learnt without normalisation, "
            f"{share['layer', 'none']} with layer and {share['batch', 'none']} with batch normalisation; "
            f"clipped, {share['none', 'global']}, {share['layer', 'global']} and "
            f"{share['batch', 'global']}.",
            "Normalisation does not make the gradients of the first step smaller: their norm is "
            f"{first['none']} without, {first['layer']} with layer and {first['batch']} with "
            "batch normalisation (on its way back through batch normalisation and ReLU the gradient grows "
            "by about 1.2 in every layer: Yang et al. 2019, arXiv:1902.08129).",
        ]


def _kind_of(row: dict[Any, Any], kinds: dict[str, dict[str, Any]]) -> str:
    """The kind that says most and is true of the row."""
    fitting = [kind for kind, more in kinds.items() if all(row[key] == value for key, value in more.items())]
    return max(fitting, key=lambda kind: len(kinds[kind]))
