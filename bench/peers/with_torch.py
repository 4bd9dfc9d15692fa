"""PyTorch on the CPU and, with gradients there, on a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

import gradclip
from bench.jobs import LOSS_SCALE, NO_CLIP, REGULARISE, UPDATE, Job, Traffic
from bench.peers.base import GPU, ROWS, Peer, traffic
from gradclip._dispatch import why_no_gpu

__all__ = ["Apex", "Torch", "TorchCuda", "TorchCudaLoop", "TorchLoop", "TransformerEngine"]


class Torch(Peer):
    """``clip_grad_norm_`` and, for the loss scale, ``GradScaler.unscale_`` before it, as documented."""

    key, title = "torch", "PyTorch foreach"
    needs: ClassVar[tuple[str, ...]] = ("torch",)
    foreach: ClassVar[bool] = True
    device: ClassVar[str] = "cpu"
    traffic: ClassVar[Mapping[str, Traffic]] = {
        **traffic(Traffic(1), Traffic(1, 1), Traffic(1, 1), Traffic(1, 2), Traffic(2, 1)),
        # A sum; a norm; a clip. A difference; its norm; its product; a sum.
        REGULARISE: Traffic(2, 2),
        UPDATE: Traffic(5, 3),
    }

    def __init__(self, grads: Sequence[Any]) -> None:
        super().__init__(grads)
        self._torch: Any = importlib.import_module("torch")
        self._grads = [self._tensor(g) for g in grads]
        # clip_grad_norm_ looks at .grad alone: parameters without memory of their own will do.
        self._parameters = []
        for g in self._grads:
            memory = self._torch.empty(1, dtype=g.dtype, device=g.device)
            parameter = self._torch.nn.Parameter(memory.expand(g.shape))
            parameter.grad = g
            self._parameters.append(parameter)
        self._optimizer = self._torch.optim.SGD(self._parameters, lr=0.0, foreach=self.foreach)
        self._new_scaler()

    def _tensor(self, grad: Any) -> Any:
        self._torch.set_num_threads(gradclip.get_num_threads())
        if grad.dtype.name == "bfloat16":
            return self._torch.from_numpy(grad.view(np.int16)).view(self._torch.bfloat16)
        return self._torch.from_numpy(grad)

    def _new_scaler(self) -> None:
        """Which takes an optimizer once in a step."""
        self._scaler = self._torch.amp.GradScaler(self.device, init_scale=LOSS_SCALE)
        self._scaler.scale(self._torch.zeros((), device=self.device))

    def call(self, job: Job, max_norm: Any, beside: Sequence[Any] = ()) -> Callable[[], Any]:
        return super().call(job, max_norm, [self._tensor(array) for array in beside])

    def regularise_and_clip(self, max_norm: float, params: Sequence[Any]) -> Any:
        self._torch._foreach_add_(self._grads, params, alpha=1.0)
        return self.clip(max_norm)

    def clip_update(self, max_norm: float, base: Sequence[Any]) -> Any:
        deltas = self._torch._foreach_sub(self._grads, base)
        total = self._torch.nn.utils.get_total_norm(deltas, foreach=self.foreach)
        self._torch._foreach_mul_(deltas, (max_norm / total).clamp(max=1.0))
        self._torch._foreach_copy_(self._grads, self._torch._foreach_add(base, deltas))
        return total

    def norms(self) -> Any:
        return self._torch.nn.utils.get_total_norm(self._grads, foreach=self.foreach)

    def clip(self, max_norm: float) -> Any:
        return self._torch.nn.utils.clip_grad_norm_(self._parameters, max_norm, foreach=self.foreach)

    def unscale_and_clip(self, max_norm: float, scale: float) -> Any:
        self._scaler.unscale_(self._optimizer)
        return self.clip(max_norm)

    def norms_and_clip(self, max_norm: float) -> Any:
        norms = self._torch.stack(self._torch._foreach_norm(self._grads)).tolist()
        return norms, self.clip(max_norm)

    def total(self, answer: Any) -> float:
        return float(answer[1] if isinstance(answer, tuple) else answer)

    def layer_norms(self, answer: Any) -> Sequence[float] | None:
        return answer[0] if isinstance(answer, tuple) else None

    def undo(self, answer: Any, factor: float) -> None:
        self._torch._foreach_mul_(self._grads, factor)

    def settle(self) -> None:
        if self._scaler._per_optimizer_states:
            self._new_scaler()


class TorchLoop(Torch):
    """A call for each tensor."""

    key, title = "torch-loop", "PyTorch loop"
    foreach = False
    traffic: ClassVar[Mapping[str, Traffic]] = {**Torch.traffic, **ROWS}

    def norms_and_clip(self, max_norm: float) -> Any:
        return [float(g.norm()) for g in self._grads], self.clip(max_norm)

    def call(self, job: Job, max_norm: Any, beside: Sequence[Any] = ()) -> Callable[[], Any]:
        if job.of_rows:
            pairs = zip(max_norm, self._grads, strict=True)
            max_norm = [self._torch.from_numpy(limits).to(g) for limits, g in pairs]
        return super().call(job, max_norm, beside)

    def row_norms(self) -> Any:
        return [g.flatten(1).norm(dim=1) if g.dim() > 1 else g.abs() for g in self._grads]

    def clip_rows(self, max_norm: Any) -> Any:
        for g, norms, limits in zip(self._grads, self.row_norms(), max_norm, strict=True):
            coefficients = (limits / norms).clamp_(max=1.0)
            g.mul_(coefficients.reshape(-1, *[1] * (g.dim() - 1)))


def _cuda_is_missing() -> str | None:
    torch: Any = importlib.import_module("torch")
    return None if torch.cuda.is_available() else "this torch reaches no GPU"


class TorchCuda(Torch):
    """Over CuPy's arrays."""

    key, title = "torch-cuda", "PyTorch foreach, GPU"
    place, device = GPU, "cuda"
    needs: ClassVar[tuple[str, ...]] = ("torch", "cupy")

    @classmethod
    def missing(cls) -> str | None:
        return super().missing() or why_no_gpu() or _cuda_is_missing()

    def _tensor(self, grad: Any) -> Any:
        if grad.dtype.name == "bfloat16":  # CuPy's DLPack does not know it
            return self._torch.utils.dlpack.from_dlpack(grad.view(np.int16)).view(self._torch.bfloat16)
        return self._torch.utils.dlpack.from_dlpack(grad)


