"""A Plan does what the functions do, over arrays that it has read and checked once."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import numpy as np
import pytest

import gradclip
from matrices import NAMES, ORDS, REAL_NAMES, Array, values


def _arrays(names: tuple[str, ...] = NAMES) -> list[Any]:
    arrays: list[Any] = [values(name, n, seed=n) for name in names for n in (3, 0, 5000)]
    arrays.append(None)
    arrays.append(values("float32", (30, 40, 20), seed=1).transpose(2, 0, 1)[::-1, :, ::2])
    return arrays


def _bytes(arrays: list[Any]) -> list[bytes]:
    return [array.tobytes() for array in arrays if array is not None]


def _same_result(left: gradclip.ClipResult, right: gradclip.ClipResult) -> bool:
    return repr(left) == repr(right) and all(
        np.array_equal(getattr(left, field), getattr(right, field), equal_nan=True)
        for field in ("total_norm", "norms", "coefficient", "clipped", "group_norms")
    )


@pytest.mark.parametrize("ord", ORDS)
def test_norms(ord: float) -> None:
    arrays = _arrays()
    plan = gradclip.Plan(arrays)
    assert plan.tensor_norms(ord).tobytes() == gradclip.tensor_norms(arrays, ord).tobytes()
    assert plan.global_norm(ord) == gradclip.global_norm(arrays, ord)


@pytest.mark.parametrize("groups", [None, "tensor", list(range(4)) * 5])
@pytest.mark.parametrize("ord", ORDS)
def test_clips(ord: float, groups: Any) -> None:
    expected, arrays = _arrays(), _arrays()
    plan = gradclip.Plan(arrays)
    for max_norm, scale in ((3.0, 1.0), (1.0, 2.0), (1e9, 1.0)):
        result = plan.clip_by_global_norm_(max_norm, ord, groups, scale)
        assert _same_result(result, gradclip.clip_by_global_norm_(expected, max_norm, ord, groups, scale))
        assert _bytes(arrays) == _bytes(expected)
    assert _same_result(plan.clip_by_norm_(0.01, ord), gradclip.clip_by_norm_(expected, 0.01, ord))
    assert _bytes(arrays) == _bytes(expected)


def test_value_clip_and_scale() -> None:
    expected, arrays = _arrays(REAL_NAMES), _arrays(REAL_NAMES)
    plan = gradclip.Plan(arrays)
    assert _same_result(plan.clip_by_value_(0.5), gradclip.clip_by_value_(expected, 0.5))
    plan.scale_(-3.0)
    gradclip.scale_(expected, -3.0)
    assert _bytes(arrays) == _bytes(expected)


def test_it_sees_what_the_memory_holds_now() -> None:
    array = np.zeros(9000, np.float32)
    plan = gradclip.Plan({"w": array})
    for step in range(1, 20):
        array[...] = step
        assert plan.global_norm() == pytest.approx(step * 9000**0.5, rel=1e-7)
        result = plan.clip_by_global_norm_(1.0)
        assert result.clipped
        assert plan.global_norm() == pytest.approx(1.0, rel=1e-6)
    array[3] = math.nan
    with pytest.raises(gradclip.NonFiniteGradientError, match=r"grads\['w'\]"):
        plan.clip_by_global_norm_(1.0)
    array[3] = 0.0
    assert not plan.clip_by_global_norm_(2.0).clipped


def test_names_sizes_and_text() -> None:
    plan = gradclip.Plan({"a": np.ones((3, 4), np.float16), "b": None, "c": np.ones(5, np.complex128)})
    assert len(plan) == 3
    assert plan.names == ("a", "b", "c")
    assert plan.nbytes == 24 + 80
    assert repr(plan) == "Plan(3 gradients, 17 elements, 104 bytes)"
    assert plan.clip_by_norm_(1.0).named_norms().keys() == {"a", "b", "c"}
    unnamed = gradclip.Plan([np.ones(3)])
    assert unnamed.names is None
    assert unnamed.clip_by_norm_(1.0).names is None
    with pytest.warns(UserWarning, match="grads: expected gradients, got none") as caught:
        assert repr(gradclip.Plan([])) == "Plan(0 gradients, 0 elements, 0 bytes)"
    assert caught[0].filename == __file__
    assert repr(gradclip.Plan([np.zeros(1, np.float16)[:1]])) == "Plan(1 gradient, 1 element, 2 bytes)"


def test_it_keeps_the_arrays_alive_and_lets_go() -> None:
    array = np.full(100_000, 2.0)
    watch = weakref.ref(array)
    plan = gradclip.Plan([array])
    del array
    gc.collect()
    assert watch() is not None
    assert plan.global_norm(math.inf) == 2.0
    del plan
    gc.collect()
    assert watch() is None


def test_it_outlives_the_list_and_ignores_its_changes() -> None:
    grads: dict[str, Any] = {"a": np.ones(4), "b": np.ones(5)}
    plan = gradclip.Plan(grads)
    grads["a"] = "replaced"
    del grads["b"]
    assert plan.tensor_norms().tolist() == [2.0, 5**0.5]
    assert plan.names == ("a", "b")


def test_read_only_and_shared_memory_can_be_measured_and_not_clipped() -> None:
    frozen = np.ones(4)
    frozen.flags.writeable = False
    plan = gradclip.Plan([np.ones(2), frozen])
    assert plan.tensor_norms().tolist() == [2**0.5, 2.0]
    for call in (
        lambda: plan.clip_by_global_norm_(1.0),
        lambda: plan.clip_by_norm_(1.0),
        lambda: plan.clip_by_value_(1.0),
        lambda: plan.scale_(2.0),
    ):
        with pytest.raises(ValueError, match=r"^grads\[1\]: expected .*, got .*read-only"):
            call()
    array = np.ones(6)
    shared = gradclip.Plan({"x": array[:4], "y": array[2:]})
    assert shared.tensor_norms().tolist() == [2.0, 2.0]
    with pytest.raises(ValueError, match=r"^grads\['[xy]'\]: expected .*, got .*'[xy]'"):
        shared.clip_by_global_norm_(1.0)
    broadcast = gradclip.Plan([np.broadcast_to(np.float32(2), (5, 5))])
    assert broadcast.global_norm() == 10.0
    with pytest.raises(ValueError, match=r"grads\[0\]"):
        broadcast.scale_(2.0)
    assert (array == 1).all()
    assert (frozen == 1).all()


def test_bad_arguments() -> None:
    array = np.ones(3)
    plan = gradclip.Plan([array])
    with pytest.raises(TypeError, match=r"grads\[1\]"):
        gradclip.Plan([np.ones(3), np.ones(3, int)])
    with pytest.raises(TypeError):
        gradclip.Plan(np.ones(3))
    with pytest.raises(ValueError, match="max_norm"):
        plan.clip_by_global_norm_(-1.0)
    with pytest.raises(ValueError, match="ord"):
        plan.tensor_norms(0)
    with pytest.raises(ValueError, match="groups"):
        plan.clip_by_global_norm_(1.0, groups=[0, 0])
    with pytest.raises(ValueError, match="limit"):
        plan.clip_by_value_(math.nan)
    with pytest.raises(TypeError, match="factor"):
        plan.scale_("2")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"grads\[0\]"):
        gradclip.Plan([np.ones(3, complex)]).clip_by_value_(1.0)
    assert (array == 1).all()


def test_groups_may_change_from_call_to_call() -> None:
    arrays: list[Array] = [np.full(4, 2.0), np.full(4, 4.0), np.full(4, 8.0)]
    plan = gradclip.Plan(arrays)
    for groups, lengths in (([0, 1, 0], 2), ([2, 2, 0], 3), ("tensor", 3), ([1, 0, 1], 2)):
        coefficient = plan.clip_by_global_norm_(1e6, groups=groups).coefficient
        assert isinstance(coefficient, np.ndarray)
        assert len(coefficient) == lengths
    assert plan.clip_by_global_norm_(1e6).coefficient == 1.0
