"""NumPy and numba, as one writes a norm and a clip by hand."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

import numpy as np

from bench.jobs import REGULARISE, UPDATE, Traffic
from bench.peers.base import ROWS, Peer, traffic

__all__ = ["Numba", "NumpyDot", "NumpySquares"]


class _ByHand(Peer):
    """A norm of each array, one ``if``, a product with each."""

    # It has the norms in hand and folds the loss scale into the product: as good as a loop gets.
    traffic = traffic(Traffic(1), Traffic(1, 1), Traffic(1), Traffic(1, 1), Traffic(1, 1))

    def _squares(self) -> list[float]:
        raise NotImplementedError

    def norms(self) -> list[float]:
        return [math.sqrt(square) for square in self._squares()]

    def clip(self, max_norm: float) -> tuple[float, list[float] | None]:
        total = math.sqrt(sum(self._squares()))
        if total > max_norm:
            self.undo(None, max_norm / total)
        return total, None

    def unscale_and_clip(self, max_norm: float, scale: float) -> tuple[float, list[float] | None]:
        total = math.sqrt(sum(self._squares())) / scale
        self.undo(None, min(1.0, max_norm / total) / scale)
        return total, None

    def norms_and_clip(self, max_norm: float) -> tuple[float, list[float] | None]:
        norms = self.norms()
        total = math.hypot(*norms)
        if total > max_norm:
            self.undo(None, max_norm / total)
        return total, norms

    def total(self, answer: Any) -> float:
        return math.hypot(*answer) if isinstance(answer, list) else float(answer[0])

    def layer_norms(self, answer: Any) -> Sequence[float] | None:
        return answer if isinstance(answer, list) else answer[1]

    def undo(self, answer: Any, factor: float) -> None:
        for g in self.grads:
            np.multiply(g, factor, out=g)


class NumpySquares(_ByHand):
    """The first thing that comes to mind: temporaries, an unscale of its own, norms twice for the log."""

    key, title = "numpy-sum", "NumPy sum(g*g)"
    copies = 0.1  # a temporary of the size of a gradient
    # g * g is written and read again.
    traffic = traffic(Traffic(1, 1), Traffic(1, 2), Traffic(1, 1), Traffic(1, 3), Traffic(2, 3))

    def _squares(self) -> list[float]:
        return [float(np.sum(g * g)) for g in self.grads]

    def unscale_and_clip(self, max_norm: float, scale: float) -> tuple[float, list[float] | None]:
        self.undo(None, 1 / scale)
        return self.clip(max_norm)

    def norms_and_clip(self, max_norm: float) -> tuple[float, list[float] | None]:
        norms = self.norms()
        return self.clip(max_norm)[0], norms


class NumpyDot(_ByHand):
    key, title = "numpy-dot", "NumPy dot loop"
    # A product that is written; a sum; a norm; a clip. A difference; its norm; its product; a sum.
    traffic: ClassVar[Mapping[str, Traffic]] = {
        **_ByHand.traffic,
        **ROWS,
        REGULARISE: Traffic(3, 3),
        UPDATE: Traffic(5, 3),
    }

    def regularise_and_clip(self, max_norm: float, params: Sequence[Any]) -> Any:
        for g, w in zip(self.grads, params, strict=True):
            np.add(g, g.dtype.type(1.0) * w, out=g)
        return self.clip(max_norm)

    def clip_update(self, max_norm: float, base: Sequence[Any]) -> Any:
        deltas = [new - b for new, b in zip(self.grads, base, strict=True)]
        total = math.sqrt(sum(float(np.dot(d.reshape(-1), d.reshape(-1))) for d in deltas))
        if total > max_norm:
            for new, b, delta in zip(self.grads, base, deltas, strict=True):
                np.multiply(delta, delta.dtype.type(max_norm / total), out=delta)
                np.add(b, delta, out=new)
        return total, None

    def row_norms(self) -> list[Any]:
        flat = (g.reshape(len(g), -1) for g in self.grads)
        return [np.sqrt(np.einsum("ij,ij->i", rows, rows)) for rows in flat]

    def clip_rows(self, max_norm: Any) -> None:
        for g, norms, limits in zip(self.grads, self.row_norms(), max_norm, strict=True):
            coefficients = np.minimum(limits / norms, 1.0).astype(g.dtype)
            rows = g.reshape(len(g), -1)
            np.multiply(rows, coefficients[:, None], out=rows)

    def _squares(self) -> list[float]:
        squares = []
        for g in self.grads:
            flat = g.reshape(-1)
            squares.append(float(np.dot(flat, flat)))
        return squares


_MANY_ELEMENTS = 2**16  # from which on it pays to wake other threads


@cache
def _compiled(parallel: bool) -> tuple[Any, Any]:
    numba: Any = importlib.import_module("numba")

    def squares(x: Any) -> Any:
        total = x.dtype.type(0)
        for i in numba.prange(x.size):
            total += x[i] * x[i]
        return total

    def scale(x: Any, factor: Any) -> None:
        for i in numba.prange(x.size):
            x[i] *= factor

    compile_ = numba.njit(parallel=parallel, fastmath=True)
    return compile_(squares), compile_(scale)


@cache
def _compiled_rows(parallel: bool) -> tuple[Any, Any]:
    numba: Any = importlib.import_module("numba")

    def norms(x: Any, out: Any) -> None:
        for i in numba.prange(x.shape[0]):
            total = x.dtype.type(0)
            for j in range(x.shape[1]):
                total += x[i, j] * x[i, j]
            out[i] = np.sqrt(total)

    def clip(x: Any, limits: Any) -> None:
        for i in numba.prange(x.shape[0]):
            total = x.dtype.type(0)
            for j in range(x.shape[1]):
                total += x[i, j] * x[i, j]
            norm = np.sqrt(total)
            if norm > limits[i]:
                factor = x.dtype.type(limits[i] / norm)
                for j in range(x.shape[1]):
                    x[i, j] *= factor

    compile_ = numba.njit(parallel=parallel, fastmath=True)
    return compile_(norms), compile_(clip)


class Numba(_ByHand):
    """Two loops, compiled with leave to reorder sums; large arrays by all threads."""

    key, title = "numba", "numba loops"
    needs = ("numba",)
    traffic: ClassVar[Mapping[str, Traffic]] = {**_ByHand.traffic, **ROWS}

    def __init__(self, grads: Sequence[Any]) -> None:
        super().__init__(grads)
        self._flat = [(g.reshape(-1), *_compiled(g.size >= _MANY_ELEMENTS)) for g in grads]

    def _squares(self) -> list[float]:
        return [float(squares(flat)) for flat, squares, _ in self._flat]

    def undo(self, answer: Any, factor: float) -> None:
        factor = self.grads[0].dtype.type(factor)
        for flat, _, scale in self._flat:
            scale(flat, factor)

    def _rows(self) -> list[Any]:
        return [(g.reshape(len(g), -1), *_compiled_rows(g.size >= _MANY_ELEMENTS)) for g in self.grads]

    def row_norms(self) -> list[Any]:
        answer = []
        for rows, norms, _ in self._rows():
            out = np.empty(len(rows))
            norms(rows, out)
            answer.append(out)
        return answer

    def clip_rows(self, max_norm: Any) -> None:
        for (rows, _, clip), limits in zip(self._rows(), max_norm, strict=True):
            clip(rows, limits)
