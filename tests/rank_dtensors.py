"""DTensors by their placements, on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import gradclip.torch as gt
from gradclip.distributed._collective import reduced
from gradclip.torch import _joint
from gradclip.torch._layout import Layout
from rank_support import (
    ORDERS,
    SHAPES,
    check,
    full,
    mesh_of,
    norm_over,
    raises,
    rank,
    same_bits,
    values,
    with_grad,
    with_grads,
)


def _check_dtensors(make: Callable[[], list[Tensor]], wholes: Sequence[Tensor]) -> None:
    """DTensors (and plain tensors) are clipped as the whole gradients are, by all orders and functions."""
    for order in ORDERS:
        grads = make()
        norm = gt.clip_grad_norm_(with_grads(grads), 0.5, order)
        assert isinstance(norm, DTensor)
        assert all(placement.is_replicate() for placement in norm.placements)
        assert norm.dtype is torch.float32
        value = same_bits(norm)
        assert math.isclose(value, norm_over(wholes, order), rel_tol=1e-6), (order, value)
        factor = min(0.5 / (norm_over(wholes, order) + 1e-6), 1.0)
        for grad, whole in zip(grads, wholes, strict=True):
            torch.testing.assert_close(full(grad), whole * factor, rtol=2e-6, atol=2e-6)
        again = make()
        measured = gt.get_total_norm(again, order)
        assert isinstance(measured, DTensor)
        assert same_bits(measured) == value
        gt.clip_grads_with_norm_(with_grads(again), 0.5, measured)
        for one, two in zip(again, grads, strict=True):
            torch.testing.assert_close(full(one), full(two), rtol=1e-6, atol=1e-6)


@check(2, 4)
def dtensors_on_one_mesh() -> None:
    mesh = mesh_of(dist.get_world_size())
    wholes = [values(*shape, seed=i) for i, shape in enumerate((*SHAPES, (5, 8)))]
    placements: list[Any] = [[Shard(0)], [Shard(0)], [Replicate()], [Shard(0)], [Shard(1)]]
    _check_dtensors(
        lambda: [distribute_tensor(w.clone(), mesh, p) for w, p in zip(wholes, placements, strict=True)],
        wholes,
    )


@check(4)
def dtensors_on_a_mesh_of_two_dimensions() -> None:
    mesh = mesh_of(2, 2)
    wholes = [values(7, 5, seed=i) for i in range(5)]
    placements: list[Any] = [
        (Shard(0), Shard(1)),
        (Replicate(), Shard(0)),
        (Shard(1), Replicate()),
        (Replicate(), Replicate()),
        (Shard(0), Shard(0)),
    ]
    _check_dtensors(
        lambda: [distribute_tensor(w.clone(), mesh, p) for w, p in zip(wholes, placements, strict=True)],
        wholes,
    )


@check(2, 4)
def experts_on_a_mesh_of_their_own() -> None:
    """Dense layers sharded over all ranks, experts over few and replicated, a router on every rank."""
    world = dist.get_world_size()
    dense, expert = mesh_of(world), mesh_of(2, world // 2) if world > 2 else mesh_of(2)
    wholes = [values(9, 4, seed=0), values(4, 6, seed=1), values(8, seed=2), values(3, seed=3)]
    over_experts: list[Any] = [Shard(0), Replicate()][: expert.ndim]

    def make() -> list[Tensor]:
        return [
            distribute_tensor(wholes[0].clone(), dense, [Shard(0)]),
            distribute_tensor(wholes[1].clone(), expert, over_experts),
            distribute_tensor(wholes[2].clone(), dense, [Replicate()]),
            wholes[3].clone(),
        ]

    _check_dtensors(make, wholes)
    _check_dtensors(lambda: make()[::-1], wholes[::-1])  # a plain tensor first


@check(2, 4)
def partial_sums_are_added_up_and_scaled_as_they_are() -> None:
    world = dist.get_world_size()
    mesh = mesh_of(world)
    wholes = [values(5, 3, seed=0), values(4, seed=1), values(6, 2, seed=2)]

    def make() -> list[Tensor]:
        share = values(5, 3, seed=9) * (world - 1 if rank() == 0 else -1)  # which cancels
        return [
            DTensor.from_local(wholes[0] / world + share, mesh, [Partial()]),
            DTensor.from_local(wholes[1] * 1.0, mesh, [Partial("avg")]),
            distribute_tensor(wholes[2].clone(), mesh, [Shard(0)]),
        ]

    _check_dtensors(make, wholes)
    grads = make()
    gt.clip_grad_norm_(with_grads(grads), 0.5)
    assert isinstance(grads[0], DTensor)
    assert grads[0].placements[0].is_partial()
    for limit in (0.5, 0.0):
        with raises(TypeError, r"^parameters\[0\]\.grad: expected no partial sums"):
            gt.clip_grad_value_(with_grads(make()), limit)
    greatest = DTensor.from_local(torch.ones(3), mesh, [Partial("max")])
    with raises(TypeError, r"^parameters\[0\]\.grad: expected partial sums or averages"):
        gt.clip_grad_norm_([with_grad(greatest)], 0.5)


@check(2, 4)
def values_are_clipped_where_they_are() -> None:
    mesh = mesh_of(dist.get_world_size())
    whole = values(7, 3, seed=0)
    for limit in (0.5, 0.0):
        grads = [distribute_tensor(whole.clone(), mesh, [p]) for p in (Shard(0), Shard(1), Replicate())]
        gt.clip_grad_value_(with_grads(grads), limit)
        assert all(torch.equal(grad.full_tensor(), whole.clamp(-limit, limit)) for grad in grads)


@check(2, 4)
def a_dtensor_that_one_rank_has_no_gradient_for() -> None:
    mesh = mesh_of(dist.get_world_size())
    whole = values(8, 4, seed=0)
    parameters = with_grads([distribute_tensor(whole.clone(), mesh, [Shard(0)]) for _ in range(2)])
    if rank() == 0:
        parameters[0].grad = parameters[1].grad = None
    norm = gt.clip_grad_norm_(parameters, 1e9)
    rest = whole.tensor_split(dist.get_world_size())[1:]
    assert math.isclose(same_bits(norm), norm_over([*rest, *rest], 2), rel_tol=1e-6)


@check(2, 4)
def dtensors_that_are_wrong_on_one_rank() -> None:
    mesh = mesh_of(dist.get_world_size())
    for special in (math.nan, math.inf):
        whole = torch.ones(8)
        whole[-1] = special  # which the last rank has
        last = dist.get_world_size() - 1
        grad = distribute_tensor(whole, mesh, [Shard(0)])
        with raises(gt.NonFiniteNormError, rf"rank {last}: parameters\[0\]\.grad: expected finite"):
            gt.clip_grad_norm_([with_grad(grad)], 0.1, error_if_nonfinite=True)
        with raises(RuntimeError, rf"rank {last}: tensors\[0\]: expected finite elements, got"):
            gt.get_total_norm([grad], math.inf, error_if_nonfinite=True)
    good = distribute_tensor(torch.ones(8), mesh, [Shard(0)])
    parameter = with_grad(good)
    if rank() == 1:
        parameter.grad = good.clone().requires_grad_() * 1.0
    with raises(TypeError, r"^rank 1: parameters\[0\]\.grad: expected a gradient that does not require"):
        gt.clip_grad_norm_([parameter], 0.1)
    more = [with_grad(good)] * (2 if rank() == 1 else 1)
    with raises(ValueError, r"parameters: expected the same number .* got 1 on rank 0.*; 2 on rank 1"):
        gt.clip_grad_norm_(more, 0.1)
    with raises(ValueError, "^group: expected None for DTensors"):
        gt.clip_grad_norm_([with_grad(good)], 0.1, group=dist.group.WORLD)
    with raises(TypeError, "^norm_type: expected a positive order"):
        gt.clip_grad_norm_([with_grad(good)], 0.1, 0.0)
    assert torch.equal(good.full_tensor(), torch.ones(8))


@check(2, 4)
def a_rank_without_gradients_of_dtensors() -> None:
    """It takes part all the same, wherever in the list the DTensors are."""
    mesh = mesh_of(dist.get_world_size())
    whole = values(8, 4, seed=0)
    parameters = with_grads([values(3, seed=1), distribute_tensor(whole.clone(), mesh, [Shard(0)])])
    if rank() == 0:
        parameters[1].grad = None
    norm = gt.clip_grad_norm_(parameters, 1e9)
    rest = whole.tensor_split(dist.get_world_size())[1:]
    assert math.isclose(same_bits(norm), norm_over([values(3, seed=1), *rest], 2), rel_tol=1e-6)


@check(2, 4)
def replicas_that_are_wrong_on_one_rank() -> None:
    """No sum goes through their group, and still all hear of it."""
    mesh = mesh_of(2, dist.get_world_size() // 2)
    grads = [distribute_tensor(torch.ones(8), mesh, [Replicate(), Replicate()]) for _ in range(2)]
    parameters = with_grads(list(grads))
    if rank() == 1:
        parameters[1].grad = grads[1].clone().requires_grad_() * 1.0
    with raises(TypeError, r"^rank 1: parameters\[1\]\.grad: expected a gradient that does not require"):
        gt.clip_grad_norm_(parameters, 0.1)
    assert all(torch.equal(grad.to_local(), torch.ones(8)) for grad in grads)


@check(4)
def what_one_group_heard_reaches_the_others() -> None:
    """One tensor is sharded over the rows of the mesh, one over its columns; a rank is in one of each."""
    mesh = mesh_of(2, 2)
    grads = [
        distribute_tensor(torch.ones(8), mesh, [Shard(0), Replicate()]),
        distribute_tensor(torch.ones(8), mesh, [Replicate(), Shard(0)]),
    ]
    for order in (2.0, math.inf):
        parameters = with_grads(list(grads))
        if rank() == 3:
            parameters[0].grad = grads[0].clone().requires_grad_() * 1.0
        with raises(TypeError, r"^rank 3: parameters\[0\]\.grad: expected a gradient that does not require"):
            gt.clip_grad_norm_(parameters, 0.1, order)
    assert all(grad.to_local().eq(1).all() for grad in grads)


@check(2, 4)
def a_mesh_whose_group_was_destroyed() -> None:
    mesh = mesh_of(dist.get_world_size())
    group = dist.new_group()
    mesh = DeviceMesh.from_group(group, "cpu")
    grad = distribute_tensor(torch.ones(8), mesh, [Shard(0)])
    dist.destroy_process_group(group)
    with raises(ValueError, r"^parameters\[0\]\.grad: expected .*open process group.* destroyed"):
        gt.clip_grad_norm_([with_grad(grad)], 0.1)
    assert torch.equal(grad.to_local(), torch.ones(len(grad.to_local())))


@check(4)
def groups_that_rounded_differently_agree() -> None:
    """gloo's do not; here the totals of the ranks differ from the start."""
    mesh = mesh_of(2, 2)
    for placements in ([Shard(0), Shard(1)], [Replicate(), Shard(0)]):
        grad = distribute_tensor(torch.ones(4, 4), mesh, placements)
        layout = Layout.of([grad], (), None, "tensors[{}]")
        joint = _joint.Joint(layout, _joint.Report(1), 2.0, may_wait=False)
        total = joint.agreed(torch.tensor(1 + (rank() + 1) * 2.0**-52, dtype=torch.float64))
        assert same_bits(total) == 1 + 4 * 2.0**-52
        nan = torch.tensor(math.nan if rank() == 2 else 1.0, dtype=torch.float64)
        assert math.isnan(same_bits(joint.agreed(nan)))


