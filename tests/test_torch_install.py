"""Rerouting PyTorch's own functions: who is reached, what is left to PyTorch, what is counted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm

import gradclip.torch
from gradclip.torch import _install

# Imported by name, long before anything is installed: the hardest to reach.


@pytest.fixture(autouse=True)
def _uninstalled() -> Iterator[None]:
    yield
    gradclip.torch.uninstall()


def _parameter(*values: float) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.zeros(len(values)))
    parameter.grad = torch.tensor(values)
    return parameter


def _is_ours() -> bool:
    """PyTorch's own norm of these is infinite."""
    return bool(get_total_norm([torch.full((4,), 1e20)]).isfinite())


def test_functions_imported_by_name_are_reached() -> None:
    assert not _is_ours()
    gradclip.torch.install()
    assert _is_ours()
    parameter = _parameter(3e20, 4e20)
    assert clip_grad_norm_([parameter], 1.0).item() == pytest.approx(5e20)
    assert parameter.grad is not None
    assert parameter.grad.tolist() == pytest.approx([0.6, 0.8])
    clip_grads_with_norm_([parameter], 0.5, torch.tensor(1.0))
    assert parameter.grad.tolist() == pytest.approx([0.3, 0.4], rel=1e-5)
    clip_grad_value_([parameter], 0.35)
    assert parameter.grad.tolist() == pytest.approx([0.3, 0.35], rel=1e-5)
    assert gradclip.torch.stats().taken == {
        "get_total_norm": 2,
        "clip_grads_with_norm_": 2,
        "clip_grad_value_": 1,
    }
    assert not gradclip.torch.stats().passed_on
    gradclip.torch.uninstall()
    assert not _is_ours()


def test_installing_twice_and_nesting() -> None:
    gradclip.torch.install()
    gradclip.torch.install()
    with gradclip.torch.patched() as counts:
        assert _is_ours()
    assert _is_ours(), "it was installed before the block"
    assert counts.taken["get_total_norm"] == 2
    gradclip.torch.uninstall()
    assert not _is_ours()
    gradclip.torch.uninstall()
    with pytest.raises(ZeroDivisionError), gradclip.torch.patched():
        assert 1 // int(not _is_ours()), "never reached"
    assert not _is_ours()


def test_blocks_of_several_threads() -> None:
    first, second = gradclip.torch.patched(), gradclip.torch.patched()
    first.__enter__()
    second.__enter__()  # by another thread, which goes on when the first is done
    first.__exit__(None, None, None)
    assert _is_ours()
    second.__exit__(None, None, None)
    assert not _is_ours()


def test_what_is_not_supported_is_left_to_pytorch() -> None:
    graph = torch.tensor([3.0, 4.0], requires_grad=True) * 1
    holder: Any = type("Holder", (), {"grad": graph})
    with gradclip.torch.patched() as counts:
        assert clip_grad_norm_([holder], 1.0).item() == 5.0
    assert graph.tolist() == pytest.approx([0.6, 0.8])
    assert counts.taken == {"get_total_norm": 1}
    assert counts.passed_on == {"clip_grads_with_norm_": 1}
    ((reason, number),) = counts.reasons.items()
    assert number == 1
    assert reason.startswith("parameters[0].grad: expected a gradient that does not require grad")


def test_arguments_by_name() -> None:
    parameter = _parameter(3.0, 4.0)
    with gradclip.torch.patched() as counts:
        total = get_total_norm(tensors=[torch.tensor([3.0, 4.0])], norm_type=2.0)
        clip_grads_with_norm_(parameters=[parameter], max_norm=1.0, total_norm=total)
        clip_grad_value_(parameters=[parameter], clip_value=0.7)
        clip_grad_norm_(parameters=[parameter], max_norm=9.0)
        call: Any = get_total_norm
        with pytest.raises(TypeError, match="tensors"):
            call()
    assert parameter.grad is not None
    assert parameter.grad.tolist() == pytest.approx([0.6, 0.7])
    assert counts.taken == {"get_total_norm": 2, "clip_grads_with_norm_": 2, "clip_grad_value_": 1}


def test_a_generator_survives_being_passed_on() -> None:
    meta = torch.ones(2, device="meta")
    with gradclip.torch.patched() as counts:
        assert get_total_norm(t for t in [torch.tensor([3.0]), torch.tensor([4.0])]).item() == 5.0
        assert get_total_norm(t for t in [meta]).is_meta
    assert counts.passed_on == {"get_total_norm": 1}


def test_our_own_errors_are_not_passed_on() -> None:
    parameter = _parameter(3.0, math.nan)
    with gradclip.torch.patched() as counts:
        with pytest.raises(RuntimeError, match="got 1 NaN and 0 inf"):
            clip_grad_norm_([parameter], 1.0, error_if_nonfinite=True)
        with pytest.raises(ValueError, match="max_norm: expected a number that is not negative, got -1"):
            clip_grad_norm_([_parameter(3.0)], -1.0)
    assert not counts.passed_on


def test_a_torch_that_is_built_otherwise_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_install._WRAPPERS, "clip_grad_value_", lambda parameters, clip_value: None)
    with pytest.raises(RuntimeError, match=r"utils\.clip_grad_value_: expected a function wrapped"):
        gradclip.torch.install()
    assert not _is_ours()
