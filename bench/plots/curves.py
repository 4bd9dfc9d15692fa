"""Curves: the time of a call over the number of tensors, or over their bytes."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from bench.cases import readable_count, readable_power
from bench.jobs import JOBS
from bench.peers import PEERS
from bench.plots.looks import LOOKS, MACHINE
from bench.results import Results
from bench.rows import Row, roofline_seconds
from gradclip._report.style import DASHED, FAINT, Plot, title
from gradclip._report.tables import readable_time

__all__ = ["over_axis"]


def over_axis(results: Results, chosen: Sequence[Row], place: str, axis: str, label: str) -> Plot:
    """Time of a call over the axis, a panel for each job."""
    jobs = [job for job in JOBS if any(row.job == job for row in chosen)]
    facts = {row.load: results.loads[row.load] for row in chosen}
    where = {load: f.tensors if axis == "count" else f.nbytes for load, f in facts.items()}
    figure = Figure(figsize=(1.9 + 3.2 * len(jobs), 4.4), layout="constrained")
    grid = figure.subplots(1, len(jobs), sharey=True, squeeze=False)
    ticks = sorted(set(where.values()))
    # The last two counts are too near each other for two labels.
    ticks = [x for x, above in zip(ticks, [*ticks[1:], 1e99], strict=True) if above > 3 * x]
    names = [readable_count(x) if axis == "count" else readable_power(x) for x in ticks]
    for axes, job in zip(grid.flat, jobs, strict=True):
        axes.set_title(JOBS[job].title)
        for peer in reversed(list(PEERS)):
            times = {row.load: row.seconds for row in chosen if (row.job, row.peer) == (job, peer)}
            points = sorted((where[load], time.median) for load, time in times.items() if time)
            if points:
                color, marker, style = LOOKS[peer]
                ours = "gradclip" in peer
                axes.plot(
                    *zip(*points, strict=True), style, color=color, marker=marker, label=PEERS[peer].title,
                    linewidth=3 if ours else 1.3, markersize=6 if ours else 4.5, zorder=3 if ours else 2,
                )  # fmt: skip
        floors = {load: roofline_seconds(results, load, JOBS[job].floor, place) for load in where}
        floor = sorted((where[load], seconds) for load, seconds in floors.items() if seconds)
        axes.plot(*zip(*floor, strict=True), **DASHED, label=MACHINE)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.grid(color=FAINT, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel(label)
        axes.set_xticks(ticks, names)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: readable_time(y)))
        axes.tick_params(axis="x", labelsize=8)
    grid[0][0].set_ylabel("time of a call")
    titles = [*(peer.title for peer in PEERS.values()), MACHINE]
    found = zip(*grid[0][0].get_legend_handles_labels(), strict=True)
    handles, labels = zip(*sorted(found, key=lambda entry: titles.index(entry[1])), strict=True)
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    what = "number of tensors" if axis == "count" else "bytes"
    title(figure, f"Time against {what}, float32 (lower is better)")
    return f"time-by-{axis}-{place}", f"Time against {what}; both scales are logarithmic", figure
