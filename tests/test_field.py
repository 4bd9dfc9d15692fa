"""What reports from the field and an attack broke in the core: every example stays, with its right value."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import gradclip
from matrices import Array
from processes import output_of

PLAN_CALLS: dict[str, Callable[[gradclip.Plan], Any]] = {
    "tensor_norms": lambda plan: plan.tensor_norms(),
    "global_norm": lambda plan: plan.global_norm(3),
    "clip_by_global_norm_": lambda plan: plan.clip_by_global_norm_(0.5),
    "clip_by_norm_": lambda plan: plan.clip_by_norm_(0.5),
    "clip_by_value_": lambda plan: plan.clip_by_value_(0.5),
    "scale_": lambda plan: plan.scale_(0.0),
}
GONE = (
    r"^grads\[1\]: expected (the memory that was read before, got .*other memory since|an array with memory)"
)


def _swap(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.set_(torch.full((800,), 3.0))  # type: ignore[call-overload]


def _resize(tensor: torch.Tensor) -> None:
    tensor.untyped_storage().resize_(0)


def _assign(tensor: torch.Tensor) -> None:
    tensor.data = torch.full((800,), 3.0)


def _widen(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data.double()


def _shrink(tensor: torch.Tensor) -> None:
    tensor.resize_(10)


def _hide(tensor: torch.Tensor) -> None:
    _swap(tensor)
    tensor.requires_grad_()


SWAPS = [_swap, _resize, _assign, _widen, _shrink, _hide]


# --- Memory that is given up between reading and writing ----------------------------------------------


@pytest.mark.parametrize("call", PLAN_CALLS.values(), ids=PLAN_CALLS)
def test_a_plan_after_the_model_was_converted(call: Callable[[gradclip.Plan], Any]) -> None:
    model = torch.nn.Linear(40, 20)
    model(torch.ones(1, 40)).sum().backward()
    plan = gradclip.Plan([parameter.grad for parameter in model.parameters()])
    model.double()
    victims = [torch.full((20, 40), 7.0) for _ in range(50)]
    with pytest.raises(ValueError, match=r"^grads\[0\]: expected the memory that was read before"):
        call(plan)
    assert all((victim == 7).all() for victim in victims)


@pytest.mark.parametrize("call", PLAN_CALLS.values(), ids=PLAN_CALLS)
@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("strided", [False, True])
def test_a_plan_of_a_tensor_with_other_memory(
    swap: Callable[[torch.Tensor], None], call: Callable[[gradclip.Plan], Any], strided: bool
) -> None:
    first, tensor = np.full(5, 2.0), torch.full((1600,), 2.0)[:: 2 if strided else 1]
    plan = gradclip.Plan([first, tensor])
    swap(tensor)
    victims = [torch.full((800,), 7.0) for _ in range(50)]
    with pytest.raises(ValueError, match=GONE):
        call(plan)
    assert all((victim == 7).all() for victim in victims)
    assert (first == 2).all()


def test_a_plan_of_a_view_whose_storage_was_resized() -> None:
    tensor = torch.full((800,), 2.0)
    plan = gradclip.Plan([np.ones(3), tensor[::2]])
    _resize(tensor)
    with pytest.raises(ValueError, match=GONE):
        plan.scale_(0.0)


@pytest.mark.parametrize("call", PLAN_CALLS.values(), ids=PLAN_CALLS)
@pytest.mark.parametrize(("size", "view"), [(10, False), (1_000_000, False), (10, True)])
def test_a_plan_of_an_array_that_was_resized(
    call: Callable[[gradclip.Plan], Any], size: int, view: bool
) -> None:
    array = np.full(5000, 2.0)
    grads = [np.full(3, 2.0), array[4000:] if view else array]
    plan = gradclip.Plan(grads)
    array.resize(size, refcheck=False)
    with pytest.raises(ValueError, match=GONE):
        call(plan)


def test_an_array_that_changes_its_type_in_place() -> None:
    array = np.full(50, 2.0)
    plan = gradclip.Plan([np.ones(3), array])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        array.dtype = np.dtype(np.float32)  # type: ignore[misc]
    with pytest.raises(ValueError, match=GONE):
        plan.scale_(0.0)


@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("make", [list, gradclip.Plan])
def test_a_reduce_that_gives_a_tensor_other_memory(swap: Callable[[torch.Tensor], None], make: Any) -> None:
    first, tensor = torch.full((800,), 2.0), torch.full((800,), 2.0)
    grads = make([first, tensor])
    victims: list[torch.Tensor] = []

    def reduce(sums: Array) -> Array:
        swap(tensor)
        victims.extend(torch.full((800,), 7.0) for _ in range(50))
        return sums

    call = grads.clip_by_global_norm_ if make is gradclip.Plan else partial(gradclip.clip_by_norm_, grads)
    with pytest.raises(ValueError, match=GONE):
        call(1.0, reduce=reduce)
    assert all((victim == 7).all() for victim in victims)
    assert (first == 2).all()


class _Exporting:
    """An array by DLPack that runs code as it is exported."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.array, self.act = np.full(5, 2.0), act

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)

    def __dlpack__(self, **options: Any) -> Any:
        self.act()
        return self.array.__dlpack__(**options)


