"""The drop-ins against PyTorch's own functions, over drawn lists of gradients.

Where PyTorch is right, ours agree with it to its own rounding, and with the exact reference to ours. The
lists hold what PyTorch cannot take (sparse gradients, conjugate views, empty tensors under ``inf``): it is
given the same numbers in a form that it takes. Where it is wrong: ``test_torch_right.py``.
"""

from __future__ import annotations

import math
from typing import Any

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import utils

import gradclip
import gradclip.torch
from exact import exact_norm, relative_error, scaled
from matrices import Array
from processes import output_of
from torch_lists import (
    CONTAINERS,
    DTYPES,
    REAL,
    SPARSE_WARNINGS,
    Gradient,
    array_of,
    bits,
    eps,
    gradients,
    in_memory_order,
    parameter,
    tensor_of,
)

pytestmark = SPARSE_WARNINGS
ORDERS = (2, 2.0, 1, math.inf, "inf", 3, 0.5, -1, -math.inf, "-inf")
FOREACH = (None, True, False)
LISTS = gradients()
_CONTAINERS = st.sampled_from(sorted(CONTAINERS))


def exact(arrays: list[Array], order: float) -> Any:
    """The norm, exact to many more digits than float64 has."""
    if order > 0:
        return exact_norm(arrays, order)
    numbers = np.concatenate([np.zeros(0), *(np.abs(a.astype(np.complex128)) for a in arrays)])
    if not numbers.size:
        return mpmath.mpf(0)
    with mpmath.workprec(240):
        if math.isinf(order):
            return mpmath.mpf(numbers.min())
        if not numbers.all():
            return mpmath.mpf(0)
        return mpmath.fsum(mpmath.mpf(x) ** order for x in numbers) ** (1 / mpmath.mpf(order))


def measured(arrays: list[Array], order: float) -> float:
    """What gradclip measures without PyTorch: a float64, of which the drop-in returns a rounded one."""
    return gradclip.global_norm(arrays, order) if order > 0 else float(exact(arrays, order))


class Drawn:
    """A list, and what PyTorch shall make of it."""

    def __init__(self, drawn: list[Gradient | None], order: float) -> None:
        self.drawn = drawn
        self.grads = [None if g is None else g.grad for g in drawn]
        self.parameters = [parameter(grad) for grad in self.grads]
        self.before = [None if grad is None else array_of(grad) for grad in self.grads]
        self.versions = [None if grad is None else grad._version for grad in self.grads]
        self.pointers = [g.base.data_ptr() for g in drawn if g is not None]
        self.arrays = [in_memory_order(grad) for grad in self.grads if grad is not None]
        # PyTorch has no norm of an empty tensor for these orders.
        keep_empty = order > 0 and not math.isinf(order)
        self.theirs = [
            parameter(tensor_of(a)) if a is not None and (a.size or keep_empty) else None for a in self.before
        ]
        dtypes = [grad.dtype for grad in self.grads if grad is not None]
        self.is_wide = torch.float64 in dtypes or torch.complex128 in dtypes
        # PyTorch rounds every tensor's norm to its dtype, the total to the widest of them, and sums up to
        # 60 powers in float32: 8 units of the coarsest dtype hold all of it.
        self.rounding = 8 * max(map(eps, dtypes), default=0.0)

    @property
    def plain(self) -> list[Tensor]:
        return [p for p in self.theirs if p is not None]

    def check_norm(self, total: Tensor, reference: Tensor, order: float) -> None:
        assert total.shape == ()
        assert total.device.type == "cpu"
        assert not total.requires_grad
        assert total.dtype is (torch.float64 if self.is_wide else torch.float32)
        assert math.isclose(total, reference, rel_tol=self.rounding, abs_tol=0)
        # Ours is the exact one: 1e-7 is its promise for 16 and 32 bits, 2^-24 the rounding to float32.
        bound = (
            1e-7 + 2.0**-24 if any(a.dtype.itemsize < 8 or a.dtype == "c8" for a in self.arrays) else 4e-14
        )
        assert relative_error(total.item(), exact(self.arrays, order)) <= bound

    def check_scaled(self, max_norm: float, norm: float, exactly: bool = True) -> None:
        """Every gradient: close to PyTorch's, and the very bits of the exact reference.

        But for a unit in the last place where the norm is one that no engine measures.
        """
        coefficient = max_norm / (norm + 1e-6) if math.isfinite(max_norm) else math.inf
        for drawn, old, other, version in zip(
            self.drawn, self.before, self.theirs, self.versions, strict=True
        ):
            if drawn is None or old is None or version is None:
                continue
            new = array_of(drawn.grad)
            expected = scaled(old, coefficient) if coefficient < 1 else old
            dtype = drawn.grad.dtype
            # The smallest number of the dtype: results below the normal ones are rounded to it.
            tiny = float(torch.finfo(dtype).smallest_normal) * eps(dtype)
            if exactly or coefficient >= 1:
                assert new.tobytes() == expected.tobytes()
            else:
                rtol = eps(dtype) + 1e-14
                torch.testing.assert_close(tensor_of(new), tensor_of(expected), rtol=rtol, atol=tiny)
            assert not any(drawn.gaps())
            if other is not None and other.grad is not None:
                torch.testing.assert_close(
                    tensor_of(new), other.grad, rtol=self.rounding + 2 * eps(dtype), atol=tiny
                )
            is_dense = "sparse" not in drawn.layout and drawn.layout != "CSR"
            if coefficient >= 1 and drawn.layout != "sparse, not coalesced":
                assert drawn.grad._version == version
            elif is_dense and coefficient < 1:
                assert drawn.grad._version > version
        assert [None if p.grad is None else id(p.grad) for p in self.parameters] == [
            None if grad is None else id(grad) for grad in self.grads
        ]
        assert [g.base.data_ptr() for g in self.drawn if g is not None] == self.pointers


