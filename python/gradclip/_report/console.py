"""Where the commands print."""

from __future__ import annotations

import os

from rich.console import Console

__all__ = ["console_of_user"]


def console_of_user() -> Console:
    """As wide as ``COLUMNS`` says, or as the terminal; without either nothing is wrapped."""
    console = Console(highlight=False)
    columns = os.environ.get("COLUMNS", "")
    # Rich would wrap at 80, or at the width of a terminal that only the errors go to.
    if not console.is_terminal and not (columns.isdecimal() and int(columns)):
        console.width = 10_000
    return console