@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize(
    "call", [gradclip.tensor_norms, lambda grads: gradclip.scale_(grads, 0.0), gradclip.Plan]
)
def test_an_export_that_gives_an_earlier_tensor_other_memory(
    swap: Callable[[torch.Tensor], None], call: Callable[[list[Any]], Any]
) -> None:
    first, tensor = np.full(5, 2.0), torch.full((800,), 2.0)
    victims: list[torch.Tensor] = []

    def act() -> None:
        swap(tensor)
        victims.extend(torch.full((800,), 7.0) for _ in range(50))

    with pytest.raises(ValueError, match=GONE):
        call([first, tensor, _Exporting(act)])
    assert all((victim == 7).all() for victim in victims)
    assert (first == 2).all()


def test_a_number_that_gives_a_tensor_other_memory() -> None:
    tensor = torch.full((800,), 2.0)

    class Number:
        def __float__(self) -> float:
            _swap(tensor)
            return 0.5

    number: Any = Number()
    for call in (
        lambda grads: gradclip.clip_by_global_norm_(grads, number),
        lambda grads: gradclip.clip_by_global_norm_(grads, 1.0, grad_scale=number),
        lambda grads: gradclip.clip_by_norm_(grads, [1.0, number]),
        lambda grads: gradclip.clip_by_value_(grads, number),
        lambda grads: gradclip.scale_(grads, number),
        lambda grads: gradclip.global_norm(grads, number),
    ):
        with pytest.raises(ValueError, match=GONE):
            call([np.ones(2), tensor])


# --- Nothing but results is made once memory has changed ----------------------------------------------


@pytest.mark.parametrize("name", ["float16", "float32", "float64"])
def test_value_clips_of_tiles_with_and_without_numbers_beyond(name: str) -> None:
    """Tiles are found before any is written: with NaN alone, NaN that hides a number, and neither."""
    per_tile = 16384 // np.dtype(name).itemsize
    array = np.full(per_tile * 70 + 5, 0.25, name)
    array[3] = np.nan
    array[per_tile + 3], array[per_tile + 4] = np.nan, -9.0
    array[per_tile * 2 + 1] = np.inf
    array[-1] = 2.0
    expected = np.clip(array, -0.5, 0.5)
    result = gradclip.clip_by_value_([array], 0.5)
    assert np.array_equal(array, expected, equal_nan=True)
    assert result.clipped
    assert np.isnan(result.total_norm)
    again = gradclip.clip_by_value_([array], 0.5)
    assert not again.clipped
    assert again.nonfinite == (0,)


# --- Errors that lie, hide or kill --------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError, ZeroDivisionError, SystemExit])
@pytest.mark.parametrize("where", ["reduce", "array"])
def test_what_reduce_raises_arrives_as_it_was_raised(error: type[BaseException], where: str) -> None:
    class Failing:
        def __array__(self, *_: Any, **__: Any) -> Any:
            raise error("by the caller")

    def reduce(sums: Array) -> Any:
        if where == "reduce":
            raise error("by the caller")
        return Failing()

    array = np.array([3.0, 4.0])
    for clip in (gradclip.clip_by_global_norm_, gradclip.clip_by_norm_):
        with pytest.raises(error, match="by the caller") as caught:
            clip([array], 1.0, reduce=reduce)
        assert type(caught.value) is error
    assert array.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("returned", [object(), None, "text", {}, [[1.0], [1.0, 2.0]], 1j, np.array([True])])
def test_what_reduce_returns_is_no_array_of_sums(returned: Any) -> None:
    array = np.array([3.0, 4.0])
    with pytest.raises((TypeError, ValueError), match=r"reduce|inhomogeneous"):
        gradclip.clip_by_global_norm_([array], 1.0, reduce=lambda _: returned)
    assert array.tolist() == [3.0, 4.0]


