"""Both runs side by side while they train: on a terminal live, elsewhere a line now and then."""

from __future__ import annotations

import math
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from gradclip._lab.demo.training import Run

__all__ = ["COLOUR_MAP", "LOG_NORM_RANGE", "NOT_FINITE_COLOUR", "Display", "norm_style"]

# One colour scale for every picture of norms, here and in the PNG: log10 of a layer's norm.
LOG_NORM_RANGE = (-4.0, 8.0)
COLOUR_MAP = "inferno"
NOT_FINITE_COLOUR = "#00e5ff"

REDRAWS_PER_SECOND = 10
LINES_WITHOUT_TERMINAL = 10
WIDEST_PANEL = 60
# What a panel needs beside its chart, and the narrowest chart that shows anything.
PANEL_TEXT, CHART = 26, 8


def norm_style(norm: float) -> str:
    """The colour of a norm, as ``#rrggbb``."""
    if not math.isfinite(norm):
        return NOT_FINITE_COLOUR
    low, high = LOG_NORM_RANGE
    share = (math.log10(max(norm, 1e-300)) - low) / (high - low)
    red, green, blue, _ = colormaps[COLOUR_MAP](min(max(share, 0.0), 1.0), bytes=True)
    return f"#{red:02x}{green:02x}{blue:02x}"


class Display:
    """Shows how the runs are doing. A context manager: what it draws is live inside of it."""

    def __init__(self, console: Console, runs: tuple[Run, Run]) -> None:
        self._console = console
        self._runs = runs
        live = console.is_terminal and not console.is_dumb_terminal and not console.options.ascii_only
        # Redrawn by the training loop between two steps: a thread that draws would steal time from a step.
        self._live = Live(console=console, auto_refresh=False) if live else None
        self._last_drawn = -math.inf

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live:
            if self._runs[0].steps_done:
                self._draw()
            self._live.stop()

    def update(self, step: int, last: bool) -> None:
        """Show the state after this many steps, unless the last drawing is too recent."""
        if self._live:
            if monotonic() - self._last_drawn >= 1 / REDRAWS_PER_SECOND:
                self._draw()
        else:
            steps = self._runs[0].settings.steps
            if step == 1 or last or step % math.ceil(steps / LINES_WITHOUT_TERMINAL) == 0:
                parts = [f"step {step:{len(str(steps))}d}/{steps}"]
                parts += [f"{run.title}: {_state(run)}" for run in self._runs]
                line = "   ".join(parts)
                self._console.print(line if len(line) <= self._console.width else "\n  ".join(parts))

    def _draw(self) -> None:
        assert self._live is not None
        width = self._console.width
        if width >= 2 * (PANEL_TEXT + CHART):
            grid = Table.grid(expand=True, padding=(0, 1))
            for _ in self._runs:
                grid.add_column(ratio=1)
            grid.add_row(*(_panel(run, min(width // 2, WIDEST_PANEL)) for run in self._runs))
            self._live.update(grid, refresh=True)
        else:
            panels = (_panel(run, min(width, WIDEST_PANEL)) for run in self._runs)
            self._live.update(Group(*panels), refresh=True)
        self._last_drawn = monotonic()


def _state(run: Run) -> str:
    if run.stopped:
        return f"stopped in step {run.steps_done}, not finite"
    return f"loss {run.history.loss[-1]:.3f}, test accuracy {run.test_accuracy:.3f}"


def _panel(run: Run, width: int) -> Panel:
    """What is known of a run; without charts where there is no room for them."""
    history, done = run.history, run.steps_done
    room = width - PANEL_TEXT
    chart = max(room, CHART)
    rows = Table.grid(padding=(0, 1))
    rows.add_column(style="dim", overflow="fold")
    rows.add_column(min_width=9, justify="right", overflow="fold")
    if room >= CHART:
        rows.add_column(width=chart)

    def row(label: str, value: str, drawn: ProgressBar | Text) -> None:
        rows.add_row(*(label, value, drawn)[: len(rows.columns)])

    row("step", str(done), ProgressBar(total=run.settings.steps, completed=done, width=chart))
    row("loss", f"{history.loss[-1]:.3f}", _sparkline(history.loss, chart, (-4.0, 1.0)))
    norms = history.total_norm
    row("norm", f"{norms[-1]:.3g}", _sparkline(norms, chart, LOG_NORM_RANGE))
    row("layers", f"1 to {run.settings.layers}", _strip(np.array(history.layer_norms[-1]), chart))
    accuracy = "" if math.isnan(run.test_accuracy) else f"{run.test_accuracy:.3f}"
    row("accuracy", accuracy, Text("on test digits", "dim"))
    if run.stopped:
        state, colour = f"stopped in step {done}: gradients not finite", "bold red"
    else:
        clipped = int(run.clipped().sum())
        state, colour = f"clipped {clipped} of {done} steps" if clipped else "training", "green"
    return Panel(Group(rows, Text(state, colour)), title=f"[bold]{run.title}", border_style=colour)


def _sparkline(values: list[float], width: int, log_range: tuple[float, float]) -> Text:
    """A curve of log10 of the values, coarsened to a width by maxima."""
    blocks = "▁▂▃▄▅▆▇█"
    low, high = log_range
    text = Text()
    for part in np.array_split(np.array(values), min(width, len(values))):
        value = float(part.max())
        if not math.isfinite(value):
            text.append("x", NOT_FINITE_COLOUR)
            continue
        share = (math.log10(max(value, 1e-300)) - low) / (high - low)
        text.append(blocks[min(max(int(share * len(blocks)), 0), len(blocks) - 1)])
    return text


def _strip(norms: npt.NDArray[np.float64], width: int) -> Text:
    """Layers from left to right in the colours of their norms, two to a character."""
    text = Text()
    shown = norms[np.linspace(0, len(norms) - 1, min(2 * width, len(norms) // 2 * 2)).round().astype(int)]
    for left, right in shown.reshape(-1, 2).tolist():
        text.append("▌", f"{norm_style(left)} on {norm_style(right)}")
    return text
