"""What all runs together say of the monitor, and of the time that clipping takes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from matplotlib.figure import Figure

from gradclip._lab.experiment import EXPLOSION, Settings
from gradclip._lab.questions._base import Question, Rows, listed, percent
from gradclip._lab.questions.clipping import NAMES
from gradclip._report.style import COLORS, OURS, Plot, title
from gradclip._report.tables import ReportTable

__all__ = ["Cost", "Warning"]


class _OfAll(Question):
    """Needs no runs of its own."""

    def design(self, quick: bool) -> list[Settings]:
        return []


class Warning(_OfAll):
    """Whether the monitor warns in time."""

    name = "warning"
    title = "Does the monitor warn before the explosion, and does training recover?"
    background = (
        "gradclip.monitor looks at every step and says when a norm grows such that it will have exploded in "
        f"a few steps. Here an explosion is a global norm above {EXPLOSION:.0f} after a step in which it was "
        "below. All trainings of the laboratory together."
    )

    def answer(self, rows: Rows) -> list[str]:
        blown, calm = _late(rows), _quiet(rows)
        if not len(blown):
            return [
                f"None of {len(rows)} trainings exploded after its first step: there was nothing to warn of."
            ]
        warned = blown[blown["warned_step"] < blown["exploded_step"]]
        lead = (warned["exploded_step"] - warned["warned_step"]).astype(float)
        false = calm[calm["warned_of"].isin(["growing", "exploded", "nonfinite"])]
        return [
            f"{len(blown)} of {len(rows)} trainings exploded after their first steps. The monitor had warned "
            f"before {len(warned)} of them ({percent(len(warned) / len(blown))})"
            + (f", {lead.median():.0f} steps before in the median." if len(lead) else "."),
            f"Of the {len(blown)}, {int(blown['lost'].sum())} ended with parameters that are infinite or "
            f"NaN, and {int(blown['learnt'].sum())} had learnt in the end.",
            f"Of {len(calm)} trainings that learnt without an explosion, it warned of one in {len(false)} "
            f"({percent(len(false) / max(len(calm), 1))}).",
        ]

    def plots(self, rows: Rows) -> Iterator[Plot]:
        blown = _late(rows)
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        axes = figure.subplots()
        lead = (blown["exploded_step"] - blown["warned_step"]).astype(float).dropna()
        axes.hist(np.clip(lead, -5, 60), bins=list(range(-5, 62, 2)), color=OURS)
        axes.axvline(0, color="#222222", linewidth=1)
        axes.set_xlabel("steps between the first warning and the explosion (60: or more)")
        axes.set_ylabel("trainings")
        title(figure, "How early the monitor warned")
        yield "warning", "Right of the line: before the explosion", figure

    def tables(self, rows: Rows) -> Iterator[ReportTable]:
        blown = _late(rows)
        cells = []
        for clipping, chosen in blown.groupby("clipping", sort=False):
            early = (chosen["warned_step"] < chosen["exploded_step"]).sum()
            cells.append((NAMES[str(clipping)], str(len(chosen)), str(int(early))))
        yield ReportTable(
            "Explosions and warnings", ("clipping", "exploded", "warned before"), cells, [""] * len(cells)
        )


class Cost(_OfAll):
    """The share of a step that clipping takes."""

    name = "cost"
    title = "What does clipping cost?"
    background = (
        "The time of a clip against that of the whole step, in networks as small as these, where a step "
        "takes a few thousandths of a second: in larger ones the share is smaller (docs/performance.md). "
        "Times depend on the machine and are the only figures here that differ from run to run."
    )

    def answer(self, rows: Rows) -> list[str]:
        share = _shares(rows)
        words = [f"{NAMES[kind]} {percent(value)}" for kind, value in share.items() if kind != "none"]
        return [
            f"In the median of {len(rows)} trainings measuring without clipping takes "
            f"{percent(share['none'])} of a step" + (f"; with clipping: {listed(words)}." if words else ".")
        ]

    def plots(self, rows: Rows) -> Iterator[Plot]:
        share = _shares(rows)
        figure = Figure(figsize=(8, 0.9 + 0.32 * len(share)), layout="constrained")
        axes = figure.subplots()
        for y, value in enumerate(share.values()):
            axes.barh(y, 100 * value, color=COLORS[0], height=0.7)
            axes.text(100 * value, y, f" {100 * value:.1f} %", va="center")
        axes.set_yticks(range(len(share)), [NAMES[kind] for kind in share])
        axes.invert_yaxis()
        axes.set_xlim(0, 100 * max(share.values()) * 1.2)
        axes.set_xlabel("of a training step, %")
        title(figure, "Share of a step that clipping takes")
        yield "cost", "Median over all trainings of the laboratory", figure

    def tables(self, rows: Rows) -> Iterator[ReportTable]:
        cells = []
        for kind, chosen in rows.groupby("clipping", sort=False):
            clip, rest = (1e6 * chosen[name].median() for name in ("seconds_clip", "seconds_rest"))
            cells.append((NAMES[str(kind)], f"{clip:.0f} µs", f"{rest:.0f} µs", str(len(chosen))))
        yield ReportTable(
            "Times", ("clipping", "clip", "rest of the step", "trainings"), cells, [""] * len(cells)
        )


def _late(rows: Rows) -> Rows:
    return rows[rows["exploded"] & (rows["exploded_step"] > 1)]


def _quiet(rows: Rows) -> Rows:
    return rows[~rows["exploded"] & rows["learnt"]]


def _shares(rows: Rows) -> dict[str, float]:
    share = rows["seconds_clip"] / (rows["seconds_clip"] + rows["seconds_rest"])
    return {
        str(kind): float(value)
        for kind, value in share.groupby(rows["clipping"], sort=False).median().items()
    }
