"""A callback for the Trainer of Hugging Face's transformers. Needs ``transformers``."""

from __future__ import annotations

from typing import Any

import transformers

from gradclip.monitor._callback import ClipsAndMonitors

__all__ = ["GradientMonitorCallback"]


class GradientMonitorCallback(ClipsAndMonitors, transformers.TrainerCallback):
    """Clips the gradients of every step, or only measures them, and feeds a monitor with the result.

    It acts before the optimizer's step, and after the Trainer's own clipping: set ``max_grad_norm=0`` in the
    ``TrainingArguments`` if ``max_norm`` is given, and to see norms as they are. Losses are those that the
    Trainer logs.

    Args:
        monitor: What is fed; by default one that warns.
        max_norm: The threshold, or a policy, as for :func:`gradclip.torch.clip_module_`; ``None`` only
            measures.
        nonfinite: As for :func:`gradclip.clip_by_global_norm_`.

    Attributes:
        monitor: The monitor.
        result: Of the last step.
    """

    _loss: float | None = None

    def on_pre_optimizer_step(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        control: transformers.TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Clip, or measure, and feed the monitor."""
        self.monitor.update(self._clip(kwargs["model"]), self._loss)
        self._loss = None

    def on_log(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        control: transformers.TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Remember the loss for the next step."""
        loss = kwargs.get("logs", {}).get("loss")
        self._loss = None if loss is None else float(loss)
