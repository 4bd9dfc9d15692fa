"""The same bits: neither threads, nor instruction set, nor alignment, nor the rest of the list matter."""

from __future__ import annotations

import ctypes
import math
import platform
from collections.abc import Callable

import numpy as np
import pytest
import torch

import gradclip
from gradclip import _core
from matrices import (
    COMPLEX_NAMES,
    EXPONENTS,
    FAST_ORDS,
    ISAS,
    NAMES,
    ORDS,
    REAL_NAMES,
    THREADS,
    Array,
    placed,
    sizes,
    values,
)

# More than enough work for every thread to be started, with sizes that are no multiple of anything.
_MANY = [1_500_003, 1, 700_001, 0, 4097, 129, 250_000, 8192, 3]


def _list(name: str) -> list[Array]:
    return [values(name, n, seed=n + 1, low=-12, high=10) for n in _MANY]


def _bits(arrays: list[Array]) -> list[bytes]:
    return [array.tobytes() for array in arrays]


def _everywhere(measure: Callable[[], object]) -> None:
    """``measure`` gives the same on every instruction set and number of threads."""
    expected = None
    for isa in ISAS:
        for threads in THREADS:
            _core.set_isa(isa)
            gradclip.set_num_threads(threads)
            measured = measure()
            expected = measured if expected is None else expected
            assert measured == expected, f"{isa} with {threads} threads differs"


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("name", NAMES)
def test_norms_over_threads_and_isas(name: str, ord: float) -> None:
    fast = ord == 2 or (ord in FAST_ORDS and name in REAL_NAMES)
    arrays = _list(name)[0 if fast else 3 :]
    _everywhere(
        lambda: (gradclip.tensor_norms(arrays, ord).tobytes(), gradclip.global_norm(arrays, ord).hex())
    )


@pytest.mark.parametrize("name", NAMES)
def test_what_a_clip_writes_over_threads_and_isas(name: str) -> None:
    arrays = _list(name)

    def clip() -> tuple[object, ...]:
        copies = [array.copy() for array in arrays]
        result = gradclip.clip_by_global_norm_(copies, 0.7, grad_scale=3.0)
        assert result.clipped
        return (*_bits(copies), result.norms.tobytes(), result.coefficient, result.total_norm)

    _everywhere(clip)


@pytest.mark.parametrize("name", REAL_NAMES)
def test_what_a_value_clip_writes_over_threads_and_isas(name: str) -> None:
    arrays = _list(name)

    def clip() -> tuple[object, ...]:
        copies = [array.copy() for array in arrays]
        result = gradclip.clip_by_value_(copies, 0.3)
        return (*_bits(copies), result.norms.tobytes(), result.nonfinite)

    _everywhere(clip)


@pytest.mark.parametrize("name", NAMES)
def test_special_values_over_threads_and_isas(name: str) -> None:
    """Clips of NaN, infinities, zeros of either sign, and subnormal numbers, before and after."""
    array = values(name, 10_007, seed=9, low=-16, high=12)
    array[::50], array[7::61], array[9::67] = 0.0, -0.0, -math.inf
    array[11::211] = math.nan

    def clip() -> tuple[object, ...]:
        written: list[object] = []
        for factor in (0.0, -0.5, 1e-7, 3e-41, 1e-60, 1e39, 1.0 / 3.0):
            copy = array.copy()
            gradclip.scale_([copy], factor)
            parts = copy.view(copy.real.dtype)
            written.append(np.isnan(parts).tobytes())  # where, as the payload of a NaN is free
            parts[np.isnan(parts)] = 0
            written.append(parts.tobytes())
        return tuple(written)

    _everywhere(clip)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NAMES)
