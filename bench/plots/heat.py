"""A heat map of all ratios."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from bench.cases import readable_bytes
from bench.jobs import JOBS
from bench.peers import PEERS
from bench.results import Results
from bench.rows import Row
from gradclip._report.style import GREY, INK, Plot, title
from gradclip._report.tables import number

__all__ = ["ratios"]

# White is equal; a factor of 16 has the full colour, and the power lets a factor of 1.2 show as well.
_FULL, _POWER = 4.0, 0.6


def ratios(results: Results, chosen: Sequence[Row], place: str, job: str) -> Plot:
    """How many times as long the others take: purple where gradclip is faster, orange where it is not."""
    loads = [load for load in results.loads if any(row.load == load for row in chosen)]
    peers = [p for p in PEERS if "gradclip" not in p and any(row.peer == p for row in chosen)]
    cells = {(loads.index(row.load), peers.index(row.peer)): row for row in chosen if row.peer in peers}
    values = np.full((len(loads), len(peers)), np.nan)
    for where, row in cells.items():
        if row.ratio:
            octaves = np.log2(row.ratio.median) / _FULL
            values[where] = np.sign(octaves) * min(abs(octaves), 1.0) ** _POWER
    figure = Figure(figsize=(3.6 + 0.95 * len(peers), 1.3 + 0.27 * len(loads)), layout="constrained")
    axes = figure.subplots()
    colors = mpl.colormaps["PuOr"].with_extremes(bad="#f3f3f3")
    axes.imshow(np.ma.masked_invalid(values), cmap=colors, vmin=-1, vmax=1, aspect="auto")
    for (i, j), row in cells.items():
        look: dict[str, Any] = {"ha": "center", "va": "center"}
        if row.ratio:
            color = "white" if abs(values[i, j]) > 0.5 else INK
            axes.text(j, i, number(row.ratio.median), color=color, **look)
        else:
            axes.text(j, i, row.reason, color=GREY, style="italic", fontsize=7, **look)
    axes.set_xticks(range(len(peers)), [PEERS[p].title.replace(" ", "\n", 1) for p in peers], fontsize=8)
    axes.set_yticks(range(len(loads)), [_short(results, load) for load in loads], fontsize=8)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    title(figure, f"{JOBS[job].title}: time over gradclip's (purple: gradclip is faster; orange: slower)")
    what = "How many times as long as gradclip the others take; grey: no time, for the reason in the row"
    return f"ratios-{job}-{place}", what, figure


def _short(results: Results, load: str) -> str:
    facts = results.loads[load]
    name = facts.title.split(f", {facts.dtype}")[0]
    return f"{name}, {facts.dtype}, {readable_bytes(facts.nbytes)}"
