"""The gradients of a load: where they lie, how they are made as they were, what they held."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from bench.cases import Array, Load, dtype_of

__all__ = ["GradientBuffer", "Pattern"]

# What PyTorch and JAX align memory to; NumPy's own allocations are aligned to 16 only, which makes
# every 64-byte load of a large array touch two cache lines. The roofline is highest on aligned memory.
_ALIGNMENT = 64
_SAMPLE = 100_000


class Pattern:
    """What gradients hold: 2^20 normally distributed numbers, the same in every run, again and again.

    So a list of gradients of any size is restored without a copy of it in memory.
    """

    def __init__(self, load: Load, alignment: int = _ALIGNMENT) -> None:
        self.dtype = dtype_of(load.dtype)
        rng = np.random.default_rng(20190214)
        self.elements: Array = rng.standard_normal(2**20, dtype=np.float32).astype(self.dtype)
        step = alignment // self.dtype.itemsize
        sizes = [math.prod(shape) for shape in load.case.shapes]
        starts = np.cumsum([0, *(-(-size // step) * step for size in sizes)])
        self.starts: list[int] = starts[:-1].tolist()
        self.length = int(starts[-1])

    def pieces(self) -> Iterator[tuple[int, Array]]:
        """Where in the memory of all gradients, and what belongs there."""
        for first in range(0, self.length, self.elements.size):
            yield first, self.elements[: self.length - first]

    def sample(self, i: int, size: int) -> tuple[Array, Array]:
        """Places of a gradient, and what it holds there before anything is done to it.

        All elements of a small gradient; enough of a large one to see a kilobyte that was left out.
        """
        places = np.arange(0, size, 1 if size < _SAMPLE else 97)
        places = np.append(places, np.arange(max(size - 97, 0), size))
        held = self.elements[(self.starts[i] + places) % self.elements.size]
        return places, held.astype(np.float64)


class GradientBuffer:
    """All gradients as views of one aligned buffer of the host, 64 bytes apart at most."""

    def __init__(self, load: Load) -> None:
        self.pattern = Pattern(load)
        itemsize = self.pattern.dtype.itemsize
        memory = np.empty(self.pattern.length * itemsize + _ALIGNMENT, np.uint8)
        lead = -memory.ctypes.data % _ALIGNMENT
        self._buffer: Any = memory[lead : lead + self.pattern.length * itemsize].view(self.pattern.dtype)
        self.arrays: list[Any] = [
            self._buffer[start : start + math.prod(shape)].reshape(shape)
            for start, shape in zip(self.pattern.starts, load.case.shapes, strict=True)
        ]
        self.restore()

    def restore(self) -> None:
        """By one thread of NumPy, which leaves none awake."""
        for first, elements in self.pattern.pieces():
            np.copyto(self._buffer[first : first + elements.size], elements)

    @staticmethod
    def to_host(array: Any) -> Array:
        return np.asarray(array)
