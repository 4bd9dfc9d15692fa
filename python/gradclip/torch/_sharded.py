"""Gradients spread over ranks: DTensors (FSDP2, tensor and expert parallel), or shards of one group.

Every rank sums up what it holds (squares, magnitudes, p-th powers), apart for every set of process groups
that tensors are sharded over; each set's sum goes through one all-reduce for each of its groups, and the
root of their total is taken once. Tensors that are replicated count once, as no set has their groups.

Beside a sum travels whether all is well: a rank where something is wrong takes part all the same and says
so, and then all ranks raise the same error. None is left waiting, and nothing was written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from gradclip._dispatch import ReadGradients
from gradclip.distributed._collective import device_for, reduced
from gradclip.torch._arguments import (
    PARAMETERS,
    TENSORS,
    Names,
    Tensors,
    as_number,
    as_threshold,
    gradients_of,
)
from gradclip.torch._dtensor import writable_parts
from gradclip.torch._environment import mark_written, untraced
from gradclip.torch._gradients import (
    CHECKING,
    READING,
    Conversion,
    OnDevice,
    UnsupportedGradientError,
    read_or_convert,
    writable,
)
from gradclip.torch._layout import Layout, ProcessGroups
from gradclip.torch._local import EPSILON, norms_of, scale_by_norm_
from gradclip.torch._nonfinite import count_nonfinite, describe, nonfinite_error
from gradclip.torch._norms import carry

__all__ = ["clip_grad_norm_", "get_total_norm"]


@untraced
def clip_grad_norm_(
    parameters: Sequence[Tensor],
    max_norm: float | Tensor,
    norm_type: float,
    error_if_nonfinite: bool,
    group: ProcessGroup | None,
) -> Tensor:
    """The drop-in, for gradients that are spread over ranks."""
    try:
        grads, error = gradients_of(parameters), None
    except TypeError as caught:
        grads, error = [None] * len(parameters), caught
    layout = Layout.of(grads, parameters, group, PARAMETERS)
    return _clip(layout, grads, max_norm, norm_type, error_if_nonfinite, PARAMETERS, error)


@untraced
def get_total_norm(
    tensors: Sequence[Tensor], norm_type: float, error_if_nonfinite: bool, group: ProcessGroup | None
) -> Tensor:
    """The drop-in, for tensors that are spread over ranks."""
    layout = Layout.of(tensors, (), group, TENSORS)
    total, _ = _total_norm(layout, norm_type, error_if_nonfinite, TENSORS, lambda: None, READING)
    return carry(layout.as_returned(total), total)


def _clip(
    layout: Layout,
    grads: Tensors,
    max_norm: float | Tensor,
    norm_type: float,
    error_if_nonfinite: bool,
    names: Names,
    error: Exception | None,
) -> Tensor:
    on_device = isinstance(max_norm, Tensor) and max_norm.is_cuda

    def check() -> None:
        if error is not None:
            raise error
        if not on_device:
            as_threshold(max_norm, "max_norm")
        if layout.has_graph or layout.measured is not layout.parts:
            writable(writable_parts(grads, names), names)

    total, read = _total_norm(layout, norm_type, error_if_nonfinite, names, check, CHECKING)
    limit = max_norm if on_device else float(max_norm)
    if read is not None and layout.measured is layout.parts:
        read.with_norm(total if total.is_cuda else total.item()).clip(limit, "propagate", EPSILON)
        mark_written(layout.parts)
    else:
        scale_by_norm_(layout.parts, limit, total, names)
    if layout.like is not None:
        mark_written(grads)
    return layout.as_returned(total)


def _total_norm(
    layout: Layout,
    norm_type: float,
    error_if_nonfinite: bool,
    names: Names,
    check: Callable[[], None],
    conversion: Conversion,
) -> tuple[Tensor, ReadGradients | None]:
    """The norm over all ranks: a 0-d tensor of float64, the same bits on each.

    Where it lies on a GPU nothing has waited, except for ``error_if_nonfinite``; without that, it is NaN
    there if ranks failed or disagree. Besides, the tensors as the engine has read them, where it read them as
    they are.
    """
    order = as_number(norm_type, "norm_type")
    if not order > 0:
        raise UnsupportedGradientError(
            f"norm_type: expected a positive order for what many ranks hold, got {order}"
        )
    own = _Report(len(layout.parts))
    local = _Local(_zeros(layout), [], None)
    error: Exception | None = None
    try:
        if layout.outside is not None and layout.groups:
            raise ValueError(
                f"{layout.outside}: expected a mesh with rank {dist.get_rank()} in it, as other tensors "
                "have, got one without: no rank could add up all norms"
            )
        check()
        local = _measure(layout, order, names, conversion)
    except Exception as caught:  # The others are about to wait for this rank.
        error = caught
        own = own._replace(failure=(_kind_of(caught), str(caught)))
    else:
        if error_if_nonfinite and not local.sums.isfinite().all():
            own = own._replace(nonfinite=tuple(describe(count_nonfinite(local.tensors), names)))

    joint = _Joint(order, error_if_nonfinite, layout, own)
    parts = [joint.sum_over(groups, part) for groups, part in zip(layout.sets, local.sums, strict=True)]
    total = torch.stack(parts) if parts else local.sums.new_zeros(1)
    total = joint.agreed(total.amax() if math.isinf(order) else total.sum())
    joint.check(error)
    norm = total if order in (1, math.inf) else total.sqrt() if order == 2 else total ** (1 / order)
    if error_if_nonfinite and not math.isfinite(norm.item()):
        entries, norms = count_nonfinite(local.tensors), norms_of(local.tensors, order)
        raise nonfinite_error(order, entries, norms, names, joint.nonfinite())
    return norm, local.read


class _Local(NamedTuple):
    """What this rank has measured."""

    sums: Tensor  # one for each set
    tensors: Tensors
    read: ReadGradients | None  # of the tensors as they are


def _measure(layout: Layout, order: float, names: Names, conversion: Conversion) -> _Local:
    def measure(found: list[OnDevice], tensors: Tensors) -> _Local:
        sums = [read.measure(order, layout.labels, 1.0, None).group_sums for read, _ in found]
        there = [
            (own if isinstance(own, Tensor) else torch.from_numpy(own)).to(layout.device, copy=True)
            for own in sums
        ]
        stacked = torch.stack(there or [_zeros(layout)])
        as_they_are = found[0].read if tensors is layout.measured else None
        return _Local(stacked.amax(0) if math.isinf(order) else stacked.sum(0), tensors, as_they_are)

    if not layout.parts:  # no labels, of which an engine would make no sum
        return _Local(_zeros(layout), [], None)
    return read_or_convert(layout.measured, names, conversion, measure)


def _zeros(layout: Layout) -> Tensor:
    return torch.zeros(len(layout.sets), dtype=torch.float64, device=layout.device)


# --- Together -----------------------------------------------------------------------------------------


class _Report(NamedTuple):
    """What a rank tells the others when something is wrong."""

    tensors: int  # how many it has
    failure: tuple[str, str] | None = None  # the class and the text of its error
    nonfinite: tuple[str, ...] = ()  # what there is to say of tensors that are not finite


# Errors that another rank can raise as well; of several the first that fits.
_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (UnsupportedGradientError, TypeError, ValueError, RuntimeError)
}


def _kind_of(error: Exception) -> str:
    return next((name for name, kind in _KINDS.items() if isinstance(error, kind)), "RuntimeError")


class _Joint:
    """The reductions of one call, and what the ranks have reported to each other."""

    def __init__(self, order: float, error_if_nonfinite: bool, layout: Layout, own: _Report) -> None:
        self._order = order
        self._error_if_nonfinite = error_if_nonfinite
        self._layout = layout
        self._own = own
        self._rank = dist.get_rank() if layout.groups else 0
        self._reports = {self._rank: own}

    def sum_over(self, groups: ProcessGroups, own: Tensor) -> Tensor:
        """The sum (maximum) over groups of one number of each rank."""
        for group in groups:
            there = device_for(group, own.device)
            count = self._own.tensors
            failed = self._has_failed()
            # If and only if all n counts c are equal, n times the sum of c^2 is the square of the sum of c
            # (Cauchy-Schwarz); of maxima, if that of c and that of -c cancel.
            beside = [failed, count, -count if math.isinf(self._order) else count * count]
            # Filled in, not copied there, which would wait for a GPU.
            message = torch.stack([own, *(own.new_full((), number) for number in beside)]).to(there)
            message = reduced(message, self._order, group)
            first, second = message[2:].to(torch.int64)
            if math.isinf(self._order):
                is_wrong = (message[1] > 0) | (first != -second)
            else:
                is_wrong = (message[1] > 0) | (group.size() * second != first * first)
            own = message[0].to(own.device)
            if not self._may_wait(there):
                own = own.masked_fill(is_wrong.to(own.device), math.nan)
            elif is_wrong or (self._error_if_nonfinite and not own.isfinite()):
                self._tell(group)  # All ranks of the group have seen the same numbers.
        return own

    def _may_wait(self, device: torch.device) -> bool:
        """Whether the host may look at numbers there."""
        return device.type == "cpu" or self._error_if_nonfinite

    def agreed(self, total: Tensor) -> Tensor:
        """The number that all ranks have; of several that differ in the last bits, the greatest.

        Where several groups have reduced the same numbers, each may have done so in an order of its own.
        Groups that no sum went through (of replicas) hear here of what is wrong with another's.
        """
        groups = self._layout.groups
        if self._layout.is_spread or (groups and not any(self._layout.sets)):
            for group in groups:
                there = device_for(group, total.device)
                message = torch.stack([total, total.new_full((), self._has_failed())]).to(there)
                message = reduced(message, math.inf, group)
                total, is_wrong = message[0].to(total.device), message[1] > 0
                if not self._may_wait(there):
                    total = total.masked_fill(is_wrong.to(total.device), math.nan)
                elif is_wrong:
                    self._tell(group)
        return total

    def _has_failed(self) -> bool:
        """Whether this rank knows of an error, its own or another's."""
        counts = {report.tensors for report in self._reports.values()}
        return len(counts) > 1 or any(report.failure for report in self._reports.values())

    def check(self, error: Exception | None) -> None:
        """Raise what a rank failed with (this one: with ``error``); or that ranks disagree."""
        if error is not None and len(self._reports) == 1:
            raise error  # The others do not know.
        failures = [
            (rank, *report.failure) for rank, report in sorted(self._reports.items()) if report.failure
        ]
        if failures:
            text = "; ".join(f"rank {rank}: {text}" for rank, _, text in failures)
            raise _KINDS[failures[0][1]](text) from error
        ranks: dict[int, list[int]] = {}
        for rank, report in sorted(self._reports.items()):
            ranks.setdefault(report.tensors, []).append(rank)
        if len(ranks) > 1:
            got = "; ".join(f"{count} on rank {', '.join(map(str, who))}" for count, who in ranks.items())
            raise ValueError(
                f"{self._layout.kind}: expected the same number of tensors on every rank, got {got}; "
                "nothing was written"
            )

    def nonfinite(self) -> list[str]:
        """What the ranks have to say of their tensors that are not finite."""
        return [
            f"rank {rank}: {text}" if self._layout.groups else text
            for rank, report in sorted(self._reports.items())
            for text in report.nonfinite
        ]

    def _tell(self, group: ProcessGroup) -> None:
        told: list[Any] = [None] * group.size()
        dist.all_gather_object(told, self._reports, group)
        for reports in told:
            self._reports.update(reports)
