"""The right answers, to many more digits than any contender has."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bench.cases import Array

_TERMS = 65_536  # of one float64 dot product: its relative error is below 65536 * 2^-53 = 8e-12


def norm(grad: Array) -> float:
    """The norm of one gradient. float64 holds squares of 16- and 32-bit elements exactly."""
    flat = grad.reshape(-1)
    parts = []
    for first in range(0, flat.size, _TERMS):
        x = flat[first : first + _TERMS].astype(np.float64)
        parts.append(float(np.dot(x, x)))
    return math.sqrt(math.fsum(parts))


def norms(grads: Sequence[Array]) -> list[float]:
    return [norm(grad) for grad in grads]


def row_norms(grad: Array) -> Array:
    """The norm of each row, in blocks: float64 holds the squares exactly, and sums of few of them well."""
    rows = grad.reshape(len(grad), -1)
    step = max(1, _TERMS // max(1, rows.shape[1]))
    blocks = (rows[first : first + step].astype(np.float64) for first in range(0, len(rows), step))
    squares: Array = np.concatenate([np.einsum("ij,ij->i", block, block) for block in blocks])
    return np.sqrt(squares)


def total_of(norms: Sequence[float]) -> float:
    return math.sqrt(math.fsum(x * x for x in norms))
