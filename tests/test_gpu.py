"""What only a real GPU can show: streams, graphs, waits, memory, sizes. Together with the `real` half of
test_device_*.py these are the tests of `python -m tools.gpu_check`.
"""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cupy
import numpy as np
import pytest

import gradclip
from device import RealDevice
from gradclip.policies import AGC
from matrices import NAMES, Array, values
from policy_makers import MAKE

pytestmark = pytest.mark.gpu

_device = RealDevice()


def _spin(milliseconds: float) -> None:
    """Keep the current stream busy, on the device alone."""
    kernel = cupy.RawKernel(
        r"""
        extern "C" __global__ void spin(long long nanoseconds) {
          long long start, now;
          asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
          do asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)); while (now - start < nanoseconds);
        }
        """,
        "spin",
    )
    kernel((1,), (1,), (np.int64(milliseconds * 1e6),))


def _foreign(shape: tuple[int, ...], pointer: int, stream: int | None) -> Any:
    """A float32 array of somebody else."""
    interface = {"shape": shape, "typestr": "<f4", "data": (pointer, False), "version": 3, "stream": stream}
    return SimpleNamespace(__cuda_array_interface__=interface)


def _gradients(count: int = 20, elements: int = 5000) -> list[Array]:
    return [values("float32", elements + i, seed=i) for i in range(count)]


def test_a_clip_waits_for_what_its_stream_does() -> None:
    """On a side stream, behind a long kernel and the copies that bring the gradients."""
    host = _gradients()
    stream = cupy.cuda.Stream(non_blocking=True)
    grads = [cupy.zeros(array.shape, array.dtype) for array in host]
    cupy.cuda.Device().synchronize()
    with stream:
        _spin(50)
        for g, array in zip(grads, host, strict=True):
            g.set(array, stream=stream)
        result = gradclip.clip_by_global_norm_(grads, 1.0, nonfinite="skip")
    expected = gradclip.clip_by_global_norm_(host, 1.0)
    assert result.to_host().total_norm == expected.total_norm
    stream.synchronize()
    assert all(_device.host(g).tobytes() == array.tobytes() for g, array in zip(grads, host, strict=True))


@pytest.mark.parametrize("policy", ["skip", "zero", "propagate"])
@pytest.mark.parametrize("planned", [False, True])
def test_the_host_never_waits(policy: Any, planned: bool) -> None:
    """A call behind a kernel of 200 ms returns at once; so does taking fields of the result."""
    grads = [_device.array(array) for array in _gradients(300)]
    plan = gradclip.Plan(grads)
    threshold = cupy.asarray(0.5)

    def call() -> gradclip.ClipResult:
        if planned:
            return plan.clip_by_global_norm_(threshold, nonfinite=policy)
        return gradclip.clip_by_global_norm_(grads, threshold, nonfinite=policy)

    call()
    cupy.cuda.Device().synchronize()
    _spin(200)
    start = time.perf_counter()
    result = call()
    fields = [result.total_norm, result.norms, result.coefficient, result.clipped]
    waited = time.perf_counter() - start
    assert waited < 0.1
    start = time.perf_counter()
    result.to_host()
    assert time.perf_counter() - start > 0.05, "the stream was not busy: nothing is shown"
    assert len(fields) == 4


def test_the_default_policy_waits() -> None:
    grads = [_device.array(array) for array in _gradients()]
    _spin(100)
    start = time.perf_counter()
    gradclip.clip_by_global_norm_(grads, 1.0)
    assert time.perf_counter() - start > 0.05


_POLICIES = {**MAKE, "AGC": lambda: AGC(dict.fromkeys("abc", cupy.full(3, 2.0)))}


def _three(norms: Array, as_array: Any) -> dict[str, Any]:
    """A gradient of three elements for each norm."""
    return {name: as_array(np.full(3, norm / 3**0.5)) for name, norm in zip("abc", norms, strict=True)}


@pytest.mark.parametrize("name", _POLICIES)
def test_policies_have_the_bits_of_the_cpu(name: str) -> None:
    on_host = MAKE[name]() if name in MAKE else AGC(dict.fromkeys("abc", np.full(3, 2.0)))
    on_device = _POLICIES[name]()
    history = np.random.default_rng(3).lognormal(size=(12, 3))
    history[4, 1], history[8, 2] = 0.0, math.inf
    for call, norms in enumerate(history):
        left, right = _three(norms, np.array), _three(norms, cupy.array)
        expected = gradclip.clip_by_global_norm_(left, on_host, nonfinite="skip")
        got = gradclip.clip_by_global_norm_(right, on_device, nonfinite="skip").to_host()
        assert np.array_equal(got.coefficient, expected.coefficient)
        assert got.skipped == expected.skipped
        assert all(_device.host(right[key]).tobytes() == left[key].tobytes() for key in left)
        if call == 6 and name != "AGC":
            on_device.load_state_dict(on_device.state_dict())


