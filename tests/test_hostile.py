"""Callbacks and objects that misbehave in the middle of a call: no crash, nothing written too early."""

from __future__ import annotations

import copy
import gc
import importlib
import threading
import weakref
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import gradclip
from gradclip import _core
from matrices import Array
from processes import output_of


def test_an_entry_that_empties_the_list_while_it_is_read() -> None:
    code = """
    import gc
    import numpy as np
    import gradclip

    class Acting:
        def __init__(self, act):
            self.array, self.act = np.ones(1000), act
        def __dlpack_device__(self):
            return (1, 0)
        def __dlpack__(self, **options):
            self.act()
            return self.array.__dlpack__(**options)

    def empty():
        grads.clear()
        gc.collect()
        junk.extend(np.full(1000, 7.0) for _ in range(100))   # takes the place of what was freed

    for call in (
        gradclip.tensor_norms,
        lambda g: gradclip.clip_by_global_norm_(g, 0.5),
        lambda g: gradclip.scale_(g, 2.0),
        lambda g: gradclip.Plan(g).clip_by_norm_(0.5),
    ):
        for size in (3, 50):
            junk = []
            grads = [np.ones(1000) for _ in range(size)]
            grads += [Acting(empty), *(np.ones(1000) for _ in range(size))]
            try:
                call(grads)
            except RuntimeError:
                pass                                          # "changed size" is an answer too
            assert all((array == 7.0).all() for array in junk)
            junk = []
            grads = {str(i): np.ones(1000) for i in range(size)}
            grads["acting"] = Acting(empty)
            grads["last"] = np.ones(1000)
            try:
                call(grads)
            except RuntimeError:
                pass
            assert all((array == 7.0).all() for array in junk)
    print("alive")
    """
    assert output_of(code) == "alive"


class _Nested:
    """An array by DLPack that calls gradclip itself, with more arrays, while it is being read."""

    def __init__(self, array: Array, fails: bool = False) -> None:
        self.array, self.fails = array, fails

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)

    def __dlpack__(self, **options: Any) -> Any:
        others = {f"other {i}": np.full((40, i), 3.0).T[::-1] for i in range(200)}
        assert gradclip.clip_by_norm_(others, 1.0).clipped
        with pytest.raises(TypeError):
            gradclip.scale_([*others.values(), "text"], 0.5)
        if self.fails:
            raise OSError("gone")
        return self.array.__dlpack__(**options)


def test_a_call_within_the_reading_of_another() -> None:
    arrays = [np.array([3.0, 4.0]), np.array([[12.0, 0.0], [0.0, 0.0]]).T[:, ::-1], np.array([84.0])]
    grads = {"a": arrays[0], "b": _Nested(arrays[1]), "c": arrays[2], "d": None}
    assert gradclip.tensor_norms(grads).tolist() == [5.0, 12.0, 84.0, 0.0]
    result = gradclip.clip_by_global_norm_(grads, 42.5)
    assert result.named_norms() == {"a": 5.0, "b": 12.0, "c": 84.0, "d": 0.0}
    assert [array.max() for array in arrays] == [2.0, 6.0, 42.0]
    with pytest.raises(Exception, match=r"gone|grads\['b'\]"):
        gradclip.clip_by_global_norm_({"a": arrays[0], "b": _Nested(arrays[1], fails=True)}, 1.0)
    assert gradclip.tensor_norms(arrays).tolist() == [2.5, 6.0, 42.0]


def test_arrays_stay_alive_while_reduce_drops_them() -> None:
    grads: list[Any] = [np.full(1000, 2.0), torch.full((1000,), 2.0), np.full((9, 9), 2.0).T[::2]]
    watches = [weakref.ref(grad) for grad in grads]
    alive: list[bool] = []

    def reduce(sums: Array) -> Array:
        grads.clear()
        gc.collect()
        alive.extend(watch() is not None for watch in watches)
        return sums

    assert gradclip.clip_by_global_norm_(grads, 1.0, reduce=reduce).clipped
    gc.collect()
    assert alive == [True] * 3
    assert [watch() for watch in watches] == [None] * 3


def test_gradients_that_only_a_generator_knows() -> None:
    watches: list[Any] = []

    def grads() -> Iterator[Array]:
        for i in range(100):
            array = np.full(1000 + i, 2.0)
            watches.append(weakref.ref(array))
            yield array

    assert gradclip.clip_by_norm_(grads(), 1.0).clipped
    gc.collect()
    assert not any(watch() is not None for watch in watches)


def test_reduce_that_changes_its_argument() -> None:
    """The sums are a copy of its own: what it does to them is what it returns, or nothing."""

    def reduce(sums: Array) -> Array:
        result = sums * 4
        sums[...] = -1.0
        return result

    array = np.array([3.0, 4.0])
    result = gradclip.clip_by_global_norm_([array], 5.0, reduce=reduce)
    assert result.coefficient == 0.5
    assert result.norms.tolist() == [5.0]


