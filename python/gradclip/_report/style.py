"""How every plot and page looks."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

__all__ = [
    "BLACK",
    "BLUE",
    "COLORS",
    "DASHED",
    "FAINT",
    "GREEN",
    "GREY",
    "INK",
    "ORANGE",
    "OTHERS",
    "OURS",
    "PLAN",
    "PURPLE",
    "SKY",
    "STYLE",
    "VERMILLION",
    "Plot",
    "title",
]

# A name for files, what it shows, and the figure.
Plot = tuple[str, str, Figure]

INK, GREY, FAINT = "#222222", "#6b6b6b", "#e4e4e4"
# Okabe and Ito's colours, which colour-blind readers can tell apart. Their yellow is too pale on white.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
COLORS = (BLACK, ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE)
OURS, PLAN = VERMILLION, ORANGE
OTHERS = "#a9b4bd"  # bars of peers
DASHED: dict[str, Any] = {"color": INK, "linewidth": 1.2, "linestyle": (0, (4, 2))}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": INK,
    "svg.hashsalt": "gradclip",  # the same file for the same data
}


def title(figure: Figure, text: str) -> None:
    """On the left, above everything; the figure's label is the same, for those who hear a page."""
    figure.suptitle(text, x=0.01, ha="left", fontweight="bold")
    figure.set_label(text)
