"""How gradients grow or shrink from layer to layer, before any training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gradclip._lab.experiment import WIDTH, Settings
from gradclip._lab.layers import INITIALISATIONS
from gradclip._lab.networks import layer_gains
from gradclip._lab.questions._base import Question, Rows, percent, power, seeds, size, spread, times
from gradclip._report.style import COLORS, FAINT, Plot, title
from gradclip._report.tables import ReportTable

__all__ = ["Growth"]

_ACTIVATIONS = ("relu", "leaky relu", "gelu", "tanh", "sigmoid")
_DEPTH = 30
_SMALLEST = 1e-35  # of what float32 can hold, with some digits
# Of a weight, times the number of inputs: what the theory asks for.
_VARIANCES = {"near zero": WIDTH * 1e-4, "xavier": 1.0, "he": 2.0, "too large": 8.0, "orthogonal": 1.0}


class Growth(Question):
    """The product of layer gains, measured and by theory."""

    name = "growth"
    title = "How fast does a gradient grow, or die, from layer to layer?"
    background = (
        "Backpropagation walks from the last layer to the first. In every layer the gradient is multiplied "
        "by the layer's weights and by the slope of its activation function. What one layer does to its "
        "size is the layer's gain; the gains of all layers multiply. A gain of 1.5 makes 200 000 of 30 "
        "layers, a gain of 0.5 a billionth. The theory of wide random networks predicts the gain from two "
        "things alone: the activation function and the size of the weights. Here it is put to the test in "
        "networks of 30 layers, before any training."
    )

    def design(self, quick: bool) -> list[Settings]:
        points = [
            Settings(activation=activation, initialisation=weights, depth=_DEPTH, steps=1)
            for activation in _ACTIVATIONS
            for weights in INITIALISATIONS
        ]
        return seeds(points, quick)

    def answer(self, rows: Rows) -> list[str]:
        measured = rows.assign(product=rows["delta_rms"].map(_product))
        found = measured.groupby(["activation", "initialisation"])["product"].median()
        per_layer = {key: value ** (1 / (_DEPTH - 2)) for key, value in found.items()}
        errors = {
            key: abs(gain / _theory(*key) - 1) for key, gain in per_layer.items() if found[key] > _SMALLEST
        }
        worst = max(errors, key=lambda key: errors[key])
        relu, tanh, sigmoid = (
            {weights: found[name, weights] for weights in INITIALISATIONS}
            for name in ("relu", "tanh", "sigmoid")
        )
        dead = [key for key, value in found.items() if value < 1e-3]
        return [
            f"The gain of a layer is what theory says: over {len(errors)} combinations of activation "
            "function and weights, measured and predicted gain differ by "
            f"{percent(float(np.median(list(errors.values()))))} in the median, and by "
            f"{percent(errors[worst])} at most ({worst[0]}, {worst[1]}). In {len(found) - len(errors)} more "
            "the gradient is smaller than float32 can hold.",
            "The gains multiply. From the last hidden layer to the first, the gradient of a ReLU network "
            f"is multiplied by {times(relu['he'])} with the weights of He et al., by "
            f"{times(relu['too large'])} with weights twice as large, and by {times(relu['near zero'])} "
            "with weights near zero.",
            f"The same weights, twice those of He: {times(tanh['too large'])} with tanh, "
            f"{times(sigmoid['too large'])} with sigmoid. {_who_grows(found)}",
            f"In {len(dead)} of {len(found)} combinations less than a thousandth of the gradient arrives at "
            f"the first layer; with weights near zero it is {power(found[:, 'near zero'].max())} at best. "
            "Weights close to zero prevent explosions, and learning with them.",
        ]

    def plots(self, rows: Rows) -> Iterator[Plot]:
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        grid = figure.subplots(1, len(_ACTIVATIONS), sharey=True)
        layers = np.arange(1, _DEPTH)
        for axes, activation in zip(grid, _ACTIVATIONS, strict=True):
            axes.set_title(activation)
            for color, weights in zip(COLORS, INITIALISATIONS, strict=False):
                chosen = rows[(rows["activation"] == activation) & (rows["initialisation"] == weights)]
                sizes = np.array([_hidden(delta) for delta in chosen["delta_rms"]])
                with np.errstate(divide="ignore", invalid="ignore"):
                    logs = np.log10(sizes / sizes[:, -1:])
                axes.plot(layers, np.median(logs, axis=0), ".", color=color, markersize=4, label=weights)
                gains = layer_gains(activation, _VARIANCES[weights], _DEPTH - 1)["backward"]
                back = np.log10(np.maximum(gains[1:], 1e-300))[::-1]
                axes.plot(layers, [*np.cumsum(back)[::-1], 0], color=color, linewidth=1)
            axes.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
            axes.set_ylim(-22, 22)
            axes.set_xlabel("layer")
        grid[0].set_ylabel("log10 of the gradient,\nof that of the last hidden layer")
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
        title(figure, "Size of the gradient by layer: measured (dots) and by theory (lines)")
        yield "growth", "Backpropagation goes from right to left; a straight line is a constant gain", figure

    def tables(self, rows: Rows) -> Iterator[ReportTable]:
        measured = rows.assign(product=rows["delta_rms"].map(_product))
        cells = []
        for key, chosen in measured.groupby(["activation", "initialisation"], sort=False):
            activation, weights = map(str, key)
            product = float(chosen["product"].median())
            cells.append((
                activation, weights, size(product ** (1 / (_DEPTH - 2))), size(_theory(activation, weights)),
                size(product), size(spread(chosen, ["seed"], "first_norm")["median"].median()),
                str(len(chosen)),
            ))  # fmt: skip
        header = (
            "activation",
            "weights",
            "gain of a layer",
            "by theory",
            "of all",
            "norm, all gradients",
            "seeds",
        )
        yield ReportTable("Gains of layers", header, cells, [""] * len(cells))


def _hidden(delta_rms: list[float | None]) -> np.ndarray:
    """By the outputs of the hidden layers; what is not finite is as large as can be."""
    return np.array([np.inf if value is None else value for value in delta_rms[:-1]], dtype=float)


def _product(delta_rms: list[float | None]) -> float:
    hidden = _hidden(delta_rms)
    with np.errstate(invalid="ignore"):
        return float(hidden[0] / hidden[-1])


def _theory(activation: str, weights: str) -> float:
    """The geometric mean of the predicted gains."""
    gains = layer_gains(activation, _VARIANCES[weights], _DEPTH - 1)["backward"]
    return float(np.exp(np.mean(np.log(gains[1:]))))


def _who_grows(found: Any) -> str:
    large = {name: float(found[name, "too large"]) for name in _ACTIVATIONS}
    growing = sum(value > 1000 for value in large.values())
    most = max(large, key=lambda name: large[name])
    return (
        "No activation function here has a slope above 1.13, and yet with these weights the gradient of "
        f"{growing} of {len(large)} grows more than 1000 times (most of all {most}, {times(large[most])}): a "
        "bounded slope bounds nothing, because the weights multiply, too."
    )
