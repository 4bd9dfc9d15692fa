"""What the callbacks of training frameworks share: they clip, or measure, and feed a monitor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from gradclip._api import NonFinite, Thresholds
from gradclip._measured import Policy
from gradclip._result import ClipResult
from gradclip.monitor._monitor import GradientMonitor
from gradclip.torch import clip_module_

__all__ = ["Clipper"]


class Clipper:
    """Clips a module by a threshold, a policy, or not at all, and has a monitor for the results."""

    def __init__(
        self, monitor: GradientMonitor | None, max_norm: Thresholds | Policy | None, nonfinite: NonFinite
    ) -> None:
        clips = max_norm is not None
        self.monitor = GradientMonitor(clips=clips, on_alert="warn") if monitor is None else monitor
        self.max_norm: Any = max_norm if clips else math.inf
        self._nonfinite: NonFinite = nonfinite

    def clip(self, module: torch.nn.Module) -> ClipResult:
        return clip_module_(module, self.max_norm, nonfinite=self._nonfinite)

    def state_dict(self) -> dict[str, Any]:
        """The policy's state, if it has one."""
        return {"policy": self.max_norm.state_dict()} if hasattr(self.max_norm, "state_dict") else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "policy" in state:
            self.max_norm.load_state_dict(state["policy"])
