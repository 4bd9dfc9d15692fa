"""Two ranks whose gradients lie on the CPU, where their process group reduces nothing: as with FSDP2, CPU
offload and NCCL. ``python tests/offload_ranks.py STORE``"""

from __future__ import annotations

import math
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

import apart
import gradclip
import gradclip.distributed
import gradclip.torch

WORLD, MAX_NORM = 2, 1.0
# Rows on each rank; the gradient of all is 1 … 12.
_ROWS = {0: slice(0, 2), 1: slice(2, 4)}
_WHOLE = torch.arange(1.0, 13.0).reshape(4, 3)


def _expected(order: float) -> float:
    return float(torch.linalg.vector_norm(_WHOLE.double(), order))


def _sharded(mesh: Any, rank: int) -> nn.Parameter:
    """As FSDP2 leaves it with CPUOffloadPolicy: a DTensor of the device's mesh, its shard on the CPU."""
    spec = DTensorSpec(mesh, (Shard(0),), tensor_meta=TensorMeta(_WHOLE.shape, (3, 1), _WHOLE.dtype))

    def on_host(local: Tensor) -> Any:
        make: Any = DTensor
        return make(local, spec, requires_grad=False)

    parameter = nn.Parameter(on_host(torch.zeros(2, 3)))
    parameter.grad = on_host(_WHOLE[_ROWS[rank]].clone())
    return parameter


def _local(tensor: Any) -> Tensor:
    local: Tensor = tensor._local_tensor
    assert local.device.type == "cpu"
    return local


def _value(norm: Tensor) -> float:
    return float(norm.full_tensor().to("cpu")) if isinstance(norm, DTensor) else float(norm)


@contextmanager
def _raises(text: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not re.search(text, str(error)):
            raise
        return
    raise AssertionError(f"nothing was raised, expected: {text}")


def check_dtensors(rank: int) -> None:
    mesh = init_device_mesh("apart", (WORLD,))
    weight = _sharded(mesh, rank)
    # What this is about: if PyTorch learns to do it, the page has to say so.
    with _raises("No backend type associated with device type cpu"):
        torch.nn.utils.clip_grad_norm_([weight], MAX_NORM)
    for order in (2.0, 1.0, math.inf, 3.0):
        weight = _sharded(mesh, rank)
        norm = _value(gradclip.torch.clip_grad_norm_([weight], MAX_NORM, order))
        assert math.isclose(norm, _expected(order), rel_tol=1e-6), (norm, order)
        clipped = _WHOLE[_ROWS[rank]] * (MAX_NORM / _expected(order))
        torch.testing.assert_close(_local(weight.grad), clipped, rtol=2e-6, atol=0)
        grad: Any = _sharded(mesh, rank).grad
        assert _value(gradclip.torch.get_total_norm([grad], order)) == norm


def check_errors(rank: int) -> None:
    """What is wrong on one rank is raised on both, and nothing is written."""
    mesh = init_device_mesh("apart", (WORLD,))
    weight = _sharded(mesh, rank)
    if rank == 1:
        _local(weight.grad)[0, 1] = math.nan
    before = _local(weight.grad).clone()
    with _raises("rank 1: "):
        gradclip.torch.clip_grad_norm_([weight], MAX_NORM, error_if_nonfinite=True)
    torch.testing.assert_close(_local(weight.grad), before, rtol=0, atol=0, equal_nan=True)


def check_accumulation(rank: int) -> None:
    """The recipe for a partition of each rank's own: summed in float32, one norm, the optimizer clips."""
    weight = nn.Parameter(torch.zeros(6))
    weight.grad = torch.zeros(6)
    reduce = gradclip.distributed.process_group(ord=2)
    half = _WHOLE[_ROWS[rank]].flatten().to(torch.bfloat16)
    gradclip.accumulate_([weight.grad], [half], scale=0.5)
    measured = gradclip.accumulate_([weight.grad], [half], scale=0.5, reduce=reduce)
    assert math.isclose(measured.total_norm, _expected(2), rel_tol=1e-7)
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    gradclip.torch.defer_clip_(optimizer, MAX_NORM, measured=measured)
    optimizer.step()
    clipped = _WHOLE[_ROWS[rank]].flatten() * (MAX_NORM / _expected(2))
    torch.testing.assert_close(weight.detach(), -clipped, rtol=2e-6, atol=0)


def main(store: str, rank: int) -> None:
    library = apart.register()
    dist.init_process_group(
        "apart", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=300)
    )
    for check in (check_dtensors, check_errors, check_accumulation):
        check(rank)
        sys.stdout.write(f"{check.__name__} on rank {rank}\n")
        sys.stdout.flush()
    del library


if __name__ == "__main__":
    child = os.fork()  # everything is imported, and nothing runs yet
    try:
        main(sys.argv[1], 1 if child == 0 else 0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    # Threads of PyTorch's process groups end a process by std::terminate, now and then.
    os._exit(0 if child == 0 else os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
