"""The contenders: each library as its users would write it, over the same gradients.

A peer answers two calls, ``norms`` and ``clip``. The rest is for the benchmark, outside of the timed
region: what the answer says, what the gradients hold now, and how to make them as they were. Each peer
undoes its clip with its own library: threads of another one would still be awake during the next call.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

import gradclip
from bench.cases import Array, Case

__all__ = ["Peer", "missing", "peers_for"]

_MOST_OPTAX_LEAVES = 1000  # compiling a program of 20 000 arguments takes longer than all else together


class Peer:
    """One library, one way to write it."""

    name: str
    tolerance = 1e-2  # largest relative error that is taken for an answer; each error is reported

    def __init__(self, grads: list[Array]) -> None:
        self.grads = grads

    def norms(self) -> Any:
        """Timed: the norms, or the global norm alone where that is all that the library offers."""
        raise NotImplementedError

    def clip(self, max_norm: float) -> Any:
        """Timed: measure and clip."""
        raise NotImplementedError

    def total(self, answer: Any) -> float | None:
        """The global norm in what ``norms`` or ``clip`` returned; None if it is not in there."""
        raise NotImplementedError

    def undo(self, answer: Any, max_norm: float) -> None:
        """After a call of ``clip`` that clipped: make the gradients as they were."""
        raise NotImplementedError

    def confirm(self, answer: Any, max_norm: float, clipping: bool) -> None:
        """Assert that a call of ``clip`` had to clip, or had not."""
        total = self.total(answer)
        assert total is None or (total > max_norm) == clipping

    def current(self, answer: Any) -> Sequence[Array]:
        """The gradients after a call of ``clip``."""
        return self.grads


class NumpySquares(Peer):
    name = "NumPy sum(g*g)"

    def norms(self) -> float:
        return math.sqrt(sum(float(np.sum(g * g)) for g in self.grads))

    def clip(self, max_norm: float) -> float:
        total = math.sqrt(sum(float(np.sum(g * g)) for g in self.grads))
        if total > max_norm:
            for g in self.grads:
                np.multiply(g, max_norm / total, out=g)
        return total

    def total(self, answer: float) -> float:
        return answer

    def undo(self, answer: float, max_norm: float) -> None:
        for g in self.grads:
            np.multiply(g, answer / max_norm, out=g)


class NumpyDot(NumpySquares):
    name = "NumPy dot"

    def norms(self) -> list[float]:  # type: ignore[override]
        norms = []
        for g in self.grads:
            flat = g.ravel()
            norms.append(math.sqrt(np.dot(flat, flat)))
        return norms

    def clip(self, max_norm: float) -> float:
        squares = 0.0
        for g in self.grads:
            flat = g.ravel()
            squares += float(np.dot(flat, flat))
        total = math.sqrt(squares)
        if total > max_norm:
            scale = max_norm / total
            for g in self.grads:
                np.multiply(g, scale, out=g)
        return total

    def total(self, answer: Any) -> float:
        return answer if isinstance(answer, float) else math.hypot(*answer)


class Torch(Peer):
    name = "PyTorch"

    def __init__(self, grads: list[Array]) -> None:
        import torch  # noqa: PLC0415

        super().__init__(grads)
        torch.set_num_threads(gradclip.get_num_threads())
        self._torch = torch
        self._grads = [torch.from_numpy(g) for g in grads]
        # clip_grad_norm_ looks at .grad alone: parameters without memory of their own will do.
        self._parameters = []
        for g in self._grads:
            parameter = torch.nn.Parameter(torch.empty(1).expand(g.shape))
            parameter.grad = g
            self._parameters.append(parameter)

    def norms(self) -> Any:
        return self._torch.nn.utils.get_total_norm(self._grads)

    def clip(self, max_norm: float) -> Any:
        return self._torch.nn.utils.clip_grad_norm_(self._parameters, max_norm)

    def total(self, answer: Any) -> float:
        return float(answer)

    def undo(self, answer: Any, max_norm: float) -> None:
        self._torch._foreach_mul_(self._grads, float(answer) / max_norm)


class Optax(Peer):
    """Compiled once; JAX arrays are immutable, so the clipped gradients are new ones."""

    name = "optax, jit"
    donate = False

    def __init__(self, grads: list[Array]) -> None:
        super().__init__(grads)
        # By name: they come without types.
        self._jax: Any = importlib.import_module("jax")
        self._optax: Any = importlib.import_module("optax")
        self._norm = self._jax.jit(self._optax.tree.norm)
        self._clips: dict[float, Any] = {}
        # Copies in any case: JAX would take aligned NumPy memory as it is, and others write into it.
        self._jax_grads = [self._jax.numpy.array(g, copy=True) for g in grads]

    def norms(self) -> Any:
        return self._norm(self._jax_grads).block_until_ready()

    def clip(self, max_norm: float) -> Any:
        if max_norm not in self._clips:  # compiled in the check, before timing
            transform = self._optax.clip_by_global_norm(max_norm)
            state = transform.init(self._jax_grads)
            self._clips[max_norm] = self._jax.jit(
                lambda grads: transform.update(grads, state)[0], donate_argnums=0 if self.donate else ()
            )
        clipped = self._clips[max_norm](self._jax_grads)
        return self._jax.block_until_ready(clipped)

    def total(self, answer: Any) -> float | None:
        return None if isinstance(answer, list) else float(answer)

    def undo(self, answer: Any, max_norm: float) -> None:
        pass

    def current(self, answer: Any) -> Sequence[Array]:
        return [np.asarray(g) for g in answer]


class OptaxDonated(Optax):
    """The gradients are given away, so that XLA may write over them."""

    name = "optax, jit, donated"
    donate = True

    def __init__(self, grads: list[Array]) -> None:
        super().__init__(grads)
        self._double = self._jax.jit(lambda grads: [2 * g for g in grads], donate_argnums=0)

    def confirm(self, answer: Any, max_norm: float, clipping: bool) -> None:
        self._jax_grads = answer  # what was given is gone
        assert (abs(float(self._norm(answer)) / max_norm - 1) < self.tolerance) == clipping

    def undo(self, answer: Any, max_norm: float) -> None:
        self._jax_grads = self._jax.block_until_ready(self._double(answer))


class Gradclip(Peer):
    name = "gradclip"
    tolerance = 1e-7

    def norms(self) -> Any:
        return gradclip.tensor_norms(self.grads)

    def clip(self, max_norm: float) -> Any:
        return gradclip.clip_by_global_norm_(self.grads, max_norm)

    def total(self, answer: Any) -> float:
        if isinstance(answer, gradclip.ClipResult):
            return answer.total_norm
        return math.sqrt(math.fsum(answer * answer))

    def confirm(self, answer: gradclip.ClipResult, max_norm: float, clipping: bool) -> None:
        assert answer.clipped == clipping

    def undo(self, answer: gradclip.ClipResult, max_norm: float) -> None:
        gradclip.scale_(self.grads, answer.total_norm / max_norm)


class GradclipPlan(Gradclip):
    name = "gradclip, Plan"

    def __init__(self, grads: list[Array]) -> None:
        super().__init__(grads)
        self._plan = gradclip.Plan(grads)

    def norms(self) -> Any:
        return self._plan.tensor_norms()

    def clip(self, max_norm: float) -> Any:
        return self._plan.clip_by_global_norm_(max_norm)

    def undo(self, answer: gradclip.ClipResult, max_norm: float) -> None:
        self._plan.scale_(answer.total_norm / max_norm)


_NEEDS: dict[type[Peer], str] = {Torch: "torch", Optax: "optax", OptaxDonated: "optax"}


def missing() -> list[str]:
    """Libraries that are not installed and whose peers are left out."""
    return sorted(m for m in set(_NEEDS.values()) if importlib.util.find_spec(m) is None)


def peers_for(case: Case) -> list[type[Peer]]:
    """The contenders that take part in a case."""
    kinds: list[type[Peer]] = [Gradclip, GradclipPlan]
    if case.peers:
        kinds += [NumpyDot, NumpySquares, Torch]
    if case.peers and len(case.shapes) <= _MOST_OPTAX_LEAVES:
        kinds += [Optax, OptaxDonated]
    absent = missing()
    return [kind for kind in kinds if _NEEDS.get(kind) not in absent]