@given(LISTS, st.sampled_from(ORDERS), st.sampled_from(FOREACH), _CONTAINERS)
def test_get_total_norm(
    drawn: list[Gradient | None], norm_type: Any, foreach: bool | None, container: str
) -> None:
    case = Drawn(drawn, float(norm_type))
    tensors = [grad for grad in case.grads if grad is not None]
    total = gradclip.torch.get_total_norm(
        CONTAINERS[container](tensors) if tensors else tensors, norm_type, foreach=foreach
    )
    reference = utils.get_total_norm(
        [p.grad for p in case.plain if p.grad is not None], norm_type, foreach=foreach
    )
    case.check_norm(total, reference, float(norm_type))
    case.check_scaled(math.inf, 1.0)  # nothing was written


@pytest.mark.filterwarnings("ignore:grads. expected gradients, got none")
@given(
    LISTS,
    st.sampled_from(ORDERS),
    st.sampled_from((0.0, 0.3, 0.999, 1.0, 1.5, math.inf)),
    st.sampled_from(FOREACH),
    st.booleans(),
    _CONTAINERS,
)
def test_clip_grad_norm(
    drawn: list[Gradient | None],
    norm_type: Any,
    share: float,
    foreach: bool | None,
    strict: bool,
    container: str,
) -> None:
    order = float(norm_type)
    case = Drawn(drawn, order)
    norm = measured(case.arrays, order)
    max_norm = share * norm if share < math.inf else math.inf
    given_parameters = CONTAINERS[container](case.parameters) if case.parameters else case.parameters
    total = gradclip.torch.clip_grad_norm_(given_parameters, max_norm, norm_type, strict, foreach)
    reference = utils.clip_grad_norm_(case.plain, max_norm, norm_type, strict, foreach)
    case.check_norm(total, reference, order)
    # At the threshold itself, what the last bit of such a norm is decides.
    assume(order > 0 or share != 1.0)
    case.check_scaled(max_norm, norm, exactly=order > 0)


