"""Ways to clip, at a learning rate that is too high and at one that is not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from gradclip._lab.experiment import Settings
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
)
from gradclip._lab.training import CLIPPINGS
from gradclip._report.style import COLORS, Plot, title
from gradclip._report.tables import ReportTable

__all__ = ["NAMES", "Clipping"]

NAMES = {
    "none": "no clipping", "global": "global norm", "value": "value", "agc": "AGC", "zclip": "ZClip",
    "autoclip": "AutoClip",
}  # fmt: skip


class Clipping(Question):
    """All of gradclip's ways that the laboratory has."""

    name = "clipping"
    title = "Which way of clipping helps, and what does it cost where nothing explodes?"
    background = (
        "Global norm (Pascanu et al. 2013): all gradients together are scaled down to a norm of 1. Value: "
        "every element is cut off at 0.01. AGC (Brock et al. 2021): every unit in proportion to its "
        "weights. ZClip (Kumar et al. 2025) and AutoClip (Seetharaman et al. 2020): the threshold follows "
        "from the norms so far. The network is the same at both learning rates: 20 layers, ReLU, weights of "
        "He."
    )

    def design(self, quick: bool) -> list[Settings]:
        points = [
            replace(base, clipping=clipping, in_detail=base is HOT)
            for base in (HOT, CALM)
            for clipping in CLIPPINGS
        ]
        return seeds(points, quick)

    def answer(self, rows: Rows) -> list[str]:
        hot, calm = (rows[rows["learning_rate"] == base.learning_rate] for base in (HOT, CALM))
        at_hot, at_calm = (part.groupby("clipping")["test_accuracy"].median() for part in (hot, calm))
        plain = hot[hot["clipping"] == "none"]
        helped = [kind for kind in CLIPPINGS if kind != "none" and at_hot[kind] >= LEARNT["digits"]]
        failed = [kind for kind in CLIPPINGS if kind not in ("none", *helped)]
        cost = {kind: at_calm["none"] - at_calm[kind] for kind in CLIPPINGS if kind != "none"}
        worst = max(cost, key=lambda kind: cost[kind])
        stuck = len(plain) - int((plain["trouble"] | plain["learnt"]).sum())
        sentences = [
            f"At a learning rate of {HOT.learning_rate:g} without clipping, {count_of(plain, 'trouble')} "
            f"runs came to grief, {stuck} more got stuck, and {int(plain['learnt'].sum())} learnt (median "
            f"accuracy {percent(at_hot['none'])}). "
            + _sentence("Saved by", helped, at_hot)
            + (" " + _sentence("Not enough:", failed, at_hot) if failed else ""),
            f"At {CALM.learning_rate:g}, where the network trains by itself ({percent(at_calm['none'])}), "
            f"the worst that clipping does is {100 * cost[worst]:.1f} points less accuracy "
            f"({NAMES[worst]}).",
        ]
        for _, one in plain[plain["exploded"]].head(1).iterrows():
            end = (
                f"the run is lost in step {one['steps_done']}"
                if one["lost"]
                else f"in the end the accuracy is {percent(one['test_accuracy'])}"
            )
            before = one["warned_step"] <= one["exploded_step"]
            warned = (
                f"the monitor had warned in step {one['warned_step']:.0f}"
                if before
                else "no warning came before"
            )
            sentences.append(
                f"An explosion as it happens (seed {one['seed']}): in step {one['exploded_step']:.0f} the "
                f"norm passes 1000, first in {one['exploded_layer']}; {warned}; {end}."
            )
        return sentences

    def plots(self, rows: Rows) -> Iterator[Plot]:
        hot = rows[(rows["learning_rate"] == HOT.learning_rate) & rows["losses"].notna()]
        plain = hot[hot["clipping"] == "none"]
        seed = (plain[plain["exploded"]] if plain["exploded"].any() else plain)["seed"].iloc[0]
        yield (
            "clipping-layers",
            "Rows are layers, that of the output on top; a run that ends early is lost",
            _layers(hot, seed),
        )
        figure = Figure(figsize=(10, 4), layout="constrained")
        axes = figure.subplots()
        for color, kind in zip(COLORS, CLIPPINGS, strict=False):
            one = hot[(hot["clipping"] == kind) & (hot["seed"] == seed)].iloc[0]
            losses = np.array([np.nan if loss is None else loss for loss in one["losses"]], float)
            axes.plot(one["steps_shown"], losses, color=color, label=NAMES[kind], linewidth=1.6)
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel("training loss")
        figure.legend(loc="outside right center", frameon=False)
        title(figure, f"Training loss at a learning rate of {HOT.learning_rate:g}, seed {seed}")
        yield "clipping-losses", "The same weights and batches for all", figure

    def tables(self, rows: Rows) -> Iterator[ReportTable]:
        named = rows.assign(way=rows["clipping"].map(NAMES))
        by = {"learning_rate": "learning rate", "way": "clipping"}
        more = {"steps clipped": _share}
        yield outcomes(named, "Ways of clipping", by, more)


def _share(rows: Rows) -> str:
    """Of steps in which the norm was above the threshold; a limit of values has none."""
    return "" if rows["clipping"].iloc[0] == "value" else percent(rows["clipped_share"].median())


def _sentence(before: str, kinds: list[str], accuracy: object) -> str:
    words = [f"{NAMES[kind]} {percent(accuracy[kind])}" for kind in kinds]  # type: ignore[index]
    return f"{before} {listed(words)}."


def _layers(hot: Rows, seed: int) -> Figure:
    """The norm of every layer in every step, without and with clipping."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    grid = figure.subplots(1, 2, sharey=True)
    image: Any = None
    for axes, kind in zip(grid, ("none", "global"), strict=True):
        one = hot[(hot["clipping"] == kind) & (hot["seed"] == seed)].iloc[0]
        norms = np.array([[np.nan if n is None else n for n in step] for step in one["layer_norms"]], float).T
        with np.errstate(divide="ignore"):
            logs = np.log10(norms)
        colors = mpl.colormaps["inferno"].with_extremes(bad="#00e5ff")
        last = one["steps_shown"][-1]
        image = axes.imshow(
            logs, cmap=colors, vmin=-4, vmax=4, aspect="auto", origin="lower", interpolation="nearest",
            extent=(0.5, last + 0.5, 0.5, len(norms) + 0.5),
        )  # fmt: skip
        axes.set_xlim(0.5, one["steps"] + 0.5)
        axes.set_title(NAMES[kind] + (f": lost in step {one['steps_done']}" if one["lost"] else ""))
        axes.set_xlabel("step")
    grid[0].set_ylabel("layer (1: input)")
    bar = figure.colorbar(image, ax=grid, pad=0.01, extend="both")
    bar.set_label("log10 of the norm (blue: not finite)")
    title(figure, f"Norm of each layer's gradient, before clipping (seed {seed})")
    return figure
