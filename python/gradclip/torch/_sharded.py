"""Gradients spread over ranks: DTensors (FSDP2, tensor and expert parallel), or shards of one group.

Every rank sums up what it holds (squares, magnitudes, p-th powers), apart for every set of process groups
that tensors are sharded over; each group makes one all-reduce of the sums of all sets that it is in, and the
root of their total is taken once. Tensors that are replicated count once, as no set has their groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from gradclip._dispatch import ReadGradients
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
from gradclip.torch._joint import Joint, Report
from gradclip.torch._layout import Layout
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
    own = Report(len(layout.parts))
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
        own = own.failed(caught)
    else:
        if error_if_nonfinite and not local.sums.isfinite().all():
            own = own._replace(nonfinite=tuple(describe(count_nonfinite(local.tensors), names)))

    joint = Joint(layout, own, order, error_if_nonfinite)
    total = joint.totals(local.sums) if layout.sets else local.sums.new_zeros(1)
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
