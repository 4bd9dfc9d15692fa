"""No write when nothing changes, and no access outside: in memory where that would be a crash.

Every case runs in a process of its own, over pages that are made read-only (or inaccessible) behind
NumPy's back: its arrays still say that they are writable.
"""

from __future__ import annotations

import signal

import pytest

from matrices import ISAS, NAMES, REAL_NAMES
from processes import output_of, run_python

_PRELUDE = """
import ctypes, math, mmap
import ml_dtypes
import numpy as np
import gradclip

libc = ctypes.CDLL(None, use_errno=True)
DTYPE = np.dtype(getattr(ml_dtypes, "{name}", None) or "{name}")
PAGES = 32                            # 128 KB: 8 tiles
NONE, READ, BOTH = 0, 1, 3            # what mprotect takes
region = mmap.mmap(-1, PAGES * 4096)
memory = np.frombuffer(region, np.uint8)

def protect(mode, first=0, last=PAGES):
    address = ctypes.c_void_p(memory.ctypes.data + first * 4096)
    assert libc.mprotect(address, ctypes.c_size_t((last - first) * 4096), mode) == 0

array = memory.view(DTYPE)
array[...] = 1.0
"""


def _prelude(name: str) -> str:
    return _PRELUDE.format(name=name)


_NO_OPS = """
protect(READ)
halves = [array[: array.size // 2], array[array.size // 2 :]]
norm = gradclip.global_norm(halves)
assert abs(norm - array.size**0.5) < 1e-6 * norm
for grads in (halves, [array[::2], array[1::2]], [array.reshape(64, -1).T], dict(a=array)):
    top = gradclip.global_norm(grads)
    for result in (
        gradclip.clip_by_global_norm_(grads, top),
        gradclip.clip_by_global_norm_(grads, 1e30),
        gradclip.clip_by_global_norm_(grads, math.inf, ord=1),
        gradclip.clip_by_global_norm_(grads, 1.0, ord=math.inf),
        gradclip.clip_by_global_norm_(grads, 1e30, ord=3),
        gradclip.clip_by_norm_(grads, top),
        gradclip.Plan(grads).clip_by_global_norm_(top),
        gradclip.clip_by_global_norm_(grads, 2 * top, reduce=lambda sums: sums * 4),
    ):
        assert not result.clipped and np.all(result.coefficient == 1)
    gradclip.scale_(grads, 1.0)
    gradclip.Plan(grads).scale_(1)
print("nothing written")
"""


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NAMES)
def test_no_write_when_nothing_is_clipped(name: str, isa: str) -> None:
    code = _prelude(name) + _NO_OPS
    assert output_of(code, GRADCLIP_ISA=isa, GRADCLIP_NUM_THREADS="3") == "nothing written"


def test_a_write_would_have_been_seen() -> None:
    """The control: where something is clipped, read-only pages are a crash."""
    for call in (
        "gradclip.clip_by_global_norm_([array], 0.5)",
        "gradclip.scale_([array], 0.5)",
        "gradclip.clip_by_value_([array], 0.5)",
    ):
        done = run_python(f"{_prelude('float32')}\nprotect(READ)\n{call}\n")
        assert done.returncode == -signal.SIGSEGV, call


@pytest.mark.parametrize("name", REAL_NAMES)
def test_a_value_clip_writes_only_tiles_with_something_to_clip(name: str) -> None:
    code = """
    tile = 16384 // DTYPE.itemsize
    for beyond in (1.5, -1.5, math.inf, -math.inf):
        protect(BOTH)
        array[:] = 1.0
        array[2 * tile + 17] = beyond
        array[5 * tile - 1] = math.nan        # stays: no reason to write tile 4
        array[7 * tile] = beyond
        protect(READ, 0, 8), protect(READ, 12, 28)
        result = gradclip.clip_by_value_([array], 1.0)
        assert result.clipped and abs(array[2 * tile + 17]) == 1 == abs(array[7 * tile])
    protect(READ)
    result = gradclip.clip_by_value_([array], 1.0)
    assert not result.clipped
    assert not gradclip.clip_by_value_([array], math.inf).clipped
    print("only two tiles written")
    """
    assert output_of(_prelude(name) + _dedent(code)) == "only two tiles written"


@pytest.mark.parametrize("name", NAMES)
def test_groups_below_their_threshold_are_not_written(name: str) -> None:
    code = """
    grads = list(array.reshape(8, -1))                      # a tile each
    array.reshape(8, -1)[3] = 4.0
    norm = gradclip.global_norm(grads[:1])
    protect(READ, 0, 12), protect(READ, 16, 32)
    result = gradclip.clip_by_norm_(grads, 2 * norm)
    assert result.coefficient.tolist() == [1, 1, 1, 0.5, 1, 1, 1, 1] and (grads[3] == 2).all()
    result = gradclip.clip_by_global_norm_(grads, 1.5 * norm, groups=[0, 1, 0, 2, 1, 3, 4, 5])
    assert result.coefficient.tolist() == [1, 1, 0.75, 1, 1, 1] and (grads[3] == 1.5).all()
    print("one tensor written")
    """
    assert output_of(_prelude(name) + _dedent(code)) == "one tensor written"


