"""What is said of the runs: how the gradients blew up, and the table at the end."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from gradclip._lab.training import BLOW_UP_FACTOR

if TYPE_CHECKING:
    from gradclip._lab.demo.training import Run
    from gradclip._lab.training import BlowUp

__all__ = ["print_blow_up", "print_layers", "print_summary"]

# Of the bars beside the layers: as they should be, and the narrowest that are drawn.
BAR_WIDTH, NARROWEST_BAR = 36, 14


def print_blow_up(console: Console, run: Run, blow_up: BlowUp) -> None:
    """One line, at once: which layer went first, and by how much."""
    norm = run.history.layer_norms[blow_up.step][blow_up.layer]
    usual = blow_up.usual[blow_up.layer]
    if math.isfinite(norm):
        what = f"norm {norm:.3g}, {norm / usual:,.0f} times its usual {usual:.3g}"
    else:
        what = "norm not finite" + (f", usually {usual:.3g}" if math.isfinite(usual) else "")
    what += f" (usual: the median of the first steps; {BLOW_UP_FACTOR:g} times that is a blow-up)"
    where = f"layer {blow_up.layer + 1} blew up first, in step {blow_up.step + 1}"
    console.print(f"\n[bold red]{run.title}: {where}[/]: {what}")


def print_layers(console: Console, run: Run, blow_up: BlowUp) -> None:
    """Every layer's norm: usually, when the first one blew up, and in the last step of the run."""
    history, last = run.history, run.steps_done - 1
    for line in _story(run, blow_up):
        console.print(line)
    console.print()

    block = "#" if console.options.ascii_only else "█"
    columns = np.array([blow_up.usual, history.layer_norms[blow_up.step], history.layer_norms[last]])
    logs = np.log10(np.maximum(columns, 1e-300))
    low = math.floor(np.nanmin(logs))
    high = max(math.ceil(np.max(logs[np.isfinite(logs)])), low + 1)
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("layer", justify="right", overflow="fold")
    table.add_column("usual", justify="right", overflow="fold")
    table.add_column(f"step {blow_up.step + 1}", justify="right", style="yellow", overflow="fold")
    table.add_column(f"step {last + 1}", justify="right", style="red", overflow="fold")
    # Each of the others is up to 8 characters wide, and has one on either side.
    bar_width = min(BAR_WIDTH, console.width - 4 * 10 - 2)
    if bar_width >= NARROWEST_BAR:
        table.add_column(f"log scale from 1e{low:+03d} to 1e{high:+03d}", width=bar_width)
    for layer in range(run.settings.layers):
        bar, drawn = Text(), 0
        for log, style in zip(logs[:, layer], ("bright_black", "yellow", "red"), strict=True):
            share = (log - low) / (high - low) if math.isfinite(log) else 1.0
            length = max(round(share * bar_width) - drawn, 0)
            bar.append(block * length, style)
            drawn += length
        cells: list[str | Text] = [str(layer + 1), *(f"{norm:.3g}" for norm in columns[:, layer]), bar]
        table.add_row(*cells[: len(table.columns)], style="bold" if layer == blow_up.layer else "")
    console.print(table)


def _story(run: Run, blow_up: BlowUp) -> list[str]:
    """What happened before and after, all of it read from the history."""
    history, depth = run.history, run.settings.layers
    lines: list[str] = []
    first = np.array(history.layer_norms[0])
    if depth > 2:
        growth = first[0] / first[depth - 2]
        lines.append(
            f"Already in step 1 the gradients grew on their way back from layer {depth - 1} to layer 1: "
            f"{growth:.3g} times, or {growth ** (1 / (depth - 2)) - 1:+.1%} per layer."
        )
    names = history.nonfinite[-1]
    if names:
        listed = escape(", ".join(map(str, names[:4]))) + (", ..." if len(names) > 4 else "")
        layers = {str(name).partition(".")[0] for name in names}
        many = f"{len(layers)} layers"
        if len(layers) == 1:
            many = f"layer {history.layers.index(layers.pop()) + 1}"
        lines.append(
            f"In step {run.steps_done}, {len(names)} of {2 * depth} gradients, those of {many}, are no "
            f"longer finite ({listed}); with them the weights are lost, and the run ends."
        )
    overflow = [
        step
        for step, (total, loop) in enumerate(zip(history.total_norm, run.clip.loop_norm, strict=True))
        if math.isfinite(total) and not math.isfinite(loop)
    ]
    if overflow:
        measured = [history.total_norm[step] for step in overflow]
        lines.append(
            f"In {len(overflow)} steps, from step {overflow[0] + 1} on, every gradient was still finite: "
            f"NumPy's float32 norm was inf, gradclip measured {min(measured):.3g} to {max(measured):.3g}."
        )
    return lines


def print_summary(console: Console, runs: tuple[Run, Run]) -> None:
    """The table at the end."""
    table = Table(title="\nThe same weights, batches and learning rates", title_style="bold")
    table.add_column("", overflow="fold")
    for run in runs:
        table.add_column(run.title, justify="right", overflow="fold")

    def row(label: str, cells: list[str]) -> None:
        table.add_row(label, *cells)

    steps = runs[0].settings.steps
    row("steps trained", [f"{run.steps_done} of {steps}" for run in runs])
    row("last training loss", [f"{run.history.loss[-1]:.3g}" for run in runs])
    row("test loss", [f"{run.test_loss:.3f}" for run in runs])
    row("test accuracy", [_accuracy(run) for run in runs])
    row("largest gradient norm", [f"{run.largest_norm():.3g}" for run in runs])
    row("steps clipped", [_clipped(run) for run in runs])
    table.add_section()
    times = [run.milliseconds() for run in runs]
    row("step without clipping", [f"{rest:.2f} ms" for _, _, rest in times])
    row("gradclip, per step", [_share(clip, rest) for clip, _, rest in times])
    row("NumPy loop, per step", [_share(loop, rest) for _, loop, rest in times])
    console.print(table)

    parameters = runs[0].network.parameters
    size = sum(p.nbytes for p in parameters.values()) / 1e6
    console.print(
        f"The NumPy loop did the same to copies of the same {len(parameters)} gradients ({size:.1f} MB), in "
        "the same steps. Percentages: of the step that it is part of. Without clipping both only measure. "
        "Everything ran on one thread.",
        style="dim",
    )


def _accuracy(run: Run) -> str:
    return f"{run.test_accuracy:.3f}" + (" (outputs are NaN)" if math.isnan(run.test_loss) else "")


def _clipped(run: Run) -> str:
    if math.isinf(run.max_norm):
        return "none"
    clipped = run.clipped()
    return f"{clipped.sum()} ({clipped.mean():.0%}, to norm {run.max_norm:g})"


def _share(part: float, rest: float) -> str:
    return f"{part:.3f} ms = {part / (part + rest):.1%}"
