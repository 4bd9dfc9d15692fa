"""The picture of a training: norms by layer and step, thresholds, losses, alerts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from gradclip.monitor._monitor import GradientMonitor

__all__ = ["plot"]

_INK, _GREY, _OURS, _WARNING = "#222222", "#6b6b6b", "#D55E00", "#CC3311"
_MOST_NAMES = 40


def plot(monitor: GradientMonitor) -> Figure:
    """Three panels over the steps that are remembered."""
    norms, names = monitor.norms, monitor.names or ()
    steps = np.arange(monitor.step - len(norms) + 1, monitor.step + 1)
    tall = min(max(len(names), 8), _MOST_NAMES) * 0.16
    has_loss = bool(np.isfinite(monitor.losses).any())
    figure = Figure(figsize=(9, 2.2 + tall + 1.6 * has_loss), layout="constrained")
    heights = [2.0, max(tall, 1.0)] + [1.5] * has_loss
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    _totals(axes[0], monitor, steps)
    _layers(figure, axes[1], norms, names, steps)
    if has_loss:
        axes[2].plot(steps, monitor.losses, color=_INK, linewidth=0.9)
        axes[2].set_ylabel("loss")
        finite = monitor.losses[np.isfinite(monitor.losses)]
        if finite.min() > 0 and finite.max() > 100 * finite.min():
            axes[2].set_yscale("log")
    axes[-1].set_xlabel("step")
    for alert in monitor.alerts:
        if alert.is_warning and steps.size and alert.step >= steps[0]:
            for ax in axes:
                ax.axvline(alert.step, color=_WARNING, linewidth=0.8, linestyle=":")
            axes[0].annotate(
                alert.kind, (alert.step, 1.0), xycoords=("data", "axes fraction"), rotation=35,
                fontsize=7, color=_WARNING, annotation_clip=False,
            )  # fmt: skip
    return figure


def _totals(ax: Axes, monitor: GradientMonitor, steps: np.ndarray) -> None:
    before, after = monitor.total_norms, monitor.clipped_norms
    shown = np.where(np.isfinite(before) & (before > 0), before, np.nan)
    ax.plot(steps, shown, color=_GREY, linewidth=0.9, label="global norm")
    if (monitor.coefficients < 1).any() and np.isfinite(after).any():
        ax.plot(steps, after, color=_OURS, linewidth=0.9, label="after clipping")
    broken = steps[~np.isfinite(before)]
    if broken.size:
        bottom = np.nanmin(shown) if np.isfinite(shown).any() else 1.0
        ax.plot(broken, np.full(len(broken), bottom), "x", color=_WARNING, markersize=4, label="not finite")
    ax.set_yscale("log")
    ax.set_ylabel("norm")
    ax.legend(loc="upper left", frameon=False, fontsize=8)


def _layers(figure: Figure, ax: Axes, norms: np.ndarray, names: tuple[str, ...], steps: np.ndarray) -> None:
    with np.errstate(all="ignore"):
        logs = np.log10(np.where(norms > 0, norms, np.nan)).T
    logs = np.ma.masked_invalid(logs)
    colours = mpl.colormaps["viridis"].with_extremes(bad="white")
    left, right = (steps[0] - 0.5, steps[-1] + 0.5) if steps.size else (0, 1)
    image = ax.imshow(
        logs, aspect="auto", interpolation="nearest", cmap=colours,
        extent=(left, right, len(names) - 0.5, -0.5),
    )  # fmt: skip
    figure.colorbar(image, ax=ax, label="log10 of the norm", pad=0.01)
    stride = -(-len(names) // _MOST_NAMES) or 1
    places = range(0, len(names), stride)
    ax.set_yticks(list(places), [names[i] for i in places], fontsize=6)