@pytest.mark.parametrize("name", NAMES)
def test_no_write_when_something_is_not_finite(name: str) -> None:
    code = """
    for special in (math.nan, math.inf, -math.inf):
        protect(BOTH)
        array[array.size // 2] = special
        protect(READ)
        grads = [array[:10], array[10:]]
        for call in (gradclip.clip_by_global_norm_, gradclip.clip_by_norm_):
            try:
                call(grads, 0.5)
            except gradclip.NonFiniteGradientError as error:
                assert error.entries == [(1, special != special, special == special)], error.entries
            else:
                raise SystemExit("no error")
            result = call(grads, 0.5, nonfinite="skip", grad_scale=8.0)
            assert result.nonfinite == (1,) and not result.clipped
        result = gradclip.clip_by_global_norm_(grads, math.inf, nonfinite="propagate")
        assert result.nonfinite == (1,) and not result.clipped
    print("nothing written")
    """
    assert output_of(_prelude(name) + _dedent(code)) == "nothing written"


def test_no_write_when_an_argument_is_bad() -> None:
    """All or nothing: the bad entry is the last, the bad argument is looked at before the first byte."""
    code = """
    protect(READ)
    head = [array[:1000], array[1000:]]
    frozen = np.ones(3, np.float32)
    frozen.flags.writeable = False
    def stop(sums):
        raise RuntimeError("reduce failed")
    calls = [
        lambda: gradclip.clip_by_global_norm_([*head, np.ones(3, int)], 0.5),
        lambda: gradclip.clip_by_global_norm_([*head, frozen], 0.5),
        lambda: gradclip.clip_by_global_norm_([*head, array[-1:]], 0.5),
        lambda: gradclip.clip_by_norm_([*head, "text"], 0.5),
        lambda: gradclip.clip_by_global_norm_(head, -1.0),
        lambda: gradclip.clip_by_global_norm_(head, 0.5, ord=0),
        lambda: gradclip.clip_by_global_norm_(head, 0.5, groups=[0]),
        lambda: gradclip.clip_by_global_norm_(head, 0.5, groups=[0, 2]),
        lambda: gradclip.clip_by_global_norm_(head, 0.5, grad_scale=0.0),
        lambda: gradclip.clip_by_global_norm_(head, 0.5, nonfinite="no"),
        lambda: gradclip.clip_by_global_norm_(head, 0.5, reduce=stop),
        lambda: gradclip.clip_by_global_norm_(head, 0.5, reduce=lambda sums: [1.0, 2.0]),
        lambda: gradclip.clip_by_global_norm_(head, 0.5, reduce=lambda sums: "text"),
        lambda: gradclip.clip_by_global_norm_(head, 0.5, reduce=lambda sums: sums * math.nan),
        lambda: gradclip.clip_by_value_([*head, np.ones(3, complex)], 0.5),
        lambda: gradclip.clip_by_value_(head, math.nan),
        lambda: gradclip.scale_([*head, np.ones(3, int)], 0.5),
        lambda: gradclip.scale_(head, math.nan),
    ]
    for number, call in enumerate(calls):
        try:
            call()
        except (TypeError, ValueError, ArithmeticError, RuntimeError):
            continue
        raise SystemExit(f"call {number} raised nothing")
    print("nothing written")
    """
    assert output_of(_prelude("float32") + _dedent(code)) == "nothing written"


@pytest.mark.parametrize("isa", ISAS)
def test_nothing_is_read_beyond_either_end(isa: str) -> None:
    """Arrays that begin, and arrays that end, where the accessible memory does."""
    code = """
    protect(NONE, 0, 1), protect(NONE, 31, 32)
    for name in ("float16", "bfloat16", "float32", "float64", "complex64", "complex128"):
        dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
        for n in (*range(1, 70), 127, 255, 300, 511, 1025, 4095, 5000):
            for start in (4096, 31 * 4096 - n * dtype.itemsize):
                array = np.ndarray((n,), dtype, region, start)
                array[...] = 1.0
                for ord in (2, 1, math.inf, 3):
                    norm = gradclip.tensor_norms([array], ord)[0]
                    assert abs(norm - n ** (1 / ord)) < 1e-6 * norm
                gradclip.scale_([array], 0.5)
                assert (array == 0.5).all()
                if dtype.kind != "c":
                    gradclip.clip_by_value_([array], 0.25)
                    assert (array == 0.25).all()
    print("nothing read beyond")
    """
    code = _prelude("uint8") + _dedent(code)
    assert output_of(code, GRADCLIP_ISA=isa) == "nothing read beyond"


def _dedent(code: str) -> str:
    return code.replace("\n    ", "\n")
