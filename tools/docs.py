"""``python -m tools.docs FILE``: the figures of README.md and of the pages on speed, out of a result file.

No figure of a run is written by hand: what stands between two markers is made here, and a test compares
it with the file that it names. The plots that the pages show are written beside them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from bench import tables
from bench.errors import BenchError
from bench.jobs import CLIP, JOBS, NO_CLIP, NORMS
from bench.peers import CPU, OURS, PEERS
from bench.plots import plots
from bench.results import Results, load
from bench.rows import Row, rows
from gradclip._report.html import save_png
from gradclip._report.tables import markdown, markdown_table, number, readable_time

__all__ = ["MARKS", "ROOT", "main", "replaced", "results_section", "speed_section", "tables_section"]

ROOT = Path(__file__).resolve().parent.parent
_IMAGES = Path("docs/images/bench")
_README_PLOT, _README_CURVES = "bars-gpt2-float32-cpu", "time-by-count-cpu"
_SHOWN = (
    _README_PLOT, _README_CURVES, "time-by-bytes-cpu", "ratios-norms-cpu", "ratios-clip-cpu",
    "ratios-no-clip-cpu", "training",
)  # fmt: skip
# File, and what stands around the part that is made here.
MARKS = {
    "README.md": ("<!-- speed: python -m tools.docs -->\n", "<!-- end of speed -->\n"),
    "docs/performance.md": ("<!-- results: python -m tools.docs -->\n", "<!-- end of results -->\n"),
    "docs/performance-tables.md": ("<!-- tables: python -m tools.docs -->\n", "<!-- end of tables -->\n"),
}
_SPEED_LOADS = (
    "gpt2/float32",
    "mixtral-16th/float32",
    "mlp/float32",
    "tiny/float32",
    "many/float32",
)
# As a training step has them, and the run that README shows them of.
_BETWEEN_LOADS = ("mlp-pause/float32", "mlp-product/float32")
_BETWEEN = Path("bench/results/amd-epyc-zen4-2-threads-avx512.json")
_SPEED_PEERS = ("torch", "optax-donated", "numpy-dot", "numba")
_SPEED_JOBS = (NORMS, CLIP, NO_CLIP)


def speed_section(results: Results, path: Path) -> str:
    """README's tables: times of gradclip and what the others take."""
    between = load(ROOT / _BETWEEN)
    found = {(row.load, row.job, row.peer): row for row in rows(results)}
    machine = results.machine
    return f"""
Time of a call with a plain list of arrays, and how many times as long the others take: medians of one run
with {machine["threads"]} threads on {machine["cpu"]}, {machine["isa"]}, every answer checked first.
(optax's `jit` knows its arrays beforehand; gradclip's `Plan` does too, and need not read the list.)

{_times_table(results, _SPEED_LOADS)}

{_of_roofline(found)}

In a training step other work stands between two calls. A pause, after which threads sleep, and a product of
PyTorch's, whose threads wait for more, in [a run]({_BETWEEN.as_posix()})
on {between.machine["cpu"]}:

{_times_table(between, _BETWEEN_LOADS)}

![Each contender's speed as a part of the machine's own]({_IMAGES / _README_PLOT}.png)

![Time against the number of tensors]({_IMAGES / _README_CURVES}.png)

`pip install '.[bench]' && python -m bench` measures it again and writes a report to look at;
[the run of the first table]({path.as_posix()}) holds every sample.
[Where gradclip is not first](docs/performance.md#where-gradclip-is-not-first) is said there.

"""


def _times_table(results: Results, loads: tuple[str, ...]) -> str:
    """The median times of gradclip with a list, and over these those of others."""
    found = {(row.load, row.job, row.peer): row for row in rows(results)}
    header = ["gradients", "job", "gradclip", *(PEERS[peer].title for peer in _SPEED_PEERS)]
    lines = []
    for name in loads:
        for job in _SPEED_JOBS:
            row = found.get((name, job, OURS[CPU]))
            if row and row.seconds:
                first = _describe(results, name) if job == _SPEED_JOBS[0] else ""
                others = (_times(found.get((name, job, peer))) for peer in _SPEED_PEERS)
                time = readable_time(row.seconds.median)
                lines.append([first, JOBS[job].title, time, *others])
    return markdown_table(header, lines)