@pytest.mark.parametrize("name", _POLICIES)
def test_policies_let_nothing_wait(name: str) -> None:
    policy = _POLICIES[name]()
    grads = _three(np.ones(3), cupy.array)
    for _ in range(8):
        gradclip.clip_by_global_norm_(grads, policy, nonfinite="skip")
    cupy.cuda.Device().synchronize()
    _spin(300)
    start = time.perf_counter()
    result = gradclip.clip_by_global_norm_(grads, policy, nonfinite="skip")
    skipped = result.skipped
    assert time.perf_counter() - start < 0.15
    start = time.perf_counter()
    assert not bool(skipped)
    assert time.perf_counter() - start > 0.05, "the stream was not busy: nothing is shown"


def test_nothing_is_allocated_but_the_result() -> None:
    """Neither from CuPy's pool nor from the driver, after the first call."""
    grads = [_device.array(array) for array in _gradients(2000, 100)]
    gradclip.clip_by_global_norm_(grads, 1.0)
    cupy.cuda.Device().synchronize()
    pool = cupy.get_default_memory_pool()
    free = cupy.cuda.Device().mem_info[0]
    used = pool.used_bytes()
    results = [gradclip.clip_by_global_norm_(grads, 1.0, nonfinite="skip") for _ in range(20)]
    assert cupy.cuda.Device().mem_info[0] >= free - 2**21 * (len(results) + 1)  # the pool grows by 2 MB
    layout = 8 + 24 + 8 * 2000 + 16 + 2000
    assert pool.used_bytes() - used <= len(results) * (layout + 1024)


@pytest.mark.parametrize("groups", [None, "tensor"])
def test_a_graph_of_a_plan(groups: Any) -> None:
    """Captured once, replayed with changed gradients and a changed threshold."""
    host = _gradients()
    grads = [_device.array(array) for array in host]
    threshold = cupy.asarray(1.0)
    plan = gradclip.Plan(grads)
    plan.clip_by_global_norm_(1e9, groups=groups)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        result = plan.clip_by_global_norm_(threshold, groups=groups, nonfinite="skip")
        graph = stream.end_capture()
    for factor, max_norm in ((1.0, 5.0), (3.0, 0.1), (0.001, 1e3), (math.nan, 1.0)):
        arrays = [array * np.float32(factor) for array in host]
        with stream:
            for g, array in zip(grads, arrays, strict=True):
                g.set(array, stream=stream)
            threshold.set(np.array(max_norm), stream=stream)
        graph.launch(stream)
        stream.synchronize()
        expected = gradclip.clip_by_global_norm_(arrays, max_norm, groups=groups, nonfinite="skip")
        told = result.to_host()
        assert np.array_equal(told.norms, expected.norms, equal_nan=True)
        assert np.array_equal(told.coefficient, expected.coefficient)
        assert (told.clipped, told.nonfinite) == (expected.clipped, expected.nonfinite)
        assert all(
            _device.host(g).tobytes() == array.tobytes() for g, array in zip(grads, arrays, strict=True)
        )


