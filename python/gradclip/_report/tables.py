"""Tables of text, for the terminal and for Markdown; ``macros.html.j2`` has the one for HTML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["MARKS", "ReportTable", "markdown", "markdown_table", "number", "print_table", "readable_time"]

# How a terminal shows the rows of a mark; page.html.j2 says it for HTML.
MARKS = {"ours": "bold cyan", "good": "green", "bad": "red"}


@dataclass(frozen=True)
class ReportTable:
    """Cells as text.

    Attributes:
        title: What it shows.
        header: A name for each column.
        rows: As many cells each as the header has.
        marks: What each row is, such as one of ``MARKS``, or "" for one like any other.
    """

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    marks: Sequence[str]


def number(value: float) -> str:
    """No decimals from 100 on, two below, and below a tenth two digits."""
    size = abs(value)
    return f"{value:.0f}" if size >= 100 or size == 0 else f"{value:.2g}" if size < 0.1 else f"{value:.2f}"


def readable_time(seconds: float) -> str:
    """Such as "16.9 ms"."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 999 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def print_table(
    table: ReportTable, console: Console, styles: Mapping[str, str] = MARKS, *, left: int = 1
) -> None:
    """Print one table.

    Args:
        table: Its text is shown as it is: Rich's markup in it means nothing.
        console: Where to.
        styles: Rich's style for the rows of a mark; those of any other have none.
        left: This many columns are names, and begin on the left; the rest are figures and end on the right.

    Raises:
        ValueError: If there is not one mark for each row.
    """
    view = Table(title=escape(table.title), title_justify="left")
    for i, column in enumerate(table.header):
        view.add_column(escape(column), justify="left" if i < left else "right")
    for cells, mark in zip(table.rows, table.marks, strict=True):
        view.add_row(*map(escape, cells), style=styles.get(mark))
    console.print(view)


def markdown(table: ReportTable, titled: bool = True) -> str:
    """A table for the documentation."""
    text = markdown_table(table.header, table.rows)
    return f"**{table.title}**\n\n{text}" if titled else text


def markdown_table(header: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """Cells of text, with a line between the header and the rows."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))
