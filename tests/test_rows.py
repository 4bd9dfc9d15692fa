"""Rows and samples: the bits of each row as a gradient of its own, in one pass; errors that write nothing."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradclip
import gradclip.torch
import order_model
from gradclip import _core
from matrices import (
    COMPLEX_NAMES,
    FAST_ORDS,
    ISAS,
    LAYOUTS,
    NAMES,
    ORDS,
    REAL_NAMES,
    THREADS,
    Array,
    lay_out,
    placed,
    sizes,
    values,
)


def rows_of(array: Array) -> list[Array]:
    """Each row as a gradient of its own, in the same memory."""
    return [array[i, ...] for i in range(len(array))]


def _check_rows(array: Any, ord: float = 2) -> None:
    expected = gradclip.tensor_norms(rows_of(array), ord)
    (measured,) = gradclip.row_norms([array], ord)
    assert measured.tolist() == expected.tolist(), (array.shape, ord)


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_every_layout(name: str, layout: str, ord: float) -> None:
    for shape in ((3, 5, 7), (1, 40, 53), (129, 3, 1), (4, 1, 300)):
        _check_rows(lay_out(layout, values(name, shape, seed=3))[0], ord)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NAMES)
def test_the_reduction_order_of_rows(name: str, isa: str) -> None:
    """Rows of every size around a boundary, which begin at no multiple of anything."""
    _core.set_isa(isa)
    orders = (2,) if name in COMPLEX_NAMES else FAST_ORDS
    arrays = [values(name, (3, n), seed=n) for n in sizes(name)]
    for ord in orders:
        for array, norms in zip(arrays, gradclip.row_norms(arrays, ord), strict=True):
            assert norms.tolist() == [order_model.tensor_norm(row, ord) for row in array], (array.shape, ord)


@pytest.mark.parametrize("offset", range(0, 16, 2))
def test_rows_at_every_address(offset: int) -> None:
    for name in ("float16", "bfloat16"):
        for n in (1, 7, 31, 33, 257):
            flat = values(name, 5 * n, seed=n)
            moved, _ = placed(flat, offset)
            _check_rows(moved.reshape(5, n))


@pytest.mark.parametrize("ord", [2, 1, math.inf, 3])
def test_rows_over_threads_and_isas(ord: float) -> None:
    """Rows longer than a thread's share, of one element, and what lies between."""
    shapes = [(2, 700_001), (50_001,), (3, 1), (300, 129), (0, 4), (5, 0), (9, 40_000)]
    grads = [values("float32", shape, seed=1, low=-12, high=10) for shape in shapes]
    expected = [gradclip.tensor_norms(rows_of(g), ord).tolist() for g in grads]
    for isa in ISAS:
        for threads in THREADS:
            _core.set_isa(isa)
            gradclip.set_num_threads(threads)
            assert [norms.tolist() for norms in gradclip.row_norms(grads, ord)] == expected, (isa, threads)


def test_torch_and_missing_gradients() -> None:
    matrix = torch.randn(6, 5).t()
    grads = {"a": matrix, "b": None, "c": torch.nn.Parameter(torch.ones(3, 4)).detach()}
    for read in (grads, gradclip.Plan(grads)):
        norms = read.row_norms() if isinstance(read, gradclip.Plan) else gradclip.row_norms(read)
        assert [len(n) for n in norms] == [5, 0, 3]
        assert norms[0].tolist() == gradclip.tensor_norms([matrix[i] for i in range(5)]).tolist()


@pytest.mark.parametrize("ord", [2, 1, math.inf, 3])
@pytest.mark.parametrize("name", NAMES)
def test_clipping_rows_is_clipping_each_by_its_own_norm(name: str, ord: float) -> None:
    shapes = [(7, 33), (40,), (3, 5, 7), (0, 3), (2, 0), (2, 20_000)]
    grads = [values(name, shape, seed=8, low=-6, high=0) for shape in shapes]
    alone = [g.copy() for g in grads]
    limit = float(np.median(np.concatenate(gradclip.row_norms(grads, ord))))
    result = gradclip.clip_by_global_norm_(grads, limit, ord, groups="row")
    each = [gradclip.clip_by_norm_(rows_of(g), limit, ord) for g in alone if len(g)]
    assert [g.tobytes() for g in grads] == [g.tobytes() for g in alone]
    assert result.group_norms.tolist() == np.concatenate([r.norms for r in each]).tolist()
    coefficients = np.concatenate([np.atleast_1d(r.coefficient) for r in each])
    assert np.asarray(result.coefficient).tolist() == coefficients.tolist()
    assert 0 < (coefficients == 1).sum() < len(coefficients)


