"""CuPy, as one writes a norm and a clip by hand."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

from bench.jobs import Traffic
from bench.peers.base import GPU, Peer, traffic
from gradclip._dispatch import why_no_gpu

__all__ = ["CupyNrm2", "CupySquares"]


class CupySquares(Peer):
    """``sum(g*g)``, one wait for the host to compare."""

    key, title = "cupy-sum", "CuPy sum(g*g)"
    place, needs = GPU, ("cupy",)
    waits, copies = True, 0.1
    traffic = traffic(Traffic(1, 1), Traffic(1, 2), Traffic(1, 1), Traffic(1, 3), Traffic(2, 3))

    def __init__(self, grads: Sequence[Any]) -> None:
        super().__init__(grads)
        self._cupy: Any = importlib.import_module("cupy")

    @classmethod
    def missing(cls) -> str | None:
        return super().missing() or why_no_gpu()

    def _norms(self) -> Any:
        return self._cupy.sqrt(self._cupy.stack([self._cupy.sum(g * g) for g in self.grads]))

    def norms(self) -> list[float]:
        norms: list[float] = self._norms().tolist()
        return norms

    def clip(self, max_norm: float) -> tuple[float, list[float] | None]:
        total = math.hypot(*self.norms())
        if total > max_norm:
            self.undo(None, max_norm / total)
        return total, None

    def unscale_and_clip(self, max_norm: float, scale: float) -> tuple[float, list[float] | None]:
        self.undo(None, 1 / scale)
        return self.clip(max_norm)

    def norms_and_clip(self, max_norm: float) -> tuple[float, list[float] | None]:
        norms = self.norms()
        return self.clip(max_norm)[0], norms

    def total(self, answer: Any) -> float:
        return math.hypot(*answer) if isinstance(answer, list) else float(answer[0])

    def layer_norms(self, answer: Any) -> Sequence[float] | None:
        return answer if isinstance(answer, list) else answer[1]

    def undo(self, answer: Any, factor: float) -> None:
        for g in self.grads:
            self._cupy.multiply(g, g.dtype.type(factor), out=g)


class CupyNrm2(CupySquares):
    """``cupy.cublas.nrm2`` of each array."""

    key, title = "cupy-nrm2", "CuPy cublas.nrm2 loop"
    copies = 0.0
    traffic = traffic(Traffic(1), Traffic(1, 1), Traffic(1), Traffic(1, 2), Traffic(2, 1))

    def _norms(self) -> Any:
        cublas: Any = importlib.import_module("cupy.cublas")
        return self._cupy.stack([cublas.nrm2(g.ravel()) for g in self.grads])
