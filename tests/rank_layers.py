"""Every tensor's norm over all ranks, by name, in groups and for policies, on every rank."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import gradclip
import gradclip.torch as gt
from gradclip.policies import AdaGC, AutoClip, Percentile, SkipStep, WarmUp, ZClip
from gradclip.torch._spread import SpreadGradients
from rank_shards import Messages
from rank_support import ORDERS, check, full, mesh_of, raises, rank, same_bits, values, with_grad, with_grads

_TILE = 16384


def _same_on_all(numbers: Sequence[float]) -> list[float]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, struct.pack(f"<{len(numbers)}d", *numbers))
    assert len(set(found)) == 1, numbers
    return list(numbers)


def _named(grads: Sequence[Tensor]) -> list[tuple[str, nn.Parameter]]:
    names = ("a.weight", "a.bias", "b.weight", "b.bias", "c.weight")
    return list(zip(names, with_grads(grads), strict=False))


def _placements() -> tuple[Any, list[list[Any]]]:
    """A mesh, and ways to lie on it."""
    if dist.get_world_size() < 4:
        return mesh_of(2), [[Shard(0)], [Replicate()], [Shard(1)], [Shard(0)], [Shard(0)]]
    mesh = mesh_of(2, 2)
    return mesh, [
        [Shard(0), Shard(1)],
        [Replicate(), Shard(0)],
        [Shard(1), Replicate()],
        [Replicate(), Replicate()],
        [Shard(0), Shard(0)],
    ]


def _spread(wholes: Sequence[Tensor]) -> list[Tensor]:
    mesh, placements = _placements()
    return [distribute_tensor(w.clone(), mesh, p) for w, p in zip(wholes, placements, strict=True)]


def _wholes(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [values(7 + i, 5, seed=i, dtype=dtype) * 10.0 ** (i - 2) for i in range(5)]


@check(2, 4)
def layers_have_norms_by_name() -> None:
    """In groups of all kinds, by all orders, as the whole model has."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for order in ORDERS:
            for groups in (None, "tensor", "module", 1, ["x", "y", "x", "y", "x"]):
                alone = _named([w.clone() for w in _wholes(dtype)])
                spread = _named(_spread(_wholes(dtype)))
                expected = gt.clip_module_(alone, 3.0, ord=order, groups=groups, grad_scale=2.0)
                result = gt.clip_module_(spread, 3.0, ord=order, groups=groups, grad_scale=2.0)
                _same_on_all([result.total_norm, *result.norms, *result.group_norms])
                _same_on_all(np.atleast_1d(result.coefficient).tolist())
                tolerance = 1e-6 if dtype is not torch.float64 else 1e-13
                np.testing.assert_allclose(result.norms, expected.norms, rtol=tolerance)
                np.testing.assert_allclose(result.group_norms, expected.group_norms, rtol=tolerance)
                assert result.named_norms().keys() == expected.named_norms().keys()
                assert result.named_group_norms().keys() == expected.named_group_norms().keys()
                assert result.clipped == expected.clipped
                eps = 4 * torch.finfo(dtype).eps
                for (_, mine), (_, whole) in zip(spread, alone, strict=True):
                    assert mine.grad is not None
                    torch.testing.assert_close(full(mine.grad), whole.grad, rtol=eps, atol=0)