@check(4)
def the_norm_is_what_groups_that_rounded_differently_agree_on() -> None:
    plain = reduced

    def rounded(values: Tensor, order: float, group: dist.ProcessGroup) -> Tensor:
        values = plain(values, order, group)
        if not math.isinf(order):
            values[0] *= 1 + rank() // 2 * 2.0**-40
        return values

    grad = distribute_tensor(values(8, 8, seed=1, dtype=torch.float64), mesh_of(2, 2), [Shard(0), Shard(1)])
    with mock.patch.object(_joint, "reduced", rounded):
        norm = same_bits(gt.clip_grad_norm_([with_grad(grad)], 0.5))
    assert math.isclose(norm, norm_over([values(8, 8, seed=1, dtype=torch.float64)], 2), rel_tol=1e-11)


@check(2, 4)
def no_tensor_beside_dtensors_on_one_rank() -> None:
    mesh = mesh_of(dist.get_world_size())
    parameters: list[Any] = with_grads(
        [distribute_tensor(values(8, seed=i), mesh, [Shard(0)]) for i in (0, 1)]
    )
    if rank() == 1:
        parameters[0] = 5
    with raises(TypeError, r"^rank 1: parameters\[0\]: expected a torch.Tensor, got builtins.int"):
        gt.clip_grad_norm_(parameters, 0.5)
    assert torch.equal(full(parameters[1].grad), values(8, seed=1))


