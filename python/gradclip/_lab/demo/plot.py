"""The picture: loss curves above, below them every layer's norm in every step."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from gradclip._lab.demo.display import COLOUR_MAP, LOG_NORM_RANGE, NOT_FINITE_COLOUR

if TYPE_CHECKING:
    from gradclip._lab.demo.training import Run
    from gradclip._lab.training import BlowUp

__all__ = ["save_plot"]

GROUND, TEXT, FAINT = "#0e1116", "#e6e9ee", "#8b949e"
COLOURS = ("#ff6b6b", "#5ad1a5")  # without, with
STYLE: dict[Any, Any] = {
    "figure.facecolor": GROUND,
    "axes.facecolor": "#151a21",
    "axes.edgecolor": "#30363d",
    "axes.labelcolor": TEXT,
    "axes.titlecolor": TEXT,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": 12,
    "font.size": 12,
    "grid.color": "#262d36",
    "legend.frameon": False,
    "legend.fontsize": 12,
    "text.color": TEXT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
}


def save_plot(runs: tuple[Run, Run], blow_up: BlowUp | None, out: Path) -> None:
    """Draw both runs: in pixels, 1600 x 1000.

    Args:
        runs: The run without clipping, and the one with.
        blow_up: How the first one blew up, if it did.
        out: The file to write, in the format of its suffix.
    """
    without, clipped = runs
    done = max(run.steps_done for run in runs)
    # Without pyplot there is no window system to look for and nothing to close.
    with rc_context(STYLE):
        figure = Figure(figsize=(16, 10), dpi=100)
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(
            2, 3, width_ratios=(1, 1.45, 0.03), height_ratios=(1, 1.25),
            left=0.055, right=0.945, top=0.855, bottom=0.07, wspace=0.17, hspace=0.3,
        )  # fmt: skip
        start, whole = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
        steps, stopped = without.steps_done, without.stopped
        zoom = max(round(1.25 * steps), steps + 3) if stopped else steps
        _loss_curves(start, runs, zoom)
        start.set_ylabel("training loss")
        start.set_title(f"Training loss, the first {zoom} steps" if stopped else "Training loss")
        _loss_curves(whole, runs, done)
        whole.set_title("Training loss, the whole run")

        left, right = figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1])
        _heat_map(left, without, zoom)
        left.set_ylabel("layer  (1: input, last: output)")
        left.set_title("Norm of every layer's gradient without clipping")
        if blow_up:
            _mark(left, without, blow_up, zoom)
        image = _heat_map(right, clipped, done)
        right.set_title("With gradclip (norms before clipping)")
        bar = figure.colorbar(image, cax=figure.add_subplot(grid[1, 2]), extend="both")
        bar.set_label("gradient norm", color=TEXT)
        low, high = map(round, LOG_NORM_RANGE)
        ticks = range(low, high + 1, 2)
        bar.set_ticks(list(ticks), labels=[f"$10^{{{tick}}}$" for tick in ticks])

        _headline(figure, runs)
        picture = BytesIO()  # a file that is there is a whole one
        figure.savefig(picture, format=out.suffix[1:].lower(), facecolor=GROUND)
    out.write_bytes(picture.getvalue())


def _headline(figure: Figure, runs: tuple[Run, Run]) -> None:
    without, clipped = runs
    settings = clipped.settings
    title = f"{settings.layers} layers, trained twice"
    if not clipped.stopped and clipped.steps_done < settings.steps:
        title += f", interrupted after {clipped.steps_done} of {settings.steps} steps"
    figure.text(0.055, 0.945, title, size=22, weight="bold")
    x = 0.055
    for text, colour in (
        (f"without clipping: {_end(without)}", COLOURS[0]),
        (f"clipped to norm {settings.max_norm:g}: {_end(clipped)}", COLOURS[1]),
        ("same weights, same batches, same learning rate", FAINT),
    ):
        drawn = figure.text(x, 0.91, text, color=colour, size=14)
        x += drawn.get_window_extent().width / figure.bbox.width + 0.025


def _end(run: Run) -> str:
    if run.stopped:
        return f"gradients not finite in step {run.steps_done}"
    return f"test accuracy {run.test_accuracy:.3f}"


def _loss_curves(axes: Axes, runs: tuple[Run, Run], steps: int) -> None:
    for run, colour in zip(reversed(runs), reversed(COLOURS), strict=True):
        loss = np.array(run.history.loss[:steps])
        x = np.arange(1, len(loss) + 1)
        smooth = _running_median(loss, width=max(steps // 60, 1))
        axes.plot(x, loss, color=colour, alpha=0.3 if steps >= 120 else 0.0, linewidth=0.8)
        axes.plot(x, smooth, color=colour, linewidth=2.2, label=run.title)
        if run.stopped and run.steps_done <= steps:
            end = (float(x[-1]), float(loss[-1]))
            axes.plot(*end, "X", color=NOT_FINITE_COLOUR, markersize=13, markeredgecolor=GROUND, zorder=5)
            axes.annotate(
                "then NaN", end, xytext=(14, 0), textcoords="offset points", va="center",
                color=NOT_FINITE_COLOUR,
            )  # fmt: skip
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    # Within little more than a decade the powers of ten alone would leave the axis without numbers.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1,)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(0.5, steps + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.grid(True)
    axes.legend(loc="lower left", reverse=True)


def _running_median(values: npt.NDArray[np.float64], width: int) -> npt.NDArray[np.float64]:
    """Median over up to ``width`` values to either side."""
    return np.array([np.median(values[max(i - width + 1, 0) : i + width]) for i in range(len(values))])


def _heat_map(axes: Axes, run: Run, steps: int) -> AxesImage:
    norms = np.array(run.history.layer_norms).T
    with np.errstate(divide="ignore"):
        logs = np.where(np.isfinite(norms), np.log10(norms), np.nan)
    colours = colormaps[COLOUR_MAP].with_extremes(bad=NOT_FINITE_COLOUR)
    image = axes.imshow(
        logs, cmap=colours, norm=Normalize(*LOG_NORM_RANGE), aspect="auto", origin="lower",
        interpolation="nearest", extent=(0.5, norms.shape[1] + 0.5, 0.5, len(norms) + 0.5),
    )  # fmt: skip
    axes.set_xlim(0.5, steps + 0.5)
    axes.set_ylim(0.5, len(norms) + 0.5)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return image


def _mark(axes: Axes, run: Run, blow_up: BlowUp, steps: int) -> None:
    """Point at the layer that went first, and say where the run ended."""
    norms = run.history.layer_norms
    norm, layer = norms[blow_up.step][blow_up.layer], blow_up.layer + 1
    axes.annotate(
        f"layer {layer} goes first\nstep {blow_up.step + 1}: norm {norm:.1e}",
        (blow_up.step + 1, layer), xytext=(-30, 70), textcoords="offset points", ha="center",
        color=TEXT, weight="bold", arrowprops={"arrowstyle": "-|>", "color": TEXT, "lw": 1.6},
    )  # fmt: skip
    if run.stopped:
        end, middle = len(norms), len(norms[0]) / 2
        axes.text(
            (end + steps) / 2 + 0.5, middle, f"not finite in step {end}: the run ends", rotation=90,
            color=NOT_FINITE_COLOUR, ha="center", va="center",
        )  # fmt: skip