@check(2, 4)
def shards_of_whole_tiles_have_the_bits_of_the_whole_tensor() -> None:
    """Also beside tensors that are not, whose norms are within the bound."""
    mesh = mesh_of(dist.get_world_size())
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        size = _TILE // dtype.itemsize
        for seed in range(8):
            shape = (dist.get_world_size() * (1 + seed % 3), size)
            wholes = [
                values(*shape, seed=seed, dtype=dtype) * 10.0 ** (seed * 3 - 9),
                values(1009, seed=seed, dtype=dtype),
            ]
            for order in (2, 1):
                named = {str(i): distribute_tensor(w, mesh, [Shard(0)]) for i, w in enumerate(wholes)}
                measured = gradclip.measure(named, ord=order, groups="tensor")
                expected = gradclip.tensor_norms(wholes, ord=order)
                assert measured.norms[0] == expected[0]
                assert math.isclose(measured.norms[1], expected[1], rel_tol=2**-22)
                only = gradclip.measure([named["0"]], ord=order)
                assert only.total_norm == gradclip.global_norm(wholes[:1], ord=order)
    whole = values(dist.get_world_size(), _TILE // 4, seed=1) * 1e25  # whose squares are beyond float32
    spread = distribute_tensor(whole, mesh, [Shard(0)])
    assert gradclip.global_norm([spread]) == gradclip.global_norm([whole])


@check(2, 4)
def all_functions_of_gradclip_take_dtensors() -> None:
    wholes = _wholes()
    expected = gradclip.tensor_norms(wholes)
    np.testing.assert_allclose(gradclip.tensor_norms(_spread(wholes)), expected, rtol=1e-6)
    same_bits(torch.tensor(gradclip.global_norm(_spread(wholes)), dtype=torch.float64))
    spread, alone = _spread(wholes), [w.clone() for w in wholes]
    gradclip.clip_by_norm_(spread, 1.0)
    gradclip.clip_by_norm_(alone, 1.0)
    gradclip.scale_(spread, 0.5)
    gradclip.scale_(alone, 0.5)
    for mine, whole in zip(spread, alone, strict=True):
        torch.testing.assert_close(full(mine), whole, rtol=1e-6, atol=0)
    measured = gradclip.measure(
        dict(enumerate_names(spread)), groups={"0": "x", "1": "y", "2": "x", "3": "y", "4": "y"}
    )
    assert measured.group_names == ("x", "y")
    assert measured.group_sizes.tolist() == [sum(w.numel() for w in wholes[0:3:2]), *_rest(wholes)]
    result = measured.scale_({"x": 2.0, "y": None})
    assert result.clipped
    torch.testing.assert_close(full(spread[0]), 2 * alone[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(full(spread[1]), alone[1], rtol=1e-6, atol=0)
    with raises(ValueError, "^measured: expected gradients as they were measured"):
        measured.clip_(1.0)


def enumerate_names(tensors: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    return [(str(i), tensor) for i, tensor in enumerate(tensors)]


def _rest(wholes: Sequence[Tensor]) -> list[int]:
    return [wholes[1].numel() + wholes[3].numel() + wholes[4].numel()]


@check(2, 4)
def policies_decide_for_all_ranks() -> None:
    policies: list[Callable[[], Any]] = [
        AutoClip,
        lambda: Percentile(50),
        lambda: WarmUp(0.5, 2, ZClip()),
        AdaGC,
        SkipStep,
    ]
    for make in policies:
        mine, other = make(), make()
        for step in range(5):
            wholes = [w * (1 + 7 * (step == 3)) for w in _wholes()]
            spread, alone = _named(_spread(wholes)), _named([w.clone() for w in wholes])
            result = gt.clip_module_(spread, mine)
            expected = gt.clip_module_(alone, other)
            _same_on_all(np.atleast_1d(result.coefficient).tolist())
            np.testing.assert_allclose(result.coefficient, expected.coefficient, rtol=1e-6)


@check(2, 4)
def groups_of_parameters_and_their_thresholds() -> None:
    spread, alone = (with_grads(g) for g in (_spread(_wholes()), [w.clone() for w in _wholes()]))
    for parameters in (spread, alone):
        options: list[dict[str, Any]] = [
            {"params": parameters[:2], "max_norm": 0.01},
            {"params": parameters[2:]},
        ]
        result = gt.clip_param_groups_(torch.optim.SGD(options, lr=0.1))
        coefficients = np.atleast_1d(result.coefficient)
        assert coefficients[1] == 1.0
        assert coefficients[0] < 1.0
        _same_on_all(result.group_norms.tolist())
    for mine, whole in zip(spread, alone, strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(full(mine.grad), whole.grad, rtol=1e-6, atol=0)


@check(2, 4)
def a_layer_that_is_not_finite_on_one_rank() -> None:
    """All say the same of it; nothing was written, or all of it was set to 0."""
    wholes = _wholes()
    wholes[4][-1, -1] = math.nan  # which the last rank has
    wholes[2][0, 0] = wholes[2][1, 0] = math.inf
    named = _named(_spread(wholes))
    with raises(
        gradclip.NonFiniteGradientError, r"grads\['b.weight'\].* 0 NaN and 2 inf.*grads\['c.weight'\]"
    ):
        gt.clip_module_(named, 1.0)
    torch.testing.assert_close(full(named[0][1].grad), wholes[0])  # type: ignore[arg-type]
    result = gt.clip_module_(named, 1.0, nonfinite="skip")
    assert result.nonfinite == ("b.weight", "c.weight")
    assert result.skipped
    result = gt.clip_module_(named, 1.0, nonfinite="zero", groups="module")
    assert all(not full(p.grad).any() for _, p in named)  # type: ignore[arg-type]
    for order in (1, math.inf, 3):
        measured = gradclip.measure(
            {"x": distribute_tensor(wholes[4], mesh_of(dist.get_world_size()))}, ord=order
        )
        assert measured.nonfinite == ("x",)
        assert math.isnan(measured.total_norm)


@check(2, 4)
def partial_sums_beside_shards() -> None:
    world = dist.get_world_size()
    mesh = mesh_of(world)
    wholes = [values(5, 3, seed=0), values(64, 3, seed=1)]

    def make() -> list[tuple[str, nn.Parameter]]:
        share = values(5, 3, seed=9) * (world - 1 if rank() == 0 else -1)  # which cancels
        partial = DTensor.from_local(wholes[0] / world + share, mesh, [Partial()])
        return _named([partial, distribute_tensor(wholes[1].clone(), mesh, [Shard(0)])])

    for groups in (None, "tensor", ["x", "y"], {"a.weight": 0, "a.bias": 1}):
        labels: Any = list(groups.values()) if isinstance(groups, dict) else groups
        alone, spread = _named([w.clone() for w in wholes]), make()
        grads = {name: p.grad for name, p in spread}
        expected = gradclip.clip_by_global_norm_(
            {n: p.grad for n, p in alone}, 0.5, groups=groups, grad_scale=2.0
        )
        result = gradclip.clip_by_global_norm_(grads, 0.5, groups=groups, grad_scale=2.0)
        assert labels is None or len(result.group_norms) == 2
        np.testing.assert_allclose(result.norms, expected.norms, rtol=1e-6)
        for (_, mine), (_, whole) in zip(spread, alone, strict=True):
            assert mine.grad is not None
            torch.testing.assert_close(full(mine.grad), whole.grad, rtol=1e-5, atol=1e-6)
    for policy, expected_value in (("zero", 0.0), ("propagate", math.nan)):
        spread = make()
        assert isinstance(spread[1][1].grad, DTensor)
        spread[1][1].grad.to_local()[:1] = math.nan
        gt.clip_module_(spread, 0.5, nonfinite=policy)  # type: ignore[arg-type]
        value = full(spread[0][1].grad)  # type: ignore[arg-type]
        assert torch.equal(value.isnan(), torch.full_like(value, math.isnan(expected_value)).bool())
    with raises(ValueError, "rounding: expected 'nearest' for DTensors"):
        gt.clip_module_(make(), 0.5, rounding="down")


@check(2, 4)
def what_a_gpu_has_measured_is_decided_on_the_host() -> None:
    """The way of a GPU, here with memory of the CPU: sums are rounded before they are joined."""
    for order in ORDERS:
        for groups in (None, "tensor", "module"):
            alone, spread = _named([w.clone() for w in _wholes()]), _named(_spread(_wholes()))
            expected = gt.clip_module_(alone, 3.0, ord=order, groups=groups, grad_scale=2.0)
            with mock.patch.object(SpreadGradients, "_is_on_host", return_value=False):
                result = gt.clip_module_(spread, 3.0, ord=order, groups=groups, grad_scale=2.0)
            _same_on_all([result.total_norm, *result.norms, *result.group_norms])
            np.testing.assert_allclose(result.norms, expected.norms, rtol=1e-6)
            for (_, mine), (_, whole) in zip(spread, alone, strict=True):
                assert mine.grad is not None
                torch.testing.assert_close(full(mine.grad), whole.grad, rtol=1e-6, atol=0)
    wholes = _wholes()
    wholes[4][-1, -1] = math.nan  # which the last rank has
    named = _named(_spread(wholes))
    with mock.patch.object(SpreadGradients, "_is_on_host", return_value=False):
        with raises(gradclip.NonFiniteGradientError, r"grads\['c.weight'\].* 1 NaN and 0 inf"):
            gt.clip_module_(named, 1.0)
        with raises(ValueError, "rounding: expected 'nearest' for DTensors on a GPU"):
            gt.clip_module_(named, 1.0, rounding="down")


@check(2, 4)
def rounded_down_no_norm_is_above_the_threshold() -> None:
    spread = _spread([w * 100 for w in _wholes()])
    gt.clip_module_(_named(spread), 1.0, rounding="down")
    exact = math.fsum(float(x) ** 2 for grad in spread for x in full(grad).double().flatten())
    assert exact <= 1.0


@check(2, 4)
def layers_that_are_wrong_on_one_rank() -> None:
    """All ranks raise the same, and nothing was written."""
    wholes = _wholes()
    calls: list[tuple[Callable[[list[tuple[str, nn.Parameter]]], object], type[Exception], str]] = [
        (
            lambda named: gt.clip_module_(named, -1.0 if rank() == 1 else 1.0),
            ValueError,
            "^rank 1: max_norm: ",
        ),
        (lambda named: gt.clip_module_(named, 1.0 + rank()), ValueError, "expected the same call"),
        (
            lambda named: gt.clip_module_(named, 1.0, groups="tensor" if rank() else None),
            ValueError,
            "expected the same call",
        ),
        (lambda named: gt.clip_module_(named[rank() :], 1.0), ValueError, "expected the same number"),
        (lambda named: gt.clip_module_(named, 1.0, groups="row"), ValueError, "groups of whole gradients"),
        (lambda named: gt.clip_module_(named, 1.0, l2=0.1), TypeError, "expected plain tensors for weight"),
        (lambda named: gt.clip_module_(named, 1.0, reduce=lambda s: s), ValueError, "reduce: expected None"),
        (lambda named: gt.clip_module_(named, 1.0, ord=-1), ValueError, "ord: expected"),
        (lambda named: gradclip.row_norms([p.grad for _, p in named]), TypeError, "for norms of rows"),
        (
            lambda named: gradclip.clip_by_value_([p.grad for _, p in named], 1.0),
            TypeError,
            "a clip by value",
        ),
        (lambda named: gradclip.Plan([p.grad for _, p in named]), TypeError, "DTensor"),
    ]
    for call, kind, text in calls:
        named = _named(_spread(wholes))
        with raises(kind, text):
            call(named)
        assert all(torch.equal(full(p.grad), w) for (_, p), w in zip(named, wholes, strict=True))  # type: ignore[arg-type]
    named = _named(_spread(wholes))
    if rank() == 1:
        named[0][1].grad = named[0][1].grad.clone().requires_grad_() * 1.0  # type: ignore[union-attr]
    with raises(TypeError, "^rank 1: a.weight.grad: expected a gradient that does not require grad"):
        gt.clip_module_(named, 1.0)


@check(2, 4)
def a_layer_without_a_gradient_on_one_rank() -> None:
    mesh = mesh_of(dist.get_world_size())
    whole = values(8, 4, seed=0)
    named = [(n, with_grad(distribute_tensor(whole.clone(), mesh, [Shard(0)]))) for n in ("x", "y")]
    if rank() == 0:
        named[1][1].grad = None
    result = gt.clip_module_(named, 1.0)
    _same_on_all(result.norms.tolist())
    rest = whole.tensor_split(dist.get_world_size())[1:]
    assert math.isclose(result.norms[1], float(torch.cat(rest).norm()), rel_tol=1e-6)
    assert result.missing == (("y",) if rank() == 0 else ())


@check(2, 4)
def mixed_precision_over_ranks() -> None:
    """Unscaled and clipped together; an infinity on one rank makes all skip the step."""
    wholes = _wholes()
    for with_names in (False, True):
        for last in (1.0, math.inf):
            grads = [w.clone() * 1024 for w in wholes]
            grads[4][-1, -1] *= last
            parameters = with_grads(_spread(grads))
            optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            scaler.scale(torch.ones(()))
            if with_names:
                named = [(str(i), p) for i, p in enumerate(parameters)]
                result = gt.unscale_and_clip_(scaler, optimizer, 1.0, module=named, groups="tensor")
                _same_on_all(result.norms.tolist())
                assert list(result.named_norms()) == ["0", "1", "2", "3", "4"]
            else:
                norm = gt.unscale_and_clip_(scaler, optimizer, 1.0)
                assert isinstance(norm, DTensor)
                expected = float(torch.cat([w.flatten() for w in wholes]).norm()) if last == 1 else math.inf
                assert math.isclose(same_bits(norm), expected, rel_tol=1e-6)
            scaler.step(optimizer)
            scaler.update()
            assert all(bool(full(p.detach()).any()) == (last == 1.0) for p in parameters)
            assert scaler.get_scale() == (1024.0 if last == 1.0 else 512.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    parameters = with_grads(_spread(wholes))
    same_bits(gt.unscale_and_clip_(scaler, torch.optim.SGD(parameters, lr=0.1), 1.0))
    clipped = torch.cat([full(p.grad).flatten() for p in parameters if p.grad is not None])
    assert math.isclose(float(clipped.norm()), 1.0, rel_tol=1e-5)


@check(2, 4)
def the_step_of_a_fused_optimizer_clips() -> None:
    def stepped(grads: list[Tensor], defer: bool) -> list[Tensor]:
        parameters = with_grads(grads)
        optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True, eps=1.0)
        if defer:
            norm = gt.defer_clip_(optimizer, 0.5)
            assert isinstance(norm, DTensor)
            same_bits(norm)
        else:
            gt.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        return [full(p.detach()) for p in parameters]

    deferred, clipped = stepped(_spread(_wholes()), True), stepped([w.clone() for w in _wholes()], False)
    for mine, whole in zip(deferred, clipped, strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-5, atol=1e-6)


@check(2, 4)
def a_training_under_fsdp_tells_its_layers() -> None:
    """Six steps with a threshold for each layer that adapts itself, as without FSDP."""
    torch.manual_seed(2)
    models = [nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    mesh = mesh_of(dist.get_world_size())
    fully_shard(models[0][2], mesh=mesh)
    fully_shard(models[0], mesh=mesh)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in models]
    policies = [AdaGC(warmup=2), AdaGC(warmup=2)]
    for step in range(6):
        losses, results = [], []
        for model, optimizer, policy in zip(models, optimizers, policies, strict=True):
            optimizer.zero_grad()
            loss = model(values(6, 5, seed=step)).square().sum() * 10
            loss.backward()
            results.append(gt.clip_module_(model, policy))
            optimizer.step()
            losses.append(loss.item())
        assert math.isclose(*losses, rel_tol=1e-5), step
        mine, whole = (result.named_norms() for result in results)
        assert list(mine) == list(whole) == ["0.weight", "0.bias", "2.weight", "2.bias"]
        _same_on_all(list(mine.values()))
        np.testing.assert_allclose(list(mine.values()), list(whole.values()), rtol=1e-4)
    assert losses[-1] < 100
    assert results[0].clipped


@check(2, 4)
def two_messages_of_each_group() -> None:
    """As docs/scaling.md says: whether all is well, and the sums of the tensors that are sharded over it."""
    named = _named(_spread(_wholes()))
    with Messages() as messages:
        gt.clip_module_(named, 1.0)
    word, of_one = 8, 8 * 24
    if dist.get_world_size() == 2:
        assert messages.nbytes == [5 * word, 4 * of_one]
    else:
        assert messages.nbytes == [5 * word, 5 * word, 3 * of_one, 3 * of_one]
    with Messages() as messages:
        gt.clip_grad_norm_([p for _, p in named], 1.0)
    if dist.get_world_size() == 4:  # the sums of three sets in two messages, and two that make them alike
        assert len(messages.nbytes) == 4, messages.nbytes
