"""CuPy arrays through the public functions: what is returned, when it waits, what a Plan keeps."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import cupy
import numpy as np
import pytest
import torch

import gradclip
from device import Device, EmulatedDevice, emulated_device
from gradclip import _config, _core, _dispatch, _frameworks
from matrices import values


@pytest.fixture
def emulated() -> Iterator[EmulatedDevice]:
    with emulated_device(multiprocessors=2) as device:
        yield device


def _gradients(device: Device, count: int = 3) -> dict[str, Any]:
    return {f"layer{i}": device.array(values("float32", (i + 2, 5), seed=i)) for i in range(count)}


def test_fields_are_arrays_of_the_device(device: Device) -> None:
    result = gradclip.clip_by_global_norm_(_gradients(device), 0.5)
    shapes = {"total_norm": (), "norms": (3,), "coefficient": (), "group_norms": (1,), "clipped": ()}
    for name, shape in shapes.items():
        field = getattr(result, name)
        assert isinstance(field, cupy.ndarray), name
        assert field.shape == shape, name
        assert field.dtype == (np.bool_ if name == "clipped" else np.float64), name
    assert result.names == ("layer0", "layer1", "layer2")
    assert result.nonfinite == ()
    assert isinstance(result, gradclip.ClipResult)
    assert np.shape(gradclip.clip_by_norm_(_gradients(device), 0.5).coefficient) == (3,)
    assert isinstance(gradclip.global_norm(_gradients(device)), cupy.ndarray)
    assert gradclip.tensor_norms(_gradients(device)).shape == (3,)


def test_what_a_person_reads(device: Device) -> None:
    grads = _gradients(device)
    arrays = {name: device.host(array) for name, array in grads.items()}
    result, expected = gradclip.clip_by_norm_(grads, 0.5), gradclip.clip_by_norm_(arrays, 0.5)
    assert repr(result) == repr(expected)
    assert result.named_norms() == expected.named_norms()
    assert type(result.to_host()) is gradclip.ClipResult
    assert type(result.to_host().total_norm) is float
    assert type(result.to_host().clipped) is bool


def test_the_layers_that_are_not_finite(device: Device) -> None:
    host = [np.ones(3, np.float32), np.array([1, np.nan, np.inf, np.inf], np.float32)]
    grads = dict(zip("ab", map(device.array, host), strict=True))
    assert gradclip.clip_by_global_norm_(grads, 1.0, nonfinite="skip").nonfinite == ("b",)
    with pytest.raises(gradclip.NonFiniteGradientError, match=r"grads\['b'\].*1 NaN and 2 inf") as raised:
        gradclip.clip_by_global_norm_(grads, 1.0)
    assert raised.value.entries == [("b", 1, 2)]
    assert all(
        device.host(array).tobytes() == was.tobytes() for array, was in zip(grads.values(), host, strict=True)
    )


def test_sequences_mappings_iterators_and_none(device: Device) -> None:
    array = values("float32", 100, seed=0)
    expected = gradclip.global_norm([array])
    grads = [None, device.array(array), None]
    assert device.host(gradclip.tensor_norms(grads)).tolist() == [0.0, expected, 0.0]
    for same in (
        tuple(grads),
        iter(grads),
        dict(zip("abc", grads, strict=True)),
        {1: grads}[1:] if 0 else grads,
    ):
        assert float(device.host(gradclip.global_norm(same))) == expected
    assert float(device.host(gradclip.global_norm(dict(enumerate(grads)).values()))) == expected


def test_nothing_at_all() -> None:
    """Without an array there is no device: the CPU's answer."""
    nothing: tuple[Any, ...] = ([], [None, None], {}, iter(()))
    for empty in nothing:
        assert gradclip.global_norm(empty) == 0.0
    with pytest.warns(UserWarning, match="grads: expected gradients, got none"):
        assert gradclip.clip_by_global_norm_([None], 1.0).to_host().total_norm == 0.0


