"""How contenders look in every plot."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

__all__ = ["DASHED", "FAINT", "GREY", "INK", "LOOKS", "MACHINE", "OTHERS", "OURS", "STYLE", "Plot", "title"]

# A name for files, what it shows, and the figure.
Plot = tuple[str, str, Figure]

INK, GREY, FAINT = "#222222", "#6b6b6b", "#e4e4e4"
OURS, PLAN = "#D55E00", "#E69F00"
# Okabe and Ito's colours, which colour-blind readers can tell apart; variants of a library by the marker.
LOOKS: dict[str, tuple[str, str, str]] = {
    "gradclip": (OURS, "o", "-"),
    "gradclip-plan": (PLAN, "o", "-"),
    "gradclip-measured": (OURS, "d", ":"),
    "gradclip-unbound": (PLAN, "d", ":"),
    "gradclip-torch": (OURS, "X", "--"),
    "gradclip-jax": (OURS, "P", "--"),
    "numpy-dot": ("#0072B2", "s", "-"),
    "numpy-sum": ("#0072B2", "D", "--"),
    "numba": ("#000000", "P", ":"),
    "torch": ("#009E73", "^", "-"),
    "torch-loop": ("#009E73", "v", "--"),
    "optax": ("#CC79A7", "<", "--"),
    "optax-donated": ("#CC79A7", ">", "-"),
    "gradclip-gpu": (OURS, "o", "-"),
    "gradclip-gpu-plan": (PLAN, "o", "-"),
    "gradclip-torch-cuda": (OURS, "X", "--"),
    "cupy-nrm2": ("#0072B2", "s", "-"),
    "cupy-sum": ("#0072B2", "D", "--"),
    "torch-cuda": ("#009E73", "^", "-"),
    "torch-cuda-loop": ("#009E73", "v", "--"),
    "apex": ("#56B4E9", "X", "-"),
    "transformer-engine": ("#000000", "P", ":"),
}
STYLE: dict[str, Any] = {
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

OTHERS = "#a9b4bd"  # bars of peers
DASHED: dict[str, Any] = {"color": INK, "linewidth": 1.2, "linestyle": (0, (4, 2))}
MACHINE = "machine's own"


def title(figure: Figure, text: str) -> None:
    """On the left, above everything."""
    figure.suptitle(text, x=0.01, ha="left", fontweight="bold")
