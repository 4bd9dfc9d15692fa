"""A second array beside each gradient: weight regularisation, and the update of what training began from."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradclip
from exact import pair_model, written_beside, written_from
from gradclip import _core
from matrices import (
    COMPLEX_NAMES,
    EXPONENTS,
    ISAS,
    LAYOUTS,
    NAMES,
    PART,
    REAL_NAMES,
    THREADS,
    Array,
    lay_out,
    placed,
    values,
)

_L2, _L1 = 0.37, 0.011
# What frameworks have side by side.
_KINDS = [(a, b) for a in REAL_NAMES for b in REAL_NAMES]
_KINDS += [(a, b) for a in COMPLEX_NAMES for b in COMPLEX_NAMES]
_SIZES = (0, 1, 2, 7, 8, 9, 63, 64, 65, 2047, 2048, 2049, 4095, 4097, 70001)


def _l1_of(name: str) -> float:
    return 0.0 if name in PART else _L1


def _same(got: Array, expected: Array) -> bool:
    return got.dtype == expected.dtype and got.shape == expected.shape and got.tobytes() == expected.tobytes()


# --- Bits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("x_name", "y_name"), _KINDS)
def test_it_is_the_norm_of_the_float64_tensor(x_name: str, y_name: str, isa: str) -> None:
    _core.set_isa(isa)
    l1 = _l1_of(x_name)
    grads = [values(x_name, n, seed=n) for n in _SIZES]
    params = [values(y_name, n, seed=n + 1) for n in _SIZES]
    wide = [pair_model(x, y, _L2, l1) for x, y in zip(grads, params, strict=True)]
    for ord in (2, 1, math.inf, 3):
        measured = gradclip.measure(grads, ord, params=params, l2=_L2, l1=l1)
        assert np.array_equal(measured.norms, gradclip.tensor_norms(wide, ord)), ord
        assert measured.total_norm == gradclip.global_norm(wide, ord)
    squares = gradclip.global_norm([y.astype(wide[0].dtype) for y in params]) ** 2
    magnitudes = gradclip.global_norm([y.astype(wide[0].dtype) for y in params], 1) if l1 else 0.0
    assert measured.penalty == pytest.approx(0.5 * _L2 * squares + l1 * magnitudes, rel=1e-14)
    for rounding in ("nearest", "down"):
        memory = [x.copy() for x in grads]
        result = gradclip.clip_by_global_norm_(
            memory,
            1.0,
            params=params,
            l2=_L2,
            l1=l1,
            rounding=rounding,
        )
        assert result.clipped
        assert result.penalty == measured.penalty
        for got, z, x in zip(memory, wide, grads, strict=True):
            assert _same(got, written_from(z, result.coefficient, x.dtype, rounding))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NAMES)
def test_a_difference_is_moved_towards_its_base(name: str, isa: str) -> None:
    _core.set_isa(isa)
    news = [values(name, n, seed=n) for n in _SIZES]
    bases = [values(name, n, seed=n + 1) for n in _SIZES]
    wide = [pair_model(x, y, -1.0) for x, y in zip(news, bases, strict=True)]
    for rounding in ("nearest", "down"):
        memory = [x.copy() for x in news]
        result = gradclip.clip_difference_(memory, bases, 1.0, rounding=rounding)
        assert np.array_equal(result.norms, gradclip.tensor_norms(wide))
        assert result.penalty == 0.0
        for got, z, y in zip(memory, wide, bases, strict=True):
            assert _same(got, written_beside(z, result.coefficient, y, rounding))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["float16", "float32", "float64"])
def test_a_difference_among_the_smallest_numbers(name: str, isa: str) -> None:
    """Subnormal numbers, zeros and the smallest normal ones beside each other."""
    _core.set_isa(isa)
    lowest = EXPONENTS[name][0]
    digits = {"float16": 10, "float32": 23, "float64": 52}[name]
    for low in (lowest, lowest + digits - 3, lowest + digits + 2):
        new, base = (values(name, 1500, seed=seed, low=low, high=low + 5) for seed in (1, 2))
        base[:200:3], new[100:300:7], new[300:320] = 0, 0, base[300:320]
        z = pair_model(new, base, -1.0)
        limit = 0.4 * gradclip.global_norm([z])
        memory = new.copy()
        result = gradclip.clip_difference_([memory], [base], limit, rounding="down")
        assert _same(memory, written_beside(z, result.coefficient, base, "down"))


def test_bits_do_not_depend_on_threads_offsets_or_company() -> None:
    sizes = (3, 100_003, 2048, 300_001)
    grads = [values("float32", n, seed=n) for n in sizes]
    params = [values("bfloat16", n, seed=n + 1) for n in sizes]
    alone = [gradclip.measure([x], params=[y], l2=_L2).total_norm for x, y in zip(grads, params, strict=True)]
    before = gradclip.get_num_threads()
    seen = set()
    for threads in THREADS:
        for offset in (0, 4, 20):
            gradclip.set_num_threads(threads)
            moved = [placed(x, offset)[0] for x in grads]
            beside = [placed(y, offset // 2)[0] for y in params]
            result = gradclip.clip_by_global_norm_(moved, 2.0, params=beside, l2=_L2, l1=_L1)
            measured = gradclip.measure(grads, params=beside, l2=_L2)
            assert measured.norms.tolist() == alone
            seen.add((result.total_norm, result.penalty, b"".join(x.tobytes() for x in moved)))
    gradclip.set_num_threads(before)
    assert len(seen) == 1


@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize(
    "y_layout", ["C", "F", "all axes reversed", "every third, reversed", "field of a record"]
)
def test_both_are_read_in_the_order_of_the_gradient(x_layout: str, y_layout: str) -> None:
    shape = (7, 11, 33)
    x, y = values("float32", shape, seed=1), values("float64", shape, seed=2)
    wide = pair_model(x, y, _L2, _L1)
    grad, around = lay_out(x_layout, x)
    param, beside = lay_out(y_layout, y)
    untouched = beside.copy()
    measured = gradclip.measure([grad], params=[param], l2=_L2, l1=_L1)
    assert measured.total_norm == gradclip.global_norm([lay_out(x_layout, wide)[0]])
    expected = lay_out(x_layout, written_from(wide, 1 / measured.total_norm, x.dtype))[1]
    measured.clip_(1.0)
    assert around.tobytes() == expected.tobytes()
    assert beside.tobytes() == untouched.tobytes()


@pytest.mark.parametrize("groups", ["row", "sample", "unit", "unit_last"])
@pytest.mark.parametrize("layout", ["C", "F", "every third, reversed", "padded everywhere, reversed"])
def test_rows_of_pairs(layout: str, groups: str) -> None:
    shape = (5, 9, 601)
    x, y = values("float32", shape, seed=1), values("float32", shape, seed=2)
    wide = pair_model(x, y, _L2, _L1)
    other, beside = values("float16", (5, 3), seed=3), values("float32", (5, 3), seed=4)
    wide_other = pair_model(other, beside, _L2, _L1)
    grads = [lay_out(layout, x)[0], None, other.copy()]
    params = [lay_out("axes 1 2 0", y)[0], None, beside]
    expected = gradclip.measure([lay_out(layout, wide)[0], None, wide_other], groups=groups)
    limits = expected.group_norms / np.linspace(0.5, 3, len(expected.group_norms))
    result = gradclip.clip_by_global_norm_(grads, limits, groups=groups, params=params, l2=_L2, l1=_L1)
    assert np.array_equal(result.group_norms, expected.group_norms)
    assert result.total_norm == expected.total_norm
    assert np.array_equal(result.norms, expected.norms)
    rows: Any = np.asarray(result.coefficient)
    names: Any = result.group_names
    rows = [rows] * 3 if groups == "sample" else names.split(rows)
    for array, coefficients, z in ((grads[0], rows[0], wide), (grads[2], rows[2], wide_other)):
        assert array is not None
        axis = -1 if groups == "unit_last" else 0
        written = zip(np.moveaxis(array, axis, 0), np.moveaxis(z, axis, 0), coefficients, strict=True)
        for row, its_z, coefficient in written:
            assert _same(row.copy(), written_from(its_z, coefficient, array.dtype))


def test_groups_by_label_and_names() -> None:
    grads = {"a": np.array([3.0]), "b": None, "c": np.array([4.0]), "d": np.array([1.0])}
    params = {"d": np.array([11.0]), "c": np.array([-4.0]), "b": None, "a": np.array([3.0])}
    result = gradclip.clip_by_global_norm_(
        grads, {"x": 3.0, "y": None}, groups={"a": "x", "b": "x", "c": "x", "d": "y"}, params=params, l2=1.0
    )
    assert result.named_norms() == {"a": 6.0, "b": 0.0, "c": 0.0, "d": 12.0}
    assert result.named_group_norms() == {"x": 6.0, "y": 12.0}
    assert result.penalty == (9 + 16 + 121) / 2
    left = [grad for grad in grads.values() if grad is not None]
    assert [grad.tolist() for grad in left] == [[3.0], [0.0], [12.0]]
    assert result.missing == ("b",)
    assert "penalty" in result.as_dict()


@given(data=st.data(), seed=st.integers(0, 1000))
def test_any_shape(data: st.DataObject, seed: int) -> None:
    x_name, y_name = data.draw(st.sampled_from(_KINDS))
    shape = tuple(data.draw(st.lists(st.integers(0, 40), min_size=0, max_size=4)))
    x, y = values(x_name, shape, seed=seed), values(y_name, shape, seed=seed + 1)
    flips = tuple(slice(None, None, data.draw(st.sampled_from((1, -1, 2)))) for _ in shape)
    order = data.draw(st.permutations(range(len(shape))))
    x, y = np.asarray(x[flips]).transpose(order), np.asarray(y[flips]).transpose(order)
    y = y.copy(data.draw(st.sampled_from("CFK")))
    l1 = _l1_of(x_name)
    wide = pair_model(x, y, _L2, l1)
    measured = gradclip.measure([x], params=[y], l2=_L2, l1=l1)
    assert measured.total_norm == gradclip.global_norm([_in_order(x, wide)])
    measured.clip_(1.0)
    assert _same(x.copy("C"), written_from(wide, min(1.0, 1 / (measured.total_norm or 1)), x.dtype))


def _in_order(x: Array, wide: Array) -> Array:
    """The elements of ``wide`` in the order of the addresses of ``x``."""
    axes = sorted((a for a in range(x.ndim) if x.shape[a] > 1), key=lambda a: -abs(x.strides[a]))
    rest = [a for a in range(x.ndim) if a not in axes]
    turned = wide.transpose(axes + rest)
    turns = tuple(slice(None, None, -1 if x.strides[a] < 0 else 1) for a in axes)
    return np.ascontiguousarray(turned[turns]).reshape(-1)


# --- What is written ------------------------------------------------------------------------------------


def test_regularisation_is_written_also_where_nothing_is_clipped() -> None:
    x, y = values("float32", 5000, seed=1), values("float32", 5000, seed=2)
    wide = pair_model(x, y, _L2, _L1)
    for max_norm in (1e9, math.inf):
        memory = [x.copy()]
        result = gradclip.clip_by_global_norm_(memory, max_norm, params=[y], l2=_L2, l1=_L1)
        assert not result.clipped
        assert result.coefficient == 1.0
        assert _same(memory[0], wide.astype(np.float32))


def test_without_factors_it_is_the_plain_clip() -> None:
    x, y = values("float32", 500, seed=1), np.full(500, np.nan, np.float32)
    left, right = x.copy(), x.copy()
    result = gradclip.clip_by_global_norm_([left], 1.0, params=[y], l2=0.0, l1=0.0)
    plain = gradclip.clip_by_global_norm_([right], 1.0)
    assert (result.total_norm, result.penalty) == (plain.total_norm, 0.0)
    assert _same(left, right)
    # A term by 0 is none: what is not multiplied may be anything.
    assert gradclip.measure(
        [np.ones(2)], params=[np.array([np.inf, -2.0])], l1=0.5
    ).total_norm == pytest.approx(math.hypot(1.5, 0.5))


def test_a_difference_that_is_short_is_not_touched() -> None:
    new, base = np.array([2.0, -1.0]), np.array([1.0, -1.0])
    new.flags.writeable = True
    before = new.tobytes()
    result = gradclip.clip_difference_([new], [base], 1.0)
    assert (result.total_norm, result.clipped, result.coefficient) == (1.0, False, 1.0)
    assert new.tobytes() == before
    # Where one group is clipped, the others are not touched either.
    news, bases = [np.array([0.1]), np.array([7.0])], [np.array([0.3]), np.array([3.0])]
    gradclip.clip_difference_(news, bases, 2.0, groups="tensor")
    assert [n.tolist() for n in news] == [[0.1], [5.0]]


@pytest.mark.parametrize("scale", [1024.0, 3.0])
def test_a_loss_scale_is_divided_out(scale: float) -> None:
    x, y = values("float16", 3000, seed=1), values("float32", 3000, seed=2)
    wide = pair_model(x, y, _L2 * scale, _L1 * scale)
    memory = [x.copy()]
    result = gradclip.clip_by_global_norm_(memory, 1.0, params=[y], l2=_L2, l1=_L1, grad_scale=scale)
    assert result.total_norm == gradclip.measure([wide], grad_scale=scale).total_norm
    assert _same(memory[0], written_from(wide, result.coefficient / scale, x.dtype))
    assert result.penalty == gradclip.measure([x], params=[y], l2=_L2, l1=_L1).penalty


def test_reduce_gets_the_sums_of_what_is_made() -> None:
    seen = []

    def reduce(sums: Array) -> Array:
        seen.append(sums.tolist())
        return 4 * sums

    new, base = [np.array([4.0, 4.0])], [np.array([1.0, 0.0])]
    result = gradclip.clip_difference_(new, base, 5.0, reduce=reduce)
    assert seen == [[25.0]]
    assert (result.total_norm, result.coefficient) == (10.0, 0.5)
    assert new[0].tolist() == [2.5, 2.0]


def test_a_policy_decides_between() -> None:
    class Half:
        def thresholds(self, measured: gradclip.Measured) -> float:
            return measured.total_norm / 2

    grads, params = [np.array([1.0, 2.0])], [np.array([2.0, 2.0])]
    result = gradclip.clip_by_global_norm_(grads, Half(), params=params, l2=1.0)
    assert (result.total_norm, grads[0].tolist()) == (5.0, [1.5, 2.0])


def test_scaling_what_was_measured() -> None:
    grads, params = [np.array([1.0, 2.0]), np.array([1.0])], [np.array([2.0, 2.0]), np.array([5.0])]
    measured = gradclip.measure(grads, groups="tensor", params=params, l2=1.0)
    assert measured.group_norms.tolist() == [5.0, 6.0]
    measured.scale_([2.0, None])
    assert [g.tolist() for g in grads] == [[6.0, 8.0], [6.0]]
    with pytest.raises(ValueError, match="clipped or"):
        measured.clip_(1.0)


def test_a_plan_takes_them_too() -> None:
    new, base = [np.array([4.0, 4.0])], [np.array([1.0, 0.0])]
    plan = gradclip.Plan(new)
    assert plan.measure(params=base, l2=1.0).total_norm == math.hypot(5, 4)
    assert plan.clip_difference_(base, 2.5).total_norm == 5.0
    assert new[0].tolist() == [2.5, 2.0]
    assert plan.clip_by_norm_(100.0, params=base, l2=0.5).penalty == 0.25
    assert new[0].tolist() == [3.0, 2.0]
    assert plan.clip_by_global_norm_(100.0, params=base, l1=1.0).penalty == 1.0
    assert new[0].tolist() == [4.0, 2.0]


# --- Right where NumPy overflows ------------------------------------------------------------------------


def test_what_is_beyond_float32_between_is_right() -> None:
    x, y = np.array([3e38, -3e38], np.float32), np.array([3e38, 3e38], np.float32)
    with np.errstate(over="ignore"):
        assert np.isinf(x + np.float32(1) * y).any()
    memory = [x.copy()]
    result = gradclip.clip_by_global_norm_(memory, 1e38, params=[y], l2=1.0)
    assert result.total_norm == pytest.approx(6e38, rel=1e-7)
    assert memory[0].tolist() == [pytest.approx(1e38, rel=1e-6), 0.0]
    half = np.array([60000.0], np.float16)
    assert gradclip.clip_difference_([half], [-half], 1000.0).total_norm == 120000.0
    assert half.tolist() == [-59008.0]
    huge = np.array([1e200, 1e-200])
    assert gradclip.measure([huge], params=[huge], l2=1.0).total_norm == 2e200
    # Squares that are lost in float64 are not, and zeros are zeros.
    small = np.full(3, 1e-200)
    assert gradclip.measure([small], params=[small], l2=1e300).penalty == pytest.approx(1.5e-100, rel=1e-12)
    assert gradclip.measure([small], params=[0 * small], l2=1.0).penalty == 0.0


# --- What is not finite ---------------------------------------------------------------------------------


def _beyond() -> tuple[dict[str, Array], dict[str, Array]]:
    grads = {"a": np.array([1.0, 2.0]), "b": np.array([1.0, np.inf, 1.0])}
    return grads, {"a": np.array([5.0, np.nan]), "b": np.array([1.0, 1.0, 1.0])}


def test_an_error_names_what_is_not_finite_of_both() -> None:
    grads, params = _beyond()
    before = [g.tobytes() for g in grads.values()]
    with pytest.raises(gradclip.NonFiniteGradientError) as caught:
        gradclip.clip_by_global_norm_(grads, 1.0, params=params, l2=1.0)
    assert caught.value.entries == [("a", 1, 0), ("b", 0, 1)]
    assert [g.tobytes() for g in grads.values()] == before
    with pytest.raises(
        gradclip.NonFiniteGradientError, match=re.escape("new['a']: expected finite elements")
    ):
        gradclip.clip_difference_(grads, params, 1.0)
    assert [g.tobytes() for g in grads.values()] == before
    complex_new = np.array([1 + 1j, complex(np.nan, np.inf)])
    with pytest.raises(gradclip.NonFiniteGradientError) as caught:
        gradclip.clip_difference_([complex_new], [np.zeros(2, complex)], 1.0)
    assert caught.value.entries == [(0, 1, 0)]


def test_the_other_ways_with_what_is_not_finite() -> None:
    for nonfinite in ("skip", "zero", "propagate"):
        grads, params = _beyond()
        result = gradclip.clip_by_global_norm_(
            grads,
            1.0,
            params=params,
            l2=1.0,
            nonfinite=nonfinite,
        )
        assert result.nonfinite == ("a", "b")
        new, base = _beyond()
        gradclip.clip_difference_(new, base, 1.0, nonfinite=nonfinite)
        if nonfinite == "skip":
            expected = _beyond()[0]
            for n in "ab":
                assert _same(grads[n], expected[n])
                assert _same(new[n], expected[n])
        elif nonfinite == "zero":
            for n in "ab":
                assert not grads[n].any()
                assert np.array_equal(new[n], base[n], equal_nan=True)
        else:
            assert all(np.isnan(g).all() for g in (*grads.values(), *new.values()))


# --- Rounding down --------------------------------------------------------------------------------------


def _square(numbers: list[Fraction]) -> Fraction:
    return sum((x * x for x in numbers), Fraction(0))


def _exactly(array: Array) -> list[Fraction]:
    parts = array.reshape(-1).view(PART[array.dtype.name]) if array.dtype.name in PART else array.reshape(-1)
    return [Fraction(x) for x in parts.astype(np.float64).tolist()]


@pytest.mark.parametrize("name", NAMES)
def test_rounded_down_it_is_never_above(name: str) -> None:
    above_to_nearest = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(1, 200))
        x, y = values(name, n, seed=seed, low=-8, high=3), values(name, n, seed=seed + 100, low=-8, high=3)
        # The wider the limit, the nearer to the base and to a coefficient of 1.
        for part in (0.3, 0.9, 1.0):
            limit = part * gradclip.measure([x], params=[y], l2=_L2).total_norm
            memory = x.copy()
            gradclip.clip_by_global_norm_([memory], limit, params=[y], l2=_L2, rounding="down")
            assert _square(_exactly(memory)) <= Fraction(limit) ** 2
            limit = part * float(gradclip.clip_difference_([x.copy()], [y], math.inf).total_norm)
            for rounding in ("down", "nearest"):
                memory = x.copy()
                gradclip.clip_difference_([memory], [y], limit, rounding=rounding)
                moved = [a - b for a, b in zip(_exactly(memory), _exactly(y), strict=True)]
                is_above = _square(moved) > Fraction(limit) ** 2
                assert not (is_above and rounding == "down")
                above_to_nearest += is_above
    assert above_to_nearest > 20


@given(
    base=st.floats(width=32, allow_nan=False, allow_infinity=False),
    new=st.floats(width=32, allow_nan=False, allow_infinity=False),
    part=st.floats(1e-9, 1.0),
)
def test_one_number_rounded_down_is_between(base: float, new: float, part: float) -> None:
    memory, before = np.array([new], np.float32), np.array([base], np.float32)
    limit = part * abs(float(before[0]) - float(memory[0]))
    gradclip.clip_difference_([memory], [before], limit, rounding="down")
    moved = Fraction(float(memory[0])) - Fraction(float(before[0]))
    assert abs(moved) <= Fraction(limit)
    assert moved == 0 or (moved > 0) == (new > base)


# --- Frameworks -----------------------------------------------------------------------------------------


def test_parameters_of_torch_that_require_grad() -> None:
    model = torch.nn.Linear(30, 20).bfloat16()
    masters = [p.detach().float().requires_grad_() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    grads = [p.grad for p in model.parameters()]
    before = [g.float().clone() for g in grads if g is not None]
    result = gradclip.clip_by_global_norm_(grads, 1e9, params=masters, l2=0.5)
    for g, b, w in zip(grads, before, masters, strict=True):
        assert g is not None
        assert torch.equal(g, (b.double() + 0.5 * w.detach().double()).float().bfloat16())
    assert result.penalty == pytest.approx(
        sum(0.25 * float((w.detach() ** 2).sum()) for w in masters), rel=1e-5
    )
    # Also by the plan, whose parameters are read at each call, and transposed ones.
    plan = gradclip.Plan([torch.zeros(20, 30)])
    assert plan.measure(
        params=[torch.ones(30, 20, requires_grad=True).t()], l2=1.0
    ).total_norm == pytest.approx(600**0.5)


def test_regularisation_is_that_of_an_optimizer() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(50, 10), torch.nn.Linear(50, 10)
    theirs.load_state_dict(ours.state_dict())
    first = torch.optim.SGD(ours.parameters(), 0.1)
    second = torch.optim.SGD(theirs.parameters(), 0.1, weight_decay=0.01)
    x = torch.randn(8, 50)
    for _ in range(5):
        for model, optimizer in ((ours, first), (theirs, second)):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            if model is ours:
                params = list(model.parameters())
                gradclip.clip_by_global_norm_([p.grad for p in params], math.inf, params=params, l2=0.01)
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-7)
