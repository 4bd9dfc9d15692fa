"""The GPU's engine and the CPU's: the same bits in every norm, coefficient and gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import cupy
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gradclip
from device import Device, EmulatedDevice, emulated_device
from matrices import DTYPES, LAYOUTS, NAMES, ORDS, REAL_NAMES, Array, lay_out, placed, sizes, values

POLICIES = ("raise", "skip", "zero", "propagate")
# Elements that lie at no multiple of their size: refused, in test_device_bad_input.py.
_ALIGNED_LAYOUTS = [layout for layout in LAYOUTS if layout not in ("one byte off", "field of a record")]


def same_bits(left: Any, right: Any) -> bool:
    """Equal bytes, where any NaN is equal to any other: which of its patterns comes out is the hardware's."""
    left, right = np.asarray(left), np.asarray(right)
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    differ = np.frombuffer(left.tobytes(), np.uint8) != np.frombuffer(right.tobytes(), np.uint8)
    if not differ.any():
        return True
    real = left.real.dtype if left.dtype.kind == "c" else left.dtype
    ours, theirs = (np.frombuffer(x.tobytes(), real) for x in (left, right))
    return bool(
        np.all(
            (ours.view(f"u{real.itemsize}") == theirs.view(f"u{real.itemsize}"))
            | (np.isnan(ours) & np.isnan(theirs))
        )
    )


Outcome: TypeAlias = gradclip.ClipResult | gradclip.NonFiniteGradientError


def outcome(call: Callable[[], gradclip.ClipResult]) -> Outcome:
    """What a clip returns or raises, on the host."""
    try:
        return call().to_host()
    except gradclip.NonFiniteGradientError as error:
        return error


def check_outcome(on_gpu: Outcome, on_cpu: Outcome) -> None:
    assert type(on_gpu) is type(on_cpu)
    if isinstance(on_gpu, gradclip.ClipResult):
        assert isinstance(on_cpu, gradclip.ClipResult)
        for field in ("total_norm", "norms", "coefficient", "group_norms", "penalty"):
            assert same_bits(getattr(on_gpu, field), getattr(on_cpu, field)), field
        assert (on_gpu.clipped, on_gpu.nonfinite) == (on_cpu.clipped, on_cpu.nonfinite)
        assert on_gpu.names == on_cpu.names
    else:
        assert isinstance(on_cpu, gradclip.NonFiniteGradientError)
        assert str(on_gpu) == str(on_cpu)
        assert on_gpu.entries == on_cpu.entries
        assert same_bits(on_gpu.norms, on_cpu.norms)


def check_clip(device: Device, arrays: list[Array | None], max_norm: float, **options: Any) -> None:
    """Clip on both and compare everything that is told and left."""
    on_gpu = [None if array is None else device.array(array) for array in arrays]
    check_outcome(
        outcome(lambda: gradclip.clip_by_global_norm_(on_gpu, max_norm, **options)),
        outcome(lambda: gradclip.clip_by_global_norm_(arrays, max_norm, **options)),
    )
    for left, right in zip(on_gpu, arrays, strict=True):
        assert right is None or same_bits(device.host(left), right)


def check_pair(
    device: Device,
    arrays: list[Array | None],
    second: list[Array | None],
    max_norm: Any,
    l2: float | None = None,
    l1: float = 0.0,
    **options: Any,
) -> None:
    """The same of pairs: an update of ``second``, or with ``l2`` a clip that they regularise."""

    def clip(first: list[Any], beside: list[Any]) -> Any:
        if l2 is None:
            return outcome(lambda: gradclip.clip_difference_(first, beside, max_norm, **options))
        regularised: dict[str, Any] = {"params": beside, "l2": l2, "l1": l1}
        return outcome(lambda: gradclip.clip_by_global_norm_(first, max_norm, **regularised, **options))

    on_gpu, beside = ([None if a is None else device.array(a) for a in list_] for list_ in (arrays, second))
    check_outcome(clip(on_gpu, beside), clip(arrays, second))
    for left, right in zip([*on_gpu, *beside], [*arrays, *second], strict=True):
        assert right is None or same_bits(device.host(left), right)


