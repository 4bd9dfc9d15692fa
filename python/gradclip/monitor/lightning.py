"""A callback for Lightning's Trainer. Needs ``lightning``."""

from __future__ import annotations

from typing import Any

import lightning
import torch

from gradclip._api import NonFinite, Thresholds
from gradclip._measured import Policy
from gradclip._result import ClipResult
from gradclip.monitor._callback import Clipper
from gradclip.monitor._monitor import GradientMonitor

__all__ = ["GradientMonitorCallback"]


class GradientMonitorCallback(lightning.Callback):
    """Clips the gradients of every step, or only measures them, and feeds a monitor with result and loss.

    It acts before the optimizer's step, when gradients are accumulated and unscaled, and before Lightning's
    own clipping: leave ``gradient_clip_val`` of the Trainer alone if ``max_norm`` is given. The state of a
    policy goes into Lightning's checkpoints and comes back from them.

    Args:
        monitor: What is fed; by default one that warns.
        max_norm: The threshold, or a policy, as for :func:`gradclip.torch.clip_module_`; ``None`` only
            measures.
        nonfinite: As for :func:`gradclip.clip_by_global_norm_`.

    Attributes:
        monitor: The monitor.
        result: Of the last step.
    """

    def __init__(
        self,
        monitor: GradientMonitor | None = None,
        max_norm: Thresholds | Policy | None = None,
        nonfinite: NonFinite = "propagate",
    ) -> None:
        self._clipper = Clipper(monitor, max_norm, nonfinite)
        self.monitor = self._clipper.monitor
        self.result: ClipResult | None = None
        self._is_new = False

    def on_before_optimizer_step(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Clip, or measure."""
        self.result = self._clipper.clip(pl_module)
        self._is_new = True

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Feed the monitor, if the batch ended with a step."""
        if not self._is_new:
            return
        self._is_new = False
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        self.monitor.update(self.result, loss, batch=batch)

    def state_dict(self) -> dict[str, Any]:
        """The state of the policy."""
        return self._clipper.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from it."""
        self._clipper.load_state_dict(state_dict)
