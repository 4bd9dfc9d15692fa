"""The command: what is to be run, what is missing, and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic

from gradclip._lab.experiment import Settings, merged
from gradclip._lab.questions import QUESTIONS
from gradclip._lab.report import sections, write_report
from gradclip._lab.runner import run_all
from gradclip._lab.store import LabError, Store
from gradclip._report.console import console_of_user

__all__ = ["LabError", "chosen_runs", "run_lab"]


def chosen_runs(only: Sequence[str], where: Mapping[str, Sequence[str]], quick: bool) -> list[Settings]:
    """The runs that a command line asks for.

    Args:
        only: Names of questions; none: all.
        where: By axis, the values of which runs must have one.
        quick: One seed, and fewer points.

    Raises:
        LabError: There is no such question, axis or value; the text lists what there is.
    """
    for name in only:
        if name not in QUESTIONS:
            raise LabError(f"--only: expected one of {', '.join(QUESTIONS)}, got {name}")
    names = only or QUESTIONS
    found = merged([one for name in names for one in QUESTIONS[name].design(quick)])
    for axis, values in where.items():
        if axis not in Settings.names():
            raise LabError(f"--where: expected an axis of {', '.join(Settings.names())}, got {axis}")
        known = [str(value) for value in sorted({getattr(one, axis) for one in found})]
        for value in values:
            if value not in known:
                raise LabError(f"--where {axis}: expected one of {', '.join(known)}, got {value}")
        found = [one for one in found if str(getattr(one, axis)) in values]
    return found


def run_lab(
    folder: Path, *, only: Sequence[str] = (), where: Mapping[str, Sequence[str]] | None = None,
    quick: bool = False, report_only: bool = False,
) -> None:  # fmt: skip
    """Run what is missing in a folder, and write its report.

    Args:
        folder: Of rows and report. What is there is kept.
        only: Names of questions.
        where: By axis, the values of which runs must have one.
        quick: One seed, and fewer points.
        report_only: Run nothing.

    Raises:
        LabError: What the user has to know.
        KeyboardInterrupt: Ctrl-C, after the report of what there is.
    """
    console = console_of_user()
    begin = monotonic()
    settings = chosen_runs(only, where or {}, quick)
    store = Store(folder)
    missing = [] if report_only else [one for one in settings if not store.has(one)]
    if report_only and not store.rows:
        raise LabError(f"{folder}: expected rows to report on, got none")
    if store.cut_off:
        console.print("The last row is half-written: it is left out, and its run is done again.")
    if store.rows:
        console.print(f"{len(store.rows)} runs are there already: {folder}", soft_wrap=True)
    interrupted = False
    if missing:
        store.begin()
        try:
            run_all(missing, store, console)
        except KeyboardInterrupt:
            interrupted = True
            console.print("Interrupted: the report is of what there is. The same command goes on from here.")
    for section in sections(store.rows, only or tuple(QUESTIONS)):
        console.print(f"\n[bold]{section.question.title}[/]  [dim]({section.basis})[/]")
        for sentence in section.answer:
            console.print(f"  {sentence}", markup=False)
    path = write_report(store.rows, store.about, folder)
    console.print(f"\nReport: {path}   ({monotonic() - begin:.0f} s in all)", soft_wrap=True)
    if interrupted:
        raise KeyboardInterrupt
