"""Mixed precision and deferred clipping against PyTorch's own sequence of calls."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler, OptState

import gradclip.torch
from torch_lists import bits

SCALE = 1024.0


def _training(
    make: Callable[[Any], torch.optim.Optimizer], bad: float | None = None, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model whose gradients hold SCALE times what they should; `bad` among them."""
    torch.manual_seed(3)
    last = nn.Linear(5, 4)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), last).to(dtype)
    for parameter in model.parameters():
        parameter.grad = SCALE * torch.randn_like(parameter)
    if bad is not None and last.weight.grad is not None:
        last.weight.grad[1, 1] = bad
    return model, make(model.parameters())


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def _scaler(**options: Any) -> GradScaler:
    scaler = GradScaler("cpu", init_scale=SCALE, growth_interval=1, **options)
    scaler.scale(torch.ones(()))  # makes the scale a tensor, as the first loss does
    return scaler


def _state(scaler: GradScaler, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state: dict[str, Any] = dict(scaler._per_optimizer_states[id(optimizer)])
    found = state.pop("found_inf_per_device")
    return {**state, "found": {device: (f.dtype, f.shape, f.item()) for device, f in found.items()}}


def _assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 3.0, 0.0])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@pytest.mark.parametrize("bad", [None, math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_unscale_and_clip(dtype: torch.dtype, bad: float | None, max_norm: float, norm_type: float) -> None:
    model, optimizer = _training(_sgd, bad, dtype)
    scaled = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    twin, twins = _training(_sgd, bad, dtype)
    ours, theirs = _scaler(), _scaler()

    total = gradclip.torch.unscale_and_clip_(ours, optimizer, max_norm, norm_type)
    theirs.unscale_(twins)
    expected = gradclip.torch.clip_grad_norm_(twin.parameters(), max_norm, norm_type)
    rough = dtype is torch.bfloat16  # unscale_ rounds its gradients before they are measured
    torch.testing.assert_close(total, expected, rtol=1e-2 if rough else 1e-6, atol=0, equal_nan=True)
    assert total.dtype == expected.dtype
    assert _state(ours, optimizer) == _state(theirs, twins)
    for a, b, was in zip(model.parameters(), twin.parameters(), scaled, strict=True):
        assert a.grad is not None
        if bad is None:
            torch.testing.assert_close(
                a.grad, b.grad, rtol=2e-2 if rough else 1e-5, atol=1e-4 if rough else 1e-7
            )
        elif norm_type > 0:
            torch.testing.assert_close(a.grad, was, rtol=0, atol=0, equal_nan=True)  # left as they were

    start = copy.deepcopy(model.state_dict())
    for scaler, each in ((ours, optimizer), (theirs, twins)):
        scaler.step(each)
        scaler.update()
    assert ours.state_dict() == theirs.state_dict()
    assert ours.get_scale() == (2 * SCALE if bad is None else SCALE / 2)
    if bad is not None:
        assert all(torch.equal(value, start[key]) for key, value in model.state_dict().items()), "skipped"
    elif not rough:
        _assert_same(model, twin)


def test_a_second_call_and_a_call_after_the_step_are_refused() -> None:
    model, optimizer = _training(_sgd)
    scaler = _scaler()
    gradclip.torch.unscale_and_clip_(scaler, optimizer, 1.0)
    with pytest.raises(RuntimeError, match="has already been called"):
        gradclip.torch.unscale_and_clip_(scaler, optimizer, 1.0)
    with pytest.raises(RuntimeError, match="has already been called"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="called after step"):
        gradclip.torch.unscale_and_clip_(scaler, optimizer, 1.0)
    assert model is not None


def test_a_scaler_that_is_disabled_only_clips() -> None:
    model, optimizer = _training(_sgd)
    twin, _ = _training(_sgd)
    total = gradclip.torch.unscale_and_clip_(GradScaler("cpu", enabled=False), optimizer, 1.0)
    assert torch.equal(total, gradclip.torch.clip_grad_norm_(twin.parameters(), 1.0))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


def test_sparse_gradients_are_unscaled() -> None:
    embeddings = [nn.Embedding(9, 3, sparse=True) for _ in range(2)]
    embeddings[1].load_state_dict(embeddings[0].state_dict())
    totals = []
    for i, embedding in enumerate(embeddings):
        (SCALE * embedding(torch.tensor([1, 2, 1])) ** 2).sum().backward()
        optimizer, scaler = torch.optim.SGD(embedding.parameters(), lr=1.0), _scaler()
        if i == 0:
            totals.append(gradclip.torch.unscale_and_clip_(scaler, optimizer, 0.1))
        else:
            scaler.unscale_(optimizer)
            totals.append(gradclip.torch.clip_grad_norm_(embedding.parameters(), 0.1))
        scaler.step(optimizer)
    torch.testing.assert_close(totals[0], totals[1])
    _assert_same(*embeddings)


@pytest.mark.parametrize(
    ("grad", "error", "finding"),
    [
        (torch.ones(2, dtype=torch.float16), ValueError, r"parameters\[1\]\.grad: .* got float16"),
        (torch.ones(2, device="meta"), TypeError, r"parameters\[1\]\.grad: .* device meta"),
        (torch.ones(1).expand(2), ValueError, r"parameters\[1\]\.grad: .* overlaps itself"),
    ],
)
@pytest.mark.parametrize("norm_type", [2.0, 0.0])
def test_what_cannot_be_unscaled_is_named(
    grad: Tensor, error: type[Exception], finding: str, norm_type: float
) -> None:
    class Holder(Tensor):
        pass

    Holder.grad = grad
    good = nn.Parameter(torch.zeros(2))
    good.grad = torch.full((2,), SCALE)
    optimizer = torch.optim.SGD([good], lr=1.0)
    optimizer.param_groups[0]["params"].append(torch.zeros(2).as_subclass(Holder))
    scaler = _scaler()
    with pytest.raises(error, match=finding):
        gradclip.torch.unscale_and_clip_(scaler, optimizer, 1e-3, norm_type)
    assert good.grad.tolist() == [SCALE, SCALE]
    assert scaler._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY


# --- Deferred -----------------------------------------------------------------------------------------

FUSED: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
}
if not hasattr(FUSED["Adagrad"]([torch.zeros(1)]), "_step_supports_amp_scaling"):
    del FUSED["Adagrad"]  # before PyTorch 2.12 its step takes no scale


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("max_norm", [0.5, 1e9, math.inf])
def test_the_step_clips(name: str, max_norm: float) -> None:
    model, optimizer = _training(FUSED[name])
    twin, twins = _training(FUSED[name])
    for seed in range(3):
        torch.manual_seed(seed)
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        # The last step goes without: nothing of the one before may be left.
        if seed < 2:
            total = gradclip.torch.defer_clip_(optimizer, max_norm)
            assert torch.equal(total, gradclip.torch.clip_grad_norm_(twin.parameters(), max_norm))
        optimizer.step()
        twins.step()
        assert getattr(optimizer, "grad_scale", None) is None
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    if max_norm > 1.0:
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("bad", [None, math.inf, math.nan])
def test_the_step_unscales_and_clips(name: str, bad: float | None) -> None:
    model, optimizer = _training(FUSED[name], bad)
    twin, twins = _training(FUSED[name], bad)
    ours, theirs = _scaler(), _scaler()
    total = gradclip.torch.defer_clip_(optimizer, 0.5, scaler=ours)
    theirs.unscale_(twins)
    expected = gradclip.torch.clip_grad_norm_(twin.parameters(), 0.5)
    torch.testing.assert_close(total, expected, equal_nan=True)
    assert _state(ours, optimizer) == _state(theirs, twins)
    start = copy.deepcopy(model.state_dict())
    for scaler, each in ((ours, optimizer), (theirs, twins)):
        scaler.step(each)
        scaler.update()
    assert ours.state_dict() == theirs.state_dict()
    assert getattr(optimizer, "grad_scale", None) is None
    moved = any(not torch.equal(value, start[key]) for key, value in model.state_dict().items())
    assert moved == (bad is None)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_norm_that_is_not_finite_reaches_the_weights_as_it_does_in_pytorch() -> None:
    model, optimizer = _training(FUSED["SGD"], math.nan)
    gradclip.torch.defer_clip_(optimizer, 1.0)
    optimizer.step()
    assert all(p.isnan().all() for p in model.parameters())


def test_deferring_that_is_refused() -> None:
    model, plain = _training(_sgd)
    with pytest.raises(ValueError, match=r"optimizer: expected .* fused=True.* got torch.optim.sgd.SGD"):
        gradclip.torch.defer_clip_(plain, 1.0)
    _, optimizer = _training(FUSED["Adam"])
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="max_norm: expected a"):
            gradclip.torch.defer_clip_(optimizer, bad)
    by_somebody: Any = optimizer
    by_somebody.grad_scale = torch.tensor(2.0)
    with pytest.raises(ValueError, match="optimizer: expected no grad_scale, got one that waits"):
        gradclip.torch.defer_clip_(optimizer, 1e-3)
    weight, bias, *_ = model.parameters()
    options: list[dict[str, Any]] = [{"params": [weight]}, {"params": [bias], "fused": False}]
    mixed = torch.optim.SGD(options, lr=0.1, fused=True)
    with pytest.raises(ValueError, match="optimizer: expected fused=True in all parameter groups"):
        gradclip.torch.defer_clip_(mixed, 1.0)


