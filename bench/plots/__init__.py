"""The plots of a run: against peers, over the number of tensors, over bytes, and all ratios at a glance."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib as mpl

from bench.jobs import JOBS
from bench.peers import CPU, GPU, OURS, PEERS
from bench.plots.bars import against_peers, training
from bench.plots.curves import over_axis
from bench.plots.heat import ratios
from bench.results import Results
from bench.rows import rows
from gradclip._report.style import STYLE, Plot

__all__ = ["plots"]

_AXES = {"count": "number of tensors (8 MB in all)", "bytes": "bytes in 16 tensors"}


def plots(results: Results) -> Iterator[Plot]:
    """Every plot for which the run has data."""
    everything = list(rows(results))
    with mpl.rc_context(STYLE):
        if results.training:
            yield training(results)
        for place in (CPU, GPU):
            here = [row for row in everything if PEERS[row.peer].place == place]
            for axis, label in _AXES.items():
                on_axis = [row for row in here if row.seconds and results.loads[row.load].axis == axis]
                if len({row.load for row in on_axis}) > 1:
                    yield over_axis(results, on_axis, place, axis, label)
            for job in JOBS:
                doing = [row for row in here if row.job == job]
                if len({row.load for row in doing}) > 1:
                    yield ratios(results, doing, place, job)
            for load, facts in results.loads.items():
                of_load = [row for row in here if row.load == load]
                if not facts.axis and any(row.peer not in OURS.values() for row in of_load):
                    yield against_peers(results, of_load, place)
