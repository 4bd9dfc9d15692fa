"""``rounding="down"``: the exact norm of what memory holds afterwards is at most the threshold."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gradclip
from device import Device
from exact import scaled_down
from gradclip import _core
from matrices import COMPLEX_NAMES, EXPONENTS, ISAS, NAMES, PART, REAL_NAMES, THREADS, Array, values
from test_device_bits import check_clip

# What may be given away: by the bound of the norm, and where 16-bit elements are cut off.
_LOSS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 1e-6, "float64": 2e-13}
_LOSS |= {name: _LOSS[part] for name, part in PART.items()}


def _fractions(arrays: Iterable[Array]) -> list[Fraction]:
    """The magnitudes of all real parts, exactly."""
    found: list[Fraction] = []
    for array in arrays:
        parts = array.reshape(-1)
        if parts.dtype.kind == "c":
            parts = parts.view(np.float32 if parts.dtype.itemsize == 8 else np.float64)
        found += [abs(Fraction(x)) for x in parts.astype(np.float64).tolist()]
    return found


def _power(arrays: Iterable[Array], ord: float) -> Fraction:
    """The norm, to the power of ``ord``; of real arrays unless ``ord`` is 2."""
    parts = _fractions(arrays)
    if ord == math.inf:
        return max(parts, default=Fraction(0))
    return sum((x ** int(ord) for x in parts), Fraction(0))


def _limit(max_norm: float, ord: float) -> Fraction:
    return Fraction(max_norm) ** (1 if ord == math.inf else int(ord))


def _check(arrays: list[Array], max_norm: float, ord: float = 2, **options: Any) -> gradclip.ClipResult:
    result = gradclip.clip_by_global_norm_(arrays, max_norm, ord, rounding="down", **options)
    assert _power(arrays, ord) <= _limit(max_norm, ord), (max_norm, result.total_norm)
    return result


_ORDS = [(name, ord) for name in NAMES for ord in ((2,) if name in COMPLEX_NAMES else (2, 1, math.inf, 3))]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("name", "ord"), _ORDS)
def test_it_is_never_above_and_hardly_below(name: str, ord: float, isa: str) -> None:
    _core.set_isa(isa)
    rng = np.random.default_rng(5)
    root = 1 if ord == math.inf else 1 / ord
    for seed in range(40):
        arrays = [values(name, int(n), seed=seed, low=-9, high=2) for n in rng.integers(1, 300, size=2)]
        max_norm = float(_power(arrays, ord)) ** root * float(rng.uniform(0.01, 1.0))
        _check(arrays, max_norm, ord)
        assert 1 - float(_power(arrays, ord)) ** root / max_norm < _LOSS[name]


@pytest.mark.parametrize("name", NAMES)
def test_rounding_to_nearest_is_above(name: str) -> None:
    """Of what these tests would find."""
    above = 0
    for seed in range(40):
        array = values(name, 100, seed=seed, low=-3, high=2)
        gradclip.clip_by_global_norm_([array], 1.0)
        above += _power([array], 2) > 1
    assert 5 < above < 35


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NAMES)
def test_no_element_is_above_its_product(name: str, isa: str) -> None:
    """Whatever the exponents: products that are subnormal or 0, factors that no float32 holds."""
    _core.set_isa(isa)
    low, high = EXPONENTS[name]
    step = max(1, (high - low) // 12)
    for first in range(low, high - 8, step):
        array = values(name, 67, seed=first - low, low=first, high=first + 8)
        for ord in (2, math.inf):
            for max_norm in (1e-320, 1e-300, 1e-44, 1e-39, 3e-8, 0.3, 1e30, 1e300):
                for scale in (1.0, 3.0, 1e-5, 2.0**120):
                    after = array.copy()
                    options: Any = {"nonfinite": "propagate", "grad_scale": scale, "rounding": "down"}
                    result = gradclip.clip_by_global_norm_([after], max_norm, ord, **options)
                    assert isinstance(result.coefficient, float)
                    factor = Fraction(result.coefficient / scale)
                    before, now = _fractions([array]), _fractions([after])
                    assert all(y <= factor * x for x, y in zip(before, now, strict=True)), (first, max_norm)
                    if result.coefficient / scale != 1:
                        assert after.tobytes() == scaled_down(array, result.coefficient / scale).tobytes()
                    if ord == 2 or (ord == math.inf and name in REAL_NAMES):
                        assert _power([after], ord) <= _limit(max_norm, ord)


@pytest.mark.parametrize("name", REAL_NAMES)
def test_norms_at_the_threshold(name: str) -> None:
    """Equal elements, whose norm is exact: what is written is no more than asked for, or left alone."""
    for n in (1, 4, 16, 1024):
        for value in (1.0, 1.5, 0.0625):
            arrays = [np.full(n, value).astype(np.float32).astype(values(name, 1, seed=0).dtype)]
            _check(arrays, value * math.sqrt(n))
    arrays = [values(name, 100, seed=1)]
    before = arrays[0].tobytes()
    result = _check(arrays, gradclip.global_norm(arrays) * (1 + 1e-6))
    assert result.coefficient == 1.0
    assert not result.clipped
    assert arrays[0].tobytes() == before
    assert gradclip.clip_by_global_norm_(arrays, math.inf, rounding="down").coefficient == 1.0
    _check(arrays, 0.0)
    assert not arrays[0].any()
    _check(arrays, 0.0)


def test_a_scale_is_rounded_down_too() -> None:
    """Also where nothing is clipped: to divide rounds."""
    for seed in range(50):
        arrays = [values("float16", 50, seed=seed)]
        exact = math.sqrt(float(_power(arrays, 2))) / 3.0
        for factor in (0.5, 1.0 + 1e-6, 1.5):
            copies = [array.copy() for array in arrays]
            _check(copies, exact * factor, grad_scale=3.0)


@pytest.mark.parametrize("groups", ["tensor", "row", "sample"])
def test_groups_plans_and_policies(groups: str) -> None:
    grads = [values(name, (12, 33), seed=3) for name in ("float16", "bfloat16", "float32", "float64")]

    def check(arrays: list[Array]) -> None:
        if groups == "tensor":
            found: list[list[Array]] = [[g] for g in arrays]
        elif groups == "row":
            found = [[row] for g in arrays for row in g]
        else:
            found = [list(rows) for rows in zip(*arrays, strict=True)]
        assert all(_power(group, 2) <= 1 for group in found)

    class Policy:
        def thresholds(self, measured: gradclip.Measured) -> float:
            return 1.0

    options: Any = {"groups": groups, "rounding": "down"}
    calls: Any = (
        lambda g: gradclip.clip_by_global_norm_(g, 1.0, **options),
        lambda g: gradclip.clip_by_global_norm_(g, Policy(), **options),
        lambda g: gradclip.Plan(g).clip_by_global_norm_(1.0, **options),
        lambda g: gradclip.measure(g, groups=groups).clip_(1.0, rounding="down"),
        lambda g: gradclip.clip_by_global_norm_(g, 1.0, reduce=lambda sums: sums, **options),
    )
    for clip in calls:
        copies = [g.copy() for g in grads]
        clip(copies)
        check(copies)
    copies = [g.copy() for g in grads]
    gradclip.clip_by_norm_(copies, 1.0, rounding="down")
    assert all(_power([g], 2) <= 1 for g in copies)


def test_shards_of_one_vector() -> None:
    """Each process has a part, of a dtype of its own: together they are not above."""
    for seed in range(30):
        shards = [values(name, 100, seed=seed) for name in ("float64", "float32", "bfloat16")]
        norms = [gradclip.global_norm([shard]) for shard in shards]
        joined = np.array([math.fsum(norm * norm for norm in norms)])

        def join(sums: Array, joined: Array = joined) -> Array:
            return joined

        options: Any = {"reduce": join, "rounding": "down"}
        coefficients = {gradclip.clip_by_global_norm_([s], 1.0, **options).coefficient for s in shards}
        assert len(coefficients) == 1
        assert _power(shards, 2) <= 1


@given(data=st.data())
def test_any_list(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4))
    arrays = []
    for i, name in enumerate(names):
        first, last = EXPONENTS[name]
        low = data.draw(st.integers(first, last - 4))
        arrays.append(values(name, data.draw(st.integers(1, 70)), seed=i, low=low, high=low + 3))
    max_norm = data.draw(st.floats(0, 1e308, exclude_min=True)) * data.draw(
        st.sampled_from([1, 1e-150, 1e-300])
    )
    result = gradclip.clip_by_global_norm_(arrays, max_norm, nonfinite="propagate", rounding="down")
    if not math.isnan(float(result.coefficient)):
        assert _power(arrays, 2) <= _limit(max_norm, 2)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_over_threads_and_isas(name: str) -> None:
    original = [values(name, n, seed=n, low=-12, high=3) for n in (300_001, 7, 0, 8192)]
    seen = set()
    for isa in ISAS:
        for threads in THREADS:
            _core.set_isa(isa)
            gradclip.set_num_threads(threads)
            copies = [array.copy() for array in original]
            gradclip.clip_by_global_norm_(copies, 0.37, rounding="down")
            seen.add(b"".join(array.tobytes() for array in copies))
    assert len(seen) == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_on_a_gpu(device: Device, name: str) -> None:
    first, last = EXPONENTS[name]
    for low in (first, -8, last - 9):
        for max_norm, scale in ((0.37, 1.0), (1e-41, 1.0), (1e-300, 3.0), (0.0, 1.0), (2.0, 1e-5)):
            arrays: list[Array | None] = [
                values(name, n, seed=n, low=low, high=low + 8) for n in (1, 700, 5000)
            ]
            options: Any = {"rounding": "down", "grad_scale": scale, "nonfinite": "propagate"}
            check_clip(device, arrays, max_norm, **options)
    for groups in ("tensor", "row"):
        arrays = [values(name, (9, 33), seed=1), values("float32", (3, 5), seed=2)]
        check_clip(device, arrays, 0.5, groups=groups, rounding="down")


def test_bad_input() -> None:
    grads = [np.array([3.0, 4.0])]
    calls: Any = (
        lambda rounding: gradclip.clip_by_global_norm_(grads, 1.0, rounding=rounding),
        lambda rounding: gradclip.clip_by_norm_(grads, 1.0, rounding=rounding),
        lambda rounding: gradclip.Plan(grads).clip_by_global_norm_(1.0, rounding=rounding),
        lambda rounding: gradclip.Plan(grads).clip_by_norm_(1.0, rounding=rounding),
        lambda rounding: gradclip.measure(grads).clip_(1.0, rounding=rounding),
    )
    for call in calls:
        with pytest.raises(ValueError, match=re.escape("rounding: expected 'nearest' or 'down', got 'up'")):
            call("up")
        for wrong in (0.5, None, 1, np.float64(0.5)):
            with pytest.raises(TypeError, match="rounding: expected 'nearest' or 'down', got "):
                call(wrong)
    assert grads[0].tolist() == [3.0, 4.0]
