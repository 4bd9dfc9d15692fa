"""Where PyTorch 2.13 is wrong: what it does, and that ours is what an exact reference says.

Every test shows first that PyTorch is still wrong, so that the list of these cases stays true.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.nn import utils

import gradclip
import gradclip.torch
from exact import exact_norm, relative_error, scaled
from torch_lists import (
    DTYPES,
    REAL,
    SPARSE_WARNINGS,
    TORCH_VERSION,
    Gradient,
    array_of,
    bits,
    grad_of,
    gradients,
    parameter,
)

pytestmark = SPARSE_WARNINGS
_F16, _BF16, _F32, _F64 = REAL


def both(*grads: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The same gradients for gradclip and for PyTorch."""
    return [parameter(grad.clone()) for grad in grads], [parameter(grad.clone()) for grad in grads]


def clip_exactly(leaves: list[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Clip by ours; norm and every bit of the gradients are what the exact reference says."""
    before = [array_of(grad_of(leaf)) for leaf in leaves]
    exact = exact_norm(before, norm_type)
    total = gradclip.torch.clip_grad_norm_(leaves, max_norm, norm_type)
    measured = gradclip.global_norm(before, norm_type)
    assert relative_error(measured, exact) <= 1e-7
    assert relative_error(total.item(), exact) <= 1e-7 + 2.0**-24
    coefficient = min(1.0, max_norm / (measured + 1e-6))
    for leaf, old in zip(leaves, before, strict=True):
        expected = scaled(old, coefficient) if coefficient < 1 else old
        assert array_of(grad_of(leaf)).tobytes() == expected.tobytes()
    return total


@pytest.mark.parametrize("norm_type", [2, 1, 3])
@pytest.mark.parametrize(
    ("dtype", "value", "count"),
    [(_F16, 60000.0, 4), (_F32, 1e38, 5), (_F64, 1e308, 5), (torch.complex64, 3e38, 1), (_BF16, 2e38, 9)],
    ids=str,
)
def test_overflow(dtype: torch.dtype, value: float, count: int, norm_type: float) -> None:
    grad = torch.full((count,), value, dtype=dtype)
    if dtype.is_complex:
        grad = grad * (1 + 1j)
    ours, theirs = both(grad, torch.ones(3, dtype=dtype))
    assert utils.clip_grad_norm_(theirs, 1.0, norm_type).isinf()
    assert not grad_of(theirs[1]).count_nonzero()  # all but the infinite were lost
    exact = exact_norm([array_of(grad_of(leaf)) for leaf in ours], norm_type)
    if exact > torch.finfo(torch.float64).max:
        with pytest.raises(RuntimeError, match="expected a finite norm, got one that is not"):
            gradclip.torch.clip_grad_norm_(ours, 1.0, norm_type, error_if_nonfinite=True)
        return
    before = [array_of(grad_of(leaf)) for leaf in ours]
    total = gradclip.torch.clip_grad_norm_(ours, 1.0, norm_type)
    # float32 holds no norm above 3.4e38, but the gradients are clipped by what it is.
    assert (
        total.isinf() if exact > 3.4e38 and dtype is not _F64 else relative_error(total.item(), exact) < 2e-7
    )
    for leaf, old in zip(ours, before, strict=True):
        coefficient = 1.0 / (gradclip.global_norm(before, norm_type) + 1e-6)
        assert array_of(grad_of(leaf)).tobytes() == scaled(old, coefficient).tobytes()
    assert gradclip.torch.clip_grad_norm_(ours, 1.0, norm_type).item() == pytest.approx(1.0, rel=1e-2)


@pytest.mark.parametrize(
    ("norm_type", "expected"), [(2, math.sqrt(12) * 60000), (1, 720000), (math.inf, 60000)]
)
def test_fp16_gradients_whose_norm_is_beyond_fp16(norm_type: float, expected: float) -> None:
    ours, theirs = both(*(torch.full((4,), 60000.0, dtype=_F16) for _ in range(3)))
    wrong = utils.clip_grad_norm_(theirs, 1.0, norm_type)
    assert wrong.isinf() if norm_type != math.inf else wrong.item() == 60000
    total = clip_exactly(ours, 1.0, norm_type)
    assert total.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("dtype", "value"), [(_F32, 1e-25), (_F64, 1e-170), (torch.complex64, 1e-25)], ids=str
)
def test_underflow(dtype: torch.dtype, value: float) -> None:
    ours, theirs = both(torch.full((4,), value, dtype=dtype))
    assert utils.get_total_norm([grad_of(leaf) for leaf in theirs]) == 0
    total = clip_exactly(ours, 1.0)
    assert total.item() == pytest.approx(2 * value, rel=1e-6)


@pytest.mark.parametrize("dtype", [_BF16, _F16], ids=str)
def test_norm_and_coefficient_are_not_rounded_to_16_bits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    grads = [torch.rand(30, generator=generator).to(dtype) for _ in range(3)]
    ours, theirs = both(*grads)
    wrong = utils.clip_grad_norm_(theirs, 1.0)
    assert wrong.dtype is dtype
    exact = exact_norm([array_of(grad) for grad in grads])
    assert relative_error(wrong.item(), exact) > 1e-5
    total = clip_exactly(ours, 1.0)
    assert total.dtype is _F32
    errors = [
        abs(gradclip.global_norm([array_of(grad_of(p)) for p in leaves]) - 1) for leaves in (ours, theirs)
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_parameter_twice(dtype: torch.dtype) -> None:
    (once,), theirs = both(torch.full((4,), 2.0, dtype=dtype))
    assert utils.clip_grad_norm_(theirs * 2, 1.0).item() == pytest.approx(math.sqrt(32), rel=1e-2)  # not 4
    total = gradclip.torch.clip_grad_norm_([once, parameter(None), once, once], 1.0)
    assert total.item() == 4
    expected = scaled(np.full(4, 2.0, array_of(grad_of(once)).dtype), 1 / (4 + 1e-6))
    assert array_of(grad_of(once)).tobytes() == expected.tobytes()
    # So under the reroute, where PyTorch measures and scales in two calls.
    tied = torch.nn.Parameter(torch.zeros(2))
    tied.grad = torch.tensor([3.0, 4.0])
    with gradclip.torch.patched():
        assert utils.clip_grad_norm_([tied, tied], 1.0).item() == 5
    torch.testing.assert_close(grad_of(tied), torch.tensor([0.6, 0.8]))
    # Another tensor over the same memory is the same gradient.
    views = [grad_of(once), grad_of(once).view(4), grad_of(once).detach()]
    assert gradclip.torch.get_total_norm(views).item() == gradclip.torch.get_total_norm(views[0]).item()


@pytest.mark.parametrize("coalesced", [True, False])
def test_a_sparse_gradient_twice(coalesced: bool) -> None:
    grad = torch.sparse_coo_tensor(torch.tensor([[0, 0, 2]]), torch.tensor([1.0, 2.0, 4.0]), (5,))
    leaf = parameter(grad.coalesce() if coalesced else grad)
    if TORCH_VERSION < (2, 14):  # which takes them, and counts them twice
        with pytest.raises(NotImplementedError):
            utils.clip_grad_norm_(leaf, 1.0)
    assert gradclip.torch.get_total_norm([grad_of(leaf), grad_of(leaf)]).item() == 5
    assert gradclip.torch.clip_grad_norm_([leaf, leaf], 1.0).item() == 5
    torch.testing.assert_close(grad_of(leaf).to_dense(), torch.tensor([0.6, 0, 0.8, 0, 0]))


@pytest.mark.parametrize("max_norm", [-1.0, -1e-30, "-2", torch.tensor(-3.0)])
def test_a_negative_threshold(max_norm: float) -> None:
    ours, theirs = both(torch.tensor([3.0, 4.0]))
    utils.clip_grad_norm_(theirs, max_norm)
    assert (grad_of(theirs[0]) < 0).all()  # uphill
    before = bits(grad_of(leaf) for leaf in ours)
    for call in (
        lambda: gradclip.torch.clip_grad_norm_(ours, max_norm),
        lambda: gradclip.torch.clip_grads_with_norm_(ours, max_norm, torch.tensor(5.0)),
    ):
        with pytest.raises(ValueError, match="max_norm: expected a number that is not negative"):
            call()
    with pytest.raises(ValueError, match="clip_value: expected a number that is not negative"):
        gradclip.torch.clip_grad_value_(ours, max_norm)
    assert bits(grad_of(leaf) for leaf in ours) == before


@given(gradients())
def test_order_0_counts_elements(drawn: list[Gradient | None]) -> None:
    leaves = [parameter(None if g is None else g.grad) for g in drawn]
    count = sum(array_of(g.grad).size for g in drawn if g is not None)
    zeros = parameter(torch.tensor([0.0, 1.0, -0.0]))
    total = gradclip.torch.clip_grad_norm_([zeros, *leaves], math.inf, 0)
    assert total.item() == count + 1


def test_order_0_of_several_tensors() -> None:
    ours, theirs = both(torch.ones(3), torch.tensor([1.0, 0.0]))
    assert utils.clip_grad_norm_(theirs, 1.0, 0).item() == 2  # tensors
    assert gradclip.torch.clip_grad_norm_(ours, 1.0, 0).item() == 4  # elements
    torch.testing.assert_close(grad_of(ours[0]), torch.full((3,), 0.25))


@pytest.mark.parametrize("order", [math.inf, -math.inf, "-inf", -1])
def test_an_empty_tensor_among_others(order: float) -> None:
    ours, theirs = both(torch.tensor([3.0, -4.0]), torch.ones(0), torch.ones(0, 3))
    with pytest.raises(RuntimeError, match="empty tensor"):
        utils.clip_grad_norm_(theirs, 1.0, order)
    expected = {math.inf: 4.0, -math.inf: 3.0, -1: 1 / (1 / 3 + 1 / 4)}[float(order)]
    assert gradclip.torch.clip_grad_norm_(ours, 1.0, order).item() == pytest.approx(expected)
    assert gradclip.torch.get_total_norm([torch.ones(0)], order).item() == 0


@pytest.mark.parametrize("order", [-1, -2, -3.5])
@pytest.mark.parametrize("value", [2e200, 2e-200, 5e-324])
def test_negative_orders_do_not_overflow(order: float, value: float) -> None:
    ours, theirs = both(torch.full((10,), value, dtype=_F64))
    wrong = utils.clip_grad_norm_(theirs, 1.0, order)
    assert order == -1 or wrong.isinf() or wrong == 0
    total = gradclip.torch.clip_grad_norm_(ours, 1.0, order).item()
    assert total == pytest.approx(value * 10 ** (1 / order), rel=1e-14)


def test_a_threshold_of_infinity_only_measures() -> None:
    ours, theirs = both(torch.tensor([math.inf, 1.0]), torch.tensor([math.nan, 2.0]))
    utils.clip_grad_norm_(theirs, math.inf)
    assert grad_of(theirs[0]).isnan().all()
    before = bits(grad_of(leaf) for leaf in ours)
    assert gradclip.torch.clip_grad_norm_(ours, math.inf).isnan()
    assert bits(grad_of(leaf) for leaf in ours) == before


def test_a_generator_an_empty_list_and_none() -> None:
    leaves = [parameter(torch.tensor([3.0])), parameter(torch.tensor([4.0]))]
    assert gradclip.torch.get_total_norm(grad_of(leaf) for leaf in leaves).item() == 5
    with pytest.raises(RuntimeError):
        utils.clip_grad_value_([], 1.0)
    with pytest.warns(UserWarning, match="grads: expected gradients, got none"):
        gradclip.torch.clip_grad_value_([], 1.0)
    with_none: list[Any] = [grad_of(leaves[0]), None, grad_of(leaves[1])]
    with pytest.raises(RuntimeError):
        utils.get_total_norm(with_none)
    assert gradclip.torch.get_total_norm(with_none).item() == 5


def test_clipping_by_value_to_0_and_by_infinity() -> None:
    grads = [torch.tensor([1.0, -2.0, math.nan, math.inf]), torch.tensor([[3.0, -0.0]], dtype=_F16)]
    leaves = [parameter(grad) for grad in grads]
    before = bits(grads)
    gradclip.torch.clip_grad_value_(leaves, math.inf)
    assert bits(grads) == before
    gradclip.torch.clip_grad_value_(leaves, 0)
    torch.testing.assert_close(grads[0], torch.tensor([0, 0, math.nan, 0]), equal_nan=True)
    assert not grads[1].any()


def test_a_value_limit_that_the_dtype_cannot_hold() -> None:
    """Rounded towards zero: no element is beyond the limit afterwards, as it is with PyTorch."""
    ours, theirs = both(torch.tensor([1.0, -1.0], dtype=_F16))
    limit = 0.1
    gradclip.torch.clip_grad_value_(ours, limit)
    utils.clip_grad_value_(theirs, 0.0999)
    for leaf in ours:
        assert all(Fraction(abs(x)) <= Fraction(limit) for x in grad_of(leaf).tolist())
