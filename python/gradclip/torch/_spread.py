"""DTensors as what is read, measured and clipped: every tensor's norm over all ranks, by name and in groups.

Every rank adds up its part of every tensor exactly, as integers (step 4 of ``docs/reduction-order.md``). Each
process group makes two all-reduces: of a few numbers that say whether all is well, and of the integers of the
tensors that are sharded over it. Integers add up to the same in any order, so that all ranks have the same
bits; and where shards are cut at whole tiles these are the bits of the whole tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from gradclip import _core
from gradclip._dispatch import MeasuredGradients, ReadGradients, read
from gradclip._result import ClipResult
from gradclip.distributed._collective import device_for
from gradclip.torch._arguments import Names, Tensors, as_number
from gradclip.torch._dtensor import is_dtensor, writable_parts
from gradclip.torch._environment import mark_written
from gradclip.torch._joint import Joint, Report
from gradclip.torch._layout import Layout
from gradclip.torch._nonfinite import count_nonfinite

__all__ = ["SpreadGradients"]

_INFINITY = np.float64(np.inf).view(np.int64).item()  # the bits of magnitudes are in their order
_GREATEST, _SUM = dist.ReduceOp.MAX, dist.ReduceOp.SUM


class SpreadGradients:
    """DTensors (plain tensors beside them are taken for replicated), read for one call.

    What is wrong on this rank is raised on all by the first call that measures.

    Args:
        grads: The tensors; of a mapping, with the names of its keys.
        parameters: Stand in for gradients that are ``None``; without them these must be ``None`` on all
            ranks.
        names: What errors call the tensors.
    """

    def __init__(
        self, grads: Tensors | Mapping[str, Tensor | None], parameters: Sequence[Tensor], names: Names
    ) -> None:
        self._keys = list(grads) if isinstance(grads, Mapping) else None
        self._grads: list[Tensor | None] = list(grads.values() if isinstance(grads, Mapping) else grads)
        self.layout = Layout.of(self._grads, parameters, None, names)
        self._error: Exception | None = None
        self._read: ReadGradients | None = None
        self._copies: ReadGradients | None = None  # with partial sums added up
        try:
            writable_parts(self._grads, names)
            self._read = self._own(self.layout.parts)
            self._read.require_writable()
            if self.layout.measured is not self.layout.parts:
                self._copies = self._own(self.layout.measured)
            if self.layout.outside is not None and self.layout.groups:
                raise ValueError(
                    f"{self.layout.outside}: expected a mesh with rank {dist.get_rank()} in it, as other "
                    "tensors have, got one without: no rank could add up all norms"
                )
        except Exception as error:
            self._error = error

    def _own(self, parts: Tensors) -> ReadGradients:
        return read(parts if self._keys is None else dict(zip(self._keys, parts, strict=True)))

    def _empty(self) -> Any:
        """A list with the same names and nothing in it: of the CPU's engine, to decide about others."""
        nothing: list[Any] = [None if grad is None else np.empty(0) for grad in self._grads]
        return _core.read(nothing if self._keys is None else dict(zip(self._keys, nothing, strict=True)))

    def measure(self, ord: object, groups: object, grad_scale: object, reduce: object) -> MeasuredGradients:
        return self._measure(ord, groups, grad_scale, reduce, lambda: None, "")

    def clip(
        self,
        max_norm: object,
        ord: object,
        groups: object,
        grad_scale: object,
        nonfinite: object,
        reduce: object,
        formula: object,
    ) -> ClipResult:
        def check() -> None:  # as if there were nothing to measure
            self._empty().clip(max_norm, ord, groups, grad_scale, nonfinite, None, formula)
            if formula == "down":
                self._refuse_down()

        what = f"{max_norm if isinstance(max_norm, int | float) else ''} {nonfinite} {formula}"
        measured = self._measure(ord, groups, grad_scale, reduce, check, what)
        return measured.clip(max_norm, nonfinite, formula)

    def _refuse_down(self) -> None:
        if not self._is_direct():
            raise ValueError(
                "rounding: expected 'nearest' for DTensors on a GPU and for partial sums, got 'down'"
            )

    def _is_direct(self) -> bool:
        """Whether the CPU's engine measures what it then writes."""
        return self._copies is None and self._is_on_host()

    def _is_on_host(self) -> bool:
        return self.layout.device.type == "cpu"

    def _measure(
        self,
        ord: object,
        groups: object,
        grad_scale: object,
        reduce: object,
        check: Callable[[], None],
        what: str,
    ) -> _Measured:
        layout = self.layout
        report = Report(len(self), layout=f"{ord} {groups} {layout.labels} {layout.dtype} {what}")
        local: Any = None
        error: Exception | None = None
        try:
            if self._error is not None:
                raise self._error
            if reduce is not None:
                raise ValueError(
                    f"reduce: expected None for DTensors, which know their groups, got {reduce!r}"
                )
            check()
            local = self._measure_own(as_number(ord, "ord"), groups, grad_scale)  # type: ignore[arg-type]
        except Exception as caught:  # The others are about to wait for this rank.
            error = caught
            report = report.failed(caught)
        joint = Joint(layout, report, 2.0, may_wait=True)
        joint.meet()
        joint.check(error)
        self._join(local, as_number(ord, "ord"))  # type: ignore[arg-type]
        return _Measured(self, local.measured, groups, grad_scale)

    def _measure_own(self, order: float, groups: object, grad_scale: object) -> _Local:
        is_wide = self.layout.dtype is torch.float64 or order not in (1, 2)

        def decided_elsewhere(sums: npt.NDArray[np.float64]) -> Any:
            return self._empty().measure_shards(order, groups, grad_scale, is_wide, sums)

        source: Any = self._copies or self._read
        if self._is_on_host():
            measured = source.measure_shards(order, groups, grad_scale, is_wide)
            words, counts = measured.sum_words, measured.nonfinite_counts.reshape(-1, 2)
            if self._copies is not None:
                measured = decided_elsewhere(np.zeros(len(self)))
            return _Local(measured, words.reshape(len(self), -1), counts)
        there = source.measure(order, "tensor", 1.0, None).group_sums
        sums = there.cpu().numpy() if isinstance(there, Tensor) else there  # waits
        counts = np.zeros((len(self), 2), np.int64)
        if not np.isfinite(sums).all():
            for i, nan, infinity in count_nonfinite(self.layout.measured):
                counts[i] = nan, infinity
        measured = decided_elsewhere(sums)
        return _Local(measured, measured.sum_words.reshape(len(self), -1), counts)

    def _join(self, local: _Local, order: float) -> None:
        """Over the ranks, which have all got this far."""
        tensors = [
            (group, np.flatnonzero(np.isin(self.layout.labels, sets)))
            for group, sets in self.layout.sets_by_group()
        ]

        def all_reduce(numbers: npt.NDArray[np.int64], group: dist.ProcessGroup, op: Any) -> Any:
            message = torch.from_numpy(numbers).to(device_for(group, torch.device("cpu")))
            dist.all_reduce(message, op, group)
            return message.cpu().numpy()

        is_greatest = math.isinf(order)
        words = local.words
        for group, of_group in tensors:
            words[of_group] = all_reduce(words[of_group], group, _GREATEST if is_greatest else _SUM)
        is_odd: Any = (words >= _INFINITY if is_greatest else words[:, -2:] != 0).any(axis=1)
        for group, of_group in tensors:
            if is_odd[of_group].any():  # as all ranks of the group know
                local.counts[of_group] = all_reduce(local.counts[of_group], group, _SUM)
        local.measured.join(words.ravel(), local.counts.ravel())

    def apply(self, result: ClipResult, measured: Any, groups: object, grad_scale: object) -> None:
        """Write what was decided of copies, or elsewhere."""
        by_group = np.atleast_1d(np.asarray(result.coefficient))[_labels(measured, groups, len(self))]
        scale = as_number(grad_scale, "grad_scale")  # type: ignore[arg-type]
        are_zeroed = result.clipped and bool(measured.nonfinite) and not by_group.any()
        coefficients, of_tensor = np.unique(by_group, return_inverse=True)
        for i, coefficient in enumerate(coefficients):
            parts = [part if c == i else None for c, part in zip(of_tensor, self.layout.parts, strict=True)]
            factor = float(coefficient) / scale
            if are_zeroed or not math.isfinite(factor):
                for part in parts:
                    if part is not None:
                        part.zero_() if are_zeroed else part.mul_(factor)
            elif factor != 1:
                read(parts).scale(factor)

    def group_sizes(self, groups: object) -> npt.NDArray[np.int64]:
        """How many elements each group has on all ranks together."""
        sizes = np.array([0.0 if grad is None else grad.numel() for grad in self._grads])
        counted = self._empty().measure_shards(1, groups, 1.0, True, sizes)
        counted.join(counted.sum_words, counted.nonfinite_counts)
        return counted.group_norms.astype(np.int64)  # type: ignore[no-any-return]

    def mark_written(self) -> None:
        mark_written([grad for grad in self._grads if is_dtensor(grad)])

    # --- What else gradients can do -------------------------------------------------------------------

    def tensor_norms(self, ord: object) -> Any:
        return self.measure(ord, None, 1.0, None).norms

    def global_norm(self, ord: object) -> Any:
        return self.measure(ord, None, 1.0, None).total_norm

    def total_norm(self, ord: object) -> Tensor:
        """A 0-d tensor of float64, where the tensors lie."""
        return torch.full((), self.global_norm(ord), dtype=torch.float64, device=self.layout.device)

    def row_norms(self, ord: object) -> NoReturn:
        self._refuse("norms of rows")

    def with_norm(self, norm: object) -> NoReturn:
        self._refuse("a norm that somebody else has measured")

    def with_params(self, params: object, l2: object, l1: object) -> NoReturn:
        self._refuse("weight regularisation (params, l2, l1)")

    def with_base(self, base: object) -> NoReturn:
        self._refuse("the clip of a difference")

    def clip_by_value(self, limit: object, to_nearest: bool = False) -> NoReturn:
        self._refuse("a clip by value (gradclip.torch.clip_grad_value_ has it)")

    def scale(self, factor: object) -> None:
        if self._error is not None:
            raise self._error
        assert self._read is not None
        self._read.scale(factor)
        self.mark_written()

    def require_writable(self) -> None:
        """What is wrong is raised when ranks meet."""

    def _refuse(self, what: str) -> NoReturn:
        raise TypeError(f"grads: expected plain tensors for {what}, got DTensors")

    def __len__(self) -> int:
        return len(self._grads)

    @property
    def names(self) -> tuple[str, ...] | None:
        return None if self._keys is None else tuple(self._keys)

    @property
    def has_float64(self) -> bool:
        return self.layout.dtype is torch.float64

    @property
    def nbytes(self) -> int:
        """Of this rank's parts."""
        return sum(part.nbytes for part in self.layout.parts if part is not None)

    @property
    def num_elements(self) -> int:
        """Of this rank's parts."""
        return sum(part.numel() for part in self.layout.parts if part is not None)


