"""A device that PyTorch knows and no CPU's tensor is on, and process groups that reduce only what lies there.

So are NCCL's to tensors on the CPU: "No backend type associated with device type cpu". The numbers of the
device's tensors lie in tensors of the CPU, which a fallback computes with and gloo sends.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

__all__ = ["Apart", "register"]

_aten = torch.ops.aten


class Apart(Tensor):
    """A tensor on the device."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    held: Tensor


def _put(held: Tensor) -> Apart:
    made: Any = torch._C._acc.create_empty_tensor(held.shape, held.dtype)
    made.__class__ = Apart
    made.held = held
    placed: Apart = made
    return placed


def _compute(operation: Any, *args: Any, **options: Any) -> Any:
    """Any operation of the device's."""
    on_host, options = tree_map_only(Apart, lambda tensor: tensor.held, (args, options))
    if operation is _aten._copy_from.default:
        on_host[1].copy_(on_host[0])
        return args[1]
    if operation is _aten._local_scalar_dense.default:
        return on_host[0].item()
    if "device" in options:
        options["device"] = torch.device("cpu")
    given = {id(tensor.held): tensor for tensor in args if isinstance(tensor, Apart)}  # changed in place
    results = operation(*on_host, **options)
    return tree_map_only(
        Tensor, lambda tensor: given[id(tensor)] if id(tensor) in given else _put(tensor), results
    )


class _Group(dist.ProcessGroup):
    """Sends what lies on the device, and refuses all else, as ProcessGroupNCCL does."""

    def __init__(self, gloo: Any, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._gloo = gloo

    # As PyTorch finds them in groups of its own.
    _device_types = property(lambda self: [torch.device("apart")])
    group_name = property(lambda self: dist.distributed_c10d._world.pg_names[self])

    def getBackendName(self) -> str:
        return "apart"

    def allreduce(self, tensors: Any, options: Any = None) -> Any:  # type: ignore[override]
        return self._gloo.allreduce(_held(tensors), options)

    def allgather(self, results: Any, tensors: Any, options: Any = None) -> Any:
        return self._gloo.allgather([_held(each) for each in results], _held(tensors))


def _held(tensors: list[Tensor]) -> list[Tensor]:
    for tensor in tensors:
        if not isinstance(tensor, Apart):
            raise RuntimeError(f"No backend type associated with device type {tensor.device.type}")
    return [tensor.held for tensor in tensors]  # type: ignore[attr-defined]


def _make_group(store: Any, rank: int, size: int, timeout: timedelta) -> _Group:
    return _Group(dist.ProcessGroupGloo(store, rank, size, timeout), rank, size)


def register() -> torch.library.Library:
    """Make the device "apart" and the backend "apart", for as long as what is returned lives."""
    _setup_privateuseone_for_python_backend("apart")
    make: Any = torch.library.Library
    library: torch.library.Library = make("_", "IMPL")
    library.fallback(_compute, "PrivateUse1")  # type: ignore[no-untyped-call]
    dist.Backend.register_backend("apart", _make_group, devices=["apart"])
    return library
