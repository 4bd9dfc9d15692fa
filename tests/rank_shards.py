"""Shards in plain tensors, on every rank."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import gradclip
import gradclip.distributed
import gradclip.torch as gt
from gradclip.torch import _joint
from rank_support import (
    ORDERS,
    SHAPES,
    assert_close,
    check,
    full,
    mesh_of,
    norm_over,
    piece_of,
    raises,
    rank,
    same_bits,
    values,
    with_grad,
    with_grads,
)


@check(2, 4)
def shards_are_clipped_as_the_whole() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for order in ORDERS:
            wholes = [values(*shape, seed=i, dtype=dtype) for i, shape in enumerate(SHAPES)]
            pieces = [piece_of(whole) for whole in wholes]
            norm = gt.clip_grad_norm_(with_grads(pieces), 0.5, order, group=dist.group.WORLD)
            assert norm.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
            value = same_bits(norm)
            assert math.isclose(
                value, norm_over(wholes, order), rel_tol=1e-12 if dtype is torch.float64 else 1e-6
            )
            alone = [whole.clone() for whole in wholes]
            gt.clip_grad_norm_(with_grads(alone), 0.5, order)
            for piece, whole in zip(pieces, alone, strict=True):
                assert_close(piece, piece_of(whole), dtype)


@check(2, 4)
def shards_are_clipped_as_by_torch() -> None:
    wholes = [values(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    pieces = [piece_of(whole) for whole in wholes]
    norm = gt.clip_grad_norm_(with_grads(pieces), 0.5, group=dist.group.WORLD)
    theirs = with_grads(wholes)
    assert math.isclose(same_bits(norm), float(nn.utils.clip_grad_norm_(theirs, 0.5)), rel_tol=1e-6)
    for piece, whole in zip(pieces, theirs, strict=True):
        assert whole.grad is not None
        assert_close(piece, piece_of(whole.grad))


@check(2, 4)
def shards_beyond_the_squares_of_float32() -> None:
    for scale in (1e20, 1e-30):
        whole = torch.full((40,), scale)
        piece = piece_of(whole)
        norm = gt.clip_grad_norm_([with_grad(piece)], 0.0, group=dist.group.WORLD)
        assert math.isclose(same_bits(norm), scale * math.sqrt(40), rel_tol=1e-6)


@check(2, 4)
def a_norm_below_the_threshold_writes_nothing() -> None:
    piece = piece_of(values(1000, seed=1))
    before = piece.clone()
    norm = gt.clip_grad_norm_([with_grad(piece)], 1e9, group=dist.group.WORLD)
    assert same_bits(norm) > 1
    assert torch.equal(piece, before)


@check(2, 4)
def a_rank_without_gradients_takes_part() -> None:
    piece = values(8, seed=2, dtype=torch.float64)
    mine = with_grad(piece) if rank() == 1 else with_grad(None, torch.zeros(8, dtype=torch.float64))
    nothing = with_grad(torch.zeros(0))
    norm = gt.clip_grad_norm_([mine, nothing], 1.0, group=dist.group.WORLD)
    assert norm.dtype is torch.float64
    assert math.isclose(
        same_bits(norm), norm_over([values(8, seed=2, dtype=torch.float64)], 2), rel_tol=1e-13
    )
    if rank() == 1:
        assert math.isclose(float(piece.norm()), 1.0, rel_tol=1e-5)
    assert same_bits(gt.clip_grad_norm_([], 1.0, group=dist.group.WORLD)) == 0.0


@check(2, 4)
def the_norm_alone_and_clipping_by_it() -> None:
    whole = values(50, 3, seed=3)
    piece = piece_of(whole)
    norm = gt.get_total_norm([piece], group=dist.group.WORLD)
    assert math.isclose(same_bits(norm), norm_over([whole], 2), rel_tol=1e-6)
    gt.clip_grads_with_norm_([with_grad(piece)], 0.25, norm)
    assert math.isclose(same_bits(gt.get_total_norm([piece], group=dist.group.WORLD)), 0.25, rel_tol=1e-5)


@check(4)
def a_group_of_some_ranks() -> None:
    pair = dist.new_group([1, 3])
    piece = torch.full((2,), float(rank()))
    if rank() in (1, 3):
        norm = gt.clip_grad_norm_([with_grad(piece)], 1e9, group=pair)
        assert math.isclose(float(norm), math.sqrt(2 * (1 + 9)), rel_tol=1e-7)
        dist.destroy_process_group(pair)
    else:
        try:
            gt.clip_grad_norm_([with_grad(piece)], 1e9, group=pair)
        except ValueError as error:
            assert f"without rank {rank()}" in str(error)  # noqa: PT017 (this is no pytest)
        else:
            raise AssertionError("expected an error for a group without this rank")


@check(2, 4)
def ranks_that_disagree_on_the_number_of_tensors() -> None:
    for order in ORDERS:
        pieces = [torch.ones(3) for _ in range(2 if rank() == 1 else 3)]
        with raises(ValueError, r"parameters: expected the same number .* got 3 on rank 0.*; 2 on rank 1"):
            gt.clip_grad_norm_(with_grads(pieces), 0.1, order, group=dist.group.WORLD)
        assert all(torch.equal(piece, torch.ones(3)) for piece in pieces)
        with raises(ValueError, r"tensors: expected the same number .* 2 on rank 1"):
            gt.get_total_norm(pieces, order, group=dist.group.WORLD)
    # The counts may be anything: one off among many, a multiple.
    for count in (0, 64, 1000):
        lists = [torch.ones(1)] * (count + 64 * (rank() == 0))
        with raises(ValueError, r"rank 0"):
            gt.get_total_norm(lists, group=dist.group.WORLD)


@check(2, 4)
def what_is_wrong_on_one_rank_is_raised_on_all() -> None:
    good, bad = torch.ones(3), torch.ones(3)
    integer = nn.Parameter(torch.ones(3, dtype=torch.int32), requires_grad=False)
    integer.grad = torch.ones(3, dtype=torch.int32)
    graph = with_grad(torch.ones(3))
    graph.grad = bad.clone().requires_grad_() * 1.0
    wrong: list[tuple[Any, type[Exception], str]] = [
        (integer, TypeError, r"^rank 1: parameters\[1\]\.grad: expected a dtype of .* int32"),
        (graph, TypeError, r"^rank 1: parameters\[1\]\.grad: expected a gradient that does not require grad"),
        ("no tensor", TypeError, r"^rank 1: parameters\[1\]: expected a torch.Tensor, got builtins.str"),
        (with_grad(good.expand(3, 3)), ValueError, r"^rank 1: parameters\[1\]\.grad: "),
        (with_grad(torch.ones(3, device="meta")), TypeError, r"^rank 1: parameters\[1\]\.grad: .*meta"),
    ]
    for entry, kind, pattern in wrong:
        with raises(kind, pattern):
            second = entry if rank() == 1 else with_grad(bad)
            gt.clip_grad_norm_([with_grad(good), second], 0.1, group=dist.group.WORLD)
        assert torch.equal(good, torch.ones(3))
        assert torch.equal(bad, torch.ones(3))
    with raises(ValueError, r"^rank 1: max_norm: expected a number that is not negative, got -1"):
        gt.clip_grad_norm_([with_grad(good)], -1.0 if rank() == 1 else 1.0, group=dist.group.WORLD)
    with raises(TypeError, r"^rank 1: tensors\[0\]: expected a torch.Tensor, got builtins.int"):
        gt.get_total_norm([1 if rank() == 1 else good], group=dist.group.WORLD)  # type: ignore[list-item]
    assert torch.equal(good, torch.ones(3))


@check(2, 4)
def what_is_not_finite_on_one_rank_is_raised_on_all() -> None:
    for special in (math.nan, math.inf):
        for order in ORDERS:
            piece = torch.ones(3)
            if rank() == 1:
                piece[1] = special
            before = piece.clone()
            nan, inf = int(math.isnan(special)), int(math.isinf(special))
            pattern = rf"rank 1: parameters\[1\]\.grad: expected finite elements, got {nan} NaN and {inf} inf"
            with raises(gt.NonFiniteNormError, pattern):
                gt.clip_grad_norm_(
                    with_grads([torch.ones(2), piece]),
                    0.1,
                    order,
                    error_if_nonfinite=True,
                    group=dist.group.WORLD,
                )
            assert torch.equal(piece.nan_to_num(7.0), before.nan_to_num(7.0))
            # Without: the norm says so, on every rank. gloo's own maximum loses a NaN.
            found = full(gt.get_total_norm([piece], order, group=dist.group.WORLD))
            assert float(found) == special or (math.isnan(special) and math.isnan(float(found)))


@check(2, 4)
def where_nothing_may_wait_the_others_get_nan() -> None:
    """As on a GPU; here on the CPU."""
    with mock.patch.object(_joint.Joint, "_may_wait", return_value=False):
        for order in ORDERS:
            piece = torch.ones(3)
            norm = gt.clip_grad_norm_([with_grad(piece)], 1e9, order, group=dist.group.WORLD)
            expected = norm_over([torch.ones(3 * dist.get_world_size())], order)
            assert math.isclose(same_bits(norm), expected, rel_tol=1e-6)
            if rank() == 1:
                piece = piece.int()
            failed = False
            try:
                found = gt.get_total_norm([piece], order, group=dist.group.WORLD)
                assert math.isnan(float(found))
            except TypeError:
                failed = True
            assert failed == (rank() == 1)
            found = gt.get_total_norm([torch.ones(3)] * (1 + rank()), order, group=dist.group.WORLD)
            assert math.isnan(same_bits(found))


@check(2)
def sparse_and_repeated_gradients() -> None:
    whole = values(6, 4, seed=5)
    rows = torch.tensor([2 * rank(), 2 * rank() + 1, 2 * rank()])  # one twice
    invariants: Any = torch.sparse.check_sparse_tensor_invariants  # without which PyTorch 2.11 warns
    with invariants():
        grad = torch.sparse_coo_tensor(rows[None], whole[rows], (6, 4))
    dense = grad.to_dense()
    wholes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(wholes, dense)
    table = nn.Parameter(torch.zeros(6, 4))
    table.grad = grad
    norm = gt.clip_grad_norm_([table, table], 0.5, group=dist.group.WORLD)
    reference = norm_over(wholes, 2)
    assert math.isclose(same_bits(norm), reference, rel_tol=1e-6)
    torch.testing.assert_close(table.grad.to_dense(), dense * (0.5 / (reference + 1e-6)), rtol=1e-6, atol=0)


@check(2)
def a_compiled_step() -> None:
    """The collective breaks the graph, and nothing else."""
    pieces = [values(8, seed=rank()) for _ in range(2)]

    @torch.compile(backend="eager")
    def step(parameter: nn.Parameter) -> Tensor:
        norm: Tensor = gt.clip_grad_norm_([parameter], 0.5, group=dist.group.WORLD)
        return norm * 2

    compiled = step(with_grad(pieces[0])) / 2
    assert torch.equal(compiled, gt.clip_grad_norm_([with_grad(pieces[1])], 0.5, group=dist.group.WORLD))
    assert torch.equal(*pieces)


@check(2, 4)
def a_group_that_was_destroyed() -> None:
    group = dist.new_group()
    piece = torch.ones(3)
    reduce = gradclip.distributed.process_group(group)
    gt.clip_grad_norm_([with_grad(piece)], 1e9, group=group)
    dist.destroy_process_group(group)
    with raises(ValueError, "^group: expected an open process group.* got one that was destroyed"):
        gt.clip_grad_norm_([with_grad(piece)], 0.1, group=group)
    with raises(ValueError, "^group: expected an open process group.* got one that was destroyed"):
        gt.get_total_norm([piece], group=group)
    with raises(ValueError, "^group: expected an open process group.* got one that was destroyed"):
        gradclip.clip_by_global_norm_([piece], 0.1, reduce=reduce)
    with raises(TypeError, "^group: expected a torch.distributed.ProcessGroup or None, got a builtins.str"):
        gt.clip_grad_norm_([with_grad(piece)], 0.1, group="gloo")  # type: ignore[arg-type]
    assert torch.equal(piece, torch.ones(3))


@check(2, 4)
def orders_that_only_torch_has() -> None:
    for order in (0.0, -1.0, -math.inf):
        with raises(TypeError, "^norm_type: expected a positive order"):
            gt.clip_grad_norm_([with_grad(torch.ones(3))], 0.1, order, group=dist.group.WORLD)


class Messages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the bytes of every all-reduce."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nbytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # until it has become a call on what it holds
        if func in (torch.ops.c10d.allreduce_.default, torch.ops._c10d_functional.all_reduce.default):
            self.nbytes += [t.nbytes for t in (args[0] if isinstance(args[0], list) else [args[0]])]
        return func(*args, **(kwargs or {}))


@check(2, 4)
def one_message_whatever_the_number_of_tensors() -> None:
    """As docs/scaling.md says, of PyTorch too."""
    mesh = mesh_of(dist.get_world_size())
    for count in (1, 50):
        grads = [distribute_tensor(values(8, seed=i), mesh, [Shard(0)]) for i in range(count)]
        plain = [grad.to_local() for grad in grads]
        for order, nbytes in ((2.0, 32), (math.inf, 64)):
            with Messages() as messages:
                gt.clip_grad_norm_(with_grads(grads), 1.0, order)
                gt.clip_grad_norm_(with_grads(plain), 1.0, order, group=dist.group.WORLD)
            assert messages.nbytes == [nbytes, nbytes]
        with Messages() as messages:
            nn.utils.clip_grad_norm_(with_grads(grads), 1.0)
        assert messages.nbytes == [4 * count]


class _Copies(TorchFunctionMode):
    """Refuses what makes tensors of numbers of the host: on a GPU the host waits until they are there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.tensor, torch.as_tensor, Tensor.new_tensor), func
        return func(*args, **(kwargs or {}))


@check(4)
def no_number_is_copied_to_a_device() -> None:
    mesh = mesh_of(2, 2)
    for order in (2.0, math.inf):
        grads = [distribute_tensor(values(8), mesh, [Shard(0), Shard(0)])]
        pieces = [piece_of(values(8))]
        with _Copies():
            gt.clip_grad_norm_(with_grads(grads), 1.0, order)
            gt.clip_grad_norm_(with_grads(pieces), 1.0, order, group=dist.group.WORLD)


@check(2)
def the_default_device_is_no_matter() -> None:
    pieces, whole = [piece_of(values(9))], [values(9)]
    with torch.device("meta"):
        total = gt.get_total_norm(pieces, group=dist.group.WORLD)
        sums = gradclip.distributed.process_group()(np.ones(2))
    torch.testing.assert_close(total, gt.get_total_norm(whole))
    assert sums.tolist() == [2.0, 2.0]