@pytest.mark.parametrize("name", NAMES)
def test_every_size_around_a_boundary(device: Device, name: str) -> None:
    arrays = [values(name, n, seed=n) for n in sizes(name)]
    for ord in ORDS:
        expected = gradclip.tensor_norms(arrays, ord)
        on_gpu = [device.array(array) for array in arrays]
        assert same_bits(device.host(gradclip.tensor_norms(on_gpu, ord)), expected)
        assert same_bits(
            device.host(gradclip.global_norm(on_gpu, ord)), np.float64(gradclip.global_norm(arrays, ord))
        )
    check_clip(device, [*arrays], 0.5)
    check_clip(device, [values(name, n, seed=n) for n in sizes(name)], 0.5, groups="tensor")


@pytest.mark.parametrize("name", NAMES)
def test_every_alignment(device: Device, name: str) -> None:
    item = DTYPES[name].itemsize
    part = item // 2 if name.startswith("complex") else item
    for offset in range(0, 64, part):
        for n in (1, 40, 5000 // item, 20000 // item):
            array, _ = placed(values(name, n, seed=offset), offset)
            check_clip(device, [array], 0.01)


@pytest.mark.parametrize("layout", _ALIGNED_LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_every_layout(device: Device, name: str, layout: str) -> None:
    for shape in [(3, 5, 7), (1, 1, 1), (1, 300, 1), (2, 1, 700), (20, 17, 30)]:
        array, buffer = lay_out(layout, values(name, shape, seed=2))
        on_gpu = device.array(array)
        for ord in (2, math.inf, 1.5):
            check_outcome(
                gradclip.clip_by_global_norm_([on_gpu], 0.01, ord).to_host(),
                gradclip.clip_by_global_norm_([array], 0.01, ord),
            )
        assert same_bits(device.host(on_gpu), array)
        assert buffer.tobytes() in device.surroundings(on_gpu), "bytes outside the array were written"


@pytest.mark.parametrize("name", REAL_NAMES)
def test_clip_by_value(device: Device, name: str) -> None:
    for limit in (0.75, 1e-3, 1e30, math.inf):
        for layout in ("C", "every second"):
            arrays = [lay_out(layout, values(name, (n, 3, 5), seed=n))[0] for n in (1, 11, 900)]
            on_gpu = [device.array(array) for array in arrays]
            result = gradclip.clip_by_value_(on_gpu, limit).to_host()
            check_outcome(result, gradclip.clip_by_value_(arrays, limit))
            assert all(same_bits(device.host(g), array) for g, array in zip(on_gpu, arrays, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_scale(device: Device, name: str) -> None:
    for factor in (-0.75, 1.0, 0.0, 1e-300, 1e5):
        arrays = [values(name, n, seed=n) for n in (0, 1, 33, 9001)]
        on_gpu = [device.array(array) for array in arrays]
        gradclip.scale_(arrays, factor)
        gradclip.scale_(on_gpu, factor)
        assert all(same_bits(device.host(g), array) for g, array in zip(on_gpu, arrays, strict=True))


# Where every peer fails: squares that overflow or underflow, the smallest and the largest numbers.
_EXTREMES = [
    ("float16", 65504.0), ("float16", 2.0**-24), ("bfloat16", 3e38), ("bfloat16", 1e-40),
    ("float32", 1e30), ("float32", 1e-40), ("float32", 3.4e38), ("float64", 1e300),
    ("float64", 1e-310), ("float64", 5e-324), ("complex64", 1e30), ("complex128", 1e-310),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), _EXTREMES)
def test_the_largest_and_smallest_numbers(device: Device, name: str, value: float) -> None:
    for ord in ORDS:
        arrays: list[Array | None] = [
            np.full(n, value, np.float64).astype(DTYPES[name]) for n in (1, 130, 9000)
        ]
        check_clip(device, arrays, 1.0, ord=ord)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_infinities_and_nan(device: Device, policy: str, bad: float) -> None:
    for name in NAMES:
        for ord in (2, 1, math.inf, 3):
            for groups in (None, "tensor", [1, 0, 1, 3]):
                arrays: list[Array | None] = [values(name, n, seed=n) for n in (5, 3000, 1)]
                arrays[1][2047] = bad  # type: ignore[index]
                arrays.insert(1, None)
                check_clip(device, arrays, 2.0, ord=ord, groups=groups, nonfinite=policy)


def _arrays(draw: Callable[[st.SearchStrategy[Any]], Any]) -> list[Array | None]:
    arrays: list[Array | None] = []
    for _ in range(draw(st.integers(0, 12))):
        if draw(st.integers(0, 9)) == 0:
            arrays.append(None)
            continue
        name = draw(st.sampled_from(NAMES))
        item = DTYPES[name].itemsize
        n = draw(st.integers(0, 70) | st.integers(0, 70_000 // item))
        low = draw(st.sampled_from((-4, -12, 3)))
        array, _ = placed(
            values(name, n, draw(st.integers(0, 99)), low, low + 5), draw(st.integers(0, 3)) * item
        )
        if n and draw(st.integers(0, 15)) == 0:
            array[draw(st.integers(0, n - 1))] = draw(st.sampled_from((math.inf, math.nan)))
        if n >= 6 and draw(st.integers(0, 3)) == 0:
            array = array[:: draw(st.sampled_from((2, -1, -3)))]
        arrays.append(array)
    return arrays


@pytest.mark.filterwarnings("ignore:grads. expected gradients, got none")
@given(st.data())
def test_any_list(data: st.DataObject) -> None:
    """Any list, grouping, policy, grid and schedule, through the emulator."""
    arrays = _arrays(data.draw)
    count = len(arrays)
    labels = st.lists(st.integers(0, max(count - 1, 0)), min_size=count, max_size=count)
    machine = {
        "multiprocessors": data.draw(st.sampled_from((1, 2, 5))),
        "seed": data.draw(st.integers(0, 3)),
        "blocks_at_once": data.draw(st.sampled_from((1, 3))),
    }
    with emulated_device(**machine) as device:
        check_clip(
            device,
            arrays,
            data.draw(st.sampled_from((1e-3, 1.0, 70.0, 1e9, math.inf))),
            ord=data.draw(st.sampled_from(ORDS)),
            groups=data.draw(st.none() | st.just("tensor") | labels),
            grad_scale=data.draw(st.sampled_from((1.0, 1024.0, 3.0))),
            nonfinite=data.draw(st.sampled_from(POLICIES)),
        )


def test_many_tensors(device: Device) -> None:
    """Tables inside the kernel's argument, and beyond it in memory."""
    for count in (959, 960, 961, 5000):
        arrays: list[Array | None] = [values("float32", 1 + i % 7, seed=i) for i in range(count)]
        check_clip(device, arrays, 1.0)


def test_grids_of_any_size() -> None:
    """Work split over 1 to 100 blocks: one tensor of many tiles, and many of one."""
    arrays: list[Array | None] = [values("float32", n, seed=n) for n in (300_000, 40, 5000, 70_000)]
    arrays += [values("bfloat16", 9000, seed=i) for i in range(20)]
    expected = gradclip.tensor_norms(arrays)
    for multiprocessors in (1, 2, 7, 25):
        with emulated_device(
            multiprocessors=multiprocessors, seed=multiprocessors, blocks_at_once=5
        ) as device:
            on_gpu = [device.array(array) for array in arrays if array is not None]
            assert same_bits(device.host(gradclip.tensor_norms(on_gpu)), expected)


def test_the_emulator_is_what_ran() -> None:
    """Kernels were launched, and not NumPy or CuPy that happen to agree."""
    with emulated_device() as device:
        assert isinstance(device, EmulatedDevice)
        before = device.cuda.counters()[0]
        array = device.array(np.ones(3, np.float32))
        assert isinstance(array, cupy.ndarray)
        gradclip.global_norm([array])
        assert device.cuda.counters()[0] == before + 1
