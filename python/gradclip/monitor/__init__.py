"""A monitor that sees an explosion coming: which layer, when it began, what helps.

>>> import numpy as np, gradclip
>>> from gradclip.monitor import GradientMonitor
>>> monitor = GradientMonitor(on_alert="raise")
>>> for step in range(3):
...     grads = {"w": np.array([3.0, 4.0]), "b": np.array([1.0])}
...     alerts = monitor.update(gradclip.clip_by_global_norm_(grads, max_norm=1.0), loss=0.5)
>>> monitor
GradientMonitor(2 gradients, 3 steps, 0 alerts)
"""

from typing import TYPE_CHECKING, Any

from gradclip._public import claim
from gradclip.monitor._alerts import Alert, GradientAlertError
from gradclip.monitor._monitor import GradientMonitor, Writer
from gradclip.monitor._noise import NoiseScale
from gradclip.monitor._writers import CsvWriter, JsonlWriter, MlflowWriter, TensorBoardWriter, WandbWriter

if TYPE_CHECKING:
    from gradclip.monitor._view import LiveView

__all__ = [
    "Alert",
    "CsvWriter",
    "GradientAlertError",
    "GradientMonitor",
    "JsonlWriter",
    "LiveView",
    "MlflowWriter",
    "NoiseScale",
    "TensorBoardWriter",
    "WandbWriter",
    "Writer",
]

claim(__name__)


def __getattr__(name: str) -> Any:
    if name == "LiveView":  # needs rich
        from gradclip.monitor._view import LiveView  # noqa: PLC0415

        LiveView.__module__ = __name__
        return LiveView
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
