"""optax under ``jax.jit``: compiled once; JAX arrays are immutable, so clipped gradients are new ones."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from bench.cases import Array
from bench.jobs import LOG, NORMS, UNSCALE, Job, Traffic
from bench.peers.base import GPU, Peer, traffic
from gradclip._dispatch import why_no_gpu

__all__ = ["GradclipJax", "Optax", "OptaxCuda", "OptaxDonated"]

# Read when JAX first looks for a GPU, of whose memory it would take three quarters.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


class Optax(Peer):
    key, title = "optax", "optax, jit"
    needs: ClassVar[tuple[str, ...]] = ("jax", "optax")
    copies = 2.0  # its own gradients and the clipped ones
    most_tensors = 1000  # compiling a program of 20 000 arguments takes longer than all else together
    traffic = traffic(Traffic(1), Traffic(1, 1), Traffic(1, 1), Traffic(1, 1), Traffic(2, 1))
    donate = False
    platform = "cpu"  # of JAX: where there is a GPU, that would be its choice

    def __init__(self, grads: Sequence[Any]) -> None:
        super().__init__(grads)
        # By name: they come without types.
        self._jax: Any = importlib.import_module("jax")
        self._optax: Any = importlib.import_module("optax")
        self._norm = self._jax.jit(self._global_norm)
        self.copy_gradients()

    def copy_gradients(self) -> None:
        """Copies in any case: JAX would take aligned NumPy memory as it is, and others write into it."""
        self._jax_grads: Any = []  # those there were, if any, are let go of first
        device = self._jax.devices(self.platform)[0]  # what is put there stays there
        self._jax_grads = [
            self._jax.numpy.array(self._on_host(g), copy=True, device=device) for g in self.grads
        ]

    @staticmethod
    def _on_host(grad: Any) -> Array:
        return np.asarray(grad)

    def _global_norm(self, grads: Any) -> Any:
        return self._optax.tree.norm(grads)

    def _transformation(self, max_norm: float, grad_scale: float) -> Any:
        """What clips; it undoes the scale of the gradients."""
        clip = self._optax.clip_by_global_norm(max_norm)
        return clip if grad_scale == 1 else self._optax.chain(self._optax.scale(1 / grad_scale), clip)

    def _layer_norms(self, grads: Any, state: Any) -> Any:
        return self._jax.numpy.stack([self._jax.numpy.linalg.norm(g) for g in grads])

    def call(self, job: Job, max_norm: float, beside: Sequence[Any] = ()) -> Callable[[], Any]:
        """Compiled with the threshold in it, as one writes it into an optimizer."""
        if job.key == NORMS:
            return self.norms
        transform = self._transformation(max_norm, job.scale if job.key == UNSCALE else 1.0)
        state = transform.init(self._jax_grads)

        def clip(grads: Any) -> Any:
            return transform.update(grads, state)[0]

        def norms_and_clip(grads: Any) -> Any:
            clipped, after = transform.update(grads, state)
            return self._layer_norms(grads, after), clipped

        donated = (0,) if self.donate else ()
        compiled = self._jax.jit(norms_and_clip if job.key == LOG else clip, donate_argnums=donated)
        return lambda: self._jax.block_until_ready(compiled(self._jax_grads))

    def norms(self) -> Any:
        return self._norm(self._jax_grads).block_until_ready()

    def total(self, answer: Any) -> float | None:
        return None if isinstance(answer, (list, tuple)) else float(answer)

    def layer_norms(self, answer: Any) -> Sequence[float] | None:
        return list(map(float, answer[0])) if isinstance(answer, tuple) else None

    def undo(self, answer: Any, factor: float) -> None:
        pass

    def current(self, answer: Any) -> Sequence[Array]:
        clipped = answer[1] if isinstance(answer, tuple) else answer
        return [np.asarray(g) for g in clipped]


class OptaxDonated(Optax):
    """The gradients are given away, so that XLA may write over them."""

    key, title = "optax-donated", "optax, jit, donated"
    copies = 2.0  # its own gradients, and while they are restored the old ones
    donate = True
    traffic = traffic(Traffic(1), Traffic(1, 1), Traffic(1), Traffic(1, 1), Traffic(2, 1))

    def __init__(self, grads: Sequence[Any]) -> None:
        super().__init__(grads)
        self._scale = self._jax.jit(lambda grads, c: [g * c.astype(g.dtype) for g in grads], donate_argnums=0)

    def confirm(self, answer: Any, max_norm: float, clipping: bool) -> None:
        self._jax_grads = answer[1] if isinstance(answer, tuple) else answer  # what was given is gone
        at_threshold = abs(float(self._norm(self._jax_grads)) / max_norm - 1) < self.tolerance
        assert at_threshold == clipping, "the clipped gradients have another norm than the threshold"

    def restore(self) -> None:
        self.copy_gradients()

    def undo(self, answer: Any, factor: float) -> None:
        scaled = self._scale(self._jax_grads, self._jax.numpy.asarray(factor))
        self._jax_grads = self._jax.block_until_ready(scaled)


class GradclipJax(OptaxDonated):
    """The same with gradclip's transformation, whose state holds the norms of layers."""

    key, title = "gradclip-jax", "gradclip.jax, jit, donated"
    tolerance = 1e-7  # norms are reported in float32
    traffic = traffic(Traffic(1), Traffic(1, 1), Traffic(1), Traffic(1, 1), Traffic(1, 1))

    def __init__(self, grads: Sequence[Any]) -> None:
        self._ours: Any = importlib.import_module("gradclip.jax")
        super().__init__(grads)

    def _global_norm(self, grads: Any) -> Any:
        return self._ours.global_norm(grads)

    def _transformation(self, max_norm: float, grad_scale: float) -> Any:
        return self._ours.clip_by_global_norm(max_norm, grad_scale=grad_scale)

    def _layer_norms(self, grads: Any, state: Any) -> Any:
        return state.norms


class OptaxCuda(OptaxDonated):
    """The same on a GPU. JAX has streams of its own, and each call waits for them."""

    key, title = "optax-cuda", "optax, jit, donated, GPU"
    place, platform, waits = GPU, "cuda", True
    needs = ("jax", "optax", "cupy")

    @classmethod
    def missing(cls) -> str | None:
        return super().missing() or why_no_gpu() or _cuda_is_missing()

    @staticmethod
    def _on_host(grad: Any) -> Array:
        array: Array = importlib.import_module("cupy").asnumpy(grad)
        return array


def _cuda_is_missing() -> str | None:
    try:
        importlib.import_module("jax").devices(OptaxCuda.platform)
    except RuntimeError:
        return "this JAX reaches no GPU"
    return None
