"""Several devices in one call: norms of parts put together, and the way there, walked with two CPU lists."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import gradclip.torch
from exact import exact_norm, relative_error
from gradclip._dispatch import ReadGradients, read
from gradclip.torch import _gradients
from gradclip.torch._arguments import Tensors
from gradclip.torch._gradients import by_device
from gradclip.torch._norms import combine
from torch_lists import SPARSE_WARNINGS, array_of, bits, grad_of, parameter, random_tensor

pytestmark = SPARSE_WARNINGS
ORDERS = (2, 1, math.inf, 3, 0.5)
_NORMS = st.lists(st.floats(0, 1e308, allow_subnormal=False), min_size=1, max_size=6)


def _wide(norms: list[float]) -> list[Tensor]:
    return [torch.tensor(norm, dtype=torch.float64) for norm in norms]


# --- combine ------------------------------------------------------------------------------------------


@given(_NORMS, st.sampled_from(ORDERS))
def test_combine_is_the_norm_of_norms(norms: list[float], order: float) -> None:
    exact = exact_norm(np.array(norms), order)
    assume(exact < 1.7e308)
    total = combine(_wide(norms), order)
    assert (total.shape, total.dtype) == ((), torch.float64)
    assert relative_error(total.item(), exact) <= 2e-15 * max(1, 1 / order)


@pytest.mark.parametrize("order", [*ORDERS, 0, -1, -math.inf])
@pytest.mark.parametrize("norm", [0.0, 1e-320, 1e-300, 3.0, 1e300, math.inf])
def test_combine_of_one_is_itself(norm: float, order: float) -> None:
    assert combine(_wide([norm]), order).item() == norm


@pytest.mark.parametrize("scale", [1.0, 1e-300, 1e300, 2e-308])
def test_combine_at_the_ends_of_float64(scale: float) -> None:
    norms = _wide([3 * scale, 4 * scale])
    for order, expected in {
        2: 5.0,
        1: 7.0,
        math.inf: 4.0,
        3: 91 ** (1 / 3),
        0.5: (math.sqrt(3) + 2) ** 2,
        -1: 12 / 7,
        -2: (1 / 9 + 1 / 16) ** -0.5,
        -math.inf: 3.0,
    }.items():
        assert combine(norms, order).item() / scale == pytest.approx(expected, rel=1e-15, abs=0)


def test_combine_of_counts_adds_them() -> None:
    assert combine(_wide([3.0, 0.0, 4.0]), 0).item() == 7


@pytest.mark.parametrize("order", ORDERS)
def test_combine_of_zero_infinity_and_nan(order: float) -> None:
    assert combine(_wide([0.0, 0.0]), order).item() == 0
    assert combine(_wide([0.0, 2.0]), order).item() == pytest.approx(2, rel=1e-15)
    assert combine(_wide([math.inf, 2.0]), order).item() == math.inf
    assert combine(_wide([math.inf, 0.0, math.inf]), order).item() == math.inf
    for others in ([1.0], [0.0], [math.inf]):
        assert math.isnan(combine(_wide([math.nan, *others]), order).item())


@pytest.mark.parametrize("order", [-1, -2.5, -math.inf])
def test_combine_of_zero_infinity_and_nan_under_negative_orders(order: float) -> None:
    assert combine(_wide([0.0, 2.0]), order).item() == 0  # a zero somewhere is what they all come to
    assert combine(_wide([math.inf, 2.0]), order).item() == 2
    assert combine(_wide([math.inf, math.inf]), order).item() == math.inf
    assert math.isnan(combine(_wide([math.nan, 2.0]), order).item())


# --- The way of several devices -----------------------------------------------------------------------


def _alternating(grads: Tensors) -> dict[torch.device, list[Tensor | None]]:
    """As if every second gradient lay on another device: the same keys but one, the same engine."""
    lists: dict[torch.device, list[Tensor | None]] = {}
    for i, grad in enumerate(grads):
        if grad is not None:
            device = torch.device("cpu", 0) if i % 2 else torch.device("cpu")
            lists.setdefault(device, [None] * len(grads))[i] = grad
    return lists


class _Unreadable:
    """An engine that reads no list with both: what the engines say of tensors on several devices."""

    def __init__(self) -> None:
        self.parts = 0

    def __call__(self, grads: list[Tensor | None]) -> ReadGradients:
        on = {i % 2 for i, grad in enumerate(grads) if grad is not None}
        if len(on) > 1:
            raise ValueError("grads[1]: expected an array on the CPU, got one on another device")
        self.parts += bool(on)
        return read(grads)


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Unreadable]:
    """Every list with gradients at odd and at even positions is split in two."""
    engines = _Unreadable()
    monkeypatch.setattr(_gradients, "read", engines)
    monkeypatch.setattr(_gradients, "by_device", _alternating)
    yield engines
    assert engines.parts > 1


def _leaves() -> tuple[list[Tensor], list[Tensor]]:
    grads = [
        random_tensor((65,), dtype, seed) for seed, dtype in enumerate((torch.float32, torch.float16) * 2)
    ]
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 1, 1]]), torch.tensor([1.0, 2.0, 3.0]), (4,))
    grads += [torch.ones(0), torch.full((3,), 2.0, dtype=torch.bfloat16), sparse]
    return [parameter(grad.clone()) for grad in grads], [parameter(grad.clone()) for grad in grads]


@pytest.mark.parametrize("order", [*ORDERS, 0, -1, -math.inf])
@pytest.mark.parametrize("share", [0.0, 0.4, 2.0])
def test_as_on_one_device(two_devices: _Unreadable, order: float, share: float) -> None:
    split, whole = _leaves()
    with pytest.MonkeyPatch.context() as one_device:
        one_device.setattr(_gradients, "read", read)
        one_device.setattr(_gradients, "by_device", by_device)
        max_norm = share * gradclip.torch.get_total_norm([grad_of(p) for p in whole], order).item()
        expected = gradclip.torch.clip_grad_norm_(whole, max_norm, order)
    versions = [grad_of(p)._version for p in split if not grad_of(p).is_sparse]
    total = gradclip.torch.clip_grad_norm_(split, max_norm, order)
    torch.testing.assert_close(total, expected, rtol=1e-7, atol=0)
    for a, b in zip(split, whole, strict=True):
        # The norms differ in their last bits, and so may roundings.
        torch.testing.assert_close(grad_of(a).to_dense(), grad_of(b).to_dense(), rtol=2e-3, atol=1e-7)
    after = [grad_of(p)._version for p in split if not grad_of(p).is_sparse]
    assert all(new > old if share < 1 else new == old for old, new in zip(versions, after, strict=True))


def test_measured_and_scaled_apart(two_devices: _Unreadable) -> None:
    split, _ = _leaves()
    grads = [grad_of(p) for p in split]
    exact = exact_norm([array_of(grad) for grad in grads if grad is not None])
    total = gradclip.torch.get_total_norm(grads)
    assert relative_error(total.item(), exact) <= 2e-7
    gradclip.torch.clip_grads_with_norm_(split, 0.5, total)
    assert gradclip.torch.get_total_norm(grads).item() == pytest.approx(0.5, rel=1e-3)
    gradclip.torch.clip_grad_value_(split, 0.01)
    for grad in (grad for grad in grads if grad is not None and grad.numel()):
        assert grad.to_dense().abs().amax() <= torch.tensor(0.01, dtype=grad.dtype)  # rounded to nearest


def test_what_is_not_finite_is_named(two_devices: _Unreadable) -> None:
    split, _ = _leaves()
    bad = grad_of(split[3])
    assert bad is not None
    bad[5] = math.nan
    before = bits(grad_of(p) for p in split)
    with pytest.raises(gradclip.torch.NonFiniteNormError) as caught:
        gradclip.torch.clip_grad_norm_(split, 1.0, error_if_nonfinite=True)
    assert caught.value.entries == [("parameters[3].grad", 1, 0)]
    assert math.isnan(caught.value.norms[3])
    assert caught.value.norms[5] == pytest.approx(math.sqrt(12))
    assert bits(grad_of(p) for p in split) == before


def test_nothing_is_written_where_the_second_device_is_refused(two_devices: _Unreadable) -> None:
    memory = torch.ones(8)
    leaves = [
        parameter(torch.ones(3)),
        parameter(memory[:5]),
        parameter(torch.ones(2)),
        parameter(memory[3:]),
    ]
    calls: tuple[Callable[[], object], ...] = (
        lambda: gradclip.torch.clip_grad_norm_(leaves, 0.1),
        lambda: gradclip.torch.clip_grads_with_norm_(leaves, 0.1, torch.tensor(5.0)),
        lambda: gradclip.torch.clip_grad_value_(leaves, 0.1),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"parameters\[3\].grad: expected memory of its own.*\[1\]"):
            call()
        assert all(grad_of(p).eq(1).all() for p in leaves)


def test_a_complex_gradient_on_the_second_device_stops_value_clipping(two_devices: _Unreadable) -> None:
    leaves = [
        parameter(torch.ones(3)),
        parameter(torch.ones(2, dtype=torch.complex64)),
        parameter(torch.ones(1)),
    ]
    gradclip.torch.clip_grad_norm_(leaves, 100.0)  # which is no matter to norms
    for limit in (0.1, 0.0):
        with pytest.raises(TypeError, match=r"parameters\[1\].grad: expected a real dtype.*complex64"):
            gradclip.torch.clip_grad_value_(leaves, limit)
        assert all(grad_of(p).eq(1).all() for p in leaves)


def test_by_device_keeps_positions() -> None:
    assert by_device([None, None]) == {}
    split = by_device([torch.ones(1), torch.ones(1, device="meta"), None, torch.ones(1)])
    assert list(split) == [torch.device("cpu"), torch.device("meta")]
    assert [[grad is not None for grad in each] for each in split.values()] == [
        [True, False, False, True],
        [False, True, False, False],
    ]


# --- The default device, which is nobody's ------------------------------------------------------------


def _under_a_default_device(call: Callable[[], Tensor]) -> None:
    expected = call()
    with torch.device("meta"):
        total = call()
    assert (total.device, total.dtype) == (expected.device, expected.dtype)
    assert torch.equal(total, expected)


def _fused() -> tuple[torch.optim.Optimizer, torch.amp.GradScaler]:
    weight = parameter(torch.tensor([3.0, 4.0]))
    optimizer = torch.optim.SGD([weight], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    return optimizer, scaler


@pytest.mark.parametrize("order", [2.0, 0.0])
def test_the_default_device_is_no_matter(order: float) -> None:
    leaf = parameter(grad := torch.tensor([3.0, 4.0]))
    _under_a_default_device(lambda: gradclip.torch.clip_grad_norm_([leaf], 100.0, order))
    _under_a_default_device(lambda: gradclip.torch.get_total_norm([grad, grad.double()], order))
    _under_a_default_device(lambda: gradclip.torch.get_total_norm([], order))


@pytest.mark.parametrize("deferred", [False, True])
def test_the_default_device_is_no_matter_to_optimizers(deferred: bool) -> None:
    def clip(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> Tensor:
        if deferred:
            return gradclip.torch.defer_clip_(optimizer, 1.0, scaler=scaler)
        return gradclip.torch.unscale_and_clip_(scaler, optimizer, 1.0)

    expected = clip(*_fused())
    optimizer, scaler = _fused()
    with torch.device("meta"):
        total = clip(optimizer, scaler)
    assert torch.equal(total, expected)
    found = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    assert {device.type: f.item() for device, f in found.items()} == {"cpu": 0.0}