def test_empty_arrays(device: Device) -> None:
    grads = [device.array(np.zeros((0, 3), np.float32)), device.array(np.full(4, 3.0))]
    assert gradclip.clip_by_global_norm_(grads, 1.0).to_host().norms.tolist() == [0.0, 6.0]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_threshold_on_the_device(device: Device, dtype: type[np.floating[Any]]) -> None:
    array = values("float32", 1000, seed=3)
    on_gpu = device.array(array)
    threshold = device.array(np.array(0.75, dtype))
    result = gradclip.clip_by_global_norm_([on_gpu], threshold)
    expected = gradclip.clip_by_global_norm_([array], 0.75)
    assert result.to_host().coefficient == expected.coefficient
    assert device.host(on_gpu).tobytes() == array.tobytes()


@pytest.mark.parametrize("bad", [-1.0, -math.inf, math.nan])
def test_a_threshold_on_the_device_that_is_negative(device: Device, bad: float) -> None:
    array = values("float32", 1000, seed=3)
    on_gpu = device.array(array)
    threshold = device.array(np.array(bad))
    with pytest.raises(ValueError, match=r"^max_norm: expected a number that is not negative"):
        gradclip.clip_by_global_norm_([on_gpu], threshold)
    result = gradclip.clip_by_global_norm_([on_gpu], threshold, nonfinite="propagate").to_host()
    assert math.isnan(float(result.coefficient))
    assert device.host(on_gpu).tobytes() == array.tobytes()


def test_a_threshold_array_that_is_refused(device: Device) -> None:
    grads = [device.array(np.ones(3))]
    with pytest.raises(ValueError, match=r"^max_norm: expected .* 0-d array, got an array of shape \(1,\)"):
        gradclip.clip_by_global_norm_(grads, device.array(np.ones(1)))
    with pytest.raises(ValueError, match=r"^max_norm: .* shape \(1,\), got an array of shape \(2,\)"):
        gradclip.clip_by_norm_(grads, device.array(np.ones(2)))
    with pytest.raises(ValueError, match=r"^max_norm: expected a dense array, got a strided one"):
        gradclip.clip_by_norm_([*grads, *grads], device.array(np.ones(4))[::2])
    with pytest.raises(TypeError, match=r"^max_norm: expected a real number, got complex64"):
        gradclip.clip_by_global_norm_(grads, device.array(np.array(1, np.complex64)))
    with pytest.raises(TypeError, match=r"^max_norm: expected dtype .*, got dtype int64"):
        gradclip.clip_by_global_norm_(grads, device.array(np.array(1)))


def test_a_threshold_for_each_group(device: Device) -> None:
    host = [values("float32", n, seed=n) for n in (10, 3000, 20)]
    grads = [device.array(array) for array in host]
    limits = [1.0, 1e30, 0.25]
    for groups in ("tensor", [2, 0, 1]):
        result = gradclip.clip_by_global_norm_(grads, device.array(np.array(limits)), groups=groups)
        expected = gradclip.clip_by_global_norm_(host, limits, groups=groups)
        assert device.host(result.coefficient).tobytes() == expected.coefficient.tobytes()  # type: ignore[union-attr]
        assert [device.host(g).tobytes() for g in grads] == [h.tobytes() for h in host]


def test_clip_by_a_norm_that_was_measured(device: Device) -> None:
    host = [values("float32", n, seed=n) for n in (10, 3000)]
    grads = [device.array(array) for array in host]
    plan = _dispatch.read(grads, is_kept=True)
    for norm in (0.5, 0.9, 8.0, math.inf, math.nan):
        plan.with_norm(device.array(np.array(norm))).clip(1.0, "propagate", 0.1)
        _core.read(host).with_norm(norm).clip(1.0, "propagate", 0.1)
        for array, expected in zip(grads, host, strict=True):
            np.testing.assert_array_equal(device.host(array), expected)
    with pytest.raises(ValueError, match="norm: expected one float64 number, got 2 of float64"):
        plan.with_norm(device.array(np.ones(2))).clip(1.0, "propagate", 0.1)
    with pytest.raises(ValueError, match="max_norm: expected a number that is not negative, got -1"):
        plan.with_norm(device.array(np.array(1.0))).clip(-1.0, "propagate", 0.1)
    host = [values("float32", n, seed=n) for n in (10, 3000)]  # the others are NaN by now
    grads = [device.array(array) for array in host]
    plan = _dispatch.read(grads, is_kept=True)
    threshold = device.array(np.array(0.25, np.float32))  # which CuPy cannot make a number of here
    plan.with_norm(device.array(np.array(8.0))).clip(threshold, "propagate", 0.1)
    _core.read(host).with_norm(8.0).clip(0.25, "propagate", 0.1)
    plan.with_norm(device.array(np.array(8.0))).clip(
        device.array(np.array(-1.0)), "propagate", 0.1
    )  # writes nothing
    for array, expected in zip(grads, host, strict=True):
        np.testing.assert_array_equal(device.host(array), expected)
    with pytest.raises(ValueError, match=r"^max_norm: expected a number or a 0-d array, got .* \(2,\)"):
        plan.with_norm(device.array(np.array(1.0))).clip(device.array(np.ones(2)), "propagate", 0.1)


