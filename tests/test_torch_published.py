"""The cases that PyTorch publishes for its clipping functions, with gradclip's in their place.

They are those of PyTorch's test/test_nn.py: ``test_clip_grad_norm``, ``test_clip_grad_value``,
``test_clip_grad_norm_error_if_nonfinite`` and ``test_clip_grad_norm_multi_device``, with their parameters,
numbers and tolerances (those of ``torch.testing``), written anew in this suite's style. Each runs against
``gradclip.torch`` called by name and against ``torch.nn.utils`` rerouted.

Changed: for 2e200 under the orders 2, 3.5, -2 and -3.5 PyTorch expects an error, since it cannot hold
those norms. They are finite, and here they are compared with what they are. And where there is but one
GPU, the CPU is the second device.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import gradclip.torch
from gradclip.torch import Stats

inf, nan = math.inf, math.nan
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
FOREACH = (False, True)


class Functions(NamedTuple):
    """Where the four functions are looked up."""

    module: Any
    counts: Stats | None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


@pytest.fixture(params=["gradclip.torch", "torch.nn.utils, rerouted"])
def utils(request: pytest.FixtureRequest) -> Iterator[Functions]:
    """The functions; after a rerouted test, gradclip has done every call."""
    if request.param == "gradclip.torch":
        yield Functions(gradclip.torch, None)
        return
    with gradclip.torch.patched() as counts:
        yield Functions(torch.nn.utils, counts)
        assert counts.taken.total() > 0
        assert counts.passed_on.total() == 0, counts.reasons


def _close(actual: Any, expected: Any) -> None:
    """As ``assertEqual`` of PyTorch's tests."""
    torch.testing.assert_close(
        torch.as_tensor(actual), torch.as_tensor(expected), check_dtype=False, equal_nan=True
    )


def _norm(layer: nn.Module, norm_type: float | str) -> Tensor:
    grads = torch.cat([p.grad.abs().flatten() for p in layer.parameters() if p.grad is not None])
    p = float(norm_type)
    return grads.max() if p == inf else grads.pow(p).sum() ** (1 / p)


def _scale(layer: nn.Module, before: list[Tensor]) -> Tensor:
    """What all elements were multiplied by: the same for each."""
    pairs = zip(layer.parameters(), before, strict=True)
    scales = torch.cat([(p.grad / g).flatten() for p, g in pairs if p.grad is not None])
    _close(scales.std(), 0.0)
    return scales[0]


def _set_grads(layer: nn.Module, grads: list[Tensor]) -> None:
    for parameter, grad in zip(layer.parameters(), grads, strict=True):
        parameter.grad = grad.clone().view_as(parameter)


def _large(device: str) -> list[Tensor]:
    return [torch.arange(1.0, 101.0, device=device).view(10, 10), torch.ones(10, device=device) / 1000]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("foreach", FOREACH)
