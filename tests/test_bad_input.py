"""Bad input: an error of the right type that names the entry, and every byte is as it was before."""

from __future__ import annotations

import math
import re
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

import gradclip

Call = Callable[[Any], object]

WRITERS: dict[str, Call] = {
    "clip_by_global_norm_": lambda grads: gradclip.clip_by_global_norm_(grads, 0.5),
    "clip_by_norm_": lambda grads: gradclip.clip_by_norm_(grads, 0.5),
    "clip_by_value_": lambda grads: gradclip.clip_by_value_(grads, 0.5),
    "scale_": lambda grads: gradclip.scale_(grads, 0.5),
    "Plan.clip_by_global_norm_": lambda grads: gradclip.Plan(grads).clip_by_global_norm_(0.5),
    "Plan.clip_by_value_": lambda grads: gradclip.Plan(grads).clip_by_value_(0.5),
    "Plan.scale_": lambda grads: gradclip.Plan(grads).scale_(0.5),
}
READERS: dict[str, Call] = {
    "tensor_norms": gradclip.tensor_norms,
    "global_norm": gradclip.global_norm,
    "Plan.tensor_norms": lambda grads: gradclip.Plan(grads).tensor_norms(),
}


def _good() -> list[np.ndarray[Any, Any]]:
    return [np.full(7, 2.0), np.full((3, 4), 3.0, np.float32), np.full(5000, 4.0, np.float16)]


def _refused(call: Call, bad: Any, error: type[Exception], finding: str) -> None:
    """``call`` refuses the entry ``bad`` of a sequence and of a mapping, and the good entries stay."""
    good = _good()
    before = [array.tobytes() for array in good]
    with pytest.raises(error) as caught:
        call([*good, bad])
    assert re.match(rf"^grads\[3\]: expected .+, got .*{finding}", str(caught.value), re.IGNORECASE), (
        caught.value
    )
    with pytest.raises(error) as caught:
        call({"a": good[0], "b": good[1], "h.0.attn": bad, "c": good[2]})
    assert re.match(
        rf"^grads\['h\.0\.attn'\]: expected .+, got .*{finding}", str(caught.value), re.IGNORECASE
    ), caught.value
    assert [array.tobytes() for array in good] == before


_WRONG_DTYPES: dict[str, tuple[Any, str]] = {
    "int64": (np.ones(3, np.int64), "int64"),
    "uint8": (np.ones(3, np.uint8), "uint8"),
    "bool": (np.ones(3, bool), "bool"),
    "object": (np.array([1.0, None], object), "object"),
    "str": (np.array(["1.0"]), "U3"),
    "bytes": (np.array([b"1.0"]), "S3"),
    "void": (np.zeros(3, "V8"), "V8"),
    "structured": (np.zeros(3, "f4,f4"), ""),
    "datetime64": (np.zeros(3, "M8[s]"), "datetime64"),
    "byte-swapped float32": (np.ones(3, np.dtype(np.float32).newbyteorder()), ""),
    "byte-swapped float64": (np.ones(3, ">f8"), ""),
    "longdouble": (np.ones(3, np.longdouble), "(longdouble|float128)"),
    "clongdouble": (np.ones(3, np.clongdouble), "complex256"),
    "float8": (np.ones(3, ml_dtypes.float8_e4m3fn), "float8"),
    "int4": (np.ones(3, ml_dtypes.int4), "int4"),
    "torch int32": (torch.ones(3, dtype=torch.int32), "int32"),
    "torch bool": (torch.ones(3, dtype=torch.bool), "bool"),
    "torch float8": (torch.ones(3).to(torch.float8_e4m3fn), "float8_e4m3fn"),
    "jax int32": (jnp.ones(3, jnp.int32), "int32"),
}


@pytest.mark.parametrize("call", [*READERS.values(), *WRITERS.values()], ids=[*READERS, *WRITERS])
@pytest.mark.parametrize("kind", _WRONG_DTYPES)
def test_wrong_dtype(kind: str, call: Call) -> None:
    bad, finding = _WRONG_DTYPES[kind]
    _refused(call, bad, TypeError, finding)


