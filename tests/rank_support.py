"""What the checks of ranks are made of: see ``ranks.py``."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from ranks import Check

_CHECKS: list[tuple[tuple[int, ...], Check]] = []
ORDERS = (2.0, 1.0, math.inf, 3.0)


def checks_for(world: int) -> list[Check]:
    """The checks of a world, in the order in which all ranks run them."""
    return [check for worlds, check in _CHECKS if world in worlds]


def check(*worlds: int) -> Callable[[Check], Check]:
    def keep(check: Check) -> Check:
        _CHECKS.append((worlds, check))
        return check

    return keep


def rank() -> int:
    return dist.get_rank()


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same on every rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_grad(grad: Tensor | None, like: Tensor | None = None) -> nn.Parameter:
    value = torch.zeros_like(grad.detach()) if grad is not None else like
    assert value is not None
    parameter = nn.Parameter(value)
    parameter.grad = grad
    return parameter


def with_grads(grads: Sequence[Tensor]) -> list[nn.Parameter]:
    return [with_grad(grad) for grad in grads]


def norm_over(grads: Sequence[Tensor], order: float) -> float:
    """The norm over whole gradients, in float64."""
    return float(torch.linalg.vector_norm(torch.cat([g.double().flatten() for g in grads]), order))


def full(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def same_bits(norm: Tensor) -> float:
    """The norm, which must be the same bits on all ranks."""
    value = float(full(norm))
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, struct.pack("<d", value))
    assert len(set(found)) == 1, found
    return value


def assert_close(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=8 * torch.finfo(dtype).eps, atol=0)


@contextmanager
def raises(kind: type[Exception], pattern: str) -> Iterator[None]:
    """On every rank: the same kind, the same text."""
    try:
        yield
    except kind as error:
        if not re.search(pattern, str(error)):
            raise
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, (type(error).__name__, str(error)))
        assert len(set(found)) == 1, found
        return
    raise AssertionError(f"nothing was raised, expected a {kind.__name__}")


def piece_of(tensor: Tensor) -> Tensor:
    """This rank's rows of a tensor: uneven, maybe none."""
    return tensor.tensor_split(dist.get_world_size())[rank()].clone()


SHAPES = ((7, 3), (1, 5), (64,), (100, 9))


def mesh_of(*shape: int) -> DeviceMesh:
    names = ("outer", "inner")[-len(shape) :]
    return init_device_mesh("cpu", shape, mesh_dim_names=names)