@check(4)
def a_mesh_without_some_of_the_ranks() -> None:
    part, everybody = DeviceMesh("cpu", [0, 1]), mesh_of(4)
    grads = [distribute_tensor(values(8, seed=1), part, [Shard(0)])]
    for placement in (Shard(0), Replicate()):
        beside = distribute_tensor(values(8, seed=2), everybody, [placement])
        for mixed in ([*grads, beside], [beside, *grads]):
            parameters = with_grads(mixed)
            with raises(ValueError, r"^rank 2: parameters\[[01]\]\.grad: expected a mesh with rank 2 in it"):
                gt.clip_grad_norm_(parameters, 0.5)
    if rank() < 2:  # what lies there alone is clipped there
        norm = gt.clip_grad_norm_(with_grads(grads), 0.5)
        assert math.isclose(float(full(norm)), norm_over([values(8, seed=1)], 2.0), rel_tol=1e-6)


@check(2)
def a_compiled_call_leaves_the_graph_for_dtensors() -> None:
    mesh = mesh_of(2)
    clips: tuple[Callable[[Any], object], ...] = (
        lambda p: gt.clip_grad_norm_(p, 0.5),
        lambda p: gt.clip_grads_with_norm_(p, 0.5, gt.get_total_norm([each.grad for each in p])),
        lambda p: gt.clip_grad_value_(p, 0.5),
    )
    for clip in clips:
        eager, compiled = (with_grads([distribute_tensor(values(8), mesh, [Shard(0)])]) for _ in range(2))
        clip(eager)
        torch.compile(clip, backend="aot_eager")(compiled)
        assert eager[0].grad is not None
        assert compiled[0].grad is not None
        assert torch.equal(full(compiled[0].grad), full(eager[0].grad))
        assert compiled[0].grad._version > 0
