"""A live view of a training in the terminal."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from gradclip.monitor._monitor import GradientMonitor

__all__ = ["LiveView"]

_BARS = "▁▂▃▄▅▆▇█"


class LiveView:
    """Shows a monitor in the terminal while a training runs: the largest norms, their last steps, the alerts.

    Args:
        monitor: What is shown.
        layers: How many gradients.
        options: Of ``rich.live.Live``, such as ``console`` and ``refresh_per_second``.

    Example:
        >>> from gradclip.monitor import GradientMonitor, LiveView
        >>> monitor = GradientMonitor()
        >>> with LiveView(monitor):                     # doctest: +SKIP
        ...     for batch in batches:
        ...         monitor.update(step(batch))
    """

    def __init__(self, monitor: GradientMonitor, layers: int = 12, **options: Any) -> None:
        self._monitor = monitor
        self._layers = layers
        self._live = Live(get_renderable=self.render, **{"refresh_per_second": 4, **options})

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def render(self) -> Group:
        """What is shown now."""
        monitor = self._monitor
        if not monitor.step:
            return Group(Text("waiting for the first step"))
        norms = monitor.norms
        last = norms[-1]
        head = f"step {monitor.step}   norm {monitor.total_norms[-1]:.4g}"
        head += f"   coefficient {monitor.coefficients[-1]:.4g}"
        if math.isfinite(monitor.losses[-1]):
            head += f"   loss {monitor.losses[-1]:.4g}"
        table = Table(box=None, pad_edge=False, header_style="dim")
        for column, justify in (("gradient", "left"), ("norm", "right"), ("last steps", "left")):
            table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        order = np.argsort(-np.nan_to_num(last, nan=math.inf), kind="stable")[: self._layers]
        for i in order.tolist():
            style = None if math.isfinite(last[i]) else "red"
            name = escape((monitor.names or ())[i])
            table.add_row(name, f"{last[i]:.4g}", _sparkline(norms[-30:, i]), style=style)
        parts: list[Any] = [Text(head, style="bold"), table]
        for alert in list(monitor.alerts)[-4:]:
            parts.append(Text(str(alert), style="red" if alert.is_warning else "dim"))
        return Group(*parts)


def _sparkline(norms: np.ndarray) -> str:
    """Logarithms of norms as bars; a blank for zero, an exclamation mark for what is not finite."""
    good = np.isfinite(norms) & (norms > 0)
    if not good.any():
        return "!" * len(norms)
    logs = np.log(np.where(good, norms, 1.0))
    low, high = logs[good].min(), logs[good].max()
    places = np.rint((logs - low) / max(high - low, 1e-9) * (len(_BARS) - 1)).astype(int)
    bars = [
        _BARS[place] if ok else (" " if norm == 0 else "!")
        for place, ok, norm in zip(places.clip(0, 7), good, norms, strict=True)
    ]
    return "".join(bars)
