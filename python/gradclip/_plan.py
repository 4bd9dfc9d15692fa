"""Gradients that stay where they are."""

from __future__ import annotations

from typing import NoReturn, SupportsFloat

import numpy as np
import numpy.typing as npt

from gradclip._api import GradientArrays, Grouping, NonFinite, Reduce, Rounding, Thresholds
from gradclip._dispatch import read_and_see
from gradclip._measured import Measured, Policy, clip, formula_of, with_params
from gradclip._result import ClipResult, count_of, warn_of_nothing

__all__ = ["Plan"]


class Plan:
    """Gradients that stay where they are, read and checked once and clipped many times.

    The methods do what the functions of the same name do, without reading and checking every array
    again. The plan keeps the arrays and the memory alive that it was made of. It sees whatever that memory
    holds at each call; an array that is replaced by another (instead of being written in place) needs a new
    plan. A tensor or array that has been given other memory since (``model.double()``, ``tensor.data = …``,
    ``set_``, ``resize_``, ``ndarray.resize``) is noticed at each use, before memory is touched: to clip what
    nobody reads any more would do nothing. On a GPU a CUDA graph that captured calls of a plan uses the
    plan's memory whenever it runs: keep the plan, and let no other call or graph of it run at the same time.

    Args:
        grads: As for :func:`tensor_norms`.

    Raises:
        TypeError: As for :func:`tensor_norms`. A plan is of this process: it is not copied or pickled.
        ValueError: As for :func:`tensor_norms`. At each use: an array has been given other memory.

    Example:
        >>> import numpy as np, gradclip
        >>> grads = [np.array([3.0, 4.0]), np.array([12.0])]
        >>> plan = gradclip.Plan(grads)
        >>> plan
        Plan(2 gradients, 3 elements, 24 bytes)
        >>> plan.clip_by_global_norm_(6.5).coefficient
        0.5
        >>> plan.global_norm()
        6.5
    """

    __slots__ = ("_plan",)

    def __init__(self, grads: GradientArrays) -> None:
        self._plan, has_any = read_and_see(grads, is_kept=True)
        if not has_any:
            warn_of_nothing()

    def __reduce__(self) -> NoReturn:
        raise TypeError("Plan: expected no copy and no pickle of it, for it holds memory of this process")

    @property
    def names(self) -> tuple[str, ...] | None:
        """The keys of the mapping that the plan was made of; ``None`` for a sequence."""
        return self._plan.names

    @property
    def nbytes(self) -> int:
        """Bytes of all gradients together."""
        return self._plan.nbytes

    def __len__(self) -> int:
        return len(self._plan)

    def __repr__(self) -> str:
        sizes = ((len(self), "gradient"), (self._plan.num_elements, "element"), (self.nbytes, "byte"))
        return f"Plan({', '.join(count_of(*size) for size in sizes)})"

    def tensor_norms(self, ord: float = 2) -> npt.NDArray[np.float64]:
        """As :func:`gradclip.tensor_norms`."""
        return self._plan.tensor_norms(ord)

    def row_norms(self, ord: float = 2) -> list[npt.NDArray[np.float64]]:
        """As :func:`gradclip.row_norms`."""
        return self._plan.row_norms(ord)

    def global_norm(self, ord: float = 2) -> float:
        """As :func:`gradclip.global_norm`."""
        return self._plan.global_norm(ord)

    def measure(
        self,
        ord: float = 2,
        groups: Grouping = None,
        grad_scale: float = 1.0,
        reduce: Reduce | None = None,
        params: GradientArrays | None = None,
        l2: float = 0.0,
        l1: float = 0.0,
    ) -> Measured:
        """As :func:`gradclip.measure`."""
        regularised = with_params(self._plan, params, l2, l1)
        return Measured(regularised.measure(ord, groups, grad_scale, reduce))

    def clip_by_global_norm_(
        self,
        max_norm: Thresholds | Policy,
        ord: float = 2,
        groups: Grouping = None,
        grad_scale: float = 1.0,
        nonfinite: NonFinite = "raise",
        reduce: Reduce | None = None,
        rounding: Rounding = "nearest",
        params: GradientArrays | None = None,
        l2: float = 0.0,
        l1: float = 0.0,
    ) -> ClipResult:
        """As :func:`gradclip.clip_by_global_norm_`."""
        formula = formula_of(rounding)
        return clip(self._plan, max_norm, ord, groups, grad_scale, nonfinite, reduce, formula, params, l2, l1)

    def clip_by_norm_(
        self,
        max_norm: Thresholds | Policy,
        ord: float = 2,
        grad_scale: float = 1.0,
        nonfinite: NonFinite = "raise",
        reduce: Reduce | None = None,
        rounding: Rounding = "nearest",
        params: GradientArrays | None = None,
        l2: float = 0.0,
        l1: float = 0.0,
    ) -> ClipResult:
        """As :func:`gradclip.clip_by_norm_`."""
        formula = formula_of(rounding)
        return clip(
            self._plan, max_norm, ord, "tensor", grad_scale, nonfinite, reduce, formula, params, l2, l1
        )

    def clip_difference_(
        self,
        base: GradientArrays,
        max_norm: Thresholds | Policy,
        ord: float = 2,
        groups: Grouping = None,
        nonfinite: NonFinite = "raise",
        reduce: Reduce | None = None,
        rounding: Rounding = "nearest",
    ) -> ClipResult:
        """As :func:`gradclip.clip_difference_`, of which the plan has ``new``."""
        update = self._plan.with_base(base)
        return clip(update, max_norm, ord, groups, 1.0, nonfinite, reduce, formula_of(rounding))

    def clip_by_value_(self, limit: SupportsFloat) -> ClipResult:
        """As :func:`gradclip.clip_by_value_`."""
        return self._plan.clip_by_value(limit)

    def scale_(self, factor: SupportsFloat) -> None:
        """As :func:`gradclip.scale_`."""
        self._plan.scale(factor)