class _Local(NamedTuple):
    """What this rank has measured."""

    measured: Any  # the engine's, which joins the sums of all ranks
    words: npt.NDArray[np.int64]  # (tensors, words): the sums
    counts: npt.NDArray[np.int64]  # (tensors, 2): elements that are NaN and infinite


def _labels(measured: Any, groups: object, count: int) -> Any:
    """The number of every tensor's group."""
    if measured.is_global:
        return [0] * count
    if isinstance(groups, str):  # "tensor"
        return range(count)
    of: Any = [groups[name] for name in measured.names] if isinstance(groups, Mapping) else groups
    number = {name: i for i, name in enumerate(measured.group_names or ())}
    return [number[label] if isinstance(label, str) else label for label in of]


class _Measured:
    """What all ranks have measured together."""

    def __init__(self, grads: SpreadGradients, measured: Any, groups: object, grad_scale: object) -> None:
        self._grads, self._measured, self._groups, self._grad_scale = grads, measured, groups, grad_scale

    def clip(self, max_norm: object, nonfinite: object, formula: object) -> ClipResult:
        if formula == "down":
            self._grads._refuse_down()
        return self._finish(self._measured.clip(max_norm, nonfinite, formula))

    def scale(self, coefficients: object, nonfinite: object) -> ClipResult:
        return self._finish(self._measured.scale(coefficients, nonfinite))

    def _finish(self, result: ClipResult) -> ClipResult:
        if not self._grads._is_direct():
            self._grads.apply(result, self._measured, self._groups, self._grad_scale)
        self._grads.mark_written()
        return result

    @property
    def group_sizes(self) -> npt.NDArray[np.int64]:
        return self._grads.group_sizes(self._groups)

    def __getattr__(self, name: str) -> Any:  # norms and names, as the engine has them
        return getattr(self._measured, name)
