"""Pairs on a GPU: the bits of the CPU, two launches, no temporary."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import cupy
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gradclip
from device import Device, EmulatedDevice, emulated_device
from matrices import (
    COMPLEX_NAMES,
    LAYOUTS,
    NAMES,
    ORDS,
    PART,
    REAL_NAMES,
    Array,
    lay_out,
    placed,
    values,
)
from test_device_bits import check_pair

_KINDS = [(a, b) for a in REAL_NAMES for b in REAL_NAMES]
_KINDS += [(a, b) for a in COMPLEX_NAMES for b in COMPLEX_NAMES]
_SIZES = (0, 1, 2, 63, 64, 65, 2047, 2048, 2049, 9000)
_ALIGNED_LAYOUTS = [layout for layout in LAYOUTS if layout not in ("one byte off", "field of a record")]


def _l1_of(name: str) -> float:
    return 0.0 if name in PART else 0.011


@pytest.mark.parametrize(("x_name", "y_name"), _KINDS)
def test_every_pair_of_dtypes(device: Device, x_name: str, y_name: str) -> None:
    for ord in (2, 1, math.inf, 3):
        for rounding in ("nearest", "down"):
            grads: list[Array | None] = [values(x_name, n, seed=n) for n in _SIZES]
            params: list[Array | None] = [values(y_name, n, seed=n + 1) for n in _SIZES]
            options = {"ord": ord, "rounding": rounding}
            check_pair(device, grads, params, 1.0, l2=0.37, l1=_l1_of(x_name), **options)


@pytest.mark.parametrize("name", NAMES)
def test_updates(device: Device, name: str) -> None:
    for rounding in ("nearest", "down"):
        for groups in (None, "tensor"):
            news: list[Array | None] = [values(name, n, seed=n) for n in _SIZES]
            bases: list[Array | None] = [values(name, n, seed=n + 1) for n in _SIZES]
            check_pair(device, news, bases, 30.0, rounding=rounding, groups=groups)


@pytest.mark.parametrize("layout", _ALIGNED_LAYOUTS)
@pytest.mark.parametrize("groups", [None, "row", "sample", "unit_last"])
def test_layouts_and_rows(device: Device, layout: str, groups: str | None) -> None:
    for beside in ("C", "F", "every third, reversed"):
        shape = (5, 30, 9)
        grads: list[Array | None] = [lay_out(layout, values("float32", shape, seed=1))[0], None]
        params: list[Array | None] = [lay_out(beside, values("bfloat16", shape, seed=2))[0], None]
        if beside == "C":  # more than a tile, once
            grads.append(values("complex64", (5, 4000), seed=3))
            params.append(values("complex128", (5, 4000), seed=4))
        check_pair(device, grads, params, 1.5, l2=0.37, groups=groups, grad_scale=3.0)


def test_alignment(device: Device) -> None:
    for x_offset, y_offset in ((0, 2), (2, 0), (14, 6)):
        x, y = (
            placed(values("bfloat16", 3000, seed=1), x_offset)[0],
            placed(values("float16", 3000, seed=2), y_offset)[0],
        )
        check_pair(device, [x], [y], 0.1, l2=0.37, l1=0.1)


@pytest.mark.parametrize("policy", ["raise", "skip", "zero", "propagate"])
@pytest.mark.parametrize("l2", [None, 0.5])
def test_nonfinite(device: Device, policy: str, l2: float | None) -> None:
    for name in ("float32", "complex128", "float16"):
        for groups in (None, "tensor", "row"):
            arrays: list[Array | None] = [values(name, (6, 50), seed=i) for i in range(3)]
            second: list[Array | None] = [values(name, (6, 50), seed=i + 9) for i in range(3)]
            for list_, place, number in ((arrays, (1, 2), np.nan), (second, (4, 7), np.inf)):
                array = list_[1]
                assert array is not None
                array[place] = number
            check_pair(device, arrays, second, 1.0, l2=l2, nonfinite=policy, groups=groups)


@given(data=st.data())
def test_any_machine_and_shapes(data: st.DataObject) -> None:
    """On GPUs of 1 to 200 multiprocessors: warps begin and end anywhere in a pair."""
    groups = data.draw(st.sampled_from([None, "tensor", "row"]))
    l2 = data.draw(st.sampled_from([None, 0.0, 0.3]))
    grads: list[Array | None] = []
    params: list[Array | None] = []
    for i in range(data.draw(st.integers(1, 5))):
        x_name, y_name = data.draw(st.sampled_from(_KINDS))
        row = data.draw(st.sampled_from([0, 1, 2, 16, 129, 2049, 9000, 40_000]))
        shape = (data.draw(st.integers(0, 40 if row < 2049 else 4)), row)
        grads.append(values(x_name, shape, seed=i))
        params.append(values(x_name if l2 is None else y_name, shape, seed=i + 50))
    if not l2 and l2 is not None and any(g is not None and g.dtype.kind == "c" for g in grads):
        l2 = 0.1  # complex numbers have no l1
    ord = data.draw(st.sampled_from(ORDS))
    l1 = 0.0 if l2 is None or any(g is not None and g.dtype.kind == "c" for g in grads) else 0.1
    with emulated_device(multiprocessors=data.draw(st.sampled_from([1, 2, 17, 132, 200]))) as device:
        limit = data.draw(st.sampled_from([0.5, 30.0, 1e6]))
        options = {"ord": ord, "groups": groups}
        check_pair(device, grads, params, limit, l2=l2, l1=l1, **options)


def test_measured_and_plans(device: Device) -> None:
    x, y = values("float32", (4, 500), seed=1), values("float32", (4, 500), seed=2)
    grad, param = device.array(x), device.array(y)
    measured = gradclip.measure([grad], groups="row", params=[param], l2=0.5)
    expected = gradclip.measure([x], groups="row", params=[y], l2=0.5)
    assert isinstance(measured.penalty, cupy.ndarray)
    assert float(device.host(measured.penalty)) == expected.penalty
    limits = expected.group_norms / [0.5, 2, 3, 1]
    measured.clip_(limits)
    expected.clip_(limits)
    assert np.array_equal(device.host(grad), x)
    plan, on_cpu = gradclip.Plan([grad]), gradclip.Plan([x])
    for step in range(3):
        left = plan.clip_by_global_norm_(20.0, params=[param], l1=0.01).to_host()
        right = on_cpu.clip_by_global_norm_(20.0, params=[y], l1=0.01)
        assert (left.total_norm, left.penalty) == (right.total_norm, right.penalty)
        plan.clip_difference_([param], 10.0 - step)
        on_cpu.clip_difference_([y], 10.0 - step)
        assert np.array_equal(device.host(grad), x)
    assert plan.clip_by_global_norm_(1.0).penalty == 0.0
    assert plan.clip_by_global_norm_(1.0).to_host().penalty == 0.0


def test_reduce_and_thresholds_on_the_device(device: Device) -> None:
    new, base = np.array([4.0, 4.0]), np.array([1.0, 0.0])
    on_gpu, beside = device.array(new), device.array(base)
    result = gradclip.clip_difference_(
        [on_gpu], [beside], device.array(np.array(2.5)), reduce=lambda sums: sums
    )
    assert result.to_host().total_norm == 5.0
    assert device.host(on_gpu).tolist() == [2.5, 2.0]


@pytest.fixture
def emulated() -> Iterator[EmulatedDevice]:
    with emulated_device() as found:
        yield found


def test_two_launches_and_no_wait(emulated: EmulatedDevice) -> None:
    grads = [emulated.array(np.ones(3, np.float32)) for _ in range(5)]
    params = [emulated.array(np.ones(3, np.float32)) for _ in range(5)]
    before = emulated.cuda.counters()
    gradclip.clip_by_global_norm_(grads, 0.5, params=params, l2=0.1, nonfinite="skip")
    after = emulated.cuda.counters()
    assert tuple(b - a for a, b in zip(before, after, strict=True)) == (2, 0, 1, 0)  # a copy of the table


def test_bad_input(device: Device) -> None:
    grad, param = device.array(np.ones(4)), device.array(np.ones(4))
    for call, message in (
        (lambda: gradclip.clip_by_global_norm_([grad], 1.0, params=[param[:3]], l2=0.1),
         "params[0]: expected shape (4,), as grads[0] has, got (3,)"),
        (lambda: gradclip.clip_difference_([grad], [np.ones(4)], 1.0),
         "base[0]: expected memory on CUDA device 0, got a NumPy array"),
        (lambda: gradclip.clip_difference_([grad[:2]], [grad[1:3]], 1.0),
         "new[0]: expected memory of its own, got memory shared with base[0]"),
        (lambda: gradclip.measure([grad], params=[param], l2=1e300, grad_scale=1e300),
         "grad_scale: expected one whose products"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            call()
    assert device.host(grad).tolist() == [1.0] * 4


def test_second_arrays_are_not_captured(emulated: EmulatedDevice) -> None:
    grad, param = emulated.array(np.ones(4)), emulated.array(np.ones(4))
    plan = gradclip.Plan([grad])
    measured: Any = plan.measure(params=[param], l2=1.0)
    emulated.cuda.set_machine(is_capturing=True)
    for call in (
        lambda: plan.clip_by_global_norm_(1.0, params=[param], l2=0.1, nonfinite="skip"),
        lambda: plan.clip_difference_([param], 1.0, nonfinite="skip"),
        lambda: measured.clip_(1.0, nonfinite="skip"),
    ):
        with pytest.raises(RuntimeError, match=r"^grads: expected no second arrays while the stream"):
            call()
    emulated.cuda.set_machine()
    assert emulated.host(grad).tolist() == [1.0] * 4
