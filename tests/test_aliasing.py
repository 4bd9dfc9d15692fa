"""Entries that share memory would be clipped twice: refused exactly when some byte is shared."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gradclip
from matrices import Array

_as_strided = np.lib.stride_tricks.as_strided


def _base() -> Array:
    return np.arange(1.0, 121.0, dtype=np.float32)


_SHARED: dict[str, Callable[[Array], list[Any]]] = {
    "the same object": lambda a: [a, a],
    "two views of everything": lambda a: [a[:], a[:]],
    "one common element": lambda a: [a[:5], a[4:]],
    "one within the other": lambda a: [a, a[50:60]],
    "reversed": lambda a: [a, a[::-1]],
    "transposed": lambda a: [a.reshape(10, 12), a.reshape(10, 12).T],
    "strides 2 and 3": lambda a: [a[::2], a[1::3]],
    "a column and a row": lambda a: [a.reshape(10, 12)[:, 3], a.reshape(10, 12)[7]],
    "columns with one in common": lambda a: [a.reshape(10, 12)[:, :4], a.reshape(10, 12)[:, 3:]],
    "half an element": lambda a: [a[:60], np.ndarray((30,), np.float32, a, 2)],
    "another dtype": lambda a: [a, a.view(np.float64)],
    "the real part of a complex view": lambda a: [a.view(np.complex64), a.view(np.complex64).real],
    "real parts and numbers": lambda a: [a[::2], a.view(np.complex64)[10:]],
    "a diagonal and a row": lambda a: [a[:100:11], a[33:40]],
    "every byte but the first": lambda a: [a[:10], np.ndarray((3,), np.float32, a, 1)],
    "0-d": lambda a: [a.reshape(2, 60), a[77:78].reshape(())],
}

_APART: dict[str, Callable[[Array], list[Any]]] = {
    "halves": lambda a: [a[:60], a[60:]],
    "even and odd": lambda a: [a[::2], a[1::2]],
    "even and odd, reversed": lambda a: [a[::-2], a[::2]],
    "left and right columns": lambda a: [a.reshape(10, 12)[:, :3], a.reshape(10, 12)[:, 3:]],
    "left and right columns, transposed": lambda a: [a.reshape(10, 12)[:, :3].T, a.reshape(10, 12)[:, 3:]],
    "a checkerboard": lambda a: [a.reshape(10, 12)[i::2, j::2] for i in (0, 1) for j in (0, 1)],
    "each column": lambda a: list(a.reshape(10, 12).T),
    "each element": lambda a: [a[i : i + 1] for i in range(119, -1, -1)],
    "real and imaginary parts": lambda a: [a.view(np.complex64).real, a.view(np.complex64).imag],
    "blocks of two and the rest": lambda a: [
        a.reshape(20, 6)[:, 2:4],
        a.reshape(20, 6)[:, :2],
        a.reshape(20, 6)[:, 4:],
    ],
    "a diagonal and what is beside it": lambda a: [a[:100:11], a[1:100:11]],
    "empty views of the same place": lambda a: [a, a[5:5], a[5:5], a.reshape(10, 12)[3:3]],
    "planes of a cube": lambda a: [a.reshape(4, 5, 6)[:, i] for i in range(5)],
    "interleaved with different steps": lambda a: [a[0:60:4], a[1::2], a[2:60:4]],
    "none between": lambda a: [a[:3], None, a[3:], None],
}

_WRITERS: dict[str, Callable[[Any], object]] = {
    "clip_by_global_norm_": lambda grads: gradclip.clip_by_global_norm_(grads, 0.5),
    "clip_by_value_": lambda grads: gradclip.clip_by_value_(grads, 0.5),
    "scale_": lambda grads: gradclip.scale_(grads, 0.5),
    "Plan.scale_": lambda grads: gradclip.Plan(grads).scale_(0.5),
}


@pytest.mark.parametrize("call", _WRITERS.values(), ids=_WRITERS)
@pytest.mark.parametrize("case", _SHARED)
def test_shared_memory_is_refused(case: str, call: Callable[[Any], object]) -> None:
    base = _base()
    before = base.tobytes()
    views = _SHARED[case](base)
    if any(view.dtype.kind == "c" for view in views):
        call = _WRITERS["scale_"]  # a value clip refuses complex numbers for another reason
    for i, j in ((0, 1), (1, 0)):
        other = [np.ones(3), views[i], None, np.ones(2), views[j]]
        with pytest.raises(ValueError, match=r"^grads\[[14]\]: expected .*, got .*grads\[[14]\]") as caught:
            call(other)
        assert set(re.findall(r"grads\[(\d)\]", str(caught.value))) == {"1", "4"}
        with pytest.raises(
            ValueError, match=r"^grads\['[xy]'\]: expected .*, got .*grads\['[xy]'\]"
        ) as caught:
            gradclip.scale_({"x": views[i], "other": np.ones(2), "y": views[j]}, 0.5)
        assert set(re.findall(r"grads\['(\w+)'\]", str(caught.value))) == {"x", "y"}
        assert all((array == 1).all() for array in (other[0], other[3]))
    assert base.tobytes() == before


@pytest.mark.parametrize("case", _SHARED)
def test_shared_memory_can_be_measured(case: str) -> None:
    views = _SHARED[case](_base())
    with np.errstate(all="ignore"):
        alone = [gradclip.tensor_norms([view.copy(order="K")])[0] for view in views]
    norms = gradclip.tensor_norms(views)
    assert norms == pytest.approx(alone, rel=1e-6, nan_ok=True)
    assert gradclip.Plan(views).tensor_norms().tobytes() == norms.tobytes()


@pytest.mark.parametrize("case", _APART)
def test_interleaved_memory_is_accepted(case: str) -> None:
    base = _base()
    views = _APART[case](base)
    expected = _base()
    for view in _APART[case](expected):
        if view is not None:
            view[...] = view * np.float32(0.5)
    gradclip.scale_(views, 0.5)
    assert base.tolist() == expected.tolist()
    gradclip.scale_(views[::-1], 2.0)
    assert base.tolist() == _base().tolist()


_OVERLAPPING_THEMSELVES: dict[str, Callable[[Array], Array]] = {
    "stride 0": lambda a: _as_strided(a, (5,), (0,)),
    "stride 0 on one axis": lambda a: _as_strided(a, (3, 5), (4, 0)),
    "windows": lambda a: _as_strided(a, (10, 4), (4, 4)),
    "windows of step 2": lambda a: _as_strided(a, (10, 4), (8, 4)),
    "rows that share one element": lambda a: _as_strided(a, (5, 4), (12, 4)),
    "less than an element apart": lambda a: _as_strided(a, (5,), (2,)),
    "strides 2 and 3": lambda a: _as_strided(a, (4, 3), (8, 12)),
    "backwards over itself": lambda a: _as_strided(a[50:], (4, 4), (4, -4)),
}
_NOT_OVERLAPPING: dict[str, Callable[[Array], Array]] = {
    "rows side by side": lambda a: _as_strided(a, (5, 3), (12, 4)),
    "strides 2 and 3, short": lambda a: _as_strided(a, (3, 2), (8, 12)),
    "strides 3 and 5": lambda a: _as_strided(a, (5, 3), (12, 20)),
    "one element, stride 0": lambda a: _as_strided(a, (1, 1), (0, 0)),
    "no element, stride 0": lambda a: _as_strided(a, (5, 0), (0, 0)),
    "backwards": lambda a: _as_strided(a[50:], (4, 4), (16, -4)),
}


@pytest.mark.parametrize("call", _WRITERS.values(), ids=_WRITERS)
@pytest.mark.parametrize("case", _OVERLAPPING_THEMSELVES)
def test_internal_overlap_is_refused(case: str, call: Callable[[Any], object]) -> None:
    base, other = _base(), np.ones(3)
    view = _OVERLAPPING_THEMSELVES[case](base)
    with pytest.raises(ValueError, match=r"^grads\[1\]: expected .*, got .*overlap"):
        call([other, view])
    with pytest.raises(ValueError, match=r"^grads\['w'\]: expected .*, got .*overlap"):
        call({"v": other, "w": view})
    assert base.tolist() == _base().tolist()
    assert other.tolist() == [1.0] * 3
    assert gradclip.tensor_norms([view])[0] == pytest.approx(
        np.linalg.norm(view.astype(float).ravel()), rel=1e-6
    )


@pytest.mark.parametrize("case", _NOT_OVERLAPPING)
def test_internal_order_without_overlap_is_accepted(case: str) -> None:
    base = _base()
    expected = base.copy()
    _NOT_OVERLAPPING[case](expected)[...] *= np.float32(0.5)
    gradclip.scale_([_NOT_OVERLAPPING[case](base)], 0.5)
    assert base.tolist() == expected.tolist()


_BYTES = 600


@st.composite
def _layouts(draw: st.DrawFn) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Start, shape and strides in bytes of a float16 array within a buffer of 600 bytes."""
    shape = draw(st.lists(st.integers(1, 4), min_size=0, max_size=3))
    unit = draw(st.sampled_from((1, 2, 4)))
    strides = [unit * draw(st.integers(-30 // unit, 30 // unit)) for _ in shape]
    return draw(st.integers(270, 320)), tuple(shape), tuple(strides)


def _touched(layout: tuple[int, tuple[int, ...], tuple[int, ...]]) -> tuple[set[int], bool]:
    """The bytes of every element, and whether some byte belongs to two elements: by listing them."""
    start, shape, strides = layout
    touched: set[int] = set()
    overlap = False
    for index in np.ndindex(*shape):
        first = start + sum(i * s for i, s in zip(index, strides, strict=True))
        overlap = overlap or bool(touched & {first, first + 1})
        touched |= {first, first + 1}
    return touched, overlap


@given(st.lists(_layouts(), min_size=1, max_size=4))
def test_refused_exactly_when_a_byte_is_shared(
    layouts: list[tuple[int, tuple[int, ...], tuple[int, ...]]],
) -> None:
    buffer = np.zeros(_BYTES, np.uint8)
    views: list[Array] = [
        np.ndarray(shape, np.float16, buffer, start, strides) for start, shape, strides in layouts
    ]
    touched = [_touched(layout) for layout in layouts]
    pairs = {(i, j) for i in range(len(views)) for j in range(i) if touched[i][0] & touched[j][0]}
    itself = {i for i, (_, overlap) in enumerate(touched) if overlap}
    if not pairs and not itself:
        gradclip.scale_(views, 0.5)
        return
    with pytest.raises(ValueError, match=r"overlap|share") as caught:
        gradclip.scale_(views, 0.5)
    named = sorted({int(i) for i in re.findall(r"grads\[(\d)\]", str(caught.value))}, reverse=True)
    assert tuple(named) in pairs or (len(named) == 1 and named[0] in itself), (named, pairs, itself)


def test_many_views_one_of_which_is_shared() -> None:
    base = np.ones(100_000, np.float32)
    views = [base[i : i + 10] for i in range(0, 100_000, 10)]
    order = np.random.default_rng(1).permutation(len(views))
    shuffled = [views[i] for i in order]
    gradclip.scale_(shuffled, 2.0)
    assert (base == 2).all()
    last = 10 * int(order[4321]) + 9  # the last element of entry 4321
    shuffled[1234] = base[last : last + 1]
    with pytest.raises(ValueError, match=r"grads\[(1234|4321)\].*grads\[(1234|4321)\]"):
        gradclip.scale_(shuffled, 2.0)
    assert (base == 2).all()