_NO_ARRAYS: dict[str, tuple[Any, str]] = {
    "list": ([1.0, 2.0], "list"),
    "float": (1.0, "float"),
    "int": (3, "int"),
    "str": ("text", "str"),
    "bytes": (b"12345678", "bytes"),
    "object": (object(), "object"),
    "class": (np.ndarray, "type"),
    "NumPy scalar": (np.float32(1), "float32"),
    "object with __array__ only": (type("Table", (), {"__array__": lambda self: np.ones(3)})(), "Table"),
    "masked array": (np.ma.array([1.0, 2.0], mask=[False, True]), "masked"),
    "nested list of arrays": ([np.ones(3)], "list"),
}


@pytest.mark.parametrize("call", [*READERS.values(), *WRITERS.values()], ids=[*READERS, *WRITERS])
@pytest.mark.parametrize("kind", _NO_ARRAYS)
def test_not_an_array(kind: str, call: Call) -> None:
    bad, finding = _NO_ARRAYS[kind]
    _refused(call, bad, TypeError, finding)


@pytest.mark.parametrize("call", WRITERS.values(), ids=WRITERS)
def test_read_only(call: Call) -> None:
    frozen = np.full(4, 2.0)
    frozen.flags.writeable = False
    mapped = np.frombuffer(b"\x00\x00\x80\x3f" * 5, np.float32)
    for bad in (frozen, frozen[::2], mapped, np.broadcast_to(np.float32(1), (3,)), np.diag(np.ones((3, 3)))):
        before = bad.tobytes()
        _refused(call, bad, ValueError, "read-only")
        assert bad.tobytes() == before


@pytest.mark.parametrize("call", WRITERS.values(), ids=WRITERS)
def test_jax_arrays_are_immutable(call: Call) -> None:
    for dtype in (jnp.float32, jnp.bfloat16):
        bad = jnp.full(4, 2.0, dtype)
        _refused(call, bad, TypeError, "jax")
        assert (bad == 2.0).all()


@pytest.mark.parametrize("name", ["clip_by_value_", "Plan.clip_by_value_"])
def test_complex_numbers_have_no_order(name: str) -> None:
    for dtype in (np.complex64, np.complex128):
        _refused(WRITERS[name], np.ones(3, dtype), TypeError, "complex")
    _refused(WRITERS[name], torch.ones(3, dtype=torch.complex64), TypeError, "complex")


class _KeysOnly(UserDict[Any, Any]):
    """A mapping that is no dict."""


@pytest.mark.parametrize("call", [*READERS.values(), *WRITERS.values()], ids=[*READERS, *WRITERS])
@pytest.mark.parametrize("make", [dict, _KeysOnly])
@pytest.mark.parametrize("key", [3, None, b"w", ("a", "b"), 1.5])
def test_keys_that_are_no_strings(key: Any, make: type, call: Call) -> None:
    good = _good()
    before = [array.tobytes() for array in good]
    with pytest.raises(TypeError, match="str") as caught:
        call(make({"a": good[0], key: good[1], "c": good[2]}))
    assert repr(key) in str(caught.value)
    assert "expected" in str(caught.value)
    assert "got" in str(caught.value)
    assert [array.tobytes() for array in good] == before


@pytest.mark.parametrize("call", [*READERS.values(), *WRITERS.values()], ids=[*READERS, *WRITERS])
@pytest.mark.parametrize(
    "grads",
    [np.ones(3), np.ones((2, 3), np.float32), "text", b"bytes", 3, 1.0, None, torch.ones(3), jnp.ones(3)],
)
def test_grads_that_are_no_collection(grads: Any, call: Call) -> None:
    with pytest.raises(TypeError, match=r"grads.*expected .*(sequence|mapping).*, got"):
        call(grads)


def test_an_iterator_that_fails() -> None:
    array = np.full(3, 2.0)

    def grads() -> Iterator[Any]:
        yield array
        raise OSError("no more")

    for call in WRITERS.values():
        with pytest.raises(OSError, match="no more"):
            call(grads())
    assert (array == 2).all()


