"""The report: questions, answers, pictures, tables, all made of rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape

from gradclip._lab.experiment import Settings
from gradclip._lab.questions import QUESTIONS, Question, Rows, frame
from gradclip._report.html import render, save_png, svg_of
from gradclip._report.style import STYLE
from gradclip._report.tables import ReportTable

__all__ = ["Section", "sections", "write_report"]

_TEMPLATE = Path(__file__).resolve().parent / "report.html.j2"


@dataclass(frozen=True)
class Section:
    """A question and its answer.

    Attributes:
        question: What is asked.
        answer: Sentences; none while runs are missing.
        basis: How many runs, and how many seeds.
        plots: With ``name``, ``what`` and the figure.
        tables: Exact values.
    """

    question: Question
    answer: list[str]
    basis: str
    plots: list[tuple[str, str, Any]]
    tables: list[ReportTable]


def sections(found: Sequence[dict[str, Any]], names: Sequence[str] = tuple(QUESTIONS)) -> list[Section]:
    """Answer the questions from rows."""
    # A run that was done again, in more detail, counts once.
    found = list({tuple(row[name] for name in Settings.names()): row for row in found}.values())
    every = frame(found)
    by_run = {tuple(row[name] for name in Settings.names()): i for i, row in enumerate(found)}
    return [_section(QUESTIONS[name], every, by_run) for name in names]


def _section(question: Question, every: Rows, by_run: dict[tuple[Any, ...], int]) -> Section:
    whole, least = (
        [tuple(getattr(one, name) for name in Settings.names()) for one in question.design(quick)]
        for quick in (False, True)
    )
    if whole:
        chosen = every.iloc[[by_run[key] for key in dict.fromkeys(whole) if key in by_run]]
        missing = sum(key not in by_run for key in least)
    else:  # of all trainings
        chosen = every[every["steps"] > 1].sort_values(list(Settings.names())) if len(every) else every
        missing = 0 if len(chosen) else 1
    if missing:
        return Section(
            question, [], f"Not answered: {missing} of at least {len(least)} runs are missing.", [], []
        )
    seeds = chosen["seed"].nunique()
    basis = f"{len(chosen)} runs, {seeds} {'seed' if seeds == 1 else 'seeds'} of each"
    with mpl.rc_context(STYLE):
        plots = list(question.plots(chosen))
    return Section(question, question.answer(chosen), basis, plots, list(question.tables(chosen)))


def write_report(found: Sequence[dict[str, Any]], about: dict[str, Any], folder: Path) -> Path:
    """Write ``report.html``, which needs nothing else, and its pictures as PNG in ``figures/``."""
    answered = sections(found)
    pictures = folder / "figures"
    pictures.mkdir(exist_ok=True)
    content = []
    for section in answered:
        for name, _, figure in section.plots:
            save_png(figure, pictures / f"{name}.png")
        content.append({
            "name": section.question.name,
            "title": section.question.title,
            "background": section.question.background,
            "answer": [_set(sentence) for sentence in section.answer],
            "basis": section.basis,
            "plots": [
                {"name": name, "what": what, "svg": svg_of(figure)} for name, what, figure in section.plots
            ],
            "tables": section.tables,
        })  # fmt: skip
    path = folder / "report.html"
    page = render(_TEMPLATE, sections=content, about=about, runs=len(found))
    path.write_text(page, encoding="utf-8")
    return path


def _set(sentence: str) -> Markup:
    """Powers as one writes them."""
    return Markup(re.sub(r"10\^(-?\d+)", r"10<sup>\1</sup>", str(escape(sentence))))
