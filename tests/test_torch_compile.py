"""Under torch.compile: the drop-ins are operators of the graph, the other calls run between graphs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn

import gradclip.torch

MAX_NORM = 0.5


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No cache of another run, no pool of processes."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    with torch._inductor.config.patch(compile_threads=1):
        yield
    torch._dynamo.reset()


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def _gradients(module: Any, backend: str | None, *, whole: bool) -> tuple[list[float], list[Tensor]]:
    """Three steps of a training, compiled in one graph: from the loss on, or what follows the backward."""
    net = _model()
    x, y = torch.randn(8, 4), 20 * torch.randn(8, 1)  # far away: every step clips

    def finish() -> Tensor:
        norm: Tensor = module.clip_grad_norm_(net.parameters(), MAX_NORM)
        with torch.no_grad():
            for p in net.parameters():
                assert p.grad is not None
                p.sub_(p.grad, alpha=0.1)
        return norm

    def backward() -> None:
        torch.autograd.backward(torch.nn.functional.mse_loss(net(x), y))

    def step() -> Tensor:
        torch.nn.functional.mse_loss(net(x), y).backward()  # type: ignore[no-untyped-call]
        norm = finish()
        for p in net.parameters():
            p.grad = None
        return norm

    def compiled(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return torch.compile(function, fullgraph=True, backend=backend) if backend else function

    norms = []
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        call = compiled(step if whole else finish)
        for _ in range(3):
            if not whole:
                net.zero_grad()
                backward()
            norms.append(call().item())
    return norms, [p.detach() for p in net.parameters()]


@pytest.mark.parametrize(
    ("backend", "whole"), [("aot_eager", True), ("aot_eager", False), ("inductor", False)]
)
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
def test_a_compiled_step_is_the_eager_one(backend: str, whole: bool) -> None:
    norms, parameters = _gradients(gradclip.torch, backend, whole=whole)
    expected_norms, expected = _gradients(gradclip.torch, None, whole=whole)
    assert norms == pytest.approx(expected_norms, rel=1e-6)
    assert min(norms) > MAX_NORM
    for a, b in zip(parameters, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_compiled_step_keeps_pytorchs_functions_under_the_reroute() -> None:
    expected, _ = _gradients(torch.nn.utils, None, whole=False)
    with gradclip.torch.patched() as counts:
        norms, _ = _gradients(torch.nn.utils, "aot_eager", whole=False)
    assert norms == pytest.approx(expected, rel=1e-6)
    assert not counts.taken


def test_nothing_to_clip_compiles() -> None:
    net = _model()
    clip = torch.compile(
        lambda: gradclip.torch.clip_grad_norm_(net.parameters(), 1.0), fullgraph=True, backend="aot_eager"
    )
    assert clip().item() == 0
    parameter = next(net.parameters())
    parameter.grad = torch.full_like(parameter, 2.0)
    assert clip().item() == pytest.approx(2 * parameter.numel() ** 0.5)  # the others have none


@pytest.mark.parametrize("norm_type", [2.0, float("inf"), -1.0])
@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_the_operator_keeps_pytorchs_rules(norm_type: float, max_norm: float) -> None:
    grads = [torch.ones(4), torch.ones(2, 3, dtype=torch.float64), torch.ones(1, dtype=torch.bfloat16)]
    operator = torch.ops.gradclip.clip_grad_norm_.default
    for threshold in ((max_norm, None), (0.0, torch.tensor(max_norm))):
        results = torch.library.opcheck(operator, (grads, [0, 1, 3], *threshold, norm_type, False))
        assert set(results.values()) == {"SUCCESS"}


def test_the_other_operators_keep_pytorchs_rules() -> None:
    grads, places = [torch.full((4,), 2.0), torch.ones(2, 3, dtype=torch.float64)], [1, 2]
    operators = torch.ops.gradclip
    for operator, arguments in (
        (operators.get_total_norm, (grads, places, 2.0, False)),
        (operators.clip_grads_with_norm_, (grads, places, 0.5, None, torch.tensor(5.0))),
        (operators.clip_grads_with_norm_, (grads, places, 0.0, torch.tensor(0.5), torch.tensor(5.0))),
        (operators.clip_grad_value_, (grads, places, 0.5)),
    ):
        results = torch.library.opcheck(operator.default, arguments)
        assert set(results.values()) == {"SUCCESS"}


def _leaves() -> list[Tensor]:
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float32)
    leaves: list[Tensor] = [torch.nn.Parameter(torch.zeros(5, dtype=dtype)) for dtype in dtypes]
    for i, leaf in enumerate(leaves[1:]):
        leaf.grad = torch.randn(5, generator=torch.Generator().manual_seed(i)).to(leaf.dtype)
    return leaves


@pytest.mark.parametrize(
    "call",
    [
        lambda leaves: gradclip.torch.clip_grad_norm_(leaves, torch.tensor(0.5)),
        lambda leaves: gradclip.torch.get_total_norm([leaf.grad for leaf in leaves[1:]], math.inf),
        lambda leaves: gradclip.torch.get_total_norm([leaf * 2 for leaf in leaves]),
        lambda leaves: gradclip.torch.clip_grads_with_norm_(leaves, 0.5, torch.tensor(5.0)),
        lambda leaves: gradclip.torch.clip_grads_with_norm_(leaves, torch.tensor(0.5), torch.tensor(5.0)),
        lambda leaves: gradclip.torch.clip_grad_value_((leaf for leaf in leaves), 0.5),
    ],
)
def test_each_drop_in_compiles_to_what_it_does(call: Callable[[list[Tensor]], Tensor | None]) -> None:
    expected, leaves = _leaves(), _leaves()
    total = call(expected)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(leaves)
    assert total is None or (compiled is not None and torch.equal(compiled, total))
    assert compiled is None or not compiled.requires_grad
    for leaf, other in zip(leaves[1:], expected[1:], strict=True):
        assert leaf.grad is not None
        assert other.grad is not None
        assert torch.equal(leaf.grad, other.grad)
        assert (leaf.grad._version > 0) == (other.grad._version > 0)


def test_a_compiled_call_names_the_parameter() -> None:
    leaves = _leaves()
    assert leaves[2].grad is not None
    leaves[2].grad[0] = math.nan
    clip = torch.compile(
        lambda: gradclip.torch.clip_grad_norm_(leaves, 0.5, error_if_nonfinite=True), backend="aot_eager"
    )
    with pytest.raises(RuntimeError, match=r"parameters\[2\]\.grad: expected finite elements, got 1 NaN"):
        clip()


def _by_module(optimizer: torch.optim.Optimizer) -> Tensor:
    named = [("weight", optimizer.param_groups[0]["params"][0])]
    return torch.tensor(gradclip.torch.clip_module_(named, 0.5).total_norm)


def _unscaled(optimizer: torch.optim.Optimizer) -> Tensor:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))
    return gradclip.torch.unscale_and_clip_(scaler, optimizer, 0.5)


@pytest.mark.parametrize(
    "clip", [_by_module, _unscaled, lambda optimizer: gradclip.torch.defer_clip_(optimizer, 0.5)]
)
def test_other_calls_break_the_graph_and_no_more(clip: Callable[[torch.optim.Optimizer], Tensor]) -> None:
    found = []
    for call in (clip, torch.compile(clip, backend="aot_eager")):
        weight = torch.nn.Parameter(torch.zeros(2))
        weight.grad = torch.tensor([3.0, 4.0])
        optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
        norm = call(optimizer)
        version = weight.grad._version
        optimizer.step()
        found.append((norm.item(), version, weight.tolist()))
    assert found[0] == found[1]