def _unchanged(call: Callable[[list[Any]], object], error: type[Exception], match: str) -> None:
    grads = _good()
    before = [array.tobytes() for array in grads]
    with pytest.raises(error, match=match):
        call(grads)
    with pytest.raises(error, match=match):
        call([])  # arguments are looked at even if there is nothing to do
    assert [array.tobytes() for array in grads] == before


@pytest.mark.parametrize(
    ("bad", "error", "finding"),
    [
        ([1.0, 2.0], ValueError, "max_norm: expected .* 3 groups, got 2"),
        (np.ones(4), ValueError, "max_norm: expected .* 3 groups, got 4"),
        ([1.0, -2.0, 3.0], ValueError, r"max_norm\[1\]: expected .* not negative, got -2.0"),
        ([1.0, 2.0, math.nan], ValueError, r"max_norm\[2\]: expected .* not negative, got nan"),
        (["1", 2.0, 3.0], TypeError, r"max_norm\[0\]: expected a real number, got str"),
        (np.ones((3, 1)), TypeError, "max_norm: expected a real number, got numpy.ndarray"),
    ],
)
def test_thresholds_of_groups(bad: Any, error: type[Exception], finding: str) -> None:
    grads = _good()
    with pytest.raises(error, match=f"^{finding}"):
        gradclip.clip_by_norm_(grads, bad)
    assert [g.tobytes() for g in grads] == [g.tobytes() for g in _good()]


_NO_NUMBERS = [1j, np.complex64(1), "1", b"1", None, [1.0], True, False, ..., np.ones(2), np.bool_(True)]


@pytest.mark.parametrize("name", ["clip_by_global_norm_", "clip_by_norm_", "clip_by_value_"])
@pytest.mark.parametrize("bad", [-1, -1.0, -1e-310, math.nan, -math.inf, np.float32("nan"), np.array(-2.0)])
def test_threshold_of_a_wrong_value(bad: Any, name: str) -> None:
    argument = "limit" if name == "clip_by_value_" else "max_norm"
    _unchanged(
        lambda grads: getattr(gradclip, name)(grads, bad), ValueError, f"^{argument}: expected .*, got "
    )


