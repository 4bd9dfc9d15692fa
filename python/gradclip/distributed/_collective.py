"""All-reduces of float64 numbers over a process group: any backend, no NaN lost.

Reference: https://docs.pytorch.org/docs/stable/distributed.html
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

__all__ = ["device_for", "open_group", "reduced"]


def open_group(group: object, name: str = "group") -> ProcessGroup:
    """The process group, ``None`` for the default one.

    Raises:
        TypeError: It is no process group.
        ValueError: It is not open (any more), or this rank is not in it.
    """
    expected = f"{name}: expected an open process group with this rank in it"
    outside = dist.GroupMember.NON_GROUP_MEMBER
    if group is not None and group is not outside and not isinstance(group, ProcessGroup):
        got = f"{type(group).__module__}.{type(group).__qualname__}"
        raise TypeError(f"{name}: expected a torch.distributed.ProcessGroup or None, got a {got}")
    if not dist.is_initialized():
        raise ValueError(f"{expected}, got none: torch.distributed is not initialised, or was destroyed")
    if group is None:
        group = dist.group.WORLD
    if not isinstance(group, ProcessGroup):
        raise ValueError(f"{expected}, got one without rank {dist.get_rank()}")
    try:
        dist.get_backend(group)
    except (TypeError, ValueError):
        raise ValueError(f"{expected}, got one that was destroyed") from None
    return group


def device_for(group: ProcessGroup, preferred: torch.device) -> torch.device:
    """Where numbers have to lie to be reduced: where they are, if the group has a backend for that."""
    kinds = [device.type for device in group._device_types]
    if preferred.type in kinds or not kinds:
        return preferred
    if kinds[0] == "cpu":
        return torch.device("cpu")
    return torch.device(kinds[0], torch.accelerator.current_device_index())


def reduced(values: Tensor, order: float, group: ProcessGroup) -> Tensor:
    """Float64 numbers of all ranks, added up or (``order`` inf) the greatest; maybe in place.

    The backends' maxima may lose a NaN (gloo's does), so whether there was one is reduced beside it.
    """
    if not math.isinf(order):
        dist.all_reduce(values, dist.ReduceOp.SUM, group)
        return values
    is_nan = values.isnan()
    message = torch.stack([values.masked_fill(is_nan, 0.0), is_nan.to(values.dtype)])
    dist.all_reduce(message, dist.ReduceOp.MAX, group)
    return message[0].masked_fill(message[1] > 0, math.nan)