def units_of(array: Array, kind: str) -> list[Array]:
    """Each output unit as a gradient of its own, in the same memory."""
    if array.ndim < 2:
        return [array]
    return rows_of(array if kind == "unit" else np.moveaxis(array, -1, 0))


@pytest.mark.parametrize("ord", [2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["unit", "unit_last"])
@pytest.mark.parametrize("name", ["bfloat16", "float32", "complex64", "complex128"])
def test_units_are_rows_of_either_layout(name: str, kind: str, layout: str, ord: float) -> None:
    """As gradients of their own: norms, clip, sizes; a vector and a scalar are one unit."""
    shapes = [(7, 33), (40,), (3, 5, 7), (), (1, 6), (5, 1), (2, 3, 2, 6), (37, 2, 131)]
    originals = [values(name, shape, seed=8) for shape in shapes]
    grads, alone = ([lay_out(layout, g)[0] if g.ndim == 3 else g.copy() for g in originals] for _ in range(2))
    expected = [gradclip.tensor_norms(units_of(g, kind), ord) for g in alone]
    measured = gradclip.measure(grads, ord, groups=kind)
    assert measured.group_norms.tolist() == np.concatenate(expected).tolist()
    assert measured.group_sizes.tolist() == [unit.size for g in grads for unit in units_of(g, kind)]
    limit = float(np.median(np.concatenate(expected)))
    measured.clip_(limit)
    for g in alone:
        gradclip.clip_by_norm_(units_of(g, kind), limit, ord)
    assert [g.tobytes() for g in grads] == [g.tobytes() for g in alone]


def test_units_that_are_empty_or_missing() -> None:
    grads = {"a": np.ones((0, 3)), "b": None, "c": np.ones((2, 0)), "d": np.ones(0), "e": np.ones((2, 3))}
    for kind, names in (
        ("unit", "c[0] c[1] d[0] e[0] e[1]"),
        ("unit_last", "a[0] a[1] a[2] d[0] e[0] e[1] e[2]"),
    ):
        result = gradclip.clip_by_global_norm_(grads, 1.0, groups=kind)
        assert list(result.named_group_norms()) == names.split()


def test_sizes_of_groups() -> None:
    grads = {"a": np.ones((3, 4)), "b": None, "c": np.ones(3)}
    for groups, expected in [
        (None, [15]),
        ("tensor", [12, 0, 3]),
        ("row", [4, 4, 4, 1, 1, 1]),
        ("sample", [5, 5, 5]),
        (["x", "x", "y"], [12, 3]),
    ]:
        found = gradclip.measure(grads, groups=groups).group_sizes
        assert found.dtype == np.int64
        assert found.tolist() == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_clipping_rows_of_any_layout(layout: str) -> None:
    original = values("float32", (5, 6, 7), seed=2)
    view, buffer = lay_out(layout, original)
    before = buffer.tobytes()
    limits = np.where(np.arange(5) % 2 == 0, np.inf, 0.5)
    gradclip.clip_by_global_norm_([view], [limits], groups="row")
    expected, _ = lay_out(layout, original)
    gradclip.clip_by_norm_(rows_of(expected), limits.tolist())
    assert view.tobytes() == expected.tobytes()
    view[...] = original
    assert buffer.tobytes() == before, "bytes outside the array were written"


def test_a_sample_is_row_i_of_all_gradients() -> None:
    shapes = [(9, 33), (9,), (9, 5, 7), (9, 0)]
    grads: list[Any] = [values(n, s, seed=4) for n, s in zip(REAL_NAMES, shapes, strict=True)]
    expected = [gradclip.global_norm([g[i, ...] for g in grads]) for i in range(9)]
    orders = (grads, grads[::-1], [None, *grads[2:], *grads[:2]])
    for ord in (2, 1, math.inf, 3):
        norms = [gradclip.measure(order, ord, groups="sample").group_norms.tolist() for order in orders]
        assert norms[0] == norms[1] == norms[2]
    assert gradclip.measure(grads, groups="sample").group_norms.tolist() == expected
    alone = [g.copy() for g in grads]
    limits = [None, *[3.0] * 4, 0.0, *[math.inf] * 3]
    result = gradclip.clip_by_global_norm_(grads, limits, groups="sample")
    for i, limit in enumerate(limits):
        if limit is not None:
            gradclip.clip_by_global_norm_([g[i, ...] for g in alone], limit)
    assert [g.tobytes() for g in grads] == [g.tobytes() for g in alone]
    assert np.shape(result.coefficient) == (9,)


def test_a_gradient_is_the_group_of_its_rows() -> None:
    grads = [values("float32", (40, 5000), seed=1), values("float64", (77,), seed=2)]
    result = gradclip.clip_by_global_norm_(grads, math.inf, groups="row")
    sums = [order_model.add_exactly([order_model.tensor_sum(row, 2) for row in rows_of(g)]) for g in grads]
    assert result.norms.tolist() == [order_model.root(s) for s in sums]
    assert result.total_norm == order_model.root(order_model.add_exactly(sums))


@given(data=st.data())
def test_any_shapes(data: st.DataObject) -> None:
    """Around blocks, tiles and the shares of threads, in any dtype, order and layout."""
    name = data.draw(st.sampled_from(NAMES))
    row = data.draw(st.sampled_from(sizes(name)))
    shape = (data.draw(st.integers(0, 6)), row)
    array = values(name, shape, seed=data.draw(st.integers(0, 99)))
    if data.draw(st.booleans()):
        array = np.asfortranarray(array)
    if data.draw(st.booleans()):
        array = array[::-1]
    ord = data.draw(st.sampled_from(ORDS))
    _check_rows(array, ord)
    _check_rows(array.T, ord)


# --- Thresholds, names, results -----------------------------------------------------------------------


def _two() -> dict[str, Array]:
    return {"w": np.array([[3.0, 4.0], [0.0, 1.0]]), "b": np.array([12.0])}


@pytest.mark.parametrize(
    ("max_norm", "expected"),
    [
        (2.5, [0.5, 1, 2.5 / 12]),
        (np.array([2.5, 0.5, 12.0]), [0.5, 0.5, 1]),
        ([np.array([2.5, 0.5]), None], [0.5, 0.5, 1]),
        ([[2.5, 0.5], 6], [0.5, 0.5, 0.5]),
        ({"b": np.array([3], np.int64), "w": np.float32(1)}, [0.2, 1, 0.25]),
        ({"b": torch.tensor([3.0]), "w": None}, [1, 1, 0.25]),
    ],
)
def test_thresholds(max_norm: Any, expected: list[float]) -> None:
    result = gradclip.clip_by_global_norm_(_two(), max_norm, groups="row")
    assert np.asarray(result.coefficient).tolist() == expected
    measured = gradclip.measure(_two(), groups="row").clip_(max_norm)
    assert np.asarray(measured.coefficient).tolist() == expected


def test_coefficients_of_rows() -> None:
    grads = _two()
    gradclip.measure(grads, groups="row", grad_scale=2.0).scale_({"w": np.array([2.0, -4.0]), "b": None})
    assert [g.tolist() for g in grads.values()] == [[[3.0, 4.0], [-0.0, -2.0]], [6.0]]


def test_names_of_rows() -> None:
    result = gradclip.clip_by_global_norm_(_two(), 1.0, groups="row")
    names = result.group_names
    assert isinstance(names, gradclip.RowNames)
    assert list(names) == [names[i] for i in range(3)] == names[:] == ["w[0]", "w[1]", "b[0]"]
    assert names[-1] == "b[0]"
    assert len(names) == 3
    assert names.gradients == ("w", "b")
    assert repr(names) == "RowNames(3 rows of 2 gradients)"
    with pytest.raises(IndexError):
        names[3]
    assert [n.tolist() for n in names.split(result.group_norms)] == [[5.0, 1.0], [12.0]]
    assert result.named_group_norms() == {"w[0]": 5.0, "w[1]": 1.0, "b[0]": 12.0}
    copy = pickle.loads(pickle.dumps(result))
    assert copy.named_group_norms() == result.named_group_norms()
    assert not [key for key in result.as_dict() if "[" in key]
    nameless = gradclip.measure(list(_two().values()), groups="row").group_names
    assert list(nameless or ()) == ["0[0]", "0[1]", "1[0]"]
    assert gradclip.measure(_two(), groups="row").named_group_norms() == result.named_group_norms()
    assert gradclip.measure([np.ones((2, 3))], groups="sample").group_names is None


def test_policies_of_nonfinite_rows() -> None:
    def grads() -> dict[str, Array]:
        two = _two()
        two["w"][1, 0] = np.nan
        return two

    before = grads()["w"].tobytes()
    raised = grads()
    with pytest.raises(gradclip.NonFiniteGradientError) as caught:
        gradclip.clip_by_global_norm_(raised, 1.0, groups="row")
    assert caught.value.entries == [("w", 1, 0)]
    assert raised["w"].tobytes() == before
    result = gradclip.clip_by_global_norm_(grads(), 1.0, groups="row", nonfinite="skip")
    assert result.nonfinite == ("w",)
    assert np.isnan(result.norms[0])
    zeroed = grads()
    gradclip.clip_by_global_norm_(zeroed, 1.0, groups="row", nonfinite="zero")
    assert not any(g.any() for g in zeroed.values())
    propagated = grads()
    gradclip.clip_by_global_norm_(propagated, 1.0, groups="row", nonfinite="propagate")
    assert np.isnan(propagated["w"][1]).all()
    assert propagated["b"].tolist() == [1.0]


def test_reduce_and_scale() -> None:
    calls = []

    def double(sums: Array) -> Array:
        calls.append(sums.tolist())
        return 4 * sums

    grads = _two()
    result = gradclip.clip_by_global_norm_(grads, 1.0, groups="row", grad_scale=2.0, reduce=double)
    assert calls == [[25.0, 1.0, 144.0]]
    assert result.group_norms.tolist() == [5.0, 1.0, 12.0]
    assert grads["w"].tolist() == [[3 * (0.2 / 2), 4 * (0.2 / 2)], [0.0, 0.5]]


def test_a_plan_clips_rows() -> None:
    grads = [values("float32", (8, 100), seed=1), values("float32", (8,), seed=2)]
    alone = [g.copy() for g in grads]
    plan = gradclip.Plan(grads)
    for groups in ("row", "sample", None, "row"):
        left = plan.clip_by_global_norm_(0.9, groups=groups)
        right = gradclip.clip_by_global_norm_(alone, 0.9, groups=groups)
        assert np.array_equal(left.group_norms, right.group_norms)
        assert [g.tobytes() for g in grads] == [g.tobytes() for g in alone]


@pytest.mark.parametrize("make", [np.ones, torch.ones])
def test_a_plan_of_what_has_been_reshaped(make: Callable[[tuple[int, int]], Any]) -> None:
    array = make((4, 3))
    plan = gradclip.Plan([array])
    assert plan.row_norms()[0].tolist() == [3**0.5] * 4
    if isinstance(array, torch.Tensor):
        array.resize_(3, 4)
    else:
        array.shape = (3, 4)
    assert plan.row_norms()[0].tolist() == [2.0] * 3  # rows are those that it has now
    assert np.array_equal(plan.clip_by_global_norm_(1.0, groups="row").coefficient, [0.5] * 3)
    assert array.tolist() == [[0.5] * 4] * 3


def test_rows_that_need_no_clip_are_not_written() -> None:
    grads = np.array([[3.0, 4.0], [0.3, 0.4]])
    grads.flags.writeable = False
    assert gradclip.row_norms([grads])[0].tolist() == [5.0, 0.5]
    grads = grads.copy()
    gradclip.clip_by_global_norm_([grads], 1.0, groups="row")
    assert grads[1].tolist() == [0.3, 0.4]


# --- Bad input ----------------------------------------------------------------------------------------


def _row_clip(max_norm: Any) -> Callable[[Any], object]:
    return lambda grads: gradclip.clip_by_global_norm_(grads, max_norm, groups="row")


@pytest.mark.parametrize(
    ("call", "grads", "error", "message"),
    [
        (
            gradclip.row_norms,
            {"a": np.ones(3), "scale": np.array(2.0)},
            ValueError,
            "grads['scale']: expected an array with a first axis, that of its rows, got one without axes "
            "(g.reshape(1) has one row)",
        ),
        (
            _row_clip(1.0),
            [np.ones(3), torch.ones(())],
            ValueError,
            "grads[1]: expected an array with a first",
        ),
        (
            lambda grads: gradclip.clip_by_global_norm_(grads, 1.0, groups="sample"),
            {"a": np.ones((3, 2)), "b": None, "c": np.ones((4, 2))},
            ValueError,
            "grads['c']: expected 3 samples along the first axis, as grads['a'] has, got 4",
        ),
        (
            lambda grads: gradclip.measure(grads, groups="sample"),
            [np.ones((3, 2)), np.array(2.0)],
            ValueError,
            "grads[1]: expected an array with a first axis, that of the samples",
        ),
        (
            _row_clip([1.0]),
            [np.ones((2, 3)), np.ones(2)],
            ValueError,
            "max_norm: expected a number, an array of 4 numbers, or one of these for each of the 2 gradients,"
            " got 1",
        ),
        (
            _row_clip([1.0, np.ones(3)]),
            [np.ones((2, 3)), np.ones(2)],
            ValueError,
            "max_norm[1]: expected a number or an array of 2 numbers, got one of shape (3,)",
        ),
        (
            _row_clip(np.ones((2, 2))),
            [np.ones((2, 3)), np.ones(2)],
            ValueError,
            "max_norm: expected a number or an array of 4 numbers, got one of shape (2, 2)",
        ),
        (
            _row_clip({"a": np.array([1.0, -1.0])}),
            {"a": np.ones((2, 3))},
            ValueError,
            "max_norm['a'][1]: expected a number that is not negative, got -1.0",
        ),
        (
            _row_clip({"a": np.array([1.0, np.nan])}),
            {"a": np.ones((2, 3))},
            ValueError,
            "max_norm['a'][1]: expected a number that is not negative, got nan",
        ),
        (
            _row_clip({"b": 1.0}),
            {"a": np.ones((2, 3))},
            ValueError,
            "max_norm: expected an entry for each of the gradients, got none for 'a'",
        ),
        (
            _row_clip({"a": 1.0}),
            [np.ones((2, 3))],
            TypeError,
            "max_norm: expected a sequence, since the gradients of this call have no names, got a mapping",
        ),
        (
            _row_clip(["x"]),
            [np.ones((2, 3))],
            TypeError,
            "max_norm[0]: expected a number or an array of 2 numbers, got one of dtype <U1",
        ),
        (
            _row_clip(np.zeros(2, [("x", np.float32)])),
            [np.ones((2, 3))],
            TypeError,
            "max_norm: expected a number or an array of 2 numbers, got one of dtype [('x', '<f4')]",
        ),
        (
            lambda grads: gradclip.measure(grads, groups="row").scale_([np.array([1.0, np.inf])]),
            [np.ones((2, 3))],
            ValueError,
            "coefficients[0][1]: expected a finite number, got inf",
        ),
        (
            lambda grads: gradclip.measure(grads, groups="rows"),
            [np.ones((2, 3))],
            ValueError,
            "groups: expected None, 'tensor', 'row', 'sample', 'unit', 'unit_last' or one label per "
            "gradient, got 'rows'",
        ),
    ],
)
def test_bad_input(call: Callable[[Any], object], grads: Any, error: type[Exception], message: str) -> None:
    arrays = [g for g in (grads.values() if isinstance(grads, dict) else grads) if g is not None]
    before = [np.asarray(g).tobytes() for g in arrays]
    with pytest.raises(error, match="^" + re.escape(message)):
        call(grads)
    assert [np.asarray(g).tobytes() for g in arrays] == before


def test_memory_that_a_threshold_replaces_is_noticed() -> None:
    tensor = torch.ones(4, 3)

    class Hostile:
        def __array__(self, dtype: Any = None, copy: Any = None) -> Array:
            tensor.resize_(400, 300)
            return np.ones(4)

    hostile: Any = [Hostile()]
    with pytest.raises(ValueError, match="given other memory"):
        gradclip.clip_by_global_norm_([tensor], hostile, groups="row")


def test_rows_of_a_module() -> None:
    model = torch.nn.Linear(2, 2)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([2.0, 0.5])
    result = gradclip.torch.clip_module_(model, {"weight": 2.5, "bias": None}, groups="row")
    assert model.weight.grad.tolist() == [[1.5, 2.0], [0.0, 1.0]]
    assert result.named_group_norms() == {"weight[0]": 5.0, "weight[1]": 1.0, "bias[0]": 2.0, "bias[1]": 0.5}
    with pytest.raises(ValueError, match="groups: expected None, 'tensor', 'module', 'row'"):
        gradclip.torch.clip_module_(model, 1.0, groups="rows")


@pytest.mark.parametrize("groups", ["row", "sample"])
def test_more_rows_than_can_be_counted(groups: str) -> None:
    """They have no elements, so that they exist: eight times 2^61 is 0 in 64 bits."""
    many: list[Array] = [np.zeros((2**61, 0), np.float16) for _ in range(8)]
    for call in (gradclip.row_norms, lambda grads: gradclip.measure(grads, groups=groups)):
        with pytest.raises(ValueError, match="grads: expected at most 2\\^48 rows together, got more"):
            call(many)
