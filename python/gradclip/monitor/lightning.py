"""A callback for Lightning's Trainer. Needs ``lightning``."""

from __future__ import annotations

from typing import Any

import lightning
import torch

from gradclip.monitor._callback import ClipsAndMonitors

__all__ = ["GradientMonitorCallback"]


class GradientMonitorCallback(ClipsAndMonitors, lightning.Callback):
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

    _is_new = False  # whether there was a step since the last batch

    def on_before_optimizer_step(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Clip, or measure."""
        self._clip(pl_module)
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
