"""Second arrays that do not fit their gradients, share memory with them, or misbehave: nothing is written."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import gradclip
from matrices import Array


def _regularised(params: Any, **options: Any) -> Any:
    return lambda grads: gradclip.clip_by_global_norm_(grads, 1e-3, params=params, **({"l2": 0.1} | options))


def _update(base: Any, **options: Any) -> Any:
    return lambda new: gradclip.clip_difference_(new, base, 1e-3, **options)


_TWO = [np.ones((3, 4)), np.ones(2, np.float32)]
_NAMED = {"w": np.ones(3), "b": np.ones(2)}


@pytest.mark.parametrize(
    ("call", "grads", "error", "message"),
    [
        (_regularised([np.ones((4, 3)), np.ones(2)]), _TWO, ValueError,
         "params[0]: expected shape (3, 4), as grads[0] has, got (4, 3)"),
        (_update([np.ones((3, 4)), np.ones((2, 1), np.float32)]), _TWO, ValueError,
         "base[1]: expected shape (2,), as new[1] has, got (2, 1)"),
        (_regularised([np.ones((3, 4))]), _TWO, ValueError,
         "params: expected 2 arrays, one for each entry of grads, got 1"),
        (_regularised([np.ones((3, 4)), None]), _TWO, TypeError,
         "params[1]: expected an array, as grads[1] is, got None"),
        (_regularised([np.ones((3, 4)), np.ones(2)]), [np.ones((3, 4)), None], TypeError,
         "params[1]: expected None, as grads[1] is, got an array"),
        (_update([np.ones((3, 4)), np.ones(2)]), _TWO, TypeError,
         "base[1]: expected dtype float32, as new[1] has, got float64"),
        (_regularised([np.ones((3, 4)), np.ones(2, complex)]), _TWO, TypeError,
         "params[1]: expected a real dtype, as grads[1] has, got complex128"),
        (_regularised([np.ones(2)]), [np.ones(2, complex)], TypeError,
         "params[0]: expected a complex dtype, as grads[0] has, got float64"),
        (_regularised([np.ones(2, complex)], l1=0.1), [np.ones(2, complex)], TypeError,
         "params[0]: expected a real dtype"),
        (_regularised([np.ones(3), np.ones(2)]), _NAMED, TypeError,
         "params: expected a mapping of names, as grads is, got list"),
        (_regularised({"w": np.ones(3), "b": np.ones(2)}), [np.ones(3), np.ones(2)], TypeError,
         "params: expected a sequence, as grads is, got dict"),
        (_regularised({"w": np.ones(3), "c": np.ones(2)}), _NAMED, ValueError,
         "params: expected an entry for each of the entries of grads, got none for 'b'"),
        (_regularised({"w": np.ones(3), "b": np.ones(2), "c": np.ones(2)}), _NAMED, ValueError,
         "params: expected the names of entries of grads, got 'c'"),
        (_regularised({"w": np.ones(3), "b": np.ones(3)}), _NAMED, ValueError,
         "params['b']: expected shape (2,), as grads['b'] has, got (3,)"),
        (_regularised({"w": np.ones(3), "b": np.ones(2, int)}), _NAMED, TypeError,
         "params['b']: expected dtype float16"),
        (_regularised(None), _TWO, ValueError,
         "params: expected the parameters that are regularised (l2=0.1, l1=0.0), got None"),
        (_regularised(3.0), _TWO, TypeError,
         "params: expected a sequence or a mapping of arrays, got float"),
        (_regularised([np.ones((3, 4)), np.ones(2)], l2=-0.1), _TWO, ValueError,
         "l2: expected a number that is not negative, got -0.1"),
        (_regularised([np.ones((3, 4)), np.ones(2)], l2=math.nan), _TWO, ValueError,
         "l2: expected a finite number, got nan"),
        (_regularised([np.ones((3, 4)), np.ones(2)], l1=math.inf), _TWO, ValueError,
         "l1: expected a finite number, got inf"),
        (_regularised([np.ones((3, 4)), np.ones(2)], l1="much"), _TWO, TypeError,
         "l1: expected a real number, got str"),
        (_regularised([np.ones((3, 4)), np.ones(2)], l2=1e300, grad_scale=1e300), _TWO, ValueError,
         "grad_scale: expected one whose products with l2 and l1 are finite"),
        (_regularised([np.ones(())], groups="row"), [np.ones(())], ValueError,
         "grads[0]: expected an array with a first axis"),
        (_update(_TWO, groups=[0]), _TWO, ValueError, "groups: expected one label for each"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call: Any, grads: Any, error: type[Exception], message: str) -> None:
    arrays = [g for g in (grads.values() if isinstance(grads, dict) else grads) if g is not None]
    before = [g.tobytes() for g in arrays]
    with pytest.raises(error, match="^" + re.escape(message)):
        call(grads)
    assert [g.tobytes() for g in arrays] == before


def test_operands_that_share_memory() -> None:
    memory = np.arange(20.0)
    before = memory.tobytes()
    calls: tuple[Callable[[], object], ...] = (
        lambda: gradclip.clip_by_global_norm_([memory], 1.0, params=[memory], l2=0.1),
        lambda: gradclip.clip_difference_([memory[:10]], [memory[5:15]], 1.0),
        lambda: gradclip.clip_difference_([memory[:5], memory[5:10]], [np.ones(5), memory[:5]], 1.0),
        lambda: gradclip.measure([memory], params=[memory], l2=0.1).clip_(1.0),
    )
    for call in calls:
        with pytest.raises(
            ValueError, match=r"expected memory of its own, got memory shared with (params|base)"
        ):
            call()
        assert memory.tobytes() == before
    # What is only measured may share, tied parameters may be one array, and interleaved ones share nothing.
    assert gradclip.measure([memory], params=[memory], l2=1.0).total_norm == 2 * gradclip.global_norm(
        [memory]
    )
    gradclip.clip_by_global_norm_([memory[::2]], 1.0, params=[memory[1::2]], l2=0.1)
    shared = np.ones(4)
    gradclip.clip_by_global_norm_([np.ones(4), np.ones(4)], 1.0, params=[shared, shared], l2=0.1)
    gradclip.clip_by_global_norm_([np.ones((3, 4))], 1.0, params=[np.broadcast_to(shared, (3, 4))], l2=0.1)


def test_what_is_only_read_may_be_read_only() -> None:
    param = np.ones(3)
    param.flags.writeable = False
    grads = [np.ones(3)]
    gradclip.clip_by_global_norm_(grads, 10.0, params=[param], l2=1.0)
    assert grads[0].tolist() == [2.0] * 3
    with pytest.raises(ValueError, match=re.escape("new[0]: expected writable memory")):
        gradclip.clip_difference_([param], grads, 1e-3)


def test_a_parameter_that_is_given_other_memory() -> None:
    param = torch.ones(3, requires_grad=True)
    grads = [np.ones(3)]

    def reduce(sums: Array) -> Array:
        param.data = torch.zeros(3)
        return sums

    with pytest.raises(ValueError, match=re.escape("params[0]: expected the memory that was read before")):
        gradclip.clip_by_global_norm_(grads, 1e-3, params=[param], l2=1.0, reduce=reduce)
    assert grads[0].tolist() == [1.0] * 3
    measured = gradclip.measure(grads, params=[param], l2=1.0)
    param.data = torch.zeros(3)
    with pytest.raises(ValueError, match=re.escape("params[0]: expected the memory that was read before")):
        measured.clip_(1e-3)
    assert grads[0].tolist() == [1.0] * 3


def test_none_at_all_warns() -> None:
    with pytest.warns(UserWarning, match="expected gradients, got none"):
        gradclip.clip_difference_([], [], 1.0)
    with pytest.warns(UserWarning, match="expected gradients, got none"):
        gradclip.clip_by_global_norm_([None], 1.0, params=[None], l2=0.1)


class _Acting:
    """An array by DLPack that does something while it is read."""

    def __init__(self, act: Callable[[], object], array: Array) -> None:
        self.act, self.array = act, array

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)

    def __dlpack__(self, **options: Any) -> Any:
        self.act()
        return self.array.__dlpack__(**options)


def test_a_second_array_that_takes_a_gradients_memory_away() -> None:
    tensor = torch.ones(1000)

    def move() -> None:
        tensor.data = torch.ones(10)

    params = [_Acting(move, np.ones(1000))]
    with pytest.raises(ValueError, match=re.escape("grads[0]: expected the memory that was read before")):
        gradclip.clip_by_global_norm_([tensor], 0.5, params=params, l2=0.1)
    array = np.ones((4, 6))

    def reshape(shape: tuple[int, ...]) -> Callable[[], None]:
        return lambda: setattr(array, "shape", shape)

    with pytest.raises(
        ValueError, match=re.escape("base[0]: expected shape (6, 4), as new[0] has, got (4, 6)")
    ):
        gradclip.clip_difference_([array], [_Acting(reshape((6, 4)), np.zeros((4, 6)))], 0.5)
    assert (array == 1).all()


@pytest.mark.parametrize("shape", [(6, 4), (24,), (1, 4, 6), (2, 12)])
@pytest.mark.parametrize("groups", [None, "row", "sample"])
def test_an_array_that_a_threshold_reshapes(shape: tuple[int, ...], groups: Any) -> None:
    array = np.ones((4, 6))

    class Limit:
        def __float__(self) -> float:
            array.shape = shape
            return 0.5

    with pytest.raises(ValueError, match=r"^params\[0\]: expected shape .*, as grads\[0\] has, got \(4, 6\)"):
        gradclip.clip_by_global_norm_([array], Limit(), groups=groups, params=[np.ones((4, 6))], l2=0.1)
    assert (array == 1).all()


def test_arrays_that_a_threshold_reshapes_both() -> None:
    array, param = np.ones((4, 6)), np.ones((4, 6))

    class Limit:
        def __float__(self) -> float:
            array.shape = param.shape = (6, 4)
            return 0.5

    with pytest.raises(ValueError, match=r"^grads\[0\]: expected 4 rows, as when groups were made, got"):
        gradclip.clip_by_global_norm_([array], Limit(), groups="row", params=[param], l2=0.1)
    assert (array == 1).all()
