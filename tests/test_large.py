"""More than 2^31 elements and 2^32 bytes: no size, offset or count is kept in 32 bits.

The arrays are zeros that the system has not yet given memory for, so only what is written takes any.
"""

from __future__ import annotations

import math

import cupy
import numpy as np
import pytest

import gradclip
from device import emulated_device
from matrices import Array

_N = 2**31 + 9


@pytest.fixture(scope="module")
def huge() -> Array:
    array = np.zeros(_N, np.float16)
    array[0], array[2**31 - 1], array[2**31 + 8] = 2.0, 4.0, -4.0
    return array


def test_norms(huge: Array) -> None:
    assert gradclip.tensor_norms([huge], 2).tolist() == [6.0]
    assert gradclip.tensor_norms([huge], 1).tolist() == [10.0]
    assert gradclip.tensor_norms([huge], math.inf).tolist() == [4.0]


def test_strides_beyond_32_bits(huge: Array) -> None:
    ends = huge[:: 2**31 + 8]
    assert ends.strides == (2**32 + 16,)
    views = [ends, ends[::-1], huge[2**31 - 1 :: 9]]
    assert gradclip.tensor_norms(views).tolist() == [20**0.5, 20**0.5, 32**0.5]
    gradclip.scale_([ends], 0.5)
    assert ends.tolist() == [1.0, -2.0]
    gradclip.scale_([ends], 2.0)


def test_a_value_clip_and_its_report(huge: Array) -> None:
    huge[-1] = -9.0
    result = gradclip.clip_by_value_({"huge": huge}, 4.0)
    assert result.clipped
    assert result.total_norm == 9.0
    assert huge[-1] == -4.0
    huge[-2] = math.nan
    with pytest.raises(gradclip.NonFiniteGradientError) as caught:
        gradclip.clip_by_global_norm_([huge], 1.0)
    assert caught.value.entries == [(0, 1, 0)]
    huge[-2] = 0.0


def test_a_plan_counts_elements_and_bytes(huge: Array) -> None:
    plan = gradclip.Plan([huge])
    assert plan.nbytes == 2**32 + 18
    assert repr(plan) == "Plan(1 gradient, 2147483657 elements, 4294967314 bytes)"


def test_twenty_thousand_tensors() -> None:
    grads = [np.full(1 + i % 3, 2.0, np.float32) for i in range(20_000)]
    norms = gradclip.tensor_norms(grads)
    assert norms.tolist() == [2.0 * (1 + i % 3) ** 0.5 for i in range(20_000)]
    result = gradclip.clip_by_norm_(grads, 2.0)
    assert isinstance(result.coefficient, np.ndarray)
    assert result.coefficient.shape == (20_000,)
    assert gradclip.tensor_norms(grads) == pytest.approx(np.full(20_000, 2.0), rel=1e-6)


def test_kernels_beyond_32_bits(huge: Array) -> None:
    """Emulated: a GPU's own is in test_gpu.py. Only the last tile is written."""
    with emulated_device(multiprocessors=2) as device:
        owner = cupy.cuda.UnownedMemory(huge.ctypes.data, huge.nbytes, huge, 0)
        memory = cupy.cuda.MemoryPointer(owner, 0)
        ends = cupy.ndarray((2,), np.float16, memory, strides=(2**32 + 16,))
        assert device.host(gradclip.tensor_norms([ends])).tolist() == [20**0.5]
        huge[-1] = -9.0
        result = gradclip.clip_by_value_([cupy.ndarray((_N,), np.float16, memory)], 4.0).to_host()
        assert (result.clipped, result.total_norm) == (True, 9.0)
        assert huge[-1] == -4.0
        many = [device.array(np.full(3, 2.0, np.float32))] * 70_000
        norms = device.host(gradclip.tensor_norms(many))
        assert norms.tolist() == [12**0.5] * 70_000
