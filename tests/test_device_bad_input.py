"""Arrays that a GPU call refuses, and the stream handshakes of the protocols. Nothing is launched."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import cupy
import numpy as np
import pytest

import gradclip
from device import EmulatedDevice, emulated_device
from gradclip import _frameworks
from matrices import DTYPES, Array, values


@pytest.fixture
def emulated() -> Iterator[EmulatedDevice]:
    with emulated_device() as device:
        yield device


class Foreign:
    """An array of somebody else, through __cuda_array_interface__."""

    def __init__(self, array: Any, **changes: Any) -> None:
        self.array = array
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "strides": array.strides,
            "typestr": array.dtype.str,
            "data": (array.data.ptr, False),
            "version": 3,
            "stream": 7,
        } | changes


class Exporter:
    """An array of somebody else, through __dlpack__ alone: a NumPy array's memory as a GPU's."""

    def __init__(self, array: Array, device: tuple[int, int] = (2, 0)) -> None:
        self.array = array
        self.device = device
        self.streams: list[int] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: int, max_version: tuple[int, int] | None = None) -> Any:
        self.streams.append(stream)
        return on_cuda(self.array)


def on_cuda(array: Array) -> Any:
    """A DLPack capsule that says the memory is CUDA device 0's."""
    import ctypes  # noqa: PLC0415

    capsule = array.__dlpack__()
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    tensor = get(capsule, b"dltensor")
    ctypes.c_int32.from_address(tensor + 8).value = 2  # data pointer, then the device's type and number
    return capsule


def _refuses(emulated: EmulatedDevice, bad: Any, error: type[Exception], finding: str) -> None:
    """Every call that writes refuses `bad`, behind a good array, and writes nothing; so do norms."""
    good = values("float32", 2000, seed=0)
    on_gpu = emulated.array(good)
    launches = emulated.cuda.counters()[0]
    calls: tuple[Callable[[list[Any]], Any], ...] = (
        lambda grads: gradclip.clip_by_global_norm_(grads, 0.01),
        lambda grads: gradclip.clip_by_value_(grads, 0.01),
        lambda grads: gradclip.scale_(grads, 2.0),
        gradclip.global_norm,
    )
    for call in calls:
        with pytest.raises(error, match=rf"^grads\[2\]: {finding}"):
            call([on_gpu, None, bad])
    assert emulated.cuda.counters()[0] == launches, "nothing is launched"
    assert emulated.host(on_gpu).tobytes() == good.tobytes()


def test_kinds_of_objects(emulated: EmulatedDevice) -> None:
    _refuses(emulated, np.ones(3), ValueError, "expected memory on CUDA device 0, got a NumPy array")
    _refuses(emulated, 3.0, TypeError, "expected an array .*, got builtins.float")
    _refuses(
        emulated, Exporter(np.ones(3), (1, 0)), ValueError, "expected memory on CUDA device 0, got .*CPU"
    )
    _refuses(emulated, emulated.array(np.ones(3, np.int32)), TypeError, "expected dtype .*, got dtype int32")
    swapped = Foreign(emulated.array(np.ones(3)), typestr=">f8")
    _refuses(emulated, swapped, TypeError, "expected dtype .* in native byte order, got dtype >f8")


