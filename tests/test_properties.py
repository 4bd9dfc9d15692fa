"""Properties over drawn dtypes, layouts, sizes around every boundary and exponents of the whole range."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import gradclip
import order_model
from exact import exact_norm, relative_error, scaled
from gradclip import _core
from matrices import (
    COMPLEX_NAMES,
    EXPONENTS,
    ISAS,
    LAYOUTS,
    NAMES,
    REAL_NAMES,
    ROUNDING,
    SLOW_ORDS,
    TOLERANCE,
    Array,
    lay_out,
    sizes,
    values,
)

_SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def arrays(draw: st.DrawFn, names: tuple[str, ...] = NAMES) -> tuple[str, Array]:
    """A 1-D array of pieces, each with its own window of exponents out of the whole range."""
    name = draw(st.sampled_from(names))
    low, high = EXPONENTS[name]
    pieces = []
    for _ in range(draw(st.integers(1, 3))):
        first = draw(st.integers(low, high - 1))
        last = min(high - 1, first + draw(st.sampled_from((0, 1, 5, 30, 2100))))
        piece = values(name, draw(st.sampled_from(sizes(name))), draw(_SEEDS), first, last)
        if draw(st.booleans()):
            piece[:: draw(st.integers(1, 9))] = 0
        pieces.append(piece)
    return name, np.concatenate(pieces)


@st.composite
def laid_out(draw: st.DrawFn, names: tuple[str, ...] = NAMES) -> tuple[str, Array, Array, Array]:
    """A view in a drawn layout, the buffer that it lies in, and a copy of its elements."""
    name, flat = draw(arrays(names))
    columns = draw(st.sampled_from((1, 2, 7, 16, 33)))
    planes = draw(st.integers(1, 3))
    rows = max(1, flat.size // (columns * planes))
    cube = np.resize(flat, (planes, rows, columns)) if flat.size else flat.reshape(1, 1, 0)
    view, buffer = lay_out(draw(st.sampled_from(sorted(LAYOUTS))), cube)
    return name, view, buffer, cube


@given(arrays(), st.sampled_from((2, 1, math.inf)), st.sampled_from(ISAS))
def test_norms_follow_the_written_order(drawn: tuple[str, Array], ord: float, isa: str) -> None:
    name, array = drawn
    _core.set_isa(isa)
    measured = gradclip.tensor_norms([array], ord)[0]
    expected = order_model.tensor_norm(array, ord)
    if ord == 2 or name not in COMPLEX_NAMES:
        assert measured == expected
    else:
        assert relative_error(measured, exact_norm(array, ord)) < 1e-13


@given(arrays(), st.sampled_from((2, 1, math.inf)))
def test_norms_are_right(drawn: tuple[str, Array], ord: float) -> None:
    name, array = drawn
    assert relative_error(gradclip.tensor_norms([array], ord)[0], exact_norm(array, ord)) < TOLERANCE[name]


@given(arrays(), st.sampled_from(SLOW_ORDS))
def test_other_norms_are_right(drawn: tuple[str, Array], ord: float) -> None:
    name, array = drawn
    array = array[:3000]
    error = relative_error(gradclip.tensor_norms([array], ord)[0], exact_norm(array, ord))
    assert error < TOLERANCE[name] * max(1, 1 / ord)


@given(st.lists(arrays(), max_size=6), st.sampled_from((2, 1, math.inf)), st.randoms(use_true_random=False))
def test_the_global_norm_is_right_and_knows_no_order(
    drawn: list[tuple[str, Array]], ord: float, random: Any
) -> None:
    grads = [array for _, array in drawn]
    total = gradclip.global_norm(grads, ord)
    tolerance = max((TOLERANCE[name] for name, _ in drawn), default=0.0)
    assert relative_error(total, exact_norm(grads, ord)) <= tolerance
    random.shuffle(grads)
    assert gradclip.global_norm(grads, ord) == total
    if all(array.dtype.kind != "c" for array in grads) and not math.isinf(ord):
        assert total == order_model.global_norm(grads, ord)


@given(laid_out(), st.sampled_from((2, 1, math.inf)), st.floats(1e-6, 1.5), st.sampled_from(ISAS))
def test_a_clip_writes_the_product_and_nothing_else(
    drawn: tuple[str, Array, Array, Array], ord: float, share: float, isa: str
) -> None:
    name, view, buffer, original = drawn
    _core.set_isa(isa)
    before = buffer.tobytes()
    total = gradclip.global_norm([view], ord)
    max_norm = total * share
    if max_norm == 0 or not math.isfinite(total):
        return
    result = gradclip.clip_by_global_norm_([view], max_norm, ord)
    assert result.total_norm == total
    if total <= max_norm:
        assert result.coefficient == 1.0
        assert not result.clipped
        assert buffer.tobytes() == before
        return
    assert result.clipped
    assert result.coefficient == max_norm / total
    assert view.tobytes() == scaled(original, float(result.coefficient)).tobytes()
    view[...] = original
    assert buffer.tobytes() == before, f"{name}: bytes outside the array were written"


@given(st.lists(st.sampled_from(NAMES), min_size=1, max_size=5), _SEEDS, st.floats(0.1, 100.0))
def test_the_norm_is_within_the_threshold_and_a_second_clip_does_next_to_nothing(
    names: list[str], seed: int, max_norm: float
) -> None:
    grads = [values(name, 1 + (seed >> i) % 6000, seed + i, -2, 9) for i, name in enumerate(names)]
    slack = max(1e-6, *(ROUNDING[name] for name in names))
    gradclip.clip_by_global_norm_(grads, max_norm)
    assert exact_norm(grads) <= max_norm * (1 + slack)
    once = [grad.copy() for grad in grads]
    again = gradclip.clip_by_global_norm_(grads, max_norm)
    assert float(again.coefficient) >= 1 - 2 * slack
    if again.coefficient == 1.0:
        assert [grad.tobytes() for grad in grads] == [grad.tobytes() for grad in once]


@given(laid_out(REAL_NAMES), st.floats(2.0**-20, 2.0**20), st.sampled_from(ISAS))
def test_a_value_clip(drawn: tuple[str, Array, Array, Array], limit: float, isa: str) -> None:
    name, view, buffer, original = drawn
    _core.set_isa(isa)
    before = buffer.tobytes()
    result = gradclip.clip_by_value_([view], limit)
    wide, was = view.astype(np.float64), original.astype(np.float64)
    assert (np.abs(wide) <= limit).all()
    inside = np.abs(was) <= limit
    assert (wide[inside] == was[inside]).all()
    assert (np.sign(wide) == np.sign(was)).all()
    bound = np.abs(wide[~inside])
    assert bound.size == 0 or (bound == bound.flat[0]).all()
    assert result.clipped == bool((~inside).any())
    view[...] = original
    assert buffer.tobytes() == before, f"{name}: bytes outside the array were written"


@given(laid_out(), st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(ISAS))
def test_a_scale_by_any_number(drawn: tuple[str, Array, Array, Array], factor: float, isa: str) -> None:
    _, view, _, original = drawn
    _core.set_isa(isa)
    gradclip.scale_([view], factor)
    expected = original if factor == 1 else scaled(original, factor)
    assert view.tobytes() == expected.tobytes()


@given(
    arrays(), st.integers(0, 2**31), st.sampled_from((math.nan, math.inf, -math.inf)), st.sampled_from(ISAS)
)
def test_one_special_element_anywhere(drawn: tuple[str, Array], place: int, special: float, isa: str) -> None:
    _, array = drawn
    if array.size == 0:
        return
    _core.set_isa(isa)
    array[place % array.size] = special
    for ord in (2, 1, math.inf):
        norm = gradclip.tensor_norms([array], ord)[0]
        assert math.isnan(norm) if math.isnan(special) else norm == math.inf
    before = array.tobytes()
    result = gradclip.clip_by_norm_([array], 1.0, nonfinite="skip")
    assert result.nonfinite == (0,)
    assert array.tobytes() == before