@pytest.mark.parametrize("ord", [2, 1, math.inf, 3])
def test_reduce(device: Device, ord: float) -> None:
    arrays = [values("float32", n, seed=n) for n in (10, 3000)]
    grads = [device.array(array) for array in arrays]
    four = device.array(np.array([4.0, 4.0]))
    seen = []

    def from_two_processes(sums: Any) -> Any:
        seen.append(device.host(sums))
        if isinstance(device, EmulatedDevice):  # CuPy's own kernels are not emulated
            return device.array(4.0 * seen[-1])
        return sums * four

    result = gradclip.clip_by_global_norm_(grads, 0.5, ord, "tensor", reduce=from_two_processes).to_host()
    on_cpu = gradclip.clip_by_global_norm_(arrays, 0.5, ord, "tensor", reduce=lambda sums: 4.0 * sums)
    assert result.group_norms.tobytes() == on_cpu.group_norms.tobytes()
    assert result.norms.tobytes() == on_cpu.norms.tobytes()
    assert np.asarray(result.coefficient).tobytes() == np.asarray(on_cpu.coefficient).tobytes()
    assert all(device.host(g).tobytes() == array.tobytes() for g, array in zip(grads, arrays, strict=True))


def test_reduce_that_returns_something_else(device: Device) -> None:
    array = values("float32", 50, seed=1)
    grads = [device.array(array)]
    cases: tuple[tuple[Any, type[Exception], str], ...] = (
        (np.ones(1), ValueError, r"^reduce: expected memory on CUDA device 0, got a NumPy array"),
        (device.array(np.ones(2)), ValueError, r"^reduce: expected dense float64 sums of shape \(1,\), got"),
        (device.array(np.ones(1, np.float32)), ValueError, r"^reduce: expected dense float64 sums"),
        (None, TypeError, r"^reduce: expected an array"),
    )
    for returned, error, message in cases:
        reduce = mock.Mock(return_value=returned)
        with pytest.raises(error, match=message):
            gradclip.clip_by_global_norm_(grads, 0.5, reduce=reduce)
    assert device.host(grads[0]).tobytes() == array.tobytes()


def test_a_plan_sees_what_memory_holds(device: Device) -> None:
    array = values("float32", (30, 40), seed=0)
    on_gpu = device.array(array)
    plan = gradclip.Plan({"w": on_gpu})
    assert repr(plan) == "Plan(1 gradient, 1200 elements, 4800 bytes)"
    assert plan.names == ("w",)
    for max_norm in (100.0, 3.0, 0.5):
        expected = gradclip.clip_by_global_norm_({"w": array}, max_norm)
        result = plan.clip_by_global_norm_(max_norm)
        assert result.to_host().total_norm == expected.total_norm
        assert device.host(on_gpu).tobytes() == array.tobytes()
    assert float(device.host(plan.global_norm())) == gradclip.global_norm([array])
    assert (
        plan.clip_by_norm_(0.25).to_host().norms.tolist()
        == gradclip.clip_by_norm_([array], 0.25).norms.tolist()
    )
    assert plan.clip_by_value_(0.01).to_host().clipped == gradclip.clip_by_value_([array], 0.01).clipped
    plan.scale_(3.0)
    gradclip.scale_([array], 3.0)
    assert device.host(on_gpu).tobytes() == array.tobytes()
    assert device.host(plan.tensor_norms(1)).tolist() == gradclip.tensor_norms([array], 1).tolist()