def test_the_last_call_before_the_step_counts() -> None:
    (model, optimizer), (twin, twins) = _training(FUSED["SGD"]), _training(FUSED["SGD"])
    gradclip.torch.defer_clip_(optimizer, 1e-3)
    gradclip.torch.defer_clip_(optimizer, math.inf)  # and then none is wanted
    assert getattr(optimizer, "grad_scale", None) is None
    gradclip.torch.defer_clip_(optimizer, 1e-3)
    gradclip.torch.defer_clip_(optimizer, 0.5)
    gradclip.torch.defer_clip_(twins, 0.5)
    for each in (optimizer, twins):
        each.step()
        assert getattr(each, "grad_scale", None) is None
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_a_scale_that_a_failed_step_left_is_replaced() -> None:
    _, optimizer = _training(FUSED["SGD"])

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    hook = optimizer.register_step_pre_hook(fail)
    gradclip.torch.defer_clip_(optimizer, 1e-3)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    hook.remove()
    gradclip.torch.defer_clip_(optimizer, math.inf)
    assert getattr(optimizer, "grad_scale", None) is None


class _OwnScaler(torch.amp.GradScaler):
    """As FSDP's ShardedGradScaler, whose unscale_ lets the ranks agree."""

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        raise AssertionError(optimizer)


@pytest.mark.parametrize(
    "clip",
    [
        lambda scaler, optimizer: gradclip.torch.unscale_and_clip_(scaler, optimizer, 1.0),
        lambda scaler, optimizer: gradclip.torch.defer_clip_(optimizer, 1.0, scaler=scaler),
    ],
)
def test_a_scaler_that_unscales_in_its_own_way_is_refused(clip: Callable[..., Tensor]) -> None:
    model, optimizer = _training(FUSED["SGD"])
    scaler = _OwnScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    before = bits(p.grad for p in model.parameters())
    with pytest.raises(TypeError, match=r"^scaler: expected one with the unscale_ of torch.amp.GradScaler"):
        clip(scaler, optimizer)
    assert bits(p.grad for p in model.parameters()) == before
    assert getattr(optimizer, "grad_scale", None) is None
