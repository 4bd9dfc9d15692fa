"""docs/offload.md: the page runs, a fused optimizer takes the norm, groups need no backend for the CPU."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gradclip
import gradclip.torch
from processes import HANGS_AFTER, output_of

_TESTS = Path(__file__).parent
_PAGE = _TESTS.parent / "docs" / "offload.md"


def test_the_page_runs() -> None:
    code = f"""
        import doctest, os
        flags = doctest.NORMALIZE_WHITESPACE
        print(doctest.testfile({str(_PAGE)!r}, module_relative=False, optionflags=flags), flush=True)
        os._exit(0)  # threads of PyTorch's process groups end a process by std::terminate, now and then
    """
    done = output_of(code)
    assert done.startswith("TestResults(failed=0, attempted=2"), done


def test_gradients_on_the_cpu_over_a_group_without_a_backend_for_it(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(_TESTS / "offload_ranks.py"), str(tmp_path / "store")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_AFTER, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    checks = ("check_dtensors", "check_errors", "check_accumulation")
    assert sorted(run.stdout.split("\n")[:-1]) == sorted(f"{c} on rank {r}" for c in checks for r in (0, 1))


# --- The norm that was measured -------------------------------------------------------------------------

Make = Callable[[Any], torch.optim.Optimizer]
_FUSED: dict[str, Make] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, fused=True),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
}


def _training(make: Make) -> tuple[list[nn.Parameter], list[torch.Tensor], torch.optim.Optimizer]:
    """Weights with accumulators that are empty, and what is to be added to these."""
    generator = torch.Generator().manual_seed(2)
    weights = [nn.Parameter(torch.randn(n, 3, generator=generator)) for n in (5, 0, 4000)]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    grads = [torch.randn(w.shape, generator=generator).to(torch.bfloat16) for w in weights]
    return weights, grads, make(weights)


@pytest.mark.parametrize("max_norm", [0.5, 1e9, math.inf])
@pytest.mark.parametrize("name", _FUSED)
def test_it_is_the_training_that_measures_again(name: str, max_norm: float) -> None:
    weights, grads, optimizer = _training(_FUSED[name])
    twins, _, other = _training(_FUSED[name])
    for _ in range(3):
        measured = gradclip.accumulate_([w.grad for w in weights], grads)
        norm = gradclip.torch.defer_clip_(optimizer, max_norm, measured=measured)
        for twin, grad in zip(twins, grads, strict=True):
            assert twin.grad is not None
            twin.grad += grad
        assert torch.equal(norm, gradclip.torch.defer_clip_(other, max_norm))
        assert norm.dtype is torch.float32
        for each in (optimizer, other):
            each.step()
            assert getattr(each, "grad_scale", None) is None
    assert all(map(torch.equal, weights, twins))


def test_a_norm_that_several_optimizers_share() -> None:
    weights, grads, _ = _training(_FUSED["SGD"])
    measured = gradclip.accumulate_([w.grad for w in weights], grads)
    before = [w.detach().clone() for w in weights]
    for weight in weights:
        optimizer = _FUSED["SGD"]([weight])
        norm = gradclip.torch.defer_clip_(optimizer, 0.5, measured=measured)
        assert norm.item() == pytest.approx(measured.total_norm)
        optimizer.step()
    for weight, start, grad in zip(weights, before, grads, strict=True):
        torch.testing.assert_close(weight.detach(), start - 0.1 * grad.float() * (0.5 / measured.total_norm))


def test_deferring_what_was_measured_is_refused() -> None:
    weights, grads, optimizer = _training(_FUSED["SGD"])
    measured = gradclip.accumulate_([w.grad for w in weights], grads)
    few = gradclip.accumulate_([torch.zeros(5, 3)], [grads[0]])
    scaler = torch.amp.GradScaler("cpu")
    defer: Any = gradclip.torch.defer_clip_
    for options, error, message in (
        ({"measured": 3.0}, TypeError, r"^measured: expected a gradclip.Measured or None, got a .*float"),
        ({"measured": few}, ValueError, r"^measured: .* 12015 elements \(and maybe more\), got that of 15"),
        ({"measured": measured, "norm_type": 1.0}, ValueError, r"^norm_type: expected 2 beside measured"),
        ({"measured": measured, "scaler": scaler}, ValueError, r"^scaler: expected None beside measured"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            defer(optimizer, 0.5, **options)
        assert getattr(optimizer, "grad_scale", None) is None
