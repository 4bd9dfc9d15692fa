"""What a call is, apart from its arrays: hashable, so that it is traced once."""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property

import numpy as np

__all__ = ["GROUPS", "NONFINITE", "Config"]

# As the C++ side counts them (csrc/core/clip.hpp, decide.hpp).
GROUPS = ("all", "tensor", "labels", "row", "sample")
NONFINITE = ("raise", "skip", "zero", "propagate")


@dataclasses.dataclass(frozen=True)
class Config:
    """How gradients are measured and what is decided.

    Args:
        parts: What of each gradient has a sum of its own. 1: all of it. n: n rows, which are its leading
            axes. -n: n columns, which are its trailing axes.
        groups: One of ``GROUPS``.
        labels: The group of each gradient, for ``"labels"``.
        are_coefficients: Whether what is given for each group is its coefficient, in place of a threshold.
        as_reported: Whether thresholds were made of norms that had been rounded to float32: one that is the
            rounded norm is the norm.
        axis_names: The mapped axes over whose shards norms go.
    """

    parts: tuple[int, ...]
    groups: str = "all"
    labels: tuple[int, ...] = ()
    ord: float = 2.0
    nonfinite: str = "propagate"
    down: bool = False
    are_coefficients: bool = False
    as_reported: bool = False
    all_float64: bool = False
    axis_names: tuple[str, ...] = ()

    @cached_property
    def first(self) -> tuple[int, ...]:
        """The number of the first part of each gradient, and that of all parts."""
        return (0, *np.cumsum(np.abs(self.parts)).tolist())

    @property
    def num_tensors(self) -> int:
        return len(self.parts)

    @property
    def num_parts(self) -> int:
        return self.first[-1]

    @cached_property
    def num_groups(self) -> int:
        counts = {
            "all": 1,
            "tensor": self.num_tensors,
            "labels": max(self.labels, default=-1) + 1,
            "row": self.num_parts,
            "sample": max(self.parts),
        }
        return counts[self.groups]

    @cached_property
    def group_of_part(self) -> tuple[int, ...]:
        if self.groups == "row":
            return tuple(range(self.num_parts))
        if self.groups == "sample":
            return tuple(part for count in self.parts for part in range(count))
        of_tensor = {"all": (0,) * self.num_tensors, "labels": self.labels}.get(
            self.groups, tuple(range(self.num_tensors))
        )
        return tuple(np.repeat(of_tensor, np.abs(self.parts)).tolist())

    @property
    def is_max(self) -> bool:
        return math.isinf(self.ord)
