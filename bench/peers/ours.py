"""gradclip, of a list and by a plan, on the CPU and on a GPU."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

import gradclip
from bench.jobs import Traffic
from bench.peers.base import GPU, PAIRS, ROWS, Peer, traffic
from bench.peers.with_torch import Torch, TorchCuda
from gradclip._dispatch import why_no_gpu

__all__ = [
    "Gradclip",
    "GradclipGpu",
    "GradclipGpuPlan",
    "GradclipMeasured",
    "GradclipPlan",
    "GradclipTorch",
    "GradclipTorchCuda",
    "GradclipUnbound",
]

_TRAFFIC = traffic(Traffic(1), Traffic(1, 1), Traffic(1), Traffic(1, 1), Traffic(1, 1))


class Gradclip(Peer):
    key, title = "gradclip", "gradclip"
    tolerance, rounding = 1e-7, 0.0
    traffic: ClassVar[Mapping[str, Traffic]] = {**_TRAFFIC, **ROWS, **PAIRS}

    def norms(self) -> Any:
        return gradclip.tensor_norms(self.grads)

    def clip(self, max_norm: float) -> Any:
        return gradclip.clip_by_global_norm_(self.grads, max_norm)

    def unscale_and_clip(self, max_norm: float, scale: float) -> Any:
        return gradclip.clip_by_global_norm_(self.grads, max_norm, grad_scale=scale)

    def norms_and_clip(self, max_norm: float) -> Any:
        return self.clip(max_norm)

    def row_norms(self) -> Any:
        return gradclip.row_norms(self.grads)

    def clip_rows(self, max_norm: Any) -> Any:
        return gradclip.clip_by_global_norm_(self.grads, max_norm, groups="row")

    def regularise_and_clip(self, max_norm: float, params: Sequence[Any]) -> Any:
        return gradclip.clip_by_global_norm_(self.grads, max_norm, params=params, l2=1.0)

    def clip_update(self, max_norm: float, base: Sequence[Any]) -> Any:
        return gradclip.clip_difference_(self.grads, base, max_norm)

    def total(self, answer: Any) -> float:
        if isinstance(answer, gradclip.ClipResult):
            return answer.total_norm
        return math.sqrt(math.fsum(answer * answer))

    def layer_norms(self, answer: Any) -> Sequence[float]:
        norms: Any = answer.norms if isinstance(answer, gradclip.ClipResult) else answer
        return list(map(float, norms))

    def confirm(self, answer: Any, max_norm: float, clipping: bool) -> None:
        assert answer.clipped == clipping, f"clipped: {answer.clipped}"

    def undo(self, answer: Any, factor: float) -> None:
        gradclip.scale_(self.grads, factor)


class GradclipPlan(Gradclip):
    key, title = "gradclip-plan", "gradclip, Plan"

    def __init__(self, grads: Sequence[Any]) -> None:
        super().__init__(grads)
        self._plan = gradclip.Plan(grads)

    def norms(self) -> Any:
        return self._plan.tensor_norms()

    def clip(self, max_norm: float) -> Any:
        return self._plan.clip_by_global_norm_(max_norm)

    def unscale_and_clip(self, max_norm: float, scale: float) -> Any:
        return self._plan.clip_by_global_norm_(max_norm, grad_scale=scale)

    def row_norms(self) -> Any:
        return self._plan.row_norms()

    def clip_rows(self, max_norm: Any) -> Any:
        return self._plan.clip_by_global_norm_(max_norm, groups="row")

    def regularise_and_clip(self, max_norm: float, params: Sequence[Any]) -> Any:
        return self._plan.clip_by_global_norm_(max_norm, params=params, l2=1.0)

    def clip_update(self, max_norm: float, base: Sequence[Any]) -> Any:
        return self._plan.clip_difference_(base, max_norm)

    def undo(self, answer: Any, factor: float) -> None:
        self._plan.scale_(factor)


class GradclipUnbound(Gradclip):
    """Rows as people had them before: a list of all of them."""

    key, title = "gradclip-unbound", "gradclip, rows in a list"
    traffic = ROWS

    def _rows(self) -> list[Any]:
        return [row for g in self.grads for row in g.reshape(len(g), -1)]

    def row_norms(self) -> Any:
        return [gradclip.tensor_norms(self._rows())]

    def clip_rows(self, max_norm: Any) -> Any:
        return gradclip.clip_by_norm_(self._rows(), np.concatenate(max_norm))


class GradclipMeasured(Gradclip):
    """Somebody decides between measuring and clipping: an adaptive threshold."""

    key, title = "gradclip-measured", "gradclip, measure and clip"
    traffic = _TRAFFIC

    def clip(self, max_norm: float) -> Any:
        measured = gradclip.measure(self.grads)
        return measured.clip_(min(max_norm, 2 * measured.total_norm))

    def unscale_and_clip(self, max_norm: float, scale: float) -> Any:
        measured = gradclip.measure(self.grads, grad_scale=scale)
        return measured.clip_(min(max_norm, 2 * measured.total_norm))


def on_host(answer: Any) -> Any:
    """A copy of what a call on a GPU returned: a result, or norms."""
    return answer.to_host() if hasattr(answer, "to_host") else answer.get()


class GradclipGpu(Gradclip):
    """Results stay on the device, and nothing waits; ``total`` and the others copy them."""

    key, title = "gradclip-gpu", "gradclip, GPU"
    place, needs = GPU, ("cupy",)
    traffic = _TRAFFIC

    @classmethod
    def missing(cls) -> str | None:
        return super().missing() or why_no_gpu()

    def clip(self, max_norm: float) -> Any:
        return gradclip.clip_by_global_norm_(self.grads, max_norm, nonfinite="skip")

    def unscale_and_clip(self, max_norm: float, scale: float) -> Any:
        return gradclip.clip_by_global_norm_(self.grads, max_norm, grad_scale=scale, nonfinite="skip")

    def total(self, answer: Any) -> float:
        return super().total(on_host(answer))

    def layer_norms(self, answer: Any) -> Sequence[float]:
        return super().layer_norms(on_host(answer))

    def confirm(self, answer: Any, max_norm: float, clipping: bool) -> None:
        super().confirm(answer.to_host(), max_norm, clipping)


class GradclipGpuPlan(GradclipGpu):
    key, title = "gradclip-gpu-plan", "gradclip, GPU, Plan"

    def __init__(self, grads: Sequence[Any]) -> None:
        super().__init__(grads)
        self._plan = gradclip.Plan(grads)

    def norms(self) -> Any:
        return self._plan.tensor_norms()

    def clip(self, max_norm: float) -> Any:
        return self._plan.clip_by_global_norm_(max_norm, nonfinite="skip")

    def unscale_and_clip(self, max_norm: float, scale: float) -> Any:
        return self._plan.clip_by_global_norm_(max_norm, grad_scale=scale, nonfinite="skip")

    def undo(self, answer: Any, factor: float) -> None:
        self._plan.scale_(factor)


class GradclipTorch(Torch):
    """The drop-ins of ``gradclip.torch``, in the place of PyTorch's own functions."""

    key, title = "gradclip-torch", "gradclip.torch"
    tolerance = Gradclip.tolerance
    traffic = _TRAFFIC

    def __init__(self, grads: Sequence[Any]) -> None:
        super().__init__(grads)
        self._ours: Any = importlib.import_module("gradclip.torch")
        self._named = [(str(i), parameter) for i, parameter in enumerate(self._parameters)]

    def norms(self) -> Any:
        return self._ours.get_total_norm(self._grads)

    def clip(self, max_norm: float) -> Any:
        return self._ours.clip_grad_norm_(self._parameters, max_norm)

    def unscale_and_clip(self, max_norm: float, scale: float) -> Any:
        return self._ours.unscale_and_clip_(self._scaler, self._optimizer, max_norm)

    def norms_and_clip(self, max_norm: float) -> Any:
        return self._ours.clip_module_(self._named, max_norm, nonfinite="skip")

    def total(self, answer: Any) -> float:
        return float(answer.total_norm if isinstance(answer, gradclip.ClipResult) else answer)

    def layer_norms(self, answer: Any) -> Sequence[float] | None:
        return list(map(float, answer.norms)) if isinstance(answer, gradclip.ClipResult) else None

    def undo(self, answer: Any, factor: float) -> None:
        gradclip.scale_(self._grads, factor)


class GradclipTorchCuda(GradclipTorch, TorchCuda):
    key, title = "gradclip-torch-cuda", "gradclip.torch, GPU"
    place, device, needs = GPU, "cuda", TorchCuda.needs
