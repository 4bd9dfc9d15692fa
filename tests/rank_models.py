"""Models that FSDP2 and tensor parallel have sharded, on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import gradclip.torch as gt
from rank_support import (
    check,
    full,
    mesh_of,
    same_bits,
    values,
)


class _Model(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(5, hidden)
        self.second = nn.Linear(hidden, 12)
        self.last = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.second(self.first(x).tanh()).tanh())
        return out


def _loss(model: nn.Module) -> Tensor:
    out: Tensor = model(values(6, 5, seed=8))
    return out.square().sum() * 10


def _check_model(shard: Callable[[_Model], None], hidden: int = 7) -> None:  # uneven on 2 and 4 ranks
    """Three steps of a sharded model go as those of the whole one with torch's clipping."""
    torch.manual_seed(3)
    model = _Model(hidden)
    whole = _Model(hidden)
    whole.load_state_dict(model.state_dict())
    shard(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, whole)]
    for clip in (gt.clip_grad_norm_, nn.utils.clip_grad_norm_, gt.clip_grad_norm_):
        losses = [_loss(m) for m in (model, whole)]
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        torch.testing.assert_close(full(losses[0]), losses[1], rtol=1e-4, atol=1e-5)
        if clip is nn.utils.clip_grad_norm_:
            with gt.patched() as counts:
                norm = clip(model.parameters(), 1.0)
            assert counts.taken == {"get_total_norm": 1, "clip_grads_with_norm_": 1}, counts
        else:
            norm = clip(model.parameters(), 1.0)
        expected = nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
        assert isinstance(norm, DTensor)
        assert math.isclose(same_bits(norm), float(expected), rel_tol=1e-4)
        for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
            assert isinstance(mine.grad, DTensor)
            assert theirs.grad is not None
            torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad, rtol=1e-4, atol=1e-6)
        for optimizer in optimizers:
            optimizer.step()


@check(2, 4)
def fully_sharded() -> None:
    mesh = mesh_of(dist.get_world_size())

    def shard(model: _Model) -> None:
        fully_shard(model.second, mesh=mesh)
        fully_shard(model, mesh=mesh)

    _check_model(shard)


@check(2, 4)
def fully_sharded_as_by_torch() -> None:
    """Against torch's own clipping of the same shards, not clipping too."""
    for max_norm in (0.5, 1e6):
        norms, results = [], []
        for clip in (gt.clip_grad_norm_, nn.utils.clip_grad_norm_):
            torch.manual_seed(4)
            model = _Model(7)
            fully_shard(model, mesh=mesh_of(dist.get_world_size()))
            _loss(model).backward()  # type: ignore[no-untyped-call]
            before = [p.grad.to_local().clone() for p in model.parameters()]  # type: ignore[union-attr]
            norm = clip(model.parameters(), max_norm)
            norms.append(same_bits(norm))
            assert isinstance(norm, DTensor)
            results.append([p.grad.to_local() for p in model.parameters()])  # type: ignore[union-attr]
            if max_norm == 1e6 and clip is gt.clip_grad_norm_:
                assert all(map(torch.equal, before, results[-1]))
        assert math.isclose(*norms, rel_tol=1e-6)
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=0)


@check(4)
def sharded_and_replicated() -> None:
    """Hybrid sharding: gradients replicated over the outer dimension are not counted twice."""

    def shard(model: _Model) -> None:
        fully_shard(model, mesh=mesh_of(2, 2))

    _check_model(shard)


@check(4)
def tensor_parallel_and_sharded() -> None:
    """Two layers on a mesh of two dimensions, the last on one of them: counted once on the other."""
    mesh = mesh_of(2, 2)

    def shard(model: _Model) -> None:
        plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
        parallelize_module(model, mesh["inner"], plan)
        fully_shard(model, mesh=mesh["outer"])
        strided = [p for p in model.parameters() if type(p.placements[0]).__name__ == "_StridedShard"]  # type: ignore[attr-defined]
        assert strided, "expected a parameter whose shards are interleaved"

    _check_model(shard, hidden=8)


@check(2, 4)
def what_is_unsupported_goes_to_torch_on_every_rank() -> None:
    mesh = mesh_of(dist.get_world_size())
    grad = DTensor.from_local(torch.ones(3), mesh, [Partial("max")])
    with gt.patched() as counts:
        norm = nn.utils.get_total_norm([grad])
    assert counts.passed_on == {"get_total_norm": 1}
    assert math.isclose(same_bits(norm), math.sqrt(3), rel_tol=1e-6)
