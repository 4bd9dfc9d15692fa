"""The report of a run: one HTML file that needs nothing else, and its plots as PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import tables
from bench.jobs import CLIP, JOBS, NO_CLIP, NORMS
from bench.peers import CPU, OURS
from bench.plots import plots
from bench.results import Results
from bench.rows import rows
from gradclip._report.html import render, save_png, svg_of
from gradclip._report.tables import number

__all__ = ["write_report"]

_TEMPLATE = Path(__file__).resolve().parent / "report.html.j2"


def write_report(results: Results, path: Path) -> list[Path]:
    """Write ``path``, an HTML file, and its plots beside it in a directory of the same name."""
    directory = path.with_suffix("")
    directory.mkdir(parents=True, exist_ok=True)
    written, drawn = [path], []
    for name, what, figure in plots(results):
        png = directory / f"{name}.png"
        save_png(figure, png)
        written.append(png)
        drawn.append({"name": name, "what": what, "label": figure.get_label(), "svg": svg_of(figure)})
    path.write_text(render(_TEMPLATE, **_content(results), plots=drawn), encoding="utf-8")
    return written


def _content(results: Results) -> dict[str, Any]:
    return {
        "machine": results.machine,
        "headline": tables.headline(results.machine),
        "facts": _facts(results),
        "promises": tables.promises(results),
        "training": tables.training(results),
        "losses": tables.losses(results),
        "traffic": tables.traffic(results),
        "loads": _loads(results),
        "left_out": results.left_out,
        "note": tables.NOTE,
    }


def _loads(results: Results) -> list[dict[str, Any]]:
    groups = []
    for name, facts in results.loads.items():
        found = list(tables.of_load(results, name))
        if found:
            groups.append({"title": facts.title, "source": facts.source, "tables": found})
    return groups


def _facts(results: Results) -> list[tuple[str, str]]:
    """The run in a few figures."""
    everything = {(row.load, row.job, row.peer): row for row in rows(results)}
    found = []
    read = everything.get(("gpt2/float32", NORMS, OURS[CPU]))
    if read and read.of_roofline:
        what = "of a plain read's speed: norms of GPT-2's gradients, from memory"
        found.append((f"{100 * read.of_roofline:.0f} %", what))
    for load in ("gpt2/float32", "tiny/float32"):
        for job in (CLIP, NO_CLIP):
            row = everything.get((load, job, "torch"))
            if row and row.ratio:
                what = f"PyTorch's time over gradclip's: {JOBS[job].title}, {results.loads[load].title}"
                found.append((f"{number(row.ratio.median)} x", what))
    met = sum(verdict.met is True for verdict in results.verdicts)
    if results.verdicts:
        found.append((f"{met} of {len(results.verdicts)}", "promised speeds were reached"))
    return found