@pytest.mark.filterwarnings("ignore:grads. expected gradients, got none")
@given(LISTS, st.sampled_from((0.0, 0.1, 1.0, 40.0)), st.sampled_from(FOREACH), _CONTAINERS)
def test_clip_grads_with_norm(
    drawn: list[Gradient | None], max_norm: float, foreach: bool | None, container: str
) -> None:
    case = Drawn(drawn, 2.0)
    total = torch.tensor(3.25)
    given_parameters = CONTAINERS[container](case.parameters) if case.parameters else case.parameters
    gradclip.torch.clip_grads_with_norm_(given_parameters, max_norm, total, foreach)
    utils.clip_grads_with_norm_(case.plain, max_norm, total, foreach)
    case.rounding = max(case.rounding, 2 * eps(torch.float32))  # of PyTorch's coefficient
    case.check_scaled(max_norm, 3.25)


@pytest.mark.filterwarnings("ignore:grads. expected gradients, got none")
@given(
    gradients(REAL, largest=1), st.sampled_from((0.0, 0.11, 1.0, 8.0)), st.sampled_from(FOREACH), _CONTAINERS
)
def test_clip_grad_value(
    drawn: list[Gradient | None], limit: float, foreach: bool | None, container: str
) -> None:
    case = Drawn(drawn, 2.0)
    given_parameters = CONTAINERS[container](case.parameters) if case.parameters else case.parameters
    gradclip.torch.clip_grad_value_(given_parameters, limit, foreach)
    if case.plain:  # PyTorch raises of an empty list
        utils.clip_grad_value_(case.plain, limit, foreach)
    for found, other in zip(case.drawn, case.theirs, strict=True):
        if found is None or other is None or other.grad is None:
            continue
        new = tensor_of(array_of(found.grad))
        torch.testing.assert_close(new, other.grad, rtol=0, atol=0)
        assert not any(found.gaps())


@pytest.mark.filterwarnings("ignore:grads. expected gradients, got none")
@given(LISTS, st.sampled_from((2, 1, math.inf, 3, -1)))
def test_clipping_twice_changes_at_most_rounding(drawn: list[Gradient | None], norm_type: float) -> None:
    case = Drawn(drawn, norm_type)
    max_norm = 0.5 * measured(case.arrays, norm_type)
    assume(max_norm > 0)
    gradclip.torch.clip_grad_norm_(case.parameters, max_norm, norm_type)
    once = [array_of(grad) for grad in case.grads if grad is not None]
    total = gradclip.torch.clip_grad_norm_(case.parameters, max_norm, norm_type)
    for old, grad in zip(once, (g for g in case.grads if g is not None), strict=True):
        dtype = grad.dtype
        tiny = float(torch.finfo(dtype).smallest_normal) * eps(dtype)
        # PyTorch's formula makes the norm too small by 1e-6, and by 1e-6 again.
        rtol = case.rounding + eps(dtype) + 2e-6 / max_norm
        torch.testing.assert_close(tensor_of(array_of(grad)), tensor_of(old), rtol=rtol, atol=tiny)
    # Every element was rounded, by one of the smallest numbers in float16.
    assert total.item() <= max_norm * (1 + case.rounding) + 2.0**-24 * 400


BAD = (math.inf, -math.inf, math.nan)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_type", [2, 1, math.inf, 3, 0.5, -1])
@pytest.mark.parametrize("bad", BAD)
def test_not_finite_as_in_pytorch(dtype: torch.dtype, norm_type: float, bad: float) -> None:
    ours, theirs = ([parameter(torch.ones(3, dtype=dtype)) for _ in range(3)] for _ in range(2))
    for leaf in (ours[1], theirs[1]):
        assert leaf.grad is not None
        leaf.grad[2] = bad
    total = gradclip.torch.clip_grad_norm_(ours, 0.25, norm_type)
    reference = utils.clip_grad_norm_(theirs, 0.25, norm_type)
    torch.testing.assert_close(total, reference.to(total.dtype), rtol=8 * eps(dtype), atol=0, equal_nan=True)
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        if dtype.is_complex and norm_type < 0 and not math.isnan(bad):
            # Nothing to clip; PyTorch multiplies by 1 + 0j, and inf * 0j is NaN.
            assert a.grad.isnan().sum() == 0
            continue
        if dtype.is_complex:
            # inf * 0 makes both parts NaN or one: a complex number is NaN when either is.
            assert torch.equal(a.grad.isnan(), b.grad.isnan())
            a.grad, b.grad = a.grad.nan_to_num(0), b.grad.nan_to_num(0)
        torch.testing.assert_close(a.grad, b.grad, rtol=8 * eps(dtype), atol=0, equal_nan=True)