def _elsewhere(emulated: EmulatedDevice, number: int, managed: bool) -> Any:
    """Memory of another device. It fills pages of 2 MB, as a driver's memory does: one is asked for once."""
    page = 2 << 20
    whole = emulated.array(np.ones(2 * page // 8))
    array = cupy.ndarray((page // 8,), np.float64, whole.data + -whole.data.ptr % page)
    emulated.cuda.set_memory(array.data.ptr, array.data.ptr + page, number, managed)
    return array


def test_managed_memory(emulated: EmulatedDevice) -> None:
    array = _elsewhere(emulated, 0, managed=True)
    _refuses(emulated, array, ValueError, "expected memory on CUDA device 0, got managed memory")
    _refuses(emulated, Exporter(np.ones(3), (13, 0)), ValueError, ".*got an array on managed memory")


def test_two_devices(emulated: EmulatedDevice) -> None:
    array = _elsewhere(emulated, 1, managed=False)
    _refuses(emulated, array, ValueError, "expected memory on CUDA device 0, got an array on CUDA device 1")
    _refuses(emulated, Exporter(np.ones(3), (2, 1)), ValueError, ".*device 0, got an array on CUDA device 1")


def test_memory_of_no_device(emulated: EmulatedDevice) -> None:
    array = _elsewhere(emulated, -1, managed=False)
    _refuses(emulated, array, ValueError, "expected memory on CUDA device 0, got .* on no CUDA device")


def test_null_pointers(emulated: EmulatedDevice) -> None:
    emulated.cuda.set_memory(0, 1 << 21, -1, False)
    for pointer, finding in (
        (0, "expected an array with memory, got one without"),
        (16, "expected memory on CUDA device 0, got .* on no CUDA device"),
    ):
        null = Foreign(emulated.array(np.ones(3)), data=(pointer, False))
        _refuses(emulated, null, ValueError, finding)


def test_misaligned_elements(emulated: EmulatedDevice) -> None:
    array = emulated.array(np.ones(16, np.float32))
    for dtype, offset in ((np.float32, 2), (np.float64, 4), (np.complex64, 2), (np.float16, 1)):
        shifted = cupy.ndarray((3,), dtype, array.data + offset)
        message = "expected elements at multiples of their size in memory, got a misaligned array"
        _refuses(emulated, shifted, ValueError, message)
    # A complex number is as aligned as its parts.
    part = emulated.array(np.array([9, 3, 4], np.float32))
    assert (
        float(emulated.host(gradclip.global_norm([cupy.ndarray((1,), np.complex64, part.data + 4)]))) == 5.0
    )


def _only_writing_refuses(emulated: EmulatedDevice, grads: list[Any], text: str) -> None:
    gradclip.global_norm(grads)
    launches = emulated.cuda.counters()[0]
    before = [emulated.surroundings(array) for array in grads if isinstance(array, cupy.ndarray)]
    with pytest.raises(ValueError, match=text):
        gradclip.clip_by_global_norm_(grads, 1e-3)
    assert emulated.cuda.counters()[0] == launches
    assert before == [emulated.surroundings(array) for array in grads if isinstance(array, cupy.ndarray)]


def test_shared_memory(emulated: EmulatedDevice) -> None:
    array = emulated.array(np.ones(10, np.float32))
    part = cupy.ndarray((4,), np.float32, array.data + 24)
    text = r"^grads\[1\]: expected memory of its own, got memory shared with grads\[0\]"
    _only_writing_refuses(emulated, [array, array], text)
    _only_writing_refuses(emulated, [array, part], text)
    broadcast = cupy.ndarray((4, 5), np.float32, array.data, strides=(0, 4))
    _only_writing_refuses(emulated, [broadcast], r"^grads\[0\]: expected .*overlaps itself")


def test_read_only(emulated: EmulatedDevice) -> None:
    array = emulated.array(np.ones(10, np.float32))
    read_only = Foreign(array, data=(array.data.ptr, True))
    text = r"^grads\[0\]: expected writable memory, got a read-only array"
    _only_writing_refuses(emulated, [read_only], text)


def test_complex_numbers_have_no_order(emulated: EmulatedDevice) -> None:
    with pytest.raises(TypeError, match=r"^grads\[0\]: expected a real dtype .*, got complex64"):
        gradclip.clip_by_value_([emulated.array(np.ones(3, np.complex64))], 1.0)


@pytest.mark.parametrize(
    ("changes", "error", "finding"),
    [
        ({"mask": object()}, TypeError, "expected an array without a mask"),
        ({"stream": 0}, ValueError, "expected a stream"),
        ({"typestr": "nonsense"}, TypeError, "expected a NumPy typestr, got 'nonsense'"),
        ({"data": 5}, TypeError, "expected a __cuda_array_interface__ with data"),
        ({"strides": (4,)}, ValueError, "expected a stride for each axis"),
        ({"shape": (-1, 2)}, ValueError, "expected axes of 0 or more elements, got one of -1"),
        ({"shape": (2**62, 2**62), "strides": None}, ValueError, "expected at most 2\\^63 bytes"),
    ],
)
def test_interfaces_that_are_broken(
    emulated: EmulatedDevice, changes: dict[str, Any], error: type[Exception], finding: str
) -> None:
    array = emulated.array(np.ones((2, 3), np.float32))
    _refuses(emulated, Foreign(array, **changes), error, finding)


def test_interface_without_a_shape(emulated: EmulatedDevice) -> None:
    foreign = Foreign(emulated.array(np.ones(3)))
    del foreign.__cuda_array_interface__["shape"]
    _refuses(emulated, foreign, TypeError, "expected a __cuda_array_interface__, got one without 'shape'")


def test_a_single_array(emulated: EmulatedDevice) -> None:
    array = emulated.array(np.ones(3))
    singles: tuple[Any, ...] = (array, Foreign(array), Exporter(np.ones(3)))
    for single in singles:
        with pytest.raises(TypeError, match=r"^grads: expected a sequence .*; put a single array in a list"):
            gradclip.global_norm(single)


# --- Streams ------------------------------------------------------------------------------------------


def _waits(emulated: EmulatedDevice, call: Callable[[], Any]) -> list[tuple[int, int]]:
    before = len(emulated.cuda.stream_waits())
    call()
    waits: list[tuple[int, int]] = emulated.cuda.stream_waits()[before:]
    return waits


def test_streams_of_producers_wait_and_are_waited_for(emulated: EmulatedDevice) -> None:
    """Ours (0) waits for the producer's before a kernel runs; the producer's for ours after."""
    array = values("float32", (30, 50), seed=0)
    own, theirs = emulated.array(array), emulated.array(array)
    grads = [own, Foreign(theirs), Foreign(emulated.array(array), stream=9), Foreign(emulated.array(array))]
    waits = _waits(emulated, lambda: gradclip.clip_by_global_norm_(grads, 1.0, nonfinite="skip"))
    assert set(waits) == {(0, 7), (0, 9), (7, 0), (9, 0)}
    assert waits.index((0, 7)) < waits.index((7, 0))
    assert emulated.host(own).tobytes() == emulated.host(theirs).tobytes() != array.tobytes()
    assert _waits(emulated, lambda: gradclip.global_norm([own])) == []
    # None: the producer asks for no order.
    assert _waits(emulated, lambda: gradclip.global_norm([Foreign(own, stream=None)])) == []


def test_a_plan_waits_in_every_call(emulated: EmulatedDevice) -> None:
    exporter = Exporter(np.ones(30))
    plan = gradclip.Plan([Foreign(emulated.array(np.ones(5))), exporter])
    for _ in range(2):
        assert _waits(emulated, plan.global_norm) == [(0, 7), (7, 0)]
    # 1 is the legacy default stream. Read once, and made ready again in each call.
    assert exporter.streams == [1, 1, 1]


def test_a_producer_that_names_no_stream_is_waited_for(emulated: EmulatedDevice) -> None:
    """Its stream cannot be told to wait for ours: the host waits."""
    array = np.full(4, 3.0)
    exporter = Exporter(array)
    waits = emulated.cuda.counters()[3]
    result = gradclip.clip_by_global_norm_([exporter], 1.5, nonfinite="skip")
    assert emulated.cuda.counters()[3] == waits + 1
    assert exporter.streams == [1]
    assert result.to_host().total_norm == 6.0
    assert array.tolist() == [0.75] * 4


def test_cupys_current_stream_is_used(emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SimpleNamespace(ptr=42)
    monkeypatch.setattr(_frameworks.Cupy, "stream", staticmethod(lambda device: (stream.ptr, stream)))
    grads = [emulated.array(np.ones(3)), Foreign(emulated.array(np.ones(3)))]
    waits = _waits(emulated, lambda: gradclip.clip_by_global_norm_(grads, 1.0, nonfinite="skip"))
    assert waits == [(42, 7), (7, 42)]


def test_foreign_arrays_alone(emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are CuPy's, and so is the stream: memory of its pool is in order with no other."""
    monkeypatch.setattr(_frameworks.Cupy, "stream", staticmethod(lambda device: (42, None)))
    array = values("float32", 300, seed=4)
    theirs = emulated.array(array)
    exporter = Exporter(np.ones(2, np.float32))
    waits = _waits(emulated, lambda: gradclip.clip_by_global_norm_([Foreign(theirs), exporter], 1.0))
    assert waits == [(42, 7), (7, 42)]
    assert exporter.streams == [42]
    theirs = emulated.array(array)
    result = gradclip.clip_by_global_norm_([Foreign(theirs, strides=None)], 1.0)
    expected = gradclip.clip_by_global_norm_([array], 1.0)
    assert isinstance(result.norms, cupy.ndarray)
    assert result.to_host().total_norm == expected.total_norm
    assert emulated.host(theirs).tobytes() == array.tobytes()


def test_producers_wait_also_where_a_call_fails(emulated: EmulatedDevice) -> None:
    """The norms are under way when `reduce` raises."""

    def fail(sums: Any) -> Any:
        raise KeyError("no network")

    grads = [emulated.array(np.ones(3)), Foreign(emulated.array(np.ones(3)))]

    def call() -> None:
        with pytest.raises(KeyError, match="no network"):
            gradclip.clip_by_global_norm_(grads, 1.0, reduce=fail)

    assert _waits(emulated, call) == [(0, 7), (7, 0)]


def test_waits_leave_the_gil_to_others(emulated: EmulatedDevice) -> None:
    """What the device is at may need it to end: a callback in Python on the stream."""
    before = emulated.cuda.waits_with_gil()
    waits = emulated.cuda.counters()[3]
    plan = gradclip.Plan([emulated.array(np.ones(3)), Exporter(np.ones(3))])
    plan.clip_by_global_norm_(1.0).to_host()
    plan.clip_by_global_norm_(1.0, groups="tensor")
    del plan
    for count in (2000, 30_000):  # work memory grows
        gradclip.global_norm([emulated.array(np.ones(1, np.float16))] * count)
    gradclip.global_norm([Exporter(np.ones(3))])
    assert emulated.cuda.counters()[3] >= waits + 5
    assert emulated.cuda.waits_with_gil() == before


def test_capture_of_arrays_with_streams_of_their_own(emulated: EmulatedDevice) -> None:
    """To wait for them would end the capture, or draw their streams into it."""
    own, array = emulated.array(np.ones(3)), emulated.array(np.ones(3))
    same = gradclip.Plan([own, Foreign(array, stream=None)])
    others = [gradclip.Plan([own, Foreign(array)]), gradclip.Plan([own, Exporter(np.ones(3))])]
    before = emulated.cuda.counters()
    emulated.cuda.set_machine(is_capturing=True)
    same.global_norm()
    for plan in others:
        with pytest.raises(RuntimeError, match=r"^grads: expected a Plan of arrays .* on the stream"):
            plan.global_norm()
    message = r"^max_norm: expected a number or an array on the stream that is captured"
    threshold: Any = Foreign(emulated.array(np.array(1.0)))
    with pytest.raises(ValueError, match=message):
        same.clip_by_global_norm_(threshold, nonfinite="skip")
    with pytest.raises(RuntimeError, match=r"^grads: expected a Plan made before the stream was captured"):
        gradclip.global_norm([own, Foreign(array)])
    assert emulated.cuda.stream_waits() == []
    assert emulated.cuda.counters() == (before[0] + 1, *before[1:])


class JaxArray(Foreign, Exporter):
    """As on a GPU: an interface that names no stream, and __dlpack__."""

    def __init__(self, array: Array, on_gpu: Any) -> None:
        Foreign.__init__(self, on_gpu, version=2, stream=None)
        Exporter.__init__(self, array)


def test_jax_arrays_come_through_dlpack(emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax", SimpleNamespace(Array=JaxArray))
    array = JaxArray(np.full(4, 3.0), emulated.array(np.zeros(4)))
    own = emulated.array(np.ones(3))
    assert emulated.host(gradclip.tensor_norms([own, array]))[1] == 6.0
    assert array.streams == [1]
    with pytest.raises(TypeError, match=r"^grads\[1\]: expected .* can be written, got a jax.Array"):
        gradclip.scale_([own, array], 2.0)


def test_the_per_thread_default_stream(emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for the legacy one by itself, which is the one that PyTorch's export knows."""
    monkeypatch.setattr(_frameworks.Cupy, "stream", staticmethod(lambda device: (2, None)))
    exporter = Exporter(np.full(4, 3.0))
    assert float(emulated.host(gradclip.global_norm([emulated.array(np.zeros(3)), exporter]))) == 6.0
    assert exporter.streams == [1]


def test_cupy_arrays_in_a_list_that_torch_leads(
    emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of bfloat16, which no interface names; ordered with CuPy's current stream."""
    monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda device: SimpleNamespace(ptr=7))
    array = emulated.array(np.full(4, 3.0).astype(DTYPES["bfloat16"]))
    waits = len(emulated.cuda.stream_waits())
    read = emulated.cuda.read([array], 0, 16, "torch", emulated.allocate, False, False)
    memory = read.norms(2, 16)
    assert np.ctypeslib.as_array((ctypes.c_double * 1).from_address(memory.ptr))[0] == 6.0
    assert emulated.cuda.stream_waits()[waits:] == [(16, 7), (7, 16)]


def test_a_result_is_copied_on_its_own_device(emulated: EmulatedDevice) -> None:
    """Its stream may be the default one, which is another on each device."""
    emulated.cuda.set_memory(1, 1 << 62, 1, False)
    owner = emulated.array(np.full(4, 3.0))
    memory = cupy.cuda.UnownedMemory(owner.data.ptr, owner.nbytes, owner, 1)
    array = cupy.ndarray((4,), np.float64, cupy.cuda.MemoryPointer(memory, 0))
    result = gradclip.clip_by_global_norm_([array], 100.0)
    assert emulated.cuda.current_device() == 0
    assert result.to_host().total_norm == 6.0
    assert emulated.cuda.current_device() == 0
