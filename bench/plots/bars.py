"""Bars: each contender against the machine's own speed, and the clip's share of a training step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MultipleLocator

from bench.jobs import JOBS
from bench.peers import PEERS
from bench.plots.looks import LOOKS
from bench.results import Results
from bench.rows import Row
from bench.training import shares
from gradclip._report.style import DASHED, GREY, INK, OTHERS, OURS, Plot, title
from gradclip._report.tables import readable_time

__all__ = ["against_peers", "training"]


def against_peers(results: Results, chosen: Sequence[Row], place: str) -> Plot:
    """The longer the better: how near each comes to the machine's own speed, a panel for each job."""
    load = chosen[0].load
    jobs = [job for job in JOBS if any(row.job == job for row in chosen)]
    peers = [peer for peer in PEERS if any(row.peer == peer for row in chosen)]
    columns = min(3, len(jobs))
    lines = -(-len(jobs) // columns)
    height = 0.9 + lines * (0.75 + 0.23 * len(peers))
    figure = Figure(figsize=(1.4 + 3.0 * columns, height), layout="constrained")
    grid = figure.subplots(lines, columns, sharey=True, sharex=True, squeeze=False)
    for axes, job in zip(grid.flat, jobs, strict=False):
        axes.set_title(JOBS[job].title)
        _panel(axes, {row.peer: row for row in chosen if row.job == job}, peers)
    longest = max([1.0, *(row.of_roofline or 0 for row in chosen)])
    for axes in grid.flat:
        axes.set_xlim(0, 100 * longest * 1.27)
        axes.xaxis.set_major_locator(MultipleLocator(50 if longest < 2.5 else 100))
    for axes in grid.flat[len(jobs) :]:
        axes.set_visible(False)
    for column in range(columns):
        lowest = max(i for i in range(len(jobs)) if i % columns == column)
        axes = grid.flat[lowest]
        axes.set_xlabel("of the machine's own speed (dashed)")
        axes.tick_params(axis="x", labelbottom=True)
    facts = results.loads[load]
    title(figure, f"{facts.title}, {'from memory' if facts.cold else 'in the caches'}")
    what = "Speed as a part of the machine's own, with the time of a call: longer is better"
    return f"bars-{load.replace('/', '-')}-{place}", what, figure


def _panel(axes: Any, by_peer: dict[str, Row], peers: Sequence[str]) -> None:
    for y, peer in enumerate(peers):
        row = by_peer.get(peer)
        if row is None or row.of_roofline is None or row.seconds is None:
            text = row.reason if row else "not in this case"
            axes.text(1, y, text, va="center", color=GREY, style="italic", fontsize=8)
            continue
        ours = "gradclip" in peer
        length = 100 * row.of_roofline
        axes.barh(y, length, color=LOOKS[peer][0] if ours else OTHERS, height=0.72)
        weight = "bold" if ours else "normal"
        time = readable_time(row.seconds.median)
        text = axes.text(length + 1.5, y, time, va="center", fontsize=8, color=INK, fontweight=weight)
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6})  # over the dashed line
    axes.axvline(100, **DASHED)
    axes.set_ylim(len(peers) - 0.4, -0.6)
    axes.set_yticks(range(len(peers)), [PEERS[peer].title for peer in peers])
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f} %"))
    for label, peer in zip(axes.get_yticklabels(), peers, strict=False):
        label.set_fontweight("bold" if "gradclip" in peer else "normal")


def training(results: Results) -> Plot:
    """The part of a training step that the clip takes."""
    found = shares(results.training)
    figure = Figure(figsize=(9.5, 0.9 + 0.36 * len(found)), layout="constrained")
    axes = figure.subplots()
    for y, share in enumerate(found):
        ours = "gradclip" in share.way
        axes.barh(y, 100 * share.share, color=OURS if ours else OTHERS, height=0.72)
        text = f" {100 * share.share:.2g} %: {readable_time(share.clip)} of {readable_time(share.step)}"
        axes.text(100 * share.share, y, text, va="center", fontsize=8)
    axes.set_yticks(range(len(found)), [f"{share.model}: {share.way}" for share in found], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 100 * max(share.share for share in found) * 1.35 or 1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g} %"))
    axes.tick_params(axis="y", length=0)
    title(figure, "Share of a training step that the clip takes (lower is better)")
    return "training", "The clip's share of a training step, before (grey) and after", figure
