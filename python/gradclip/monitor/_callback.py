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

__all__ = ["ClipsAndMonitors"]


class ClipsAndMonitors:
    """Clips a module by a threshold, a policy, or not at all, and has a monitor for the results."""

    def __init__(
        self,
        monitor: GradientMonitor | None = None,
        max_norm: Thresholds | Policy | None = None,
        nonfinite: NonFinite = "propagate",
    ) -> None:
        clips = max_norm is not None
        self.monitor = GradientMonitor(clips=clips, on_alert="warn") if monitor is None else monitor
        self.result: ClipResult | None = None
        self._max_norm: Any = max_norm if clips else math.inf
        self._nonfinite: NonFinite = nonfinite

    def _clip(self, module: torch.nn.Module) -> ClipResult:
        self.result = clip_module_(module, self._max_norm, nonfinite=self._nonfinite)
        return self.result

    def state_dict(self) -> dict[str, Any]:
        """The state of the policy, if it has one."""
        return {"policy": self._max_norm.state_dict()} if hasattr(self._max_norm, "state_dict") else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from it."""
        if "policy" in state_dict:
            self._max_norm.load_state_dict(state_dict["policy"])