@pytest.mark.parametrize("norm_type", [0.5, 1.5, 2, 4, "inf"])
class TestClipGradNorm:
    """``test_clip_grad_norm``."""

    max_norm = 2

    def test_large_gradients(
        self, utils: Functions, norm_type: float | str, foreach: bool, device: str
    ) -> None:
        layer = nn.Linear(10, 10).to(device)
        _set_grads(layer, _large(device))
        before = _norm(layer, norm_type)
        norm = utils.clip_grad_norm_(layer.parameters(), self.max_norm, norm_type=norm_type, foreach=foreach)
        after = _norm(layer, norm_type)
        _close(norm, before)
        _close(after, float(self.max_norm))
        assert after <= before
        _scale(layer, _large(device))

    def test_in_two_calls(self, utils: Functions, norm_type: float | str, foreach: bool, device: str) -> None:
        layer = nn.Linear(10, 10).to(device)
        _set_grads(layer, _large(device))
        before = _norm(layer, norm_type)
        total = utils.get_total_norm(
            [p.grad for p in layer.parameters()], norm_type=norm_type, foreach=foreach
        )
        utils.clip_grads_with_norm_(layer.parameters(), self.max_norm, total, foreach=foreach)
        after = _norm(layer, norm_type)
        _close(total, before)
        _close(after, float(self.max_norm))
        assert after <= before
        _scale(layer, _large(device))

    def test_small_gradients_stay(
        self, utils: Functions, norm_type: float | str, foreach: bool, device: str
    ) -> None:
        torch.manual_seed(5)
        small = [torch.rand(10, 10, device=device) / 10000, torch.ones(10, device=device) / 500]
        layer = nn.Linear(10, 10).to(device)
        _set_grads(layer, small)
        before = _norm(layer, norm_type)
        norm = utils.clip_grad_norm_(layer.parameters(), self.max_norm, norm_type=norm_type, foreach=foreach)
        after = _norm(layer, norm_type)
        _close(norm, before)
        _close(before, after)
        assert after <= self.max_norm
        _close(_scale(layer, small), 1.0)

    def test_one_tensor(self, utils: Functions, norm_type: float | str, foreach: bool, device: str) -> None:
        one, listed = torch.randn(10, 10, device=device), torch.randn(10, 10, device=device)
        one.grad, listed.grad = _large(device)[0], _large(device)[0]
        utils.clip_grad_norm_(one, self.max_norm, norm_type=norm_type, foreach=foreach)
        utils.clip_grad_norm_([listed], self.max_norm, norm_type=norm_type, foreach=foreach)
        _close(one.grad, listed.grad)

    def test_warns_of_an_exhausted_generator(
        self, utils: Functions, norm_type: float | str, foreach: bool, device: str
    ) -> None:
        parameters = nn.Linear(10, 10).to(device).parameters()
        assert len(list(parameters)) == 2
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            utils.clip_grad_norm_(parameters, self.max_norm, norm_type=norm_type, foreach=foreach)
        assert [str(w.message) for w in caught] == [
            "`parameters` is an empty generator, no gradient clipping will occur."
        ]
        assert caught[0].filename == __file__


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("foreach", FOREACH)
def test_clip_grad_value(utils: Functions, foreach: bool, device: str) -> None:
    layer, limit = nn.Linear(10, 10).to(device), 2.5
    weight = torch.arange(-50.0, 50.0, device=device).view(10, 10) / 5
    for bias in (torch.full((10,), 2.0, device=device), None):
        layer.weight.grad = weight.clone()
        layer.bias.grad = bias
        utils.clip_grad_value_(layer.parameters(), limit, foreach=foreach)
        for parameter in layer.parameters():
            if parameter.grad is not None:
                assert parameter.grad.max() <= limit
                assert parameter.grad.min() >= -limit
    one, listed = torch.randn(10, 10, device=device), torch.randn(10, 10, device=device)
    one.grad, listed.grad = weight.clone(), weight.clone()
    utils.clip_grad_value_(one, limit, foreach=foreach)
    utils.clip_grad_value_([listed], limit, foreach=foreach)
    _close(one.grad, listed.grad)


_POSITIVE = (0.1, 1, 2, 3.5, inf)
_NEGATIVE = (-0.1, -1, -2, -3.5)
_BUT_0 = _POSITIVE + _NEGATIVE


class Case(NamedTuple):
    """Ten gradients of float64, or one among zeros, and perhaps a 1 before them."""

    one_element: bool
    with_a_1: bool
    scalars: tuple[float, ...]
    nonfinite: tuple[float, ...]
    finite: tuple[float, ...]


# The orders under which PyTorch expects a norm that is not finite, and those under which it is.
_CASES = (
    Case(False, False, (inf, -inf), _BUT_0, (0,)),
    Case(False, True, (inf, -inf), _POSITIVE, (*_NEGATIVE, 0)),
    Case(True, False, (inf, -inf), _POSITIVE, (*_NEGATIVE, 0)),
    Case(True, True, (inf, -inf), _POSITIVE, (*_NEGATIVE, 0)),
    Case(False, False, (nan,), _BUT_0, (0,)),
    Case(False, True, (nan,), _BUT_0, (0,)),
    Case(True, False, (nan,), _BUT_0, (0,)),
    Case(True, True, (nan,), _BUT_0, (0,)),
    Case(False, False, (2e22, -2e22), (), (*_BUT_0, 0)),
    Case(False, True, (2e22, -2e22), (), (*_BUT_0, 0)),
    Case(True, False, (2e22, -2e22), (), (*_BUT_0, 0)),
    Case(True, True, (2e22, -2e22), (), (*_BUT_0, 0)),
    # Changed: 2, 3.5, -2 and -3.5 are among the finite ones. See test_norms_that_pytorch_cannot_hold.
    Case(False, False, (2e200, -2e200), (), (*_BUT_0, 0)),
    Case(False, True, (2e200, -2e200), (), (*_BUT_0, 0)),
    Case(True, False, (2e200, -2e200), (), (*_BUT_0, 0)),
    Case(True, True, (2e200, -2e200), (), (*_BUT_0, 0)),
)


