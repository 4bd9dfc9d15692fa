"""``accumulate_``: sums of gradients and their norms in one pass, with the bits of two."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import gradclip
from gradclip import _core
from matrices import ISAS, LAYOUTS, NAMES, THREADS, Array, lay_out, placed, values

_SCALES = (1.0, -0.5, 1 / 3, 1e-30)
_SIZES = (0, 1, 2, 15, 16, 17, 127, 128, 129, 2047, 2048, 2049, 4095, 4096, 4097, 8193, 70001)
_WIDTHS = {
    "float32": ("float16", "bfloat16", "float32"),
    "float64": ("float16", "bfloat16", "float32", "float64"),
    "complex64": ("complex64",),
    "complex128": ("complex64", "complex128"),
}
_KINDS = [(into, grad) for into, grads in _WIDTHS.items() for grad in grads]


def _sum_of(into: Array, grad: Array, scale: float) -> Array:
    """As the reduction order has it: each operation in float64, rounded once."""
    wide = np.complex128 if np.iscomplexobj(into) else np.float64
    x, y = into.astype(wide).view(np.float64), grad.astype(wide).view(np.float64)
    with np.errstate(all="ignore"):
        return np.asarray((x + scale * y).view(wide).astype(into.dtype))


def _same(got: Array, expected: Array) -> bool:
    return got.dtype == expected.dtype and got.shape == expected.shape and got.tobytes() == expected.tobytes()


# --- Bits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("into_name", "grad_name"), _KINDS)
def test_the_sum_and_its_norms_are_those_of_two_passes(into_name: str, grad_name: str, isa: str) -> None:
    _core.set_isa(isa)
    for scale in _SCALES:
        into = [values(into_name, n, seed=n) for n in _SIZES]
        grads = [values(grad_name, n, seed=n + 1) for n in _SIZES]
        expected = [_sum_of(x, y, scale) for x, y in zip(into, grads, strict=True)]
        measured = gradclip.accumulate_(into, grads, scale)
        for got, sum_ in zip(into, expected, strict=True):
            assert _same(got, sum_)
        again = gradclip.measure(expected)
        assert np.array_equal(measured.norms, again.norms)
        assert measured.total_norm == again.total_norm
        assert measured.clip_(1.0).coefficient == again.clip_(1.0).coefficient
        for got, clipped in zip(into, expected, strict=True):
            assert _same(got, clipped)


def test_the_sum_is_rounded_once() -> None:
    rng = np.random.default_rng(3)
    into = rng.standard_normal(500).astype(np.float32)
    grads = rng.standard_normal(500).astype(np.float16)
    exact = [Fraction(float(x)) + Fraction(float(y)) for x, y in zip(into, grads, strict=True)]
    gradclip.accumulate_([into], [grads])
    for got, sum_ in zip(into, exact, strict=True):
        around = (np.nextafter(got, np.float32(-np.inf)), got, np.nextafter(got, np.float32(np.inf)))
        assert min(abs(Fraction(float(x)) - sum_) for x in around) == abs(Fraction(float(got)) - sum_)


def test_bits_do_not_depend_on_threads_offsets_or_company() -> None:
    sizes = (3, 100_003, 4096, 300_001)
    before = gradclip.get_num_threads()
    seen = set()
    for threads in THREADS:
        for offset in (0, 4, 20):
            gradclip.set_num_threads(threads)
            into = [placed(values("float32", n, seed=n), offset)[0] for n in sizes]
            grads = [placed(values("bfloat16", n, seed=n + 1), offset // 2)[0] for n in sizes]
            measured = gradclip.accumulate_(into, grads, 0.3)
            seen.add((tuple(measured.norms), measured.total_norm, b"".join(x.tobytes() for x in into)))
    gradclip.set_num_threads(before)
    assert len(seen) == 1
    alone = [values("float32", n, seed=n) for n in sizes]
    norms = [gradclip.accumulate_([x], [values("bfloat16", x.size, seed=x.size + 1)], 0.3) for x in alone]
    assert [measured.total_norm for measured in norms] == list(next(iter(seen))[0])


@pytest.mark.parametrize("into_layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", ["C", "F", "all axes reversed", "every third, reversed"])
def test_any_layout(into_layout: str, grad_layout: str) -> None:
    for into_name, grad_name in (("float32", "bfloat16"), ("complex128", "complex64")):
        x = values(into_name, 33 * 65 * 3, seed=1).reshape(33, 65, 3)
        y = values(grad_name, x.size, seed=2).reshape(x.shape)
        into, memory = lay_out(into_layout, x)
        grad, _ = lay_out(grad_layout, y)
        outside = memory.tobytes()
        expected = _sum_of(x.ravel(), y.ravel(), 0.7).reshape(x.shape)
        measured = gradclip.accumulate_([into], [grad], 0.7)
        assert _same(into.copy(), expected.astype(into.dtype))
        assert measured.norms[0] == gradclip.tensor_norms([into])[0]
        into[...] = x  # and nothing else was written
        assert memory.tobytes() == outside


def test_a_broadcast_gradient_is_only_read() -> None:
    into = np.zeros((4, 3), np.float32)
    gradclip.accumulate_([into], [np.broadcast_to(np.array([1, 2, 3], np.float32), (4, 3))])
    assert into.tolist() == [[1, 2, 3]] * 4


def test_as_pytorch_adds() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        generator = torch.Generator().manual_seed(1)
        theirs = [torch.randn(50, 70, generator=generator) for _ in range(3)]
        grads = [torch.randn(50, 70, generator=generator).to(dtype) for _ in range(3)]
        ours = [tensor.clone() for tensor in theirs]
        versions = [tensor._version for tensor in ours]
        measured = gradclip.accumulate_(ours, grads)
        for a, b, grad in zip(theirs, ours, grads, strict=True):
            assert torch.equal(a.add_(grad), b)
        norm = torch.nn.utils.get_total_norm(theirs)
        assert measured.total_norm == pytest.approx(norm.item(), rel=1e-6)
        assert all(tensor._version > version for tensor, version in zip(ours, versions, strict=True))


# --- Entries --------------------------------------------------------------------------------------------


def test_names_and_what_is_missing() -> None:
    into = {"w": np.ones(3, np.float32), "frozen": None, "b": np.ones(2)}
    grads = {"frozen": None, "b": None, "w": np.full(3, 2, ml_dtypes.bfloat16)}  # in any order
    measured = gradclip.accumulate_(into, grads)
    assert measured.named_norms() == {"w": math.sqrt(27), "frozen": 0.0, "b": math.sqrt(2)}
    assert measured.names == ("w", "frozen", "b")
    assert measured.missing == ("frozen",)
    assert into["w"] is not None
    assert into["w"].tolist() == [3.0] * 3
    assert measured.scale_(2.0).named_norms() == measured.named_norms()
    assert into["w"].tolist() == [6.0] * 3
    with pytest.raises(ValueError, match="measure again"):
        measured.clip_(1.0)


def test_generators() -> None:
    into = [np.zeros(2, np.float32), np.zeros(3, np.float32)]
    measured = gradclip.accumulate_((x for x in into), (np.ones(x.shape, np.float16) for x in into))
    assert measured.total_norm == math.sqrt(5)


def test_of_nothing_it_warns() -> None:
    for into in ([], [None], [np.ones(4)]):
        with pytest.warns(UserWarning, match="^grads: expected gradients to add, got none") as caught:
            measured = gradclip.accumulate_(into, [None] * len(into))
        assert measured.total_norm == gradclip.global_norm(into)
        assert caught[0].filename == __file__


def test_norms_over_processes() -> None:
    into, seen = [np.zeros(2, np.float32), np.zeros(1, np.float32)], []

    def reduce(sums: Array) -> Array:
        seen.append(sums.tolist())
        assert into[0].tolist() == [3.0, 4.0]  # the new ones
        return sums + 144.0

    measured = gradclip.accumulate_(into, [np.array([3, 4], np.float32), None], reduce=reduce)
    assert seen == [[25.0]]
    assert measured.total_norm == 13.0
    assert measured.norms.tolist() == [5.0, 0.0]
    assert measured.clip_(1.3).coefficient == pytest.approx(0.1)


def test_reduce_is_checked_before_anything_is_added() -> None:
    def of_magnitudes(sums: Array) -> Array:
        raise AssertionError

    of_magnitudes.ord = 1  # type: ignore[attr-defined]
    into = [np.zeros(2, np.float32)]
    for bad, error in ((of_magnitudes, ValueError), (3, TypeError)):
        with pytest.raises(error, match=r"^reduce: expected"):
            gradclip.accumulate_(into, [np.ones(2, np.float32)], reduce=bad)  # type: ignore[arg-type]
        assert not into[0].any()


def test_a_scale_of_0_adds_nothing() -> None:
    into = [np.array([3.0, 4.0], np.float32)]
    measured = gradclip.accumulate_(into, [np.array([np.nan, np.inf], np.float32)], scale=0)
    assert (measured.total_norm, into[0].tolist()) == (5.0, [3.0, 4.0])


def test_gradients_that_require_grad_are_read() -> None:
    into = [torch.zeros(2)]
    gradclip.accumulate_(into, [torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))])
    assert into[0].tolist() == [1.0, 1.0]


# --- What is not finite ---------------------------------------------------------------------------------


def test_infinities_and_nan_are_added_and_reported() -> None:
    into = [np.ones(5000, np.float32), np.ones(3, np.float32), np.full(2, 3e38, np.float32)]
    grads: list[Array] = [np.ones(5000, np.float16), np.ones(3, np.float16), np.full(2, 3e38, np.float32)]
    grads[0][4500] = np.inf
    grads[1][1] = np.nan
    measured = gradclip.accumulate_(into, grads)
    assert measured.nonfinite == (0, 1, 2)  # the last by overflow
    assert np.isinf(into[2]).all()
    assert into[0][[0, 4500]].tolist() == [2.0, np.inf]
    assert math.isnan(measured.total_norm)
    memory = [x.tobytes() for x in into]
    with pytest.raises(gradclip.NonFiniteGradientError, match=r"into\[1\]"):
        measured.clip_(1.0)
    assert [x.tobytes() for x in into] == memory
    measured.clip_(1.0, nonfinite="zero")  # another choice may follow
    assert not any(x.any() for x in into)


def test_large_and_tiny_sums_have_their_norms() -> None:
    for size in (1e30, 1e-30):
        into = [np.full(4, size, np.float32)]
        measured = gradclip.accumulate_(into, [np.full(4, size, np.float32)])
        assert measured.total_norm == pytest.approx(4 * size, rel=1e-6)


# --- Bad input ------------------------------------------------------------------------------------------

_TWO = (np.ones((3, 4), np.float32), np.ones(2, np.float64))
_TWO_GRADS = (np.ones((3, 4), np.float16), np.ones(2, np.float32))


@pytest.mark.parametrize(
    ("into", "grads", "options", "error", "message"),
    [
        ([np.ones(2, np.float16)], [np.ones(2, np.float16)], {}, TypeError,
         "into[0]: expected an accumulator of dtype float32, float64, complex64 or complex128, got float16"),
        ({"w": np.ones(2, ml_dtypes.bfloat16)}, {"w": np.ones(2, np.float16)}, {}, TypeError,
         "into['w']: expected an accumulator of dtype float32"),
        ([np.ones(2, int)], [np.ones(2)], {}, TypeError, "into[0]: expected dtype float16"),
        (_TWO, [_TWO_GRADS[0], np.ones(2, int)], {}, TypeError, "grads[1]: expected dtype float16"),
        (_TWO, [np.ones((3, 4)), _TWO_GRADS[1]], {}, TypeError,
         "grads[0]: expected a dtype no wider than float32, as into[0] has, got float64"),
        ([np.ones(2, np.complex64)], [np.ones(2, np.complex128)], {}, TypeError,
         "grads[0]: expected a dtype no wider than complex64, as into[0] has, got complex128"),
        ([np.ones(2, np.float64)], [np.ones(2, np.complex64)], {}, TypeError,
         "grads[0]: expected a real dtype, as into[0] has, got complex64"),
        ([np.ones(2, np.complex64)], [np.ones(2, np.float32)], {}, TypeError,
         "grads[0]: expected a complex dtype, as into[0] has, got float32"),
        (_TWO, [np.ones((4, 3), np.float16), _TWO_GRADS[1]], {}, ValueError,
         "grads[0]: expected shape (3, 4), as into[0] has, got (4, 3)"),
        (_TWO, _TWO_GRADS[:1], {}, ValueError,
         "grads: expected 2 arrays, one for each entry of into, got 1"),
        ([_TWO[0], None], _TWO_GRADS, {}, TypeError,
         "grads[1]: expected None, as into[1] is, got an array"),
        ({"w": np.ones(2)}, [np.ones(2)], {}, TypeError, "grads: expected a mapping of names, as into is"),
        ({"w": np.ones(2)}, {"v": np.ones(2)}, {}, ValueError,
         "grads: expected an entry for each of the entries of into, got none for 'w'"),
        (np.ones(2), [np.ones(2)], {}, TypeError, "into: expected a sequence or a mapping of arrays"),
        ([np.ones(2)], np.ones(2), {}, TypeError, "grads: expected a sequence or a mapping of arrays"),
        ([[np.ones(2)]], [[np.ones(2)]], {}, TypeError, "into[0]: expected"),
        (_TWO, _TWO_GRADS, {"scale": math.nan}, ValueError, "scale: expected a finite number, got nan"),
        (_TWO, _TWO_GRADS, {"scale": -math.inf}, ValueError, "scale: expected a finite number, got -inf"),
        (_TWO, _TWO_GRADS, {"scale": "half"}, TypeError, "scale: expected a real number, got str"),
        (_TWO, _TWO_GRADS, {"scale": None}, TypeError, "scale: expected a real number, got None"),
    ],
)  # fmt: skip
def test_bad_input_is_named(
    into: Any, grads: Any, options: Any, error: type[Exception], message: str
) -> None:
    arrays = [x for x in (into.values() if isinstance(into, dict) else into) if isinstance(x, np.ndarray)]
    before = [x.tobytes() for x in arrays]
    with pytest.raises(error, match="^" + re.escape(message)):
        gradclip.accumulate_(into, grads, **options)
    assert [x.tobytes() for x in arrays] == before


def test_memory_that_is_shared_or_cannot_be_written() -> None:
    memory = np.arange(20.0)
    tail = np.arange(3.0)
    frozen = np.arange(5.0)
    frozen.flags.writeable = False
    leaf = torch.zeros(5, requires_grad=True)
    cases: tuple[tuple[Callable[[], object], str], ...] = (
        (lambda: gradclip.accumulate_([memory], [memory]), "into[0]: expected memory of its own, got memory "
         "shared with grads[0]"),
        (lambda: gradclip.accumulate_([tail, memory[:10]], [np.ones(3), memory[5:15]]),
         "into[1]: expected memory of its own, got memory shared with grads[1]"),
        (lambda: gradclip.accumulate_([memory, memory], [np.ones(20), np.ones(20)]),
         "into[1]: expected memory of its own, got memory shared with into[0]"),
        (lambda: gradclip.accumulate_([np.broadcast_to(memory[:1], 5)], [np.ones(5)]), "into[0]: expected"),
        (lambda: gradclip.accumulate_([memory[:5], frozen], [np.ones(5), np.ones(5)]),
         "into[1]: expected writable memory, got a read-only array"),
        (lambda: gradclip.accumulate_([memory[:5], leaf], [np.ones(5), np.ones(5)]), "into[1]: expected"),
    )  # fmt: skip
    before = memory.tobytes(), tail.tobytes()
    for call, message in cases:
        with pytest.raises((ValueError, TypeError), match="^" + re.escape(message)):
            call()
        assert (memory.tobytes(), tail.tobytes()) == before
    # Interleaved arrays share nothing, and the same gradient may be added to two.
    gradclip.accumulate_([memory[::2]], [memory[1::2]])
    gradclip.accumulate_([tail, np.ones(3)], [frozen[:3], frozen[:3]])
    assert tail.tolist() == [0.0, 2.0, 4.0]


def test_an_array_on_a_gpu_is_refused() -> None:
    class OnGpu:
        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 0

        def __dlpack__(self, **_: object) -> object:
            raise AssertionError("nobody should ask for this")

    for into, grads, name in (([OnGpu()], [np.ones(2)], "into"), ([np.ones(2)], [OnGpu()], "grads")):
        with pytest.raises(ValueError, match=rf"^{name}\[0\]: expected .*CPU"):
            gradclip.accumulate_(into, grads)


def test_every_dtype_is_taken_or_refused() -> None:
    for into_name in NAMES:
        for grad_name in NAMES:
            into, grads = [values(into_name, 5, seed=1)], [values(grad_name, 5, seed=2)]
            if (into_name, grad_name) in _KINDS:
                gradclip.accumulate_(into, grads)
            else:
                with pytest.raises(TypeError, match=r"^(into|grads)\[0\]: expected a"):
                    gradclip.accumulate_(into, grads)
