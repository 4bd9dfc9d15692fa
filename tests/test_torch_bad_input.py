"""What the drop-ins refuse: an error that names the parameter, and nothing written."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gradclip.torch
from torch_lists import SPARSE_WARNINGS, bits, grad_of, parameter

pytestmark = [
    *SPARSE_WARNINGS,
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, .* are deprecated"),
]


class Subclass(Tensor):
    """What a framework may put in the place of a tensor."""


def _meta() -> Tensor:
    leaf = torch.nn.Parameter(torch.zeros(2, device="meta"))
    leaf.grad = torch.ones(2, device="meta")
    return leaf


def _with_grad(dtype: torch.dtype) -> Tensor:
    """A parameter whose gradient has a dtype that no autograd gives."""
    leaf = torch.zeros(2, dtype=dtype)
    leaf.grad = torch.ones(2, dtype=torch.float32).to(dtype)
    return leaf


def _quantised() -> Tensor:
    leaf = torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8)
    leaf.grad = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    return leaf


def _of_a_graph() -> Tensor:
    leaf = torch.ones(2, requires_grad=True)
    (leaf.grad,) = torch.autograd.grad((leaf**3).sum(), leaf, create_graph=True)
    return leaf


# What is wrong with the third of four parameters, and how the error describes it.
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "no tensor": (lambda: "weight", r"parameters\[2\]: expected a torch.Tensor, got builtins.str"),
    "None": (lambda: None, r"parameters\[2\]: expected a torch.Tensor, got builtins.NoneType"),
    "an array": (lambda: np.ones(2), r"parameters\[2\]: expected a torch.Tensor, got numpy.ndarray"),
    "integers": (lambda: _with_grad(torch.int32), r"parameters\[2\].grad: expected a dtype.*got dtype int32"),
    "booleans": (lambda: _with_grad(torch.bool), r"parameters\[2\].grad: expected a dtype.*got dtype bool"),
    "float8": (
        lambda: _with_grad(torch.float8_e4m3fn),
        r"parameters\[2\].grad: expected a dtype.*got dtype float8_e4m3fn",
    ),
    "quantised": (_quantised, r"parameters\[2\].grad: expected a tensor of floats, got a quantised one"),
    "meta": (_meta, r"parameters\[2\].grad: expected memory of a CPU or a CUDA device, got.*meta"),
    "requires grad": (_of_a_graph, r"parameters\[2\].grad: expected a gradient that does not require grad"),
    "a subclass": (
        lambda: parameter(torch.ones(2).as_subclass(Subclass)),
        r"parameters\[2\].grad: expected a plain torch.Tensor, got a .*Subclass",
    ),
    "expanded": (
        lambda: parameter(torch.ones(1).expand(2)),
        r"parameters\[2\].grad: expected elements that do not share memory",
    ),
}
WRITERS: dict[str, Callable[[Any], object]] = {
    "clip_grad_norm_": lambda leaves: gradclip.torch.clip_grad_norm_(leaves, 0.1),
    "clip_grad_norm_ of order -1": lambda leaves: gradclip.torch.clip_grad_norm_(leaves, 0.1, -1),
    "clip_grads_with_norm_": lambda leaves: gradclip.torch.clip_grads_with_norm_(
        leaves, 0.1, torch.tensor(5.0)
    ),
    "clip_grad_value_": lambda leaves: gradclip.torch.clip_grad_value_(leaves, 0.1),
    "clip_grad_value_ to 0": lambda leaves: gradclip.torch.clip_grad_value_(leaves, 0),
}


def _around(bad: Any) -> tuple[list[Any], Callable[[], list[Any]]]:
    """Good parameters before and after it, and their bytes."""
    good = [parameter(torch.ones(3)), parameter(None), parameter(torch.ones(2, 2))]
    return [*good[:2], bad, good[2]], lambda: bits(leaf.grad for leaf in good)


@pytest.mark.parametrize(
    ("kind", "writer"),
    # To 0 all elements may go, shared or not.
    [(k, w) for k in BAD for w in WRITERS if (k, w) != ("expanded", "clip_grad_value_ to 0")],
)
def test_what_cannot_be_clipped_is_named(kind: str, writer: str) -> None:
    make, message = BAD[kind]
    leaves, before = _around(make())
    expected = before()
    with pytest.raises((TypeError, ValueError), match=message):
        WRITERS[writer](leaves)
    assert before() == expected
    with pytest.raises((TypeError, ValueError), match=message):
        WRITERS[writer](leaf for leaf in leaves)


@pytest.mark.parametrize("kind", ["integers", "booleans", "float8", "quantised", "meta", "a subclass"])
@pytest.mark.parametrize("order", [2, math.inf, 0, -1])
def test_what_cannot_be_measured_is_named(kind: str, order: float) -> None:
    make, message = BAD[kind]
    with pytest.raises(TypeError, match=message.replace("parameters", "tensors").replace(".grad", "")):
        gradclip.torch.get_total_norm([torch.ones(1), torch.ones(1), grad_of(make())], order)


def test_what_cannot_be_measured_is_no_tensor() -> None:
    for bad in ("weight", [1.0], 3.0):
        with pytest.raises(TypeError, match=r"tensors\[1\]: expected a torch.Tensor, got"):
            gradclip.torch.get_total_norm([torch.ones(1), bad])  # type: ignore[list-item]


@pytest.mark.parametrize("writer", [name for name in WRITERS if name != "clip_grad_value_ to 0"])
def test_views_that_overlap(writer: str) -> None:
    memory = torch.ones(8)
    leaves, before = _around(parameter(memory[:5]))
    leaves.append(parameter(memory[3:]))
    expected = before(), memory.tolist()
    with pytest.raises(
        ValueError, match=r"parameters\[4\].grad: expected memory of its own.*parameters\[2\].grad"
    ):
        WRITERS[writer](leaves)
    assert (before(), memory.tolist()) == expected


@pytest.mark.parametrize("limit", [0, 0.1])
def test_complex_numbers_have_no_order(limit: float) -> None:
    leaves, before = _around(parameter(torch.ones(2, dtype=torch.complex64)))
    expected = before()
    with pytest.raises(TypeError, match=r"parameters\[2\].grad: expected a real dtype.*complex64"):
        gradclip.torch.clip_grad_value_(leaves, limit)
    assert before() == expected


@pytest.mark.parametrize("bad", [math.nan, "nan", torch.tensor(math.nan), "much", None, [1.0], torch.ones(2)])
def test_numbers_that_are_none(bad: Any) -> None:
    leaves, before = _around(parameter(torch.ones(2)))
    expected = before()
    total = torch.tensor(5.0)
    calls: dict[str, Callable[[], object]] = {
        "max_norm": lambda: gradclip.torch.clip_grad_norm_(leaves, bad),
        "max_norm ": lambda: gradclip.torch.clip_grads_with_norm_(leaves, bad, total),
        "norm_type": lambda: gradclip.torch.clip_grad_norm_(leaves, 1.0, bad),
        "norm_type ": lambda: gradclip.torch.get_total_norm([torch.ones(1)], bad),
        "clip_value": lambda: gradclip.torch.clip_grad_value_(leaves, bad),
    }
    for name, call in calls.items():
        with pytest.raises((TypeError, ValueError), match=f"{name.strip()}: expected a number"):
            call()
    assert before() == expected


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (5.0, "expected a torch.Tensor, got builtins.float"),
        (torch.ones(2), r"expected a 0-d tensor, got one of shape \(2,\)"),
        (torch.tensor(1j), "expected a real number, got dtype complex64"),
    ],
)
def test_a_total_norm_that_is_none(bad: Any, message: str) -> None:
    leaves, before = _around(parameter(torch.ones(2)))
    expected = before()
    with pytest.raises((TypeError, ValueError), match=f"total_norm: {message}"):
        gradclip.torch.clip_grads_with_norm_(leaves, 1.0, bad)
    assert before() == expected


def test_a_nan_norm_makes_nan_as_in_pytorch() -> None:
    for module in (gradclip.torch, torch.nn.utils):
        leaf = parameter(torch.ones(2))
        module.clip_grads_with_norm_([leaf], 1.0, torch.tensor(math.nan))
        assert grad_of(leaf).isnan().all()


def test_inference_tensors_are_clipped() -> None:
    """They have no version to be told of."""
    with torch.inference_mode():
        leaf = parameter(torch.tensor([3.0, 4.0]))
        assert gradclip.torch.clip_grad_norm_([leaf, parameter(torch.zeros(1))], 1.0).item() == 5
        gradclip.torch.clip_grads_with_norm_([leaf], 0.5, torch.tensor(1.0))
        gradclip.torch.clip_grad_value_([leaf], 0.35)
    torch.testing.assert_close(grad_of(leaf), torch.tensor([0.3, 0.35]))


def test_what_pytorch_takes_goes_to_pytorch_under_the_reroute() -> None:
    """Gradients of a graph, subclasses: PyTorch's own way, counted with the reason."""
    with gradclip.torch.patched() as counts:
        for make in (BAD["requires grad"][0], BAD["a subclass"][0]):
            leaf = make()
            torch.nn.utils.clip_grad_norm_([leaf], 0.5)
            assert float(grad_of(leaf).detach().norm()) == pytest.approx(0.5, rel=1e-4)
        assert counts.passed_on["clip_grads_with_norm_"] == 2
        assert any("does not require grad" in reason for reason in counts.reasons)
        assert any("Subclass" in reason for reason in counts.reasons)