def test_results_of_a_plan_are_its_callers(device: Device) -> None:
    """A later call leaves an earlier result as it was."""
    plan = gradclip.Plan([device.array(np.full(4, 3.0))])
    first = plan.clip_by_global_norm_(5.0)
    second = plan.clip_by_global_norm_(1.0)
    assert (first.to_host().total_norm, second.to_host().total_norm) == (6.0, 5.0)


def test_a_plan_of_many_threads(emulated: EmulatedDevice) -> None:
    host = [values("float32", n, seed=n) for n in (9, 30_000)]
    plan = gradclip.Plan([emulated.array(array) for array in host])
    expected = {ord: gradclip.tensor_norms(host, ord).tolist() for ord in (1, 2, 3)}
    wrong: list[int] = []

    def run(ord: int) -> None:
        with cupy.cuda.using_allocator(emulated.allocate):  # which is a thread's own
            for _ in range(5):
                if emulated.host(plan.tensor_norms(ord)).tolist() != expected[ord]:
                    wrong.append(ord)

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(run, expected))
    assert wrong == []


# --- Launches, waits and memory -----------------------------------------------------------------------


def _cost(device: EmulatedDevice, call: Any) -> tuple[int, ...]:
    """(launches, allocations of the engine, copies, host waits) of a call."""
    before = device.cuda.counters()
    call()
    return tuple(after - was for after, was in zip(device.cuda.counters(), before, strict=True))


def _calls(device: EmulatedDevice, call: Any) -> dict[str, int]:
    """How often a call calls each function of the CUDA runtime."""
    before = device.cuda.calls()
    call()
    after = device.cuda.calls()
    return {name: after[name] - before.get(name, 0) for name in after if after[name] > before.get(name, 0)}


@pytest.mark.parametrize("count", [1, 96, 97, 960, 961, 3000])
def test_two_launches_and_no_wait(emulated: EmulatedDevice, count: int) -> None:
    grads = [emulated.array(np.ones(3, np.float32)) for _ in range(count)]
    # Of the table, where it does not fit into an argument, or the kernel is one of those that take none.
    copies = 1 if count > 960 else 0

    def clip(max_norm: Any = 0.5, nonfinite: Any = "skip", **options: Any) -> gradclip.ClipResult:
        return gradclip.clip_by_global_norm_(grads, max_norm, nonfinite=nonfinite, **options)

    clip()  # the engine's own memory is made
    assert _cost(emulated, clip) == (2, 0, copies, 0)
    assert _cost(emulated, lambda: clip(groups="tensor")) == (2, 0, copies, 0)
    assert _cost(emulated, lambda: clip(math.inf)) == (2, 0, copies, 0)
    assert _cost(emulated, lambda: clip(ord=3)) == (3, 0, 1, 0)
    assert _cost(emulated, lambda: clip(ord=1)) == (2, 0, 1, 0)
    assert _cost(emulated, lambda: gradclip.global_norm(grads)) == (1, 0, copies, 0)
    assert _cost(emulated, lambda: gradclip.scale_(grads, 0.5)) == (1, 0, copies, 0)
    assert _cost(emulated, lambda: gradclip.clip_by_value_(grads, 0.5)) == (1, 0, 1, 0)
    # The default looks at the flags: one small copy, waited for.
    assert _cost(emulated, lambda: clip(nonfinite="raise")) == (2, 0, copies + 1, 1)


def test_calls_in_flight_share_no_memory(emulated: EmulatedDevice) -> None:
    """While the device is at earlier calls, each has work memory of its own; behind 64 the host waits."""
    grads = [emulated.array(np.ones(3, np.float32))]
    emulated.cuda.set_machine(is_busy=True)
    costs = [_cost(emulated, lambda: gradclip.global_norm(grads)) for _ in range(70)]
    assert all((allocations > 0) != (waits > 0) for _, allocations, _, waits in costs)
    assert sum(allocations > 0 for _, allocations, _, _ in costs) <= 64
    assert costs[64:] == [(1, 0, 0, 1)] * 6
    emulated.cuda.set_machine()
    assert _cost(emulated, lambda: gradclip.global_norm(grads)) == (1, 0, 0, 0)