def test_every_offset(name: str, isa: str) -> None:
    """At each of 64 byte offsets, aligned to the element or not; and no byte outside is written."""
    _core.set_isa(isa)
    ords = ORDS[:4]
    lengths = [n for n in sizes(name) if n]
    lengths = [lengths[0], lengths[3], lengths[len(lengths) // 2], lengths[-1]]
    for n in lengths:
        original = values(name, n, seed=n, low=-12, high=10)
        norms = [gradclip.tensor_norms([original], ord)[0] for ord in ords]
        limit = norms[0] / 3
        clipped = original.copy()
        assert gradclip.clip_by_global_norm_([clipped], limit).clipped
        for offset in range(64):
            array, buffer = placed(original, offset)
            before = buffer.tobytes()
            assert [gradclip.tensor_norms([array], ord)[0] for ord in ords] == norms, f"offset {offset}"
            gradclip.clip_by_global_norm_([array], limit)
            assert array.tobytes() == clipped.tobytes(), f"offset {offset}"
            array[...] = original
            assert buffer.tobytes() == before, f"offset {offset}: bytes outside the array were written"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", REAL_NAMES)
def test_every_offset_of_a_value_clip(name: str, isa: str) -> None:
    _core.set_isa(isa)
    for n in (1, 37, sizes(name)[-1]):
        original = values(name, n, seed=n, low=-12, high=10)
        for offset in range(64):
            array, buffer = placed(original, offset)
            before = buffer.tobytes()
            gradclip.clip_by_value_([array], 0.25)
            expected = np.clip(original.astype(np.float64), -0.25, 0.25)
            assert (array.astype(np.float64) == expected).all(), f"offset {offset}"
            array[...] = original
            assert buffer.tobytes() == before, f"offset {offset}: bytes outside the array were written"


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("name", NAMES)
def test_order_of_the_list(name: str, ord: float) -> None:
    """Norms move with their tensors, and the global norm stays."""
    arrays = [values(name, n, seed=n, low=-14, high=12) for n in (*sizes(name), 60_001)]
    norms, total = gradclip.tensor_norms(arrays, ord), gradclip.global_norm(arrays, ord)
    rng = np.random.default_rng(1)
    for _ in range(10):
        order = rng.permutation(len(arrays))
        shuffled = [arrays[i] for i in order]
        assert gradclip.tensor_norms(shuffled, ord).tobytes() == norms[order].tobytes()
        assert gradclip.global_norm(shuffled, ord) == total


def test_order_of_a_mixed_list_and_what_else_is_in_the_call() -> None:
    arrays = [values(name, n, seed=n, low=-14, high=12) for name in NAMES for n in (5, 4000, 70_001)]
    alone = [gradclip.tensor_norms([array])[0] for array in arrays]
    total = gradclip.global_norm(arrays)
    rng = np.random.default_rng(2)
    for _ in range(20):
        order = rng.permutation(len(arrays))
        shuffled = [arrays[i] for i in order]
        assert gradclip.tensor_norms(shuffled).tolist() == [alone[i] for i in order]
        assert gradclip.global_norm(shuffled) == total
        assert gradclip.global_norm([None, *shuffled, np.zeros(7), None]) == total


@pytest.mark.parametrize("ord", ORDS)
def test_order_of_a_list_with_tensors_of_any_size(ord: float) -> None:
    """The exact sum drops what is far below: the same whichever tensor comes first."""
    arrays = [np.full(3, 2.0**e) * np.array([1, 1.3, 1.7]) for e in range(-1000, 1001, 40)]
    total = gradclip.global_norm(arrays, ord)
    rng = np.random.default_rng(3)
    for _ in range(20):
        shuffled = [arrays[i] for i in rng.permutation(len(arrays))]
        assert gradclip.global_norm(shuffled, ord) == total


def test_a_clip_measures_as_the_norms_do() -> None:
    arrays = [values(name, n, seed=n) for name in NAMES for n in (5, 4000)]
    for ord in ORDS:
        result = gradclip.clip_by_global_norm_([a.copy() for a in arrays], 0.5, ord)
        assert result.norms.tobytes() == gradclip.tensor_norms(arrays, ord).tobytes()
        assert result.total_norm == gradclip.global_norm(arrays, ord)


@pytest.mark.parametrize("name", COMPLEX_NAMES)
def test_complex_numbers_are_pairs_for_the_2_norm(name: str) -> None:
    array = values(name, 9001, seed=4)
    assert gradclip.global_norm([array]) == gradclip.global_norm([array.view(array.real.dtype)])


_UPWARD = {"x86_64": 0x800, "aarch64": 0x400000}  # FE_UPWARD of <fenv.h>


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NAMES)
def test_settings_of_the_thread_s_processor(name: str, isa: str) -> None:
    """Flushing of subnormal numbers or another rounding, set by some other library: the same bits."""
    _core.set_isa(isa)
    low = EXPONENTS[name][0]
    original = values(name, 9001, seed=1, low=low, high=low + 12)
    max_norm = gradclip.global_norm([original]) * 0.5  # here, as Python would flush it too

    def everything() -> tuple[object, ...]:
        array = original.copy()
        norms = [gradclip.tensor_norms([array], ord).tobytes() for ord in ORDS]
        gradclip.scale_([array], 0.75)
        result = gradclip.clip_by_global_norm_([array], max_norm, grad_scale=0.9)
        return (*norms, array.tobytes(), result.coefficient, result.norms.tobytes())

    expected = everything()
    assert torch.set_flush_denormal(True)
    try:
        flushed = everything()
        flushes = torch.tensor([1e-310], dtype=torch.float64).mul(1.0).item() == 0.0
    finally:
        torch.set_flush_denormal(False)
    assert flushed == expected
    assert flushes, "the thread's own setting was not restored"

    libm = ctypes.CDLL("libm.so.6")
    assert libm.fesetround(_UPWARD[platform.machine()]) == 0
    try:
        upward = everything()
        rounding = libm.fegetround()
    finally:
        libm.fesetround(0)
    assert upward == expected
    assert rounding == _UPWARD[platform.machine()], "the thread's own setting was not restored"