def _describe(results: Results, name: str) -> str:
    facts = results.loads[name]
    return facts.title.replace(f", {facts.dtype}", "") + ("" if facts.cold else ", in cache")


def _times(row: Row | None) -> str:
    return f"{number(row.ratio.median)} x" if row and row.ratio else ""


def _of_roofline(found: Mapping[tuple[str, str, str], Row]) -> str:
    """How near gradclip comes to the machine's own speed, from memory."""
    parts = []
    for job in _SPEED_JOBS:
        row = found.get(("gpt2/float32", job, OURS[CPU]))
        if row is None or row.of_roofline is None:
            return "This run did not measure GPT-2's gradients."
        parts.append(f"{100 * row.of_roofline:.0f} %")
    return (
        "From memory (GPT-2), gradclip's norms reach {} of the speed of a plain read of the same bytes, a\n"
        "clip that clips {} of a read and a read-modify-write, one that has nothing to clip {} of a read.\n"
        "(A clip's second pass begins with what the first left in the cache, so that it may come out above.)"
    ).format(*parts)


def results_section(results: Results, path: Path) -> str:
    """The results of docs/performance.md."""
    first = [table for table in (tables.promises(results), tables.training(results)) if table]
    parts = [
        f"The run in {_link(path)}, {results.machine['seconds']} s:\n\n{tables.headline(results.machine)}",
        *map(markdown, first),
        "### Where gradclip is not first",
        markdown(tables.losses(results), titled=False),
        "What each contender moves, all times and the plots: [all tables of the run](performance-tables.md).",
    ]
    return "\n" + "\n\n".join(parts) + "\n\n"


def tables_section(results: Results, path: Path) -> str:
    """All of docs/performance-tables.md."""
    traffic = tables.traffic(results)
    parts = [
        f"Of the run in {_link(path)}, on the machine that [Performance](performance.md#results) describes.",
        "## The rule of traffic, measured",
        markdown(traffic, titled=False) if traffic else "This run had no load from memory.",
        "## Plots",
        *(f"![{what}]({_IMAGES.relative_to('docs') / name}.png)" for name, what in _captions(results)),
        "## All times",
        "Median time, and over gradclip's with a list.",
        *(markdown(tables.summary(results, name)) for name in results.loads),
        tables.NOTE,
    ]
    if results.left_out:
        parts.append("Left out: " + "; ".join(results.left_out) + ".")
    return "\n" + "\n\n".join(parts) + "\n\n"


def _link(path: Path) -> str:
    return f"[{path.as_posix()}](../{path.as_posix()})"


def _captions(results: Results) -> list[tuple[str, str]]:
    return [(name, what) for name, what, _ in plots(results) if name in _SHOWN]


def replaced(text: str, marks: tuple[str, str], section: str) -> str:
    """The text with another section between the marks."""
    first, last = marks
    if text.count(first) != 1 or text.count(last) != 1:
        raise BenchError(f"expected one line {first.strip()} and one {last.strip()}")
    return text[: text.index(first) + len(first)] + section + text[text.index(last) :]


def sections(results: Results, path: Path) -> dict[str, str]:
    """What is made here, by file."""
    return {
        "README.md": speed_section(results, path),
        "docs/performance.md": results_section(results, path),
        "docs/performance-tables.md": tables_section(results, path),
    }


def main() -> int:
    """Write the pages and their plots."""
    parser = argparse.ArgumentParser(prog="python -m tools.docs", description=__doc__)
    parser.add_argument("file", type=Path, help="a result of python -m bench in bench/results")
    path = parser.parse_args().file.resolve()
    try:
        if not path.is_relative_to(ROOT):
            raise BenchError(f"{path}: expected a file of this repository, in bench/results")
        results = load(path)
        for name, section in sections(results, path.relative_to(ROOT)).items():
            page = ROOT / name
            page.write_text(
                replaced(page.read_text(encoding="utf-8"), MARKS[name], section), encoding="utf-8"
            )
    except BenchError as error:
        print(f"python -m tools.docs: {error}", file=sys.stderr)
        return 2
    (ROOT / _IMAGES).mkdir(parents=True, exist_ok=True)
    for name, _, figure in plots(results):
        if name in _SHOWN:
            save_png(figure, ROOT / _IMAGES / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
