"""What a question is: runs that answer it, sentences and pictures that are made from their rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from gradclip._lab.experiment import Settings
from gradclip._report.style import Plot
from gradclip._report.tables import ReportTable

__all__ = [
    "CALM",
    "HOT",
    "LEARNT",
    "Question",
    "Rows",
    "count_of",
    "frame",
    "listed",
    "outcomes",
    "percent",
    "power",
    "seeds",
    "size",
    "spread",
    "times",
]

Rows: TypeAlias = pd.DataFrame

# The two base points: one network (20 layers, ReLU, weights of He et al.), which trains at one learning rate
# and blows up at ten times that.
CALM = Settings(learning_rate=0.005)
HOT = Settings(learning_rate=0.05)

# From which accuracy on a run has learnt: ten digits; the next of some 60 characters.
LEARNT = {"digits": 0.9, "text": 0.25}


class Question:
    """A question of the laboratory.

    Attributes:
        name: For ``--only``.
        title: The question as a heading.
        background: What one has to know to read the answer: a paragraph.
    """

    name: str
    title: str
    background: str

    def design(self, quick: bool) -> list[Settings]:
        """The runs that answer it; those of a quick look are some of those of the whole."""
        raise NotImplementedError

    def answer(self, rows: Rows) -> list[str]:
        """Sentences, every figure in them computed from the rows."""
        raise NotImplementedError

    def plots(self, rows: Rows) -> Iterator[Plot]:
        """Pictures of the rows."""
        raise NotImplementedError

    def tables(self, rows: Rows) -> Iterator[ReportTable]:
        """The exact values behind the pictures."""
        raise NotImplementedError


def seeds(settings: Iterable[Settings], quick: bool) -> list[Settings]:
    """Every one with five seeds, or with one."""
    return [Settings(**(one.varied() | {"seed": seed, "in_detail": one.in_detail}))
            for one in settings for seed in range(1 if quick else 5)]  # fmt: skip


def frame(found: Sequence[dict[str, Any]]) -> Rows:
    """Rows as a table, with what follows from them.

    ``trouble``: the gradients exploded, the parameters were lost, or the loss ended above where it began.
    ``learnt``: the accuracy in the end is at least that of :data:`LEARNT`.
    """
    rows = pd.DataFrame(found)
    if rows.empty:
        return rows
    last = rows["last_loss"].astype(float).fillna(math.inf)
    rows["exploded"] = rows["exploded_step"].notna()
    rows["trouble"] = rows["exploded"] | rows["lost"] | (last > rows["first_loss"].astype(float))
    rows["learnt"] = rows["test_accuracy"] >= rows["subject"].map(LEARNT)
    return rows


# --- Words for figures -----------------------------------------------------------------------------


def percent(share: float) -> str:
    """Such as "94 %"."""
    return f"{100 * share:.0f} %"


def times(factor: float) -> str:
    """A factor as a person writes it: two digits, or a power of ten."""
    return f"{factor:.2g}" if 0.01 <= factor < 1000 else power(factor)


def size(value: float) -> str:
    """Of a norm: three digits."""
    return f"{value:.3g}" if math.isfinite(value) else "not finite"


def power(value: float) -> str:
    """A power of ten, such as "10^-6"; the report sets it."""
    if not math.isfinite(value) or value <= 0:
        return "0" if value == 0 else "not finite"
    return f"10^{math.log10(value):.0f}"


def count_of(rows: Any, name: str) -> str:
    """How many rows have it: "3 of 5"."""
    return f"{int(rows[name].sum())} of {len(rows)}"


def outcomes(
    rows: Rows, title: str, by: Mapping[str, str], more: Mapping[str, Callable[[Rows], str]] | None = None
) -> ReportTable:
    """How the runs of every group ended.

    Args:
        rows: Of runs.
        title: Of the table.
        by: The columns that make the groups, with their headings.
        more: By heading: what else is said of a group.
    """
    more = more or {}
    cells = []
    for key, chosen in rows.groupby(list(by), sort=False):
        accuracy = chosen["test_accuracy"]
        cells.append(
            (
                *(part if isinstance(part, str) else f"{part:g}" for part in key),
                *(text(chosen) for text in more.values()),
                percent(accuracy.median()),
                f"{percent(accuracy.min())} to {percent(accuracy.max())}",
                *(count_of(chosen, name) for name in ("exploded", "lost", "learnt")),
            )
        )
    header = (*by.values(), *more, "accuracy", "lowest to highest", "exploded", "lost", "learnt")
    return ReportTable(title, header, cells, [""] * len(cells))


def listed(words: Sequence[str]) -> str:
    """With commas, and an "and" before the last."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else "none"


def spread(rows: Rows, by: list[str], value: str) -> pd.DataFrame:
    """Median, lowest and highest of a value in every group; what is not finite is the highest."""
    values = rows[value].astype(float).fillna(np.inf)
    return values.groupby([rows[key] for key in by], sort=False).agg(["median", "min", "max", "count"])
