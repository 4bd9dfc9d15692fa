"""What gradclip.jax refuses: trees, options, traced numbers; by which name, and what was expected."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradclip
import gradclip.jax

inf, nan = math.inf, math.nan

ready: Any = jax.block_until_ready

_FLOATS = "float16, bfloat16, float32, float64, complex64 or complex128"


class _Deleted:
    def __call__(self) -> Any:
        array = jnp.ones(3)
        array.delete()
        return {"w": array}


_BAD_TREES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "integers": (
        lambda: {"layer": {"w": jnp.ones(3, jnp.int32)}},
        TypeError,
        f"grads['layer']['w']: expected an array of {_FLOATS}, got one of int32",
    ),
    "booleans": (
        lambda: [jnp.ones(3), (np.ones(3, bool),)],
        TypeError,
        f"grads[1][0]: expected an array of {_FLOATS}, got one of bool",
    ),
    "longdouble": (
        lambda: {"w": np.ones(3, np.longdouble)},
        TypeError,
        f"grads['w']: expected an array of {_FLOATS}, got one of {np.dtype(np.longdouble).name}",
    ),
    "a number": (
        lambda: {"layer": {"w": 1.0}},
        TypeError,
        f"grads['layer']['w']: expected an array of {_FLOATS}, got builtins.float",
    ),
    "a string": (lambda: ["w"], TypeError, f"grads[0]: expected an array of {_FLOATS}, got builtins.str"),
    "a root": (lambda: 2.5, TypeError, f"grads: expected an array of {_FLOATS}, got builtins.float"),
    "only None": (
        lambda: {"w": None},
        ValueError,
        "grads: expected at least one array, got none in {'w': None}",
    ),
    "nothing": (lambda: [], ValueError, "grads: expected at least one array, got none in []"),
    "deleted": (
        _Deleted(),
        ValueError,
        "grads['w']: expected an array with memory, got a jax.Array that was deleted",
    ),
}


@pytest.mark.parametrize("kind", _BAD_TREES)
@pytest.mark.parametrize("call", ["clip", "measure", "global_norm", "tree_norms"])
def test_trees_that_are_refused(call: str, kind: str) -> None:
    make, error, message = _BAD_TREES[kind]
    function = getattr(gradclip.jax, call)
    with pytest.raises(error) as caught:
        function(make(), *((1.0,) if call == "clip" else ()))
    assert str(caught.value).startswith(message)


def _two() -> dict[str, Any]:
    return {"b": jnp.ones(3), "w": jnp.ones((2, 3))}


_NO_NUMBER = "max_norm: expected a number or an array of numbers, got"
_NEGATIVE = "max_norm: expected numbers that are not negative, got"
_NO_NAMES = "max_norm: expected numbers, since the groups of this call have no names, got a mapping"
_NAMES = "max_norm: expected the names of groups, ['b', 'w'], got"
_PREFIX = "groups: expected labels in a prefix of the pytree of the grads: "
_LABEL = "expected names, or labels from 0 to 1, got"
_SCALE = "grad_scale: expected a positive finite number whose reciprocal is finite, got"
_SCALE_SHAPE = "grad_scale: expected a number or a float array of shape (), got one of"
_NONFINITE = "nonfinite: expected 'propagate', 'zero' or 'skip'"

_BAD_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"max_norm": [1.0, 2.0]}, "max_norm: expected a number or an array of shape (), got one of shape (2,)"),
    (
        {"max_norm": jnp.ones(3), "groups": "tensor"},
        "max_norm: expected a number or an array of shape (), or of shape (2,), one for each group, got one "
        "of shape (3,)",
    ),
    ({"max_norm": -1.0}, f"{_NEGATIVE} -1.0"),
    ({"max_norm": nan}, f"{_NEGATIVE} nan"),
    ({"max_norm": [1.0, -inf], "groups": "tensor"}, f"{_NEGATIVE} [1.0, -inf]"),
    ({"max_norm": {"b": 1.0, "w": 1.0}}, _NO_NAMES),
    ({"max_norm": {"b": 1.0, "w": 1.0}, "groups": {"b": 0, "w": 1}}, _NO_NAMES),
    ({"max_norm": {"b": 1.0, "w": 1.0}, "groups": "row"}, _NO_NAMES),
    ({"max_norm": {"b": 1.0, "v": 1.0}, "groups": "tensor"}, f"{_NAMES} ['b', 'v']"),
    ({"max_norm": {"b": 1.0}, "groups": "tensor"}, f"{_NAMES} ['b']"),
    (
        {"groups": "tensors"},
        "groups: expected None, 'tensor', 'row', 'sample', 'unit', 'unit_last', a pytree of labels or a "
        "callable, got 'tensors'",
    ),
    ({"groups": {"b": "x"}}, _PREFIX),
    ({"groups": {"b": 0, "w": {"v": 1}}}, _PREFIX),
    ({"groups": ["x", "y"]}, _PREFIX),
    ({"groups": {"b": 0, "w": 2}}, f"groups of grads['w']: {_LABEL} 2"),
    ({"groups": {"b": -1, "w": 0}}, f"groups of grads['b']: {_LABEL} -1"),
    ({"groups": {"b": "x", "w": 0}}, f"groups of grads['b']: {_LABEL} 'x'"),
    ({"groups": lambda name: 1.5}, f"groups of grads['b']: {_LABEL} 1.5"),
    ({"groups": lambda name: True}, f"groups of grads['b']: {_LABEL} True"),
    (
        {"groups": "sample"},
        "grads['w']: expected 3 samples along the first axis, as grads['b'] has, got 2",
    ),
    ({"ord": 0}, "ord: expected a positive number or infinity, got 0"),
    ({"ord": -2}, "ord: expected a positive number or infinity, got -2"),
    ({"ord": nan}, "ord: expected a positive number or infinity, got nan"),
    ({"nonfinite": "raise"}, f"{_NONFINITE}, since a compiled program cannot raise, got 'raise'"),
    ({"nonfinite": "nan"}, f"{_NONFINITE}, got 'nan'"),
    ({"nonfinite": True}, f"{_NONFINITE}, got True"),
    ({"rounding": "up"}, "rounding: expected 'nearest' or 'down', got 'up'"),
    ({"rounding": 2}, "rounding: expected 'nearest' or 'down', got 2"),
    ({"grad_scale": 0.0}, f"{_SCALE} 0.0"),
    ({"grad_scale": -1}, f"{_SCALE} -1"),
    ({"grad_scale": nan}, f"{_SCALE} nan"),
    ({"grad_scale": inf}, f"{_SCALE} inf"),
    ({"grad_scale": 5e-324}, f"{_SCALE} 5e-324"),
    ({"grad_scale": jnp.ones(2)}, f"{_SCALE_SHAPE} float32 and shape (2,)"),
    ({"grad_scale": jnp.ones((), int)}, f"{_SCALE_SHAPE} int32 and shape ()"),
]
_BAD_KINDS: list[tuple[dict[str, Any], str]] = [
    ({"max_norm": [[1.0], [1.0, 2.0]], "groups": "tensor"}, _NO_NUMBER),
    ({"max_norm": "1"}, f"{_NO_NUMBER} '1'"),
    ({"max_norm": None}, f"{_NO_NUMBER} None"),
    ({"max_norm": True}, f"{_NO_NUMBER} True"),
    ({"max_norm": 1j}, f"{_NO_NUMBER} 1j"),
    ({"max_norm": jnp.ones((), complex)}, "max_norm: expected real numbers, got complex64"),
    ({"max_norm": jnp.ones((), bool)}, "max_norm: expected real numbers, got bool"),
    ({"ord": "2"}, "ord: expected a number, got '2'"),
    ({"ord": True}, "ord: expected a number, got True"),
    ({"ord": None}, "ord: expected a number, got None"),
    ({"grad_scale": "2"}, "grad_scale: expected a number, got '2'"),
    ({"grad_scale": [1.0]}, "grad_scale: expected a number, got [1.0]"),
]
_BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]]
_BAD_OPTIONS = [(options, ValueError, message) for options, message in _BAD_VALUES]
_BAD_OPTIONS += [(options, TypeError, message) for options, message in _BAD_KINDS]


@pytest.mark.parametrize(("options", "error", "message"), _BAD_OPTIONS)
def test_options_that_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    def clip(grads: Any) -> Any:
        return gradclip.jax.clip(grads, **({"max_norm": 1.0} | options))

    for run in (clip, jax.jit(clip)):
        with pytest.raises(error) as caught:
            run(_two())
        assert str(caught.value).startswith(message)


def test_samples_that_are_refused() -> None:
    for grads, message in (
        (
            [jnp.ones(()), jnp.ones(3)],
            "grads[0]: expected samples along the first axis, got an array without axes",
        ),
        ([jnp.ones((0, 3))], "grads[0]: expected at least one sample along the first axis, got none"),
    ):
        with pytest.raises(ValueError, match="expected") as caught:
            gradclip.jax.clip(grads, 1.0, groups="sample")
        assert str(caught.value) == message


def test_an_order_that_is_traced() -> None:
    with pytest.raises(TypeError, match=r"^ord: expected a number, got .*JitTracer"):
        jax.jit(lambda grads, ord: gradclip.jax.clip(grads, 1.0, ord=ord))(_two(), 2.0)


@pytest.mark.parametrize("bad", [-1.0, nan])
def test_traced_numbers_that_are_refused_when_they_are_known(bad: float) -> None:
    clip = jax.jit(lambda grads, max_norm, scale: gradclip.jax.clip(grads, max_norm, grad_scale=scale))
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=r"max_norm: expected numbers that are 0 or more, got -?(1|nan)"
    ):
        ready(clip(_two(), bad, 1.0))
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=r"grad_scale: expected a positive finite number, got -?(1|nan)"
    ):
        ready(clip(_two(), 1.0, bad))
    assert clip(_two(), 1.0, 1.0)[1].clipped  # and nothing is broken


def test_other_gradients_than_were_measured() -> None:
    measured = gradclip.jax.measure(_two(), groups="row")
    with pytest.raises(ValueError, match=r"^grads: expected the 2 arrays that were measured, got 1$"):
        measured.clip([jnp.ones(3)], 1.0)
    with pytest.raises(ValueError, match=r"^grads\['w'\]: expected"):
        measured.clip({"b": jnp.ones(3), "w": jnp.ones((5, 1))}, 1.0)
    with pytest.raises(ValueError, match=r"^nonfinite: expected 'propagate', 'zero' or 'skip'"):
        measured.clip(_two(), 1.0, nonfinite="raise")
