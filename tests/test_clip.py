"""Clipping by norm: coefficients, what is written, groups, grad_scale, reduce."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import gradclip
from exact import exact_norm, relative_error, scaled
from matrices import DTYPES, NAMES, ORDS, REAL_NAMES, ROUNDING, Array, sizes, values


def _copies(arrays: list[Array]) -> list[Array]:
    return [array.copy() for array in arrays]


def _float(coefficient: Any) -> float:
    assert type(coefficient) is float
    return coefficient


def _assert_written(arrays: list[Array], originals: list[Array], factors: Any) -> None:
    for i, (array, original, factor) in enumerate(zip(arrays, originals, factors, strict=True)):
        expected = original if factor == 1 else scaled(original, factor)
        assert array.tobytes() == expected.tobytes(), (
            f"entry {i}, {array.dtype}[{array.size}], factor {factor}"
        )


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_element_is_multiplied_by_the_coefficient(name: str, ord: float) -> None:
    originals = [values(name, n, seed=n, low=-10) for n in sizes(name)]
    for share in (0.999, 0.5, 1e-3):
        arrays = _copies(originals)
        total = gradclip.global_norm(arrays, ord)
        result = gradclip.clip_by_global_norm_(arrays, total * share, ord)
        assert result.clipped
        assert result.total_norm == total
        assert _float(result.coefficient) == total * share / total
        _assert_written(arrays, originals, [_float(result.coefficient)] * len(arrays))


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("name", NAMES)
def test_not_above_the_threshold_nothing_changes(name: str, ord: float) -> None:
    originals = [values(name, n, seed=n) for n in sizes(name)]
    arrays = _copies(originals)
    total = gradclip.global_norm(arrays, ord)
    for max_norm in (total, math.nextafter(total, math.inf), 1e30, math.inf):
        result = gradclip.clip_by_global_norm_(arrays, max_norm, ord)
        assert not result.clipped
        assert _float(result.coefficient) == 1.0
    _assert_written(arrays, originals, [1.0] * len(arrays))
    assert gradclip.clip_by_global_norm_(arrays, math.nextafter(total, 0.0), ord).clipped


@pytest.mark.parametrize("ord", [2, 1, math.inf, 3])
@pytest.mark.parametrize("name", NAMES)
def test_the_norm_is_at_most_max_norm_afterwards(name: str, ord: float) -> None:
    """Within rounding: 1e-6 where elements have 24 bits or more, else what storing them costs."""
    slack = max(1e-6, ROUNDING[name])
    for seed in range(10):
        arrays = [values(name, n, seed=seed + n, low=-3, high=8) for n in (3, 1000, 5000)]
        gradclip.clip_by_global_norm_(arrays, 10.0, ord)
        assert exact_norm(arrays, ord) <= 10.0 * (1 + slack)
        assert relative_error(10.0, exact_norm(arrays, ord)) < 2 * slack


@pytest.mark.parametrize("name", NAMES)
def test_clipping_twice_changes_nothing(name: str) -> None:
    """Where rounding left the norm at or below the threshold: not a bit; else not more than rounding."""
    untouched = 0
    for seed in range(40):
        arrays = [values(name, n, seed=seed + n, low=-3, high=8) for n in (3, 1000, 5000)]
        gradclip.clip_by_global_norm_(arrays, 10.0)
        once = _copies(arrays)
        again = gradclip.clip_by_global_norm_(arrays, 10.0)
        assert _float(again.coefficient) >= 1 - 2 * max(1e-6, ROUNDING[name])
        if again.coefficient == 1:
            _assert_written(arrays, once, [1.0] * 3)
            untouched += 1
        for array, before in zip(arrays, once, strict=True):
            share = 1 - float(again.coefficient) + 2.001 * ROUNDING[name]
            step = share * np.abs(before.astype(np.complex128))
            assert (np.abs(array.astype(np.complex128) - before.astype(np.complex128)) <= step).all()
    assert untouched > 0


def test_exact_values() -> None:
    grads: dict[str, Any] = {
        "w": np.array([3.0, -4.0], np.float16),
        "b": np.array([12.0 + 84.0j], np.complex64),
        "none": None,
    }
    result = gradclip.clip_by_global_norm_(grads, 42.5)
    assert result.total_norm == 85.0
    assert result.coefficient == 0.5
    assert grads["w"].tolist() == [1.5, -2.0]
    assert grads["b"].tolist() == [6 + 42j]


@pytest.mark.parametrize(
    "number", [2, 2.0, np.float32(2), np.float64(2), np.int64(2), np.array(2.0), Fraction(2)]
)
def test_max_norm_of_any_kind_of_number(number: Any) -> None:
    array = np.array([3.0, 4.0])
    assert gradclip.clip_by_global_norm_([array], number).coefficient == 0.4
    assert gradclip.clip_by_value_([array], number).clipped is False
    gradclip.scale_([array], number)
    assert array.tolist() == [3.0 * 0.4 * 2, 4.0 * 0.4 * 2]


@pytest.mark.parametrize("name", ["float32", "bfloat16", "complex64"])
def test_coefficient_below_the_normal_float32(name: str) -> None:
    """1e38 clipped to 1e-5: the coefficient is subnormal in float32, and the result must still be right."""
    for max_norm in (1e-5, 1e-1, 1e-7, 1e-10):
        array = np.full(100, 1e38, DTYPES[name])
        original = array.copy()
        result = gradclip.clip_by_global_norm_([array], max_norm)
        assert relative_error(max_norm, exact_norm(array)) < 2 * ROUNDING[name] + 1e-6
        _assert_written([array], [original], [_float(result.coefficient)])


@pytest.mark.parametrize("name", NAMES)
def test_coefficient_beyond_float32_from_another_dtype(name: str) -> None:
    """One float64 tensor of 1e200 drives the coefficient to 1e-200, where float32 has only 0."""
    originals = [values(name, 1000, seed=1), np.full(10, 1e200), np.full(3, 3e38, np.float32)]
    for max_norm in (1.0, 1e150, 1e190):
        arrays = _copies(originals)
        result = gradclip.clip_by_global_norm_(arrays, max_norm)
        _assert_written(arrays, originals, [_float(result.coefficient)] * 3)
        assert relative_error(max_norm, exact_norm(arrays)) < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_grad_scale(name: str) -> None:
    originals = [values(name, n, seed=n, low=-6, high=6) for n in (3, 1000, 5000)]
    total = gradclip.global_norm(originals)
    norms = gradclip.tensor_norms(originals)
    for scale in (3.0, 1024.0, 0.37):
        arrays = _copies(originals)
        result = gradclip.clip_by_global_norm_(arrays, 1.5, grad_scale=scale)
        assert result.total_norm == total / scale
        assert (result.norms == norms / scale).all()
        assert result.group_norms.tolist() == [total / scale]
        assert _float(result.coefficient) == 1.5 / result.total_norm
        _assert_written(arrays, originals, [_float(result.coefficient) / scale] * 3)
        # Not above the threshold: unscaled all the same.
        arrays = _copies(originals)
        result = gradclip.clip_by_global_norm_(arrays, math.inf, grad_scale=scale)
        assert not result.clipped
        assert _float(result.coefficient) == 1.0
        _assert_written(arrays, originals, [1.0 / scale] * 3)


def test_grad_scale_that_float32_cannot_hold() -> None:
    for scale, element in ((1e-40, 1e-40), (1e-42, 3e-42), (1e40, 1e38)):
        array = np.full(10, element, np.float32)
        expected = scaled(array, 1 / scale)
        assert np.isfinite(expected).all()
        assert expected.any()
        result = gradclip.clip_by_global_norm_([array], math.inf, grad_scale=scale)
        assert array.tobytes() == expected.tobytes()
        assert relative_error(result.total_norm, exact_norm(expected)) < 1e-6


@pytest.mark.parametrize("ord", ORDS)
def test_groups(ord: float) -> None:
    originals = [values(name, n, seed=n, low=-2) for name in NAMES for n in (2, 5000)]
    labels = [0, 3, 0, 2, 2, 5, 3, 0, 2, 5, 5, 0]
    arrays = _copies(originals)
    result = gradclip.clip_by_global_norm_(arrays, 100.0, ord, groups=labels)
    expected = [
        gradclip.global_norm([g for g, label in zip(originals, labels, strict=True) if label == group], ord)
        for group in range(6)
    ]
    assert result.group_norms.tolist() == expected
    assert isinstance(result.coefficient, np.ndarray)
    assert result.coefficient.tolist() == [100.0 / n if n > 100 else 1.0 for n in expected]
    assert expected[1] == 0.0, "a label that nobody has is an empty group"
    assert result.total_norm == gradclip.global_norm(originals, ord)
    _assert_written(arrays, originals, [result.coefficient[label] for label in labels])
    kinds: list[Any] = [
        np.array(labels),
        np.array(labels, np.uint8),
        tuple(labels),
        list(map(np.int32, labels)),
    ]
    for same in kinds:
        again = _copies(originals)
        gradclip.clip_by_global_norm_(again, 100.0, ord, groups=same)
        assert [a.tobytes() for a in again] == [a.tobytes() for a in arrays]


@pytest.mark.parametrize("ord", ORDS)
def test_each_tensor_by_its_own_norm(ord: float) -> None:
    originals = [values(name, n, seed=n, low=-2) for name in NAMES for n in (2, 0, 5000)]
    arrays: list[Any] = [*_copies(originals), None]
    result = gradclip.clip_by_norm_(arrays, 50.0, ord)
    norms = gradclip.tensor_norms([*originals, None], ord)
    assert (result.norms == norms).all()
    assert (result.group_norms == norms).all()
    assert isinstance(result.coefficient, np.ndarray)
    assert result.coefficient.tolist() == [50.0 / n if n > 50 else 1.0 for n in norms]
    _assert_written(arrays[:-1], originals, result.coefficient[:-1])
    again = _copies(originals)
    other = gradclip.clip_by_global_norm_(again, 50.0, ord, groups="tensor")
    assert isinstance(other.coefficient, np.ndarray)
    assert other.coefficient.tolist() == result.coefficient[:-1].tolist()
    assert [a.tobytes() for a in again] == [a.tobytes() for a in arrays[:-1]]


def test_none_keeps_its_place() -> None:
    array = np.array([3.0, 4.0])
    result = gradclip.clip_by_global_norm_([None, array, None], 2.5, groups=[0, 1, 1])
    assert result.norms.tolist() == [0.0, 5.0, 0.0]
    assert isinstance(result.coefficient, np.ndarray)
    assert result.coefficient.tolist() == [1.0, 0.5]
    assert result.missing == (0, 2)
    with pytest.warns(UserWarning, match="grads: expected gradients, got none") as caught:
        nothing = gradclip.clip_by_global_norm_([None, None], 1.0)
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(UserWarning, match="grads: expected gradients, got none"):
        empty = gradclip.clip_by_norm_({}, 1.0)
    assert empty.names == ()
    with pytest.warns(UserWarning, match="grads: expected gradients, got none"):
        empty = gradclip.clip_by_global_norm_([], 1.0)
    assert nothing.total_norm == 0.0
    assert nothing.coefficient == 1.0
    assert not nothing.clipped
    assert empty.total_norm == 0.0
    assert empty.coefficient == 1.0
    assert empty.norms.shape == (0,)


def test_any_iterable_of_gradients() -> None:
    array = np.array([3.0, 4.0])
    for grads in (
        (array,),
        iter([array]),
        (a for a in [array]),
        {"w": array}.values(),
        map(np.asarray, [array]),
    ):
        assert gradclip.clip_by_global_norm_(grads, 5.0).norms.tolist() == [5.0]


@pytest.mark.parametrize("name", REAL_NAMES)
def test_a_clip_to_almost_nothing_keeps_signs(name: str) -> None:
    array = np.array([-1.0, 1.0], DTYPES[name])
    gradclip.clip_by_global_norm_([array], 5e-324)
    assert np.signbit(array).tolist() == [True, False]


def test_a_threshold_for_each_group() -> None:
    arrays = [np.array([3.0, 4.0]), np.array([12.0]), None, np.array([8.0])]
    result = gradclip.clip_by_norm_(arrays, [2.5, 24.0, 1.0, 2.0])
    assert result.coefficient.tolist() == [0.5, 1.0, 1.0, 0.25]  # type: ignore[union-attr]
    assert [a.tolist() for a in arrays if a is not None] == [[1.5, 2.0], [12.0], [2.0]]
    result = gradclip.clip_by_global_norm_(arrays, np.array([1.25, np.inf]), groups=[0, 1, 1, 1])
    assert result.coefficient.tolist() == [0.5, 1.0]  # type: ignore[union-attr]


# --- Names of groups, and thresholds by name ----------------------------------------------------------


def _named() -> dict[str, Any]:
    return {"a": np.array([3.0, 4.0]), "b": np.array([12.0]), "c": None, "d": np.array([-8.0, 6.0])}


@pytest.mark.parametrize(
    "groups",
    [
        ["head", "body", "body", "head"],
        ("head", "body", "body", "head"),
        np.array(["head", "body", "body", "head"]),
        {"d": "head", "c": "body", "b": "body", "a": "head"},
    ],
    ids=["list", "tuple", "array", "mapping"],
)
@pytest.mark.parametrize(
    "max_norm", [{"body": None, "head": 2.5}, [2.5, None], [2.5, math.inf], {"head": 2.5, "body": 1e9}]
)
def test_names_for_groups(groups: Any, max_norm: Any) -> None:
    for plan in (False, True):
        grads = _named()
        if plan:
            result = gradclip.Plan(grads).clip_by_global_norm_(max_norm, groups=groups)
        else:
            result = gradclip.clip_by_global_norm_(grads, max_norm, groups=groups)
        assert result.group_names == ("head", "body")
        assert result.named_group_norms() == {"head": 125**0.5, "body": 12.0}
        assert np.asarray(result.coefficient).tolist() == [2.5 / 125**0.5, 1.0]
        assert result.missing == ("c",)
        assert grads["b"].tolist() == [12.0]
        assert gradclip.global_norm([grads["a"], grads["d"]]) == pytest.approx(2.5)


def test_each_gradient_by_its_name() -> None:
    grads = _named()
    result = gradclip.clip_by_norm_(grads, {"a": 2.5, "b": None, "c": 1.0, "d": 0})
    assert result.named_group_norms() == {"a": 5.0, "b": 12.0, "c": 0.0, "d": 10.0}
    assert grads["a"].tolist() == [1.5, 2.0]
    assert grads["b"].tolist() == [12.0]
    assert (grads["d"] == 0).all()
    integers = gradclip.clip_by_global_norm_(_named(), 1.0, groups={"a": 1, "b": 0, "c": 0, "d": 1})
    assert integers.named_group_norms() == {"0": 12.0, "1": 125**0.5}


@pytest.mark.parametrize(
    ("arguments", "error", "finding"),
    [
        ({"groups": {"a": "x", "b": "x", "c": "x"}}, ValueError, r"groups: .* none for 'd'"),
        ({"groups": {"a": 0, "b": 0, "c": 0, "d": 0, "e": 0}}, ValueError, r"groups: .*got 'e'"),
        ({"groups": ["x", "y"]}, ValueError, r"groups: .* 4 gradients, got 2"),
        ({"max_norm": {"all": 1.0}}, TypeError, "max_norm: expected a sequence.*got a mapping"),
        ({"max_norm": {"x": 1.0}, "groups": ["x", "y", "y", "y"]}, ValueError, "max_norm: .*none for 'y'"),
        ({"max_norm": {"x": 1, "y": 2, "z": 3}, "groups": ["x", "y", "y", "y"]}, ValueError, "got 'z'"),
        ({"max_norm": {"x": -1, "y": 2}, "groups": ["x", "y", "y", "y"]}, ValueError, r"max_norm\['x'\]"),
        ({"max_norm": {"0": 1, "1": 2}, "groups": [0, 1, 1, 1]}, TypeError, "have no names"),
        ({"max_norm": None}, TypeError, "max_norm: expected a real number, got NoneType"),
    ],
)
def test_names_that_do_not_fit(arguments: dict[str, Any], error: type[Exception], finding: str) -> None:
    grads = _named()
    with pytest.raises(error, match=finding):
        gradclip.clip_by_global_norm_(grads, **({"max_norm": 1.0} | arguments))
    assert grads["b"].tolist() == [12.0]


def test_mappings_for_a_list_without_names() -> None:
    with pytest.raises(TypeError, match=r"groups: .*gradients of this call have no names"):
        gradclip.clip_by_global_norm_([np.ones(2)], 1.0, groups={"a": 0})


def test_a_threshold_of_0_makes_everything_0() -> None:
    grads = [np.array([3.0, -4.0]), np.array([0.0]), np.full(3, 1e-300)]
    for clip in (gradclip.clip_by_global_norm_, gradclip.clip_by_norm_):
        copies = [grad.copy() for grad in grads]
        result = clip(copies, 0)
        assert result.clipped
        assert all((grad == 0).all() for grad in copies)
        assert np.min(result.coefficient) == 0
    bad = [np.array([3.0, math.nan])]
    with pytest.raises(gradclip.NonFiniteGradientError):
        gradclip.clip_by_global_norm_(bad, 0.0)
    assert not gradclip.clip_by_global_norm_(bad, 0.0, nonfinite="skip").clipped
    assert gradclip.clip_by_value_(grads, 0).clipped
    assert all((grad == 0).all() for grad in grads)