def test_two_streams_at_once() -> None:
    """Calls of two threads on two streams do not share work memory while they overlap."""
    host = [_gradients(200, 3000), _gradients(150, 40_000)]
    expected = [gradclip.tensor_norms(arrays) for arrays in host]
    on_gpu = [[_device.array(array) for array in arrays] for arrays in host]
    wrong: list[int] = []

    def run(which: int) -> None:
        with cupy.cuda.Stream(non_blocking=True) as stream:
            told = [gradclip.tensor_norms(on_gpu[which]) for _ in range(200)]
            stream.synchronize()
            wrong.extend(
                which for norms in told if _device.host(norms).tobytes() != expected[which].tobytes()
            )

    cupy.cuda.Device().synchronize()
    threads = [threading.Thread(target=run, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_plan_on_two_streams_at_once() -> None:
    """Its calls share work memory and take turns."""
    host = _gradients(150, 40_000)
    expected = gradclip.tensor_norms(host).tobytes()
    plan = gradclip.Plan([_device.array(array) for array in host])
    wrong: list[int] = []

    def run(which: int) -> None:
        with cupy.cuda.Stream(non_blocking=True) as stream:
            told = [plan.tensor_norms() for _ in range(200)]
            stream.synchronize()
            wrong.extend(which for norms in told if _device.host(norms).tobytes() != expected)

    cupy.cuda.Device().synchronize()
    threads = [threading.Thread(target=run, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_same_bits_every_time() -> None:
    """Whichever block comes last."""
    grads = [_device.array(array) for array in _gradients(50, 200_000)]
    first = _device.host(gradclip.tensor_norms(grads)).tobytes()
    for _ in range(100):
        assert _device.host(gradclip.tensor_norms(grads)).tobytes() == first


def test_five_thousand_tensors() -> None:
    host = [values("bfloat16", 1 + i % 3000, seed=i % 50) for i in range(5000)]
    grads = [_device.array(array) for array in host]
    result = gradclip.clip_by_global_norm_(grads, 1.0).to_host()
    expected = gradclip.clip_by_global_norm_(host, 1.0)
    assert result.norms.tobytes() == expected.norms.tobytes()
    assert all(_device.host(g).tobytes() == array.tobytes() for g, array in zip(grads, host, strict=True))


def test_more_than_two_to_the_31_elements() -> None:
    elements = 2**31 + 12345
    free = cupy.cuda.Device().mem_info[0]
    assert free > 3 * elements, "not enough memory on the device"
    tensor = cupy.zeros(elements, np.float16)
    tensor[0], tensor[-1], tensor[2**31 + 7] = 3.0, 4.0, 12.0
    result = gradclip.clip_by_global_norm_([tensor], 6.5).to_host()
    assert (result.total_norm, result.coefficient) == (13.0, 0.5)
    assert [float(tensor[i]) for i in (0, -1, 2**31 + 7)] == [1.5, 2.0, 6.0]


def test_managed_memory_is_refused() -> None:
    with cupy.cuda.using_allocator(cupy.cuda.malloc_managed):
        managed = cupy.ones(10, np.float32)
    with pytest.raises(ValueError, match=r"^grads\[1\]: .*got managed memory"):
        gradclip.global_norm([_device.array(np.ones(3)), managed])


def test_pinned_memory_is_refused() -> None:
    memory = cupy.cuda.alloc_pinned_memory(64)
    pinned = _foreign((4,), memory.ptr, None)
    with pytest.raises(ValueError, match=r"^grads\[1\]: .*on no CUDA device"):
        gradclip.global_norm([_device.array(np.ones(3)), pinned])


def test_a_gpu_array_among_numpys() -> None:
    with pytest.raises(ValueError, match=r"^grads\[1\]: expected memory on the CPU, got .* CUDA device 0"):
        gradclip.global_norm([np.ones(2), cupy.ones(3)])


def test_a_producer_through_dlpack_on_its_own_stream() -> None:
    """The array is written by a kernel of the producer's stream; ours waits for it, the host for ours."""
    host = values("float32", 100_000, seed=0)
    array = cupy.zeros(host.shape, host.dtype)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()

    class Exporter:
        def __dlpack_device__(self) -> tuple[int, int]:
            return (2, 0)

        def __dlpack__(self, **arguments: Any) -> Any:
            with stream:
                return array.__dlpack__(**arguments)

    with stream:
        _spin(50)
        array.set(host, stream=stream)
    result = gradclip.clip_by_global_norm_([Exporter()], 1.0, nonfinite="skip")
    expected = gradclip.clip_by_global_norm_([host], 1.0)
    assert result.to_host().total_norm == expected.total_norm
    assert _device.host(array).tobytes() == host.tobytes()


def test_an_interface_with_a_stream() -> None:
    """__cuda_array_interface__ names the stream on which the array is being written."""
    host = values("float32", 100_000, seed=0)
    array = cupy.zeros(host.shape, host.dtype)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()

    with stream:
        _spin(50)
        array.set(host, stream=stream)
    gradclip.clip_by_global_norm_([_foreign(array.shape, array.data.ptr, stream.ptr)], 1.0, nonfinite="skip")
    with stream:  # which waits for the clip
        copy = array.copy()
    stream.synchronize()
    gradclip.clip_by_global_norm_([host], 1.0)
    assert _device.host(copy).tobytes() == host.tobytes()


# --- PyTorch ------------------------------------------------------------------------------------------


def _torch() -> Any:
    import torch  # noqa: PLC0415 (only here)

    if not torch.cuda.is_available():
        pytest.skip("no GPU: this PyTorch has no CUDA")
    return torch


def _to_torch(torch: Any, array: Array) -> Any:
    return torch.from_numpy(array.view(np.uint8).copy()).cuda().view(getattr(torch, array.dtype.name))


def _bytes_of(torch: Any, tensor: Any) -> bytes:
    return bytes(tensor.view(torch.uint8).cpu().numpy().tobytes())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("planned", [False, True])
def test_torch_tensors(name: str, planned: bool) -> None:
    """On torch's current stream, with results that are tensors and a threshold that is one."""
    torch = _torch()
    host = [values(name, n, seed=n) for n in (5, 3000, 70_000)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        grads = [_to_torch(torch, array) for array in host]
        threshold = torch.tensor(0.5, dtype=torch.float64, device="cuda")
        clip = gradclip.Plan(grads).clip_by_global_norm_ if planned else None
        if clip is None:
            result = gradclip.clip_by_global_norm_(grads, threshold, nonfinite="skip")
        else:
            result = clip(threshold, nonfinite="skip")
        fields: tuple[Any, ...] = (result.total_norm, result.norms, result.coefficient, result.clipped)
        assert all(isinstance(field, torch.Tensor) and field.is_cuda for field in fields)
        told = [field.cpu().numpy() for field in fields]
    expected = gradclip.clip_by_global_norm_(host, 0.5)
    assert told[0].tobytes() == np.float64(expected.total_norm).tobytes()
    assert told[1].tobytes() == expected.norms.tobytes()
    assert told[2].tobytes() == np.float64(expected.coefficient).tobytes()
    assert bool(told[3]) is expected.clipped is True
    assert result.to_host().nonfinite == ()
    stream.synchronize()
    assert [_bytes_of(torch, g) for g in grads] == [array.tobytes() for array in host]


def test_a_torch_graph() -> None:
    """Captured on a stream that torch chooses, replayed with changed gradients."""
    torch = _torch()
    host = _gradients()
    grads = [_to_torch(torch, array) for array in host]
    plan = gradclip.Plan(grads)
    plan.clip_by_global_norm_(1e9, nonfinite="skip")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = plan.clip_by_global_norm_(1.0, nonfinite="skip")
    for factor in (1.0, 5.0):
        arrays = [array * np.float32(factor) for array in host]
        for g, array in zip(grads, arrays, strict=True):
            g.copy_(torch.from_numpy(array))
        graph.replay()
        torch.cuda.synchronize()
        expected = gradclip.clip_by_global_norm_(arrays, 1.0)
        assert result.to_host().norms.tobytes() == expected.norms.tobytes()
        assert [_bytes_of(torch, g) for g in grads] == [array.tobytes() for array in arrays]


def test_a_torch_tensor_among_cupys() -> None:
    """CuPy's stream waits for torch's, where the tensor is being written, and torch's for CuPy's."""
    torch = _torch()
    own, theirs = values("float32", 1000, seed=1), values("float32", 100_000, seed=2)
    array, source = _device.array(own), _to_torch(torch, theirs)
    tensor = torch.zeros_like(source)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        with cupy.cuda.ExternalStream(side.cuda_stream):
            _spin(50)
        tensor.copy_(source)
        result = gradclip.clip_by_global_norm_([array, tensor], 1.0, nonfinite="skip")
        after = tensor.clone()
    side.synchronize()
    expected = gradclip.clip_by_global_norm_([own, theirs], 1.0)
    assert result.to_host().norms.tobytes() == expected.norms.tobytes()
    assert _bytes_of(torch, after) == theirs.tobytes()
    assert _device.host(array).tobytes() == own.tobytes()


# --- The process --------------------------------------------------------------------------------------


def test_a_callback_in_python_on_the_stream() -> None:
    """The device waits for it, calls for the device, and it for the GIL: they must not hold that."""
    script = (
        "import time, cupy, gradclip\n"
        "grads = [cupy.ones(4)]\n"
        "plan = gradclip.Plan(grads)\n"
        "stream, called = cupy.cuda.Stream(), []\n"
        "def callback(argument):\n"
        "    time.sleep(0.1)\n"
        "    called.append(argument)\n"
        "with stream:\n"
        "    stream.launch_host_func(callback, 1)\n"
        "    gradclip.clip_by_global_norm_(grads, 1.0)\n"
        "    assert called == [1]\n"
        "    stream.launch_host_func(callback, 2)\n"
        "    del plan\n"
        "    stream.launch_host_func(callback, 3)\n"
        "    gradclip.Plan(grads)\n"
        "    stream.synchronize()\n"
        "assert called == [1, 2, 3]\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120)


def test_fork_leaves_the_parent_alone() -> None:
    """A child cannot use CUDA; the parent goes on."""
    script = (
        "import os, cupy, gradclip\n"
        "grads = [cupy.ones(4)]\n"
        "assert float(gradclip.global_norm(grads)) == 2.0\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "assert float(gradclip.global_norm(grads)) == 2.0\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, cwd=Path(__file__).parent)


def test_the_end_of_a_process() -> None:
    """Plans and results that outlive the interpreter's modules do not crash it."""
    script = (
        "import cupy, gradclip\n"
        "plan = gradclip.Plan([cupy.ones(4)])\n"
        "result = plan.clip_by_global_norm_(1.0)\n"
        "assert result.to_host().total_norm == 2.0\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", script]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stderr == ""