def test_a_stalled_stream_holds_up_no_other(
    emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its work memory is not asked for first, nor waited for."""
    grads = [emulated.array(np.ones(3, np.float32))]
    current = SimpleNamespace(stream=0)
    monkeypatch.setattr(_frameworks.Cupy, "stream", staticmethod(lambda device: (current.stream, None)))

    def calls(stream: int, count: int, **machine: Any) -> list[tuple[int, ...]]:
        current.stream = stream
        emulated.cuda.set_machine(**machine)
        return [_cost(emulated, lambda: gradclip.global_norm(grads)) for _ in range(count)]

    calls(16, 8, busy_stream=16)
    assert calls(32, 20, busy_stream=16)[1:] == [(1, 0, 0, 0)] * 19
    queries = _calls(emulated, lambda: gradclip.global_norm(grads)).get("cudaEventQuery")
    assert queries == 1
    # With all of them in flight a call waits for one of its own stream.
    calls(32, 60, is_busy=True)
    assert calls(32, 1, is_busy=True) == [(1, 0, 0, 1)]
    assert emulated.cuda.stream_of_last_wait() == 32


def test_a_plan_on_one_stream_waits_for_nobody(emulated: EmulatedDevice) -> None:
    plan = gradclip.Plan([emulated.array(np.ones(3, np.float32))])
    for _ in range(2):
        made = _calls(emulated, lambda: plan.clip_by_global_norm_(0.5, nonfinite="skip"))
        assert "cudaStreamWaitEvent" not in made
        assert made["cudaEventRecord"] == 1


@pytest.mark.parametrize("planned", [False, True])
def test_somebody_elses_capture_is_left_alone(emulated: EmulatedDevice, planned: bool) -> None:
    """While another thread captures a stream, the driver forbids all that have not said that they do not mind
    to allocate, to free, or to ask for events."""
    grads = [emulated.array(np.ones(3, np.float32)) for _ in range(30)]
    emulated.cuda.set_machine(others_capture=True)
    for nonfinite in ("skip", "raise"):
        target = gradclip.Plan(grads) if planned else None
        for groups in (None, "tensor", list(range(30))):
            if target:
                target.clip_by_global_norm_(0.5, groups=groups, nonfinite=nonfinite).to_host()
            else:
                gradclip.clip_by_global_norm_(grads, 0.5, groups=groups, nonfinite=nonfinite).to_host()
        del target
    gradclip.global_norm(grads * 500)  # work memory grows
    measured = gradclip.measure(grads)
    assert measured.nonfinite == ()
    measured.clip_(0.1)
    assert emulated.cuda.broken_captures() == 0


def test_a_plan_loads_its_kernels(emulated: EmulatedDevice) -> None:
    """A kernel that is loaded by its first launch cannot be captured."""
    plan = gradclip.Plan([emulated.array(np.ones(3, np.float32))])
    emulated.cuda.unload_kernels()
    other = gradclip.Plan([emulated.array(np.ones(3, np.float32))])
    emulated.cuda.set_machine(is_capturing=True)
    for each in (plan, other):
        for ord in (1, 2, 3, math.inf):
            each.clip_by_global_norm_(0.5, ord, nonfinite="skip")
        each.clip_by_value_(0.5)
        each.scale_(0.5)
        measured = each.measure()
        measured.clip_(0.1, nonfinite="skip")


def test_pools_of_cupy_are_believed(emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver is asked where no framework says whose memory it is, and of tensors above 2 MB each."""
    page = 2 << 20
    whole = emulated.array(np.ones(4 * page // 8))
    grads = [cupy.ndarray((9,), np.float64, whole.data + i * page) for i in range(3)]
    asked = "cudaPointerGetAttributes"
    assert _calls(emulated, lambda: gradclip.global_norm(grads))[asked] == 3
    monkeypatch.setattr(cupy.cuda.memory, "PooledMemory", type(whole.data.mem))
    assert asked not in _calls(emulated, lambda: gradclip.global_norm(grads))
    memory = cupy.cuda.UnownedMemory(whole.data.ptr + 3 * page, page, whole, 1)  # says that it is device 1's
    elsewhere = cupy.ndarray((9,), np.float64, cupy.cuda.MemoryPointer(memory, 0))
    assert _calls(emulated, lambda: gradclip.global_norm([*grads, elsewhere]))[asked] == 1


def test_no_context_is_made_on_a_device_that_nobody_uses(emulated: EmulatedDevice) -> None:
    """Every thread begins at device 0, and to go back there would make one."""
    emulated.cuda.set_memory(1, 1 << 62, 1, False)
    owner = emulated.array(np.full(4, 3.0))
    memory = cupy.cuda.UnownedMemory(owner.data.ptr, owner.nbytes, owner, 1)
    array = cupy.ndarray((4,), np.float64, cupy.cuda.MemoryPointer(memory, 0))
    for nonfinite in ("skip", "raise"):
        result = gradclip.clip_by_global_norm_([array], 100.0, nonfinite=nonfinite)
        assert result.to_host().total_norm == 6.0
    plan = gradclip.Plan([array])
    plan.clip_by_global_norm_(100.0, groups="tensor")
    del plan
    assert emulated.cuda.current_device() == 0
    assert emulated.cuda.contexts() == {1}


@pytest.mark.parametrize("groups", ["row", "sample"])
def test_two_launches_whatever_the_rows(emulated: EmulatedDevice, groups: str) -> None:
    """And one copy: of a table of the gradients, which knows nothing of each row."""
    tables = set()
    for rows in (2, 40):
        grads = [emulated.array(np.ones((rows, 4), np.float32)), emulated.array(np.ones(rows, np.float32))]
        clip = partial(gradclip.clip_by_global_norm_, grads, 0.5, groups=groups, nonfinite="skip")
        for _ in range(64):  # the pool's workspaces take turns
            clip()
        before = emulated.cuda.bytes_copied()
        assert _cost(emulated, clip) == (2, 0, 1, 0)
        tables.add(emulated.cuda.bytes_copied() - before)
        assert _cost(emulated, partial(clip, ord=3)) == (3, 0, 1, 0)
        assert _cost(emulated, partial(gradclip.row_norms, grads)) == (1, 0, 1, 0)
    assert len(tables) == 1


def test_a_plan_copies_nothing(emulated: EmulatedDevice) -> None:
    plan = gradclip.Plan([emulated.array(np.ones(3, np.float32)) for _ in range(2000)])
    assert _cost(emulated, lambda: plan.clip_by_global_norm_(0.5, nonfinite="zero")) == (2, 0, 0, 0)
    assert _cost(emulated, plan.global_norm) == (1, 0, 0, 0)


def test_only_reading_a_result_waits(emulated: EmulatedDevice) -> None:
    grads = _gradients(emulated)
    result = gradclip.clip_by_global_norm_(grads, 0.5, nonfinite="skip")
    fields = ("total_norm", "norms", "coefficient", "group_norms", "clipped", "names")
    assert _cost(emulated, lambda: [getattr(result, field) for field in fields])[3] == 0
    for read in (result.to_host, result.named_norms, lambda: result.nonfinite, lambda: repr(result)):
        assert _cost(emulated, read)[3] == 1


def test_one_allocation_a_call(device: Device) -> None:
    """The result is all that is allocated, from CuPy's current allocator."""
    grads = list(_gradients(device).values())
    gradclip.clip_by_global_norm_(grads, 0.5)
    inner = device.allocate if isinstance(device, EmulatedDevice) else cupy.get_default_memory_pool().malloc
    asked: list[int] = []

    def allocator(nbytes: int) -> Any:
        asked.append(nbytes)
        return inner(nbytes)

    with cupy.cuda.using_allocator(allocator):
        gradclip.clip_by_global_norm_(grads, 0.5)
        assert len(asked) == 1
        assert asked[0] < 256


def test_results_in_memory_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the CPU here: where a field lies and what it is are the same."""
    asked: list[tuple[int, str]] = []
    empty = torch.empty

    def on_cpu(nbytes: int, dtype: Any, device: str) -> Any:
        asked.append((nbytes, device))
        return empty(nbytes, dtype=dtype)

    monkeypatch.setattr(torch, "empty", on_cpu)
    memory = _frameworks.TorchMemory(64, 1)
    assert asked == [(64, "cuda:1")]
    assert memory.ptr == memory.buffer.data_ptr()
    content = np.concatenate([np.arange(7.0).view(np.uint8), np.array([0, 1] * 4, np.uint8)])
    memory.buffer.copy_(torch.from_numpy(content))
    assert memory.float64(8, 3).tolist() == [1.0, 2.0, 3.0]
    assert memory.float64(8, 0).tolist() == []
    scalar, flag = memory.array((), np.dtype(np.float64), 40), memory.array((), np.dtype(np.bool_), 57)
    assert (scalar.shape, scalar.dtype, scalar.item()) == ((), torch.float64, 5.0)
    assert (flag.shape, flag.dtype, flag.item()) == ((), torch.bool, True)


# --- Graph capture ------------------------------------------------------------------------------------


def test_capture_needs_a_plan(emulated: EmulatedDevice) -> None:
    grads = list(_gradients(emulated).values())
    plan = gradclip.Plan(grads)
    plan.clip_by_norm_(1.0)
    emulated.cuda.set_machine(is_capturing=True)
    with pytest.raises(RuntimeError, match=r"^grads: expected a Plan made before the stream was captured"):
        gradclip.clip_by_global_norm_(grads, 1.0, nonfinite="skip")
    with pytest.raises(RuntimeError, match=r"^grads: expected a Plan made before"):
        gradclip.Plan(grads)
    with pytest.raises(ValueError, match=r"^nonfinite: expected 'skip', .* while the stream is captured"):
        plan.clip_by_global_norm_(1.0)
    with pytest.raises(RuntimeError, match=r"^groups: expected a grouping that the plan has seen"):
        plan.clip_by_global_norm_(1.0, groups=[0, 0, 1], nonfinite="skip")

    def no_memory(nbytes: int) -> Any:
        raise AssertionError("no allocation while a stream is captured")

    with cupy.cuda.using_allocator(no_memory):
        assert _cost(emulated, lambda: plan.clip_by_global_norm_(1.0, nonfinite="skip")) == (2, 0, 0, 0)
        assert _cost(emulated, lambda: plan.clip_by_norm_(1.0, nonfinite="zero")) == (2, 0, 0, 0)
        assert _cost(emulated, lambda: plan.clip_by_value_(1.0)) == (1, 0, 0, 0)


# --- No GPU -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["no CUDA driver", "no CUDA device"])
def test_without_a_gpu(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with emulated_device() as device:
        array = device.array(np.ones(3))
        monkeypatch.setattr(_dispatch, "_look_for_gpu", lambda: (None, missing))
        for call in (gradclip.global_norm, gradclip.Plan, lambda grads: gradclip.scale_(grads, 2)):
            with pytest.raises(
                RuntimeError, match=rf"^grads: .*no GPU here \({missing}\), got a cupy.ndarray"
            ):
                call([array])


def test_a_module_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Built, but not for this machine: that is said, and not that it was never built."""
    with emulated_device() as device:
        array = device.array(np.ones(3))

    def broken(name: str) -> Any:
        raise ImportError("libstdc++.so.6: version not found", name=name)

    monkeypatch.setattr(importlib, "import_module", broken)
    says = "its CUDA module does not load: libstdc++.so.6: version not found"
    with pytest.raises(RuntimeError, match=says.replace("+", r"\+")):
        gradclip.global_norm([array])
    assert _config._gpus() == _config._gpu_engine() == f"none ({says})"


def test_what_the_configuration_says_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    with emulated_device(multiprocessors=3) as device:
        monkeypatch.setattr(_config, "cuda_module", lambda: device.cuda)
        assert _config._gpu_engine() == "CUDA 13.0, compute capability emulated"
        one = "emulated (0.0, 3 multiprocessors, 1 GiB)"
        assert _config._gpus() == f"{one}, {one}; driver for CUDA 13.0"