@pytest.mark.parametrize("norm_type", [2, 1, math.inf, 3, 0.5])
@pytest.mark.parametrize("bad", BAD)
def test_an_error_if_not_finite_as_in_pytorch(norm_type: float, bad: float) -> None:
    leaves = [parameter(torch.ones(3)), parameter(None), parameter(torch.tensor([1.0, bad]))]
    before = bits(leaf.grad for leaf in leaves)
    expected = rf"The total norm of order {float(norm_type)} .* is non-finite"
    with pytest.raises(RuntimeError, match=expected):
        utils.clip_grad_norm_(leaves, 1.0, norm_type, error_if_nonfinite=True)
    with pytest.raises(RuntimeError, match=expected) as caught:
        gradclip.torch.clip_grad_norm_(leaves, 1.0, norm_type, error_if_nonfinite=True)
    assert "parameters[2].grad: expected finite elements" in str(caught.value)
    assert isinstance(caught.value, gradclip.NonFiniteGradientError)
    assert caught.value.entries == [("parameters[2].grad", int(math.isnan(bad)), int(math.isinf(bad)))]
    assert bits(leaf.grad for leaf in leaves) == before
    with pytest.raises(RuntimeError, match=r"tensors\[1\]: expected finite"):
        gradclip.torch.get_total_norm([torch.ones(3), torch.tensor([bad])], norm_type, True)


def test_nothing_to_measure() -> None:
    for module in (gradclip.torch, utils):
        for container in (list, tuple, iter):
            nothing: list[Tensor] = []
            total = module.get_total_norm(container(nothing))
            assert (total.item(), total.dtype, total.device.type) == (0.0, torch.float32, "cpu")
        with pytest.warns(UserWarning, match="empty generator"):
            assert module.clip_grad_norm_((p for p in nothing), 1.0).item() == 0
    utils.clip_grads_with_norm_([], 1.0, torch.tensor(1.0))
    for call in (
        lambda: gradclip.torch.clip_grad_norm_([parameter(None)], 1.0),
        lambda: gradclip.torch.clip_grads_with_norm_([], 1.0, torch.tensor(1.0)),
        lambda: gradclip.torch.clip_grad_value_([parameter(None)], 1.0),
    ):
        with pytest.warns(UserWarning, match="grads: expected gradients, got none") as caught:
            call()
        assert [warning.filename for warning in caught] == [__file__]


def test_autograd_finds_out() -> None:
    """A gradient that autograd has saved was changed in place: an error, as with PyTorch's functions."""
    for module in (gradclip.torch, utils):
        leaf, factor = parameter(torch.ones(4)), torch.ones(4, requires_grad=True)
        assert leaf.grad is not None
        product = (factor * leaf.grad).sum()
        module.clip_grad_norm_([leaf], 1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.backward(product)


def test_a_threshold_that_requires_grad() -> None:
    """A warning is an error here."""
    leaves = [parameter(torch.tensor([3.0, 4.0])) for _ in range(2)]
    limit: Any = torch.tensor(1.0, requires_grad=True)
    gradclip.torch.clip_grad_norm_(leaves[:1], limit)
    utils.clip_grad_norm_(leaves[1:], limit)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_a_pytorch_without_the_exchange_api() -> None:
    code = """
        import torch
        del torch.Tensor.__dlpack_c_exchange_api__
        import gradclip.torch
        leaves = [torch.nn.Parameter(torch.zeros(2, 3, dtype=d)) for d in (torch.float32, torch.bfloat16)]
        for leaf in leaves: leaf.grad = torch.ones_like(leaf)
        leaves[1].grad = torch.ones(3, 2, dtype=torch.bfloat16).t()
        norm = gradclip.torch.clip_grad_norm_(leaves, 12**0.5 / 2)
        print(round(norm.item(), 4), [round(leaf.grad[1, 2].item(), 4) for leaf in leaves])
    """
    assert output_of(code) == "3.4641 [0.5, 0.5]"