def test_a_plan_used_by_its_own_reduce() -> None:
    array = np.array([3.0, 4.0])
    plan = gradclip.Plan([array])

    def reduce(sums: Array) -> Array:
        assert plan.global_norm() == 5.0
        return sums

    assert plan.clip_by_global_norm_(2.5, reduce=reduce).coefficient == 0.5


def test_a_plan_used_by_many_threads() -> None:
    plan = gradclip.Plan([np.full(3000, 2.0), np.full(5, 3.0, np.float32)])
    expected = plan.tensor_norms().tobytes()
    failures: list[int] = []

    def work() -> None:
        for ord in (2, 1, 3, 2) * 50:
            if ord == 2 and plan.tensor_norms(ord).tobytes() != expected:
                failures.append(ord)
            plan.global_norm(ord)
            plan.clip_by_norm_(1e9, ord, grad_scale=1.0)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


class _Lying(Mapping[str, Any]):
    """A mapping whose items, length and order do not agree."""

    def __init__(self, array: Array) -> None:
        self.array = array

    def __getitem__(self, key: str) -> Array:
        return self.array

    def __len__(self) -> int:
        return 1000

    def __iter__(self) -> Iterator[str]:
        return iter(["a"])


def test_a_mapping_that_lies_about_its_length() -> None:
    result = gradclip.clip_by_norm_(_Lying(np.array([3.0, 4.0])), 2.5)
    assert result.names == ("a",)
    assert result.norms.tolist() == [5.0]


@pytest.mark.parametrize("key", ["it's", "слой.ü", "a\nb", "", "\udc80", "a" * 5000, "{}%s"])
def test_names_of_any_text(key: str) -> None:
    with pytest.raises(TypeError) as caught:
        gradclip.tensor_norms({"fine": np.ones(2), key: 3})
    assert str(caught.value).startswith(f"grads[{key!r}]: expected ")
    result = gradclip.clip_by_norm_({key: np.array([np.nan])}, 1.0, nonfinite="skip")
    assert result.nonfinite == (key,)
    assert result.names == (key,)
    assert key in result.named_norms()


def test_numbers_that_fail_to_convert() -> None:
    class Bad:
        def __float__(self) -> float:
            raise RuntimeError("too much")

    array = np.array([3.0, 4.0])
    with pytest.raises((TypeError, RuntimeError), match=r"max_norm|too much"):
        gradclip.clip_by_global_norm_([array], Bad())
    with pytest.raises((TypeError, RuntimeError), match=r"factor|too much"):
        gradclip.scale_([array], Bad())
    assert array.tolist() == [3.0, 4.0]


def test_an_integer_beyond_float64() -> None:
    array = np.array([3.0, 4.0])
    for call in (gradclip.clip_by_global_norm_, gradclip.clip_by_value_, gradclip.scale_):
        with pytest.raises((OverflowError, ValueError)):
            call([array], 10**400)
    assert array.tolist() == [3.0, 4.0]


def test_objects_that_nobody_has_made() -> None:
    """A class of the engines called, or its __new__: memory that nobody has written to."""
    emulated = importlib.import_module("gradclip._cuda_emulated")
    for kind in (_core.Gradients, emulated.Gradients):
        derived = type("Derived", (kind,), {})
        for make in (kind, derived, partial(kind.__new__, kind), partial(object.__new__, kind)):
            with pytest.raises(TypeError):
                make()
    with pytest.raises(TypeError):
        copy.copy(_core.read([np.ones(3)]))
    plan, result = object.__new__(gradclip.Plan), object.__new__(gradclip.ClipResult)
    for call in (plan.global_norm, partial(plan.scale_, 2.0), partial(len, plan), result.as_dict):
        with pytest.raises(AttributeError):
            call()
    error = gradclip.NonFiniteGradientError.__new__(gradclip.NonFiniteGradientError)
    assert str(error) == ""


@pytest.mark.parametrize("first", ["", "import gradclip"])
def test_a_subinterpreter_is_refused(first: str) -> None:
    """In one the engines would hang for ever."""
    code = f"""
    {first}
    import sys
    name = "_interpreters" if sys.version_info >= (3, 13) else "_xxsubinterpreters"
    interpreters = __import__(name)
    other = interpreters.create()
    run = interpreters.exec if sys.version_info >= (3, 13) else interpreters.run_string
    try:
        found = run(other, "import gradclip")
    except Exception as error:
        found = error
    print(getattr(found, "formatted", found))
    """
    assert "gradclip: expected the main interpreter of the process" in output_of(code)