@pytest.mark.parametrize("name", ["clip_by_global_norm_", "clip_by_norm_", "clip_by_value_", "scale_"])
@pytest.mark.parametrize("bad", _NO_NUMBERS, ids=repr)
def test_threshold_or_factor_that_is_no_number(bad: Any, name: str) -> None:
    argument = {"clip_by_value_": "limit", "scale_": "factor"}.get(name, "max_norm")
    # clip_by_norm_ takes thresholds, but not so many.
    several = name == "clip_by_norm_" and isinstance(bad, (list, np.ndarray))
    _unchanged(
        lambda grads: getattr(gradclip, name)(grads, bad),
        ValueError if several else TypeError,
        f"^{argument}: expected .*, got ",
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_factor_that_is_not_finite(bad: float) -> None:
    _unchanged(lambda grads: gradclip.scale_(grads, bad), ValueError, "^factor: expected .*, got ")


_ORD_CALLS: dict[str, Callable[[Any, Any], object]] = {
    "tensor_norms": gradclip.tensor_norms,
    "global_norm": gradclip.global_norm,
    "clip_by_global_norm_": lambda grads, ord: gradclip.clip_by_global_norm_(grads, 0.5, ord),
    "clip_by_norm_": lambda grads, ord: gradclip.clip_by_norm_(grads, 0.5, ord),
    "Plan.clip_by_norm_": lambda grads, ord: gradclip.Plan(grads).clip_by_norm_(0.5, ord),
    "Plan.global_norm": lambda grads, ord: gradclip.Plan(grads).global_norm(ord),
}


@pytest.mark.filterwarnings("ignore:grads. expected gradients, got none")  # of Plan([])
@pytest.mark.parametrize("call", _ORD_CALLS.values(), ids=_ORD_CALLS)
@pytest.mark.parametrize("bad", [0, 0.0, -1, -2.5, -math.inf, math.nan])
def test_ord_of_a_wrong_value(bad: float, call: Callable[[Any, Any], object]) -> None:
    _unchanged(lambda grads: call(grads, bad), ValueError, "^ord: expected .*, got ")


@pytest.mark.filterwarnings("ignore:grads. expected gradients, got none")  # of Plan([])
@pytest.mark.parametrize("call", _ORD_CALLS.values(), ids=_ORD_CALLS)
@pytest.mark.parametrize("bad", ["2", "fro", "inf", None, 2j, [2]])
def test_ord_that_is_no_number(bad: Any, call: Callable[[Any, Any], object]) -> None:
    _unchanged(lambda grads: call(grads, bad), TypeError, "^ord: expected .*, got ")


@pytest.mark.parametrize("bad", [0, 0.0, -1.0, math.nan, math.inf, -math.inf])
def test_grad_scale_of_a_wrong_value(bad: float) -> None:
    _unchanged(
        lambda grads: gradclip.clip_by_global_norm_(grads, 0.5, grad_scale=bad),
        ValueError,
        "^grad_scale: expected",
    )
    _unchanged(
        lambda grads: gradclip.clip_by_norm_(grads, 0.5, grad_scale=bad), ValueError, "^grad_scale: expected"
    )


@pytest.mark.parametrize("bad", ["1", None, 1j])
def test_grad_scale_that_is_no_number(bad: Any) -> None:
    _unchanged(
        lambda grads: gradclip.clip_by_global_norm_(grads, 0.5, grad_scale=bad),
        TypeError,
        "^grad_scale: expected",
    )


def _groups_refused(groups: Any, error: type[Exception]) -> None:
    grads = _good()
    before = [array.tobytes() for array in grads]
    with pytest.raises(error, match=r"^groups.*: expected .*, got "):
        gradclip.clip_by_global_norm_(grads, 0.5, groups=groups)
    assert [array.tobytes() for array in grads] == before


_BAD_GROUPS: list[Any] = [[], [0], [0, 0], [0, 0, 0, 0], [0, -1, 0], [0, 0, 3], [0, 0, 2**40], [0, 0, 2**70]]
_BAD_GROUPS += ["tensors", "", "layer", np.array([0, -1, 0]), np.zeros((3, 1), int), np.zeros((1, 3), int)]


@pytest.mark.parametrize("bad", _BAD_GROUPS, ids=repr)
def test_groups_of_a_wrong_value(bad: Any) -> None:
    _groups_refused(bad, ValueError)


@pytest.mark.parametrize(
    "bad",
    [3, 1.5, [0.0, 1.0, 1.0], ["a", "b", 2], [0, "b", "c"], {"a": 0}, [None] * 3, np.zeros(3), ...],
    ids=repr,
)
def test_groups_of_a_wrong_kind(bad: Any) -> None:
    _groups_refused(bad, TypeError)


@pytest.mark.parametrize("bad", ["", "Raise", "ignore", "nan"])
def test_unknown_nonfinite(bad: Any) -> None:
    _unchanged(
        lambda grads: gradclip.clip_by_global_norm_(grads, 0.5, nonfinite=bad),
        ValueError,
        "^nonfinite: expected .*'raise'.*'propagate'.*, got ",
    )
    with pytest.raises(TypeError, match="nonfinite"):
        gradclip.clip_by_global_norm_([np.ones(2)], 0.5, nonfinite=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [0, -1, 1025, 2**40])
def test_thread_counts_of_a_wrong_value(bad: int) -> None:
    before = gradclip.get_num_threads()
    with pytest.raises(ValueError, match=r"expected .*, got"):
        gradclip.set_num_threads(bad)
    assert gradclip.get_num_threads() == before


@pytest.mark.parametrize("bad", ["2", 2.0, None, [2]])
def test_thread_counts_of_a_wrong_kind(bad: Any) -> None:
    with pytest.raises(TypeError):
        gradclip.set_num_threads(bad)


def test_the_first_of_several_bad_entries_is_named() -> None:
    for call in (*READERS.values(), *WRITERS.values()):
        with pytest.raises(TypeError, match=r"^grads\[1\]: "):
            call([np.ones(2), np.ones(2, int), None, "text"])
