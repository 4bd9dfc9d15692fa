"""Rows and samples on a GPU: the bits of the CPU, two launches, no entry of a table for each row."""

from __future__ import annotations

import itertools
import math
from typing import Any

import cupy
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gradclip
from device import Device, emulated_device
from matrices import LAYOUTS, NAMES, ORDS, Array, lay_out, sizes, values
from test_device_bits import check_clip, same_bits

_ALIGNED_LAYOUTS = [layout for layout in LAYOUTS if layout not in ("one byte off", "field of a record")]


def _check_rows(device: Device, arrays: list[Array | None], ord: float) -> None:
    on_gpu = [None if array is None else device.array(array) for array in arrays]
    left, right = gradclip.row_norms(on_gpu, ord), gradclip.row_norms(arrays, ord)
    assert all(same_bits(device.host(a), b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_every_size(device: Device, name: str) -> None:
    arrays: list[Array | None] = [values(name, (3, n), seed=n) for n in sizes(name)]
    for ord in (2, 1, math.inf):
        _check_rows(device, arrays, ord)


@pytest.mark.parametrize("layout", _ALIGNED_LAYOUTS)
@pytest.mark.parametrize("groups", ["row", "sample", "unit", "unit_last"])
def test_layouts(device: Device, layout: str, groups: str) -> None:
    for name in ("bfloat16", "complex64", "float64"):
        arrays = [lay_out(layout, values(name, (5, n, 9), seed=n))[0] for n in (1, 40)]
        for ord in (2, 1, 3):
            copies: list[Array | None] = [lay_out(layout, array)[0] for array in arrays]
            check_clip(device, copies, 1.5, ord=ord, groups=groups)


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("groups", ["row", "sample", "unit", "unit_last"])
def test_mixed_lists(device: Device, groups: str, ord: float) -> None:
    """Rows of many tiles, of none, of one element; gradients that are missing or have no rows."""
    shapes: list[Any] = [(9, 5000), None, (9,), (9, 0), (9, 3, 11)]
    if groups != "sample":
        # Of the last axis each column is a unit: the emulator takes a minute for what a GPU does at once.
        shapes += [(0, 7), (1, 4_001 if groups == "unit_last" else 40_001), (500,)]
    arrays = [
        None if shape is None else values(name, shape, seed=3)
        for shape, name in zip(shapes, itertools.cycle(NAMES), strict=False)
    ]
    limits: Any = np.linspace(0.1, 9, 9).tolist() if groups == "sample" else 2.0
    check_clip(device, arrays, limits, ord=ord, groups=groups, grad_scale=0.5)


@pytest.mark.parametrize("policy", ["raise", "skip", "zero", "propagate"])
@pytest.mark.parametrize("ord", [2, 1, math.inf, 3])
def test_nonfinite_rows(device: Device, policy: str, ord: float) -> None:
    for name in ("float32", "complex128"):
        arrays: list[Array | None] = [values(name, (6, 50), seed=i) for i in range(3)]
        assert arrays[1] is not None
        arrays[1][4, 7] = np.nan
        arrays[1][2, 7] = np.inf
        for groups in ("row", "sample"):
            copies = [None if array is None else array.copy() for array in arrays]
            check_clip(device, copies, 1.0, ord=ord, groups=groups, nonfinite=policy)


@given(data=st.data())
def test_any_machine_and_shapes(data: st.DataObject) -> None:
    """On GPUs of 1 to 200 multiprocessors: warps begin and end anywhere in a row."""
    groups = data.draw(st.sampled_from(["row", "sample"]))
    count = data.draw(st.integers(0, 40))
    arrays: list[Array | None] = []
    for i in range(data.draw(st.integers(1, 5))):
        name = data.draw(st.sampled_from(NAMES))
        row = data.draw(st.sampled_from([0, 1, 2, 16, 128, 129, 8191, 9000, 40_000]))
        rows = count if groups == "sample" else data.draw(st.integers(0, 40))
        arrays.append(values(name, (rows if row < 9000 else min(rows, 5), row), seed=i))
    if groups == "sample":
        arrays = [None if array is None else array[:5] for array in arrays]
    ord = data.draw(st.sampled_from(ORDS))
    with emulated_device(multiprocessors=data.draw(st.sampled_from([1, 2, 3, 17, 132, 200]))) as device:
        check_clip(device, arrays, data.draw(st.sampled_from([0.5, 3.0, 100.0])), ord=ord, groups=groups)


def test_thresholds_of_rows(device: Device) -> None:
    limits = [np.array([0.5, 2.0, 1e9]), None, 0.25]
    shapes = [(3, 30), (2, 2), (40,)]
    arrays = [values("float32", shape, seed=1) for shape in shapes]
    on_gpu = [device.array(array) for array in arrays]
    flat = np.concatenate([limits[0], np.full(2, np.inf), np.full(40, 0.25)])
    for threshold in (limits, device.array(flat), device.array(flat.astype(np.float32))):
        left = gradclip.clip_by_global_norm_(on_gpu, threshold, groups="row")
        right = gradclip.clip_by_global_norm_(arrays, flat, groups="row")
        assert same_bits(left.to_host().coefficient, right.coefficient)
        assert list(left.group_names or ()) == list(right.group_names or ())
    with pytest.raises(TypeError, match=r"^max_norm\[0\]: expected a number or an array of 3 numbers"):
        gradclip.clip_by_global_norm_(on_gpu, [device.array(np.ones(3)), None, None], groups="row")


def test_a_plan_of_rows(device: Device) -> None:
    arrays = [values("float32", (8, 900), seed=1), values("float32", (8,), seed=2)]
    on_gpu = [device.array(array) for array in arrays]
    plan = gradclip.Plan(on_gpu)
    for groups in ("row", "sample", None, "tensor", "row"):
        left = plan.clip_by_global_norm_(0.9, groups=groups).to_host()
        right = gradclip.clip_by_global_norm_(arrays, 0.9, groups=groups)
        assert same_bits(left.group_norms, right.group_norms)
        assert all(same_bits(device.host(a), b) for a, b in zip(on_gpu, arrays, strict=True))


def test_reduce_gets_sums_of_rows(device: Device) -> None:
    arrays = [np.array([[3.0, 4.0], [0.0, 1.0]]), np.array([12.0])]
    on_gpu = [device.array(array) for array in arrays]
    seen = []

    def keep(sums: Any) -> Any:
        seen.append(device.host(sums).tolist())
        return sums

    result = gradclip.clip_by_global_norm_(on_gpu, 1.0, groups="row", reduce=keep).to_host()
    assert seen == [[25.0, 1.0, 144.0]]
    assert result.group_norms.tolist() == [5.0, 1.0, 12.0]


def test_views_of_rows_on_the_device(device: Device) -> None:
    norms = gradclip.row_norms([device.array(np.ones((3, 4))), None, device.array(np.ones(2))])
    assert [n.shape for n in norms] == [(3,), (0,), (2,)]
    assert all(isinstance(n, cupy.ndarray) for n in norms)
