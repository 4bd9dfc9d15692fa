"""A guest in somebody else's process: its signals, its Ctrl-C, its exit, and what it hands over."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
import pytest

import gradclip
from processes import output_of


def test_exit_under_a_call_over_many_gradients() -> None:
    """Nothing that a kernel reads may be gone before the process is."""
    output_of(
        """
        import threading, time
        import numpy as np, gradclip
        gradclip.set_num_threads(1)
        grads = [np.full(200_000, 1.5)] * 6000
        threading.Thread(target=lambda: gradclip.global_norm(grads), daemon=True).start()
        time.sleep(0.05)
        """
    )


def test_helpers_take_no_signals() -> None:
    """A signal that the program blocks stays pending: no helper takes it with another mask."""
    output = output_of(
        """
        import os, signal
        import numpy as np, gradclip
        gradclip.set_num_threads(4)
        gradclip.global_norm([np.ones(4_000_000)])
        assert gradclip._core.num_started_threads() > 0
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        os.kill(os.getpid(), signal.SIGUSR1)
        print(signal.SIGUSR1 in signal.sigpending())
        """,
        OPENBLAS_NUM_THREADS="1",
    )
    assert output == "True"


class Exports:
    """An array whose DLPack methods do what they are told."""

    def __init__(self, export: Any, device: Any = (1, 0)) -> None:
        self._export, self._device = export, device

    def __dlpack__(self, *, max_version: object = None) -> object:
        if isinstance(self._export, BaseException):
            raise self._export
        return self._export

    def __dlpack_device__(self) -> object:
        return self._device


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_an_interrupt_is_not_an_error_of_the_entry(interrupt: BaseException) -> None:
    with pytest.raises(type(interrupt)):
        gradclip.tensor_norms([Exports(interrupt)])


def test_an_error_of_a_number_s_own_code_is_told_as_it_is() -> None:
    class Threshold:
        def __float__(self) -> float:
            raise RuntimeError("device lost")

    with pytest.raises(RuntimeError, match="device lost"):
        gradclip.clip_by_global_norm_([np.ones(2)], Threshold())


@pytest.mark.parametrize("device", [None, (1, 2**40), "cpu", (1,)], ids=repr)
def test_a_device_that_is_none(device: object) -> None:
    with pytest.raises(TypeError, match=r"^grads\[1\]: expected a device .* got "):
        gradclip.tensor_norms([np.ones(2), Exports(None, device)])


def versioned_capsule(major: int, device: int) -> Any:
    """A DLPack 1.x capsule over four float32 ones; what it points to lives as long as it is used."""

    class Managed(ctypes.Structure):
        _fields_ = (
            ("major", ctypes.c_uint32),
            ("minor", ctypes.c_uint32),
            ("context", ctypes.c_void_p),
            ("deleter", ctypes.c_void_p),
            ("flags", ctypes.c_uint64),
            ("data", ctypes.c_void_p),
            ("device_type", ctypes.c_int32),
            ("device_id", ctypes.c_int32),
            ("ndim", ctypes.c_int32),
            ("code", ctypes.c_uint8),
            ("bits", ctypes.c_uint8),
            ("lanes", ctypes.c_uint16),
            ("shape", ctypes.c_void_p),
            ("strides", ctypes.c_void_p),
            ("byte_offset", ctypes.c_uint64),
        )

    data = np.ones(4, np.float32)
    shape, strides = (ctypes.c_int64 * 1)(4), (ctypes.c_int64 * 1)(1)
    managed = Managed(
        major, 0, None, None, 0, data.ctypes.data, device, 0, 1, 2, 32, 1,
        ctypes.addressof(shape), ctypes.addressof(strides), 0,
    )  # fmt: skip
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    name = b"dltensor_versioned"
    capsule = new(ctypes.addressof(managed), name, None)
    exports = Exports(capsule)
    exports.keep = (data, shape, strides, managed, name)  # type: ignore[attr-defined]
    return exports


def test_capsules_are_read_only_if_they_are_understood() -> None:
    assert gradclip.tensor_norms([versioned_capsule(major=1, device=1)]).tolist() == [2.0]
    with pytest.raises(ValueError, match=r"^grads\[0\]: expected DLPack 1, got version 2"):
        gradclip.tensor_norms([versioned_capsule(major=2, device=1)])
    with pytest.raises(ValueError, match=r"^grads\[0\]: expected memory on the CPU, got .*CUDA"):
        gradclip.tensor_norms([versioned_capsule(major=1, device=2)])


@pytest.mark.parametrize(
    "returned", [np.array([1j]), ["4"], [True], [None], np.array([1.0, 2.0]), 1.0, [-1.0]], ids=repr
)
def test_sums_that_reduce_must_not_return(returned: Any) -> None:
    array = np.full(3, 2.0)
    with pytest.raises((TypeError, ValueError), match=r"^reduce: expected "):
        gradclip.clip_by_global_norm_([array], 1.0, reduce=lambda sums: returned)
    assert array.tolist() == [2.0, 2.0, 2.0]


def test_a_scale_whose_reciprocal_is_infinite() -> None:
    zeros = np.zeros(3)
    with pytest.raises(ValueError, match=r"^grad_scale: expected "):
        gradclip.clip_by_global_norm_([zeros], 1.0, grad_scale=1e-320)
    assert zeros.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("ord", [2, 1, math.inf, 3])
def test_a_norm_that_only_grad_scale_brings_into_float64(ord: float) -> None:
    array = np.full(1, 1.5e308)
    scaled = gradclip.clip_by_global_norm_([array], math.inf, ord=ord, grad_scale=2.0**16)
    assert scaled.total_norm == pytest.approx(1.5e308 / 2.0**16, rel=1e-15)


def test_a_sum_of_squares_that_only_grad_scale_brings_into_float64() -> None:
    result = gradclip.clip_by_global_norm_([np.full(100, 1e308)], math.inf, grad_scale=2.0**16)
    assert result.total_norm == pytest.approx(10 * (1e308 / 2.0**16), rel=1e-15)


@pytest.mark.parametrize("ord", [1, math.inf, 3])
def test_a_finite_complex_number_is_not_called_infinite(ord: float) -> None:
    """Its magnitude is beyond float64, so the norm is infinite; but no element is."""
    array = np.array([1.7e308 + 1.7e308j])
    with pytest.raises(gradclip.NonFiniteGradientError, match="beyond float64") as caught:
        gradclip.clip_by_global_norm_([array], 1.0, ord=ord)
    assert caught.value.entries == []
    assert gradclip.clip_by_global_norm_([array], 1.0, ord=ord, nonfinite="skip").nonfinite == ()