class _Raising:
    def __init__(self, error: BaseException, at: str) -> None:
        self._error, self._at = error, at

    def __dlpack_device__(self) -> tuple[int, int]:
        if self._at == "device":
            raise self._error
        return (1, 0)

    @property
    def __dlpack__(self) -> Any:
        if self._at == "attribute":
            raise self._error
        return self._export

    def _export(self, **_: Any) -> Any:
        raise self._error


@pytest.mark.parametrize("at", ["device", "attribute", "export"])
@pytest.mark.parametrize("position", [0, 1])
def test_every_entry_raises_with_its_name(at: str, position: int) -> None:
    grads: list[Any] = [np.ones(2)]
    for call in (gradclip.tensor_norms, lambda grads: gradclip.scale_(grads, 2.0), gradclip.Plan):
        for error in (RuntimeError("gone"), OSError("gone"), TypeError("gone")):
            with pytest.raises(
                ValueError, match=rf"^grads\[{position}\]: expected an array .*gone"
            ) as caught:
                call([*grads[:position], _Raising(error, at), *grads])
            assert caught.value.__cause__ is error
        for raw in (MemoryError(), KeyboardInterrupt()):
            with pytest.raises(type(raw)):
                call([*grads[:position], _Raising(raw, at), *grads])
    assert (grads[0] == 1).all()


def test_texts_that_no_message_can_hold() -> None:
    nameless = type("Nameless", (), {"__module__": None})
    odd = type("Odd", (), {"__module__": 3, "__repr__": lambda self: 1 / 0})
    surrogate = RuntimeError("lone \udc80 surrogate")
    unprintable = type("Unprintable", (RuntimeError,), {"__str__": lambda self: 1 / 0})()
    for call in (gradclip.tensor_norms, lambda grads: gradclip.scale_(grads, 2.0), gradclip.Plan):
        for entry in (nameless(), odd(), nameless, "\udc80", b"\xff"):
            with pytest.raises(TypeError, match=r"^grads\['\\udc80'\]: expected an array"):
                call({"fine": np.ones(2), "\udc80": entry})
        with pytest.raises(ValueError, match=r"lone \\udc80 surrogate"):
            call([_Raising(surrogate, "export")])
        with pytest.raises(ValueError, match="unprintable"):
            call([_Raising(unprintable, "export")])
        with pytest.raises(TypeError, match="expected names"):
            call({odd(): np.ones(2)})
    array = np.ones(2)
    bad: Any
    for bad in ("\udc80", odd()):
        for name in ("max_norm", "nonfinite", "groups", "ord", "grad_scale"):
            arguments: dict[str, Any] = {"max_norm": 1.0, name: bad}
            with pytest.raises((TypeError, ValueError), match=name):
                gradclip.clip_by_global_norm_([array], **arguments)
    assert (array == 1).all()


def test_dtypes_by_their_names() -> None:
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.int32, torch.bool):
        name = str(dtype)[6:]
        with pytest.raises(TypeError, match=rf"got dtype {name}"):
            gradclip.global_norm([torch.ones(3).to(dtype)])


def test_jax_arrays_that_are_no_arrays_now() -> None:
    deleted = jnp.ones(3)
    deleted.delete()
    for grads in ([deleted], [np.ones(2), deleted]):
        with pytest.raises(
            ValueError, match=r"expected an array with memory, got a jax.Array that was deleted"
        ):
            gradclip.global_norm(grads)
    with pytest.raises(
        TypeError, match=r"grads\[0\]: .*traced \(inside of jax.jit and jax.grad use gradclip.jax"
    ):
        jax.jit(lambda x: gradclip.global_norm([x]))(jnp.ones(3))
    with pytest.raises(TypeError, match=r"being traced"):
        jax.grad(lambda x: gradclip.global_norm([x]))(jnp.ones(3))


def test_nested_containers_and_expanded_tensors_get_a_hint() -> None:
    for nested in ({"w": np.ones(2)}, [np.ones(2)], (np.ones(2),)):
        with pytest.raises(TypeError, match=r"grads\['layer'\]: .*jax.tree.leaves"):
            gradclip.global_norm({"layer": nested})
    with pytest.raises(ValueError, match=r"grads\[0\]: .*overlaps itself .*clone\(\)"):
        gradclip.scale_([torch.ones(1).expand(4)], 2.0)


def test_a_helper_thread_that_cannot_be_started() -> None:
    """A limit on threads is no error: the caller does the work."""
    code = """
    import resource, threading
    import numpy as np
    import gradclip
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
    gradclip.set_num_threads(4)
    array = np.ones(4_000_000)
    print(gradclip.global_norm([array]))
    """
    assert output_of(code) == "2000.0"