class TorchCudaLoop(TorchCuda):
    key, title = "torch-cuda-loop", "PyTorch loop, GPU"
    foreach = False

    def norms_and_clip(self, max_norm: float) -> Any:
        norms = self._torch.stack([g.norm() for g in self._grads]).tolist()
        return norms, self.clip(max_norm)


class Apex(TorchCuda):
    """``apex.contrib.clip_grad``, which works on all tensors of a dtype by one kernel."""

    key, title = "apex", "apex"
    needs = ("torch", "cupy", "apex.contrib.clip_grad")

    def clip(self, max_norm: float) -> Any:
        apex: Any = importlib.import_module("apex.contrib.clip_grad")
        return apex.clip_grad_norm_(self._parameters, max_norm)


class TransformerEngine(TorchCuda):
    """Its multi-tensor kernels, called as Megatron-LM calls them."""

    key, title = "transformer-engine", "TransformerEngine"
    needs = ("torch", "cupy", "transformer_engine")
    # The host compares, so nothing is written where nothing is clipped.
    traffic: ClassVar[Mapping[str, Traffic]] = {**Torch.traffic, NO_CLIP: Traffic(1)}

    def __init__(self, grads: Sequence[Any]) -> None:
        super().__init__(grads)
        self._engine: Any = importlib.import_module("transformer_engine.pytorch.optimizers")
        self._overflow = self._torch.zeros(1, dtype=self._torch.int, device="cuda")

    def _apply(self, kernel: Any, lists: list[Any], *arguments: Any) -> Any:
        return self._engine.multi_tensor_applier(kernel, self._overflow, lists, *arguments)

    def norms(self) -> Any:
        return self._apply(self._engine.multi_tensor_l2norm, [self._grads], False)[0]

    def clip(self, max_norm: float) -> Any:
        total = self.norms()
        coefficient = max_norm / (float(total) + 1e-6)  # as Megatron-LM does, by the host
        if coefficient < 1:
            self._apply(self._engine.multi_tensor_scale, [self._grads, self._grads], coefficient)
        return total