def _parameters(case: Case, scalar: float, device: str) -> list[Tensor]:
    """Leaves with gradients that autograd made."""
    leaf = torch.ones(10, dtype=torch.float64, device=device, requires_grad=True)
    torch.autograd.backward((leaf[1] if case.one_element else leaf).mul(scalar).sum())
    if not case.with_a_1:
        return [leaf]
    one = torch.ones(1, dtype=torch.float64, device=device, requires_grad=True)
    torch.autograd.backward(one.sum())
    return [one, leaf]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("error_if_nonfinite", [False, True])
@pytest.mark.parametrize("case", _CASES, ids=str)
def test_clip_grad_norm_error_if_nonfinite(
    utils: Functions, case: Case, error_if_nonfinite: bool, device: str
) -> None:
    for scalar in case.scalars:
        for norm_type in case.nonfinite + case.finite:
            parameters = _parameters(case, scalar, device)
            before = [p.grad.clone() for p in parameters if p.grad is not None]
            if norm_type not in case.nonfinite or not error_if_nonfinite:
                utils.clip_grad_norm_(
                    parameters, 1, norm_type=norm_type, error_if_nonfinite=error_if_nonfinite
                )
                continue
            expected = f"The total norm of order {float(norm_type)} for gradients"
            with pytest.raises(RuntimeError, match=expected):
                utils.clip_grad_norm_(parameters, 1, norm_type=norm_type, error_if_nonfinite=True)
            for grad, parameter in zip(before, parameters, strict=True):
                _close(parameter.grad, grad)


@pytest.mark.parametrize("norm_type", [3.5, 2, -2, -3.5])
@pytest.mark.parametrize("with_a_1", [False, True])
@pytest.mark.parametrize("scalar", [2e200, -2e200])
def test_norms_that_pytorch_cannot_hold(
    utils: Functions, norm_type: float, with_a_1: bool, scalar: float
) -> None:
    parameters = _parameters(Case(False, with_a_1, (), (), ()), scalar, "cpu")
    norm = utils.clip_grad_norm_(parameters, 1, norm_type=norm_type, error_if_nonfinite=True)
    # In units of 2e200, where the 1 is nothing; under negative orders it is all.
    expected = 2e200 * 10 ** (1 / norm_type) if norm_type > 0 or not with_a_1 else 1.0
    torch.testing.assert_close(norm.item(), expected, rtol=1e-14, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("foreach", FOREACH)
@pytest.mark.parametrize("norm_type", [2.0, inf])
def test_clip_grad_norm_multi_device(utils: Functions, norm_type: float, foreach: bool) -> None:
    # With one GPU the CPU is the other device.
    devices = ("cuda:0", "cuda:1" if torch.cuda.device_count() > 1 else "cpu")
    split = nn.ModuleList([nn.Linear(10, 10).to(device) for device in devices])
    whole = nn.ModuleList([nn.Linear(10, 10) for _ in devices]).to(devices[0])
    for parameter in (*split.parameters(), *whole.parameters()):
        parameter.grad = torch.ones_like(parameter)
    norm = utils.clip_grad_norm_(split.parameters(), 0.5, norm_type=norm_type, foreach=foreach)
    expected = utils.clip_grad_norm_(whole.parameters(), 0.5, norm_type=norm_type, foreach=foreach)
    _close(norm, expected)
    for a, b in zip(split.parameters(), whole.parameters(), strict=True):
        assert a.grad is not None
        _close(a.grad.to(devices[0]), b.grad)


def test_the_cases_are_pytorchs() -> None:
    """PyTorch itself passes all but the changed ones: they were not written to fit gradclip."""
    theirs = Functions(torch.nn.utils, None)
    for case in _CASES[:12]:
        for strict in (False, True):
            test_clip_grad_norm_error_if_nonfinite(theirs, case, strict, "cpu")
    for norm_type in (0.5, 1.5, 2, 4, "inf"):
        cases = TestClipGradNorm()
        for test in (
            cases.test_large_gradients,
            cases.test_in_two_calls,
            cases.test_small_gradients_stay,
            cases.test_one_tensor,
        ):
            test(theirs, norm_type, True, "cpu")
    test_clip_grad_value(theirs, True, "cpu")