@pytest.mark.parametrize("writer", [*WRITERS, "clip_grad_norm_ of NaN"])
def test_a_sparse_gradient_stays_as_it_is_where_another_is_refused(writer: str) -> None:
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 0]]), torch.tensor([1.0, 2.0]), (3,))
    memory = torch.ones(3)
    others: list[list[Any]] = [[BAD[kind][0]()] for kind in ("integers", "requires grad", "meta")]
    others.append([parameter(memory[:2]), parameter(memory[1:])])
    write = WRITERS.get(writer)
    if write is None:
        others = [[parameter(torch.tensor([math.nan]))]]

        def write(leaves: Any) -> object:
            return gradclip.torch.clip_grad_norm_(leaves, 0.1, error_if_nonfinite=True)
    elif writer == "clip_grad_value_ to 0":
        others.pop()  # to 0 all elements may go, shared or not
    for other in others:
        with pytest.raises((TypeError, ValueError, RuntimeError), match=r"parameters\[[12]\]"):
            write([parameter(sparse), *other])
        assert not sparse.is_coalesced()
        assert sparse._values().tolist() == [1.0, 2.0]


@pytest.mark.parametrize("order", [2, 0])
def test_tensors_without_memory_of_their_own(order: float) -> None:
    def measure(tensor: Tensor) -> Tensor:
        return gradclip.torch.get_total_norm([tensor], order)

    calls: tuple[Callable[[], object], ...] = (
        lambda: measure(torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])),
        lambda: torch.func.vmap(measure)(torch.ones(2)),
        lambda: torch.func.grad(measure)(torch.ones(2)),
    )
    for call in calls:
        with pytest.raises(TypeError, match=r"tensors\[0\]: expected a tensor with memory of its own"):
            call()
