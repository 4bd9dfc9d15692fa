"""What DTensors hold on this rank. Their own data pointer is that of no memory: no engine may see them.

Reference: https://docs.pytorch.org/docs/stable/distributed.tensor.html
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from gradclip.torch._arguments import Names, Tensors, name_of
from gradclip.torch._gradients import UnsupportedGradientError, refuse_graphs

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = [
    "any_dtensor",
    "dtensor_type",
    "is_dtensor",
    "local_part",
    "whole",
    "without_partial",
    "writable_parts",
]


def dtensor_type() -> Any:
    """The class; ``None`` while there are no DTensors, as nobody has imported what defines them."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


def is_dtensor(tensor: object) -> bool:
    kind = dtensor_type()
    return kind is not None and isinstance(tensor, kind)


def any_dtensor(tensors: Sequence[object]) -> bool:
    """Whether there is a DTensor among them: the same on all ranks, if asked of parameters."""
    kind = dtensor_type()
    return kind is not None and any(issubclass(found, kind) for found in set(map(type, tensors)))


def local_part(tensor: Any) -> Tensor:
    """What this rank holds of a DTensor: memory of the DTensor itself."""
    local = tensor._local_tensor
    # What a collective has not delivered yet is a wrapper of its own.
    wait = getattr(local, "wait", None)
    part: Tensor = wait() if wait is not None else local
    return part


def whole(tensor: Tensor) -> Tensor:
    """A scalar as a plain tensor: of a DTensor the value that all its ranks have together."""
    if not is_dtensor(tensor):
        return tensor
    found = cast("DTensor", tensor)
    if all(placement.is_replicate() for placement in found.placements):
        return local_part(found)
    return found.full_tensor()


def without_partial(tensor: Any, name: str) -> Any:
    """A copy with sums in the place of partial ones.

    Raises:
        UnsupportedGradientError: Partial values that are no sums.
    """
    from torch.distributed.tensor import Partial, Replicate  # noqa: PLC0415 (a DTensor: it is imported)

    for placement in tensor.placements:
        is_sum = type(placement) is Partial and placement.reduce_op in ("sum", "avg")
        if placement.is_partial() and not is_sum:
            raise UnsupportedGradientError(
                f"{name}: expected partial sums or averages, got the placement {placement}"
            )
    placements = [Replicate() if p.is_partial() else p for p in tensor.placements]
    return tensor.detach().redistribute(placements=placements)


def writable_parts(grads: Tensors, names: Names, each_element: bool = False) -> list[Tensor | None]:
    """What this rank holds of every tensor, DTensor or plain, to be written to.

    Args:
        grads: The tensors.
        names: What errors call them.
        each_element: What is done to them is not linear.

    Raises:
        UnsupportedGradientError: A DTensor requires grad. With ``each_element``: or it holds partial sums, as
            what is done to their elements is not done to the sum.
    """
    parts = list(grads)
    for i, grad in enumerate(grads):
        if not is_dtensor(grad):
            continue
        parts[i] = local_part(grad)
        refuse_graphs([grad], [name_of(names, i)])
        placements = cast("DTensor", grad).placements
        if each_element and any(placement.is_partial() for placement in placements):
            raise UnsupportedGradientError(
                f"{name_of(names, i)}: expected no partial sums, got placements {placements}"
            )
    return parts
