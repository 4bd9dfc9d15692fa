"""Gradients summed in float32 on the CPU: PyTorch's way, in passes; ``accumulate_`` with a deferred clip."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import gradclip
import gradclip.torch
from bench.architectures import gpt2
from tools.integrations.timing import Comparison, compare

__all__ = ["measure"]

_MAX_NORM = 1.0  # below what is added, so that every clip has something to do
# Bytes of each element: of a pass that reads or writes the sums; and of AdamW's step, which reads sum, weight
# and two moments and writes all but the sum (that, too, where it has clipped it).
_SUM, _STEP = 4, 28
_WIDTHS = {torch.bfloat16: 2, torch.float32: 4}


def measure() -> Iterator[Comparison]:
    """GPT-2's 124 M parameters."""
    generator = torch.Generator().manual_seed(1)
    shapes = list(gpt2(768, 12).values())
    weights = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    sums = [torch.zeros(shape) for shape in shapes]
    for weight, total in zip(weights, sums, strict=True):
        weight.grad = total
    for dtype, width in _WIDTHS.items():
        grads = [(1e-3 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]
        yield from _compare(weights, sums, grads, width, f"{dtype}"[6:], with_step=dtype is torch.bfloat16)


def _compare(
    weights: list[nn.Parameter],
    sums: list[Tensor],
    grads: list[Tensor],
    width: int,
    name: str,
    with_step: bool,
) -> Iterator[Comparison]:
    where, load = f"PyTorch {torch.__version__.partition('+')[0]}", f"GPT-2, 124 M elements, {name}"
    adding = 2 * _SUM + width

    def by_traffic(theirs: int, ours: int) -> str:
        return f"{theirs} to {ours} bytes an element: {theirs / ours:.2f} x by traffic alone"

    def add() -> None:
        for total, grad in zip(sums, grads, strict=True):
            total.add_(grad)

    def add_and_measure() -> float:
        add()
        return gradclip.global_norm(sums)

    def accumulate() -> gradclip.Measured:
        return gradclip.accumulate_(sums, grads)

    def add_and_clip() -> float:
        add()
        return torch.nn.utils.clip_grad_norm_(weights, _MAX_NORM).item()

    def accumulate_and_clip() -> float:
        return accumulate().clip_(_MAX_NORM).total_norm

    _check(sums, add_and_measure, lambda: accumulate().total_norm, exact=True)
    yield compare(
        where,
        "`add_`, then gradclip's norms",
        load,
        add_and_measure,
        accumulate,
        note=by_traffic(adding + _SUM, adding),
    )
    _check(sums, add_and_clip, accumulate_and_clip)
    yield compare(
        where,
        "`add_`, then `clip_grad_norm_`",
        load,
        add_and_clip,
        accumulate_and_clip,
        note=by_traffic(adding + 3 * _SUM, adding + 2 * _SUM),
    )
    if not with_step:
        return
    optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=True)

    def their_step() -> float:
        norm = add_and_clip()
        optimizer.step()
        return norm

    def our_step() -> float:
        measured = accumulate()
        gradclip.torch.defer_clip_(optimizer, _MAX_NORM, measured=measured)
        optimizer.step()
        return measured.total_norm

    _check(sums, their_step, our_step)
    yield compare(
        where,
        "`add_`, `clip_grad_norm_`, fused AdamW",
        load,
        their_step,
        our_step,
        note=by_traffic(adding + 3 * _SUM + _STEP, adding + _STEP + _SUM),
    )


def _check(sums: list[Tensor], theirs: object, ours: object, exact: bool = False) -> None:
    """From the same sums, both ways give the same norm and the same new sums."""
    results = []
    for job in (theirs, ours):
        for total in sums:
            total.zero_()
        assert callable(job)
        norm = job()
        results.append((norm, [total[..., :4].clone() for total in sums]))
    (norm, before), (other, after) = results
    # PyTorch's norm of GPT-2's embedding is off by 1e-3 and more.
    assert norm == other if exact else math.isclose(norm, other, rel_tol=5e-3), (norm, other)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b) if exact else torch.allclose(a, b, rtol=5e-3), (a, b)
