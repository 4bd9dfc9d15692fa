"""gradclip.torch.clip_module_ and clip_param_groups_: names, groups, thresholds, errors."""

from __future__ import annotations

import math
import re
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradclip
import gradclip.torch


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(4, 4)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))


class Model(nn.Module):
    """Tied weights, a frozen parameter, blocks, a parameter at the root."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.h = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.gain = nn.Parameter(torch.ones(4))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)


_Module = TypeVar("_Module", bound=nn.Module)


def _with_gradients(model: _Module) -> _Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    return model


def _grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _norm(tensors: list[Tensor]) -> float:
    return math.sqrt(math.fsum(float(x) ** 2 for t in tensors for x in t.flatten().tolist()))


def test_every_parameter_is_named() -> None:
    model = _with_gradients(Model())
    before = _grads(model)
    result = gradclip.torch.clip_module_(model, 0.5)
    assert result.names == tuple(name for name, _ in model.named_parameters())
    assert "head.weight" not in result.named_norms(), "tied to embed.weight, which comes first"
    assert result.named_norms()["frozen"] == 0.0
    for name, grad in before.items():
        assert result.named_norms()[name] == pytest.approx(_norm([grad]), rel=1e-6)
    total = _norm(list(before.values()))
    assert result.total_norm == pytest.approx(total, rel=1e-6)
    for name, grad in _grads(model).items():
        torch.testing.assert_close(grad, before[name] * (0.5 / total))


@pytest.mark.parametrize(
    ("groups", "group_of"),
    [
        ("module", lambda name: name.rpartition(".")[0]),
        ("tensor", lambda name: name),
        (1, lambda name: name.split(".")[0]),
        (2, lambda name: ".".join(name.split(".")[:2])),
        (9, lambda name: name),
    ],
)
def test_groups(groups: Any, group_of: Any) -> None:
    model = _with_gradients(Model())
    before = _grads(model)
    members: dict[str, list[Tensor]] = {}
    for name, _ in model.named_parameters():
        members.setdefault(group_of(name), []).extend([before[name]] if name in before else [])
    expected = {group: _norm(grads) for group, grads in members.items()}
    result = gradclip.torch.clip_module_(model, 2.0, groups=groups)
    assert list(result.named_group_norms()) == list(expected)
    assert result.named_group_norms() == pytest.approx(expected, rel=1e-6)
    assert any(norm > 2.0 for norm in expected.values())
    assert any(norm < 2.0 for norm in expected.values())
    for name, grad in _grads(model).items():
        factor = min(1.0, 2.0 / expected[group_of(name)])
        torch.testing.assert_close(grad, before[name] * factor)


@pytest.mark.parametrize(
    "groups", [["first", "second", "first"], {"b": "second", "c": "first", "a": "first"}]
)
def test_groups_of_names_with_a_threshold_each(groups: Any) -> None:
    named = [(name, nn.Parameter(torch.zeros(1))) for name in "abc"]
    for _, parameter in named:
        parameter.grad = torch.tensor([4.0])
    result = gradclip.torch.clip_module_(named, [2.0, 1e9], groups=groups)
    assert result.group_names == ("first", "second")
    assert np.asarray(result.coefficient) == pytest.approx([2 / math.sqrt(32), 1.0])
    assert named[1][1].grad is not None
    assert named[1][1].grad.item() == 4.0


def test_a_parameter_under_two_names_is_clipped_once() -> None:
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    result = gradclip.torch.clip_module_([("a", weight), ("b", weight)], 2.5)
    assert result.named_norms() == {"a": 5.0}
    assert weight.grad.tolist() == [1.5, 2.0]


def test_a_name_of_two_parameters() -> None:
    """As of two models whose named_parameters() were put together: neither may go unseen."""
    first, second = (_with_gradients(nn.Linear(3, 3)) for _ in range(2))
    before = _grads(first)
    with pytest.raises(
        ValueError, match=r"^module: expected names of one parameter each, got 'weight' of two"
    ):
        gradclip.torch.clip_module_([*first.named_parameters(), *second.named_parameters()], 1e-3)
    assert all(torch.equal(grad, before[name]) for name, grad in _grads(first).items())


@pytest.mark.parametrize(
    ("module", "got"),
    [
        (None, "got a builtins.NoneType"),
        ([nn.Parameter(torch.zeros(2))], "got a torch.nn.parameter.Parameter at 0"),
        ({"a": nn.Parameter(torch.zeros(2))}, "got a builtins.str at 0"),
        ([(0, nn.Parameter(torch.zeros(2)))], "got a builtins.tuple at 0"),
    ],
)
def test_what_is_no_module(module: Any, got: str) -> None:
    pattern = f"^module: expected a torch.nn.Module or pairs of a name and a parameter, {got}$"
    with pytest.raises(TypeError, match=pattern):
        gradclip.torch.clip_module_(module, 1.0)


def test_sparse_gradients_and_channels_last() -> None:
    embed, conv = nn.Embedding(10, 3, sparse=True), nn.Conv2d(2, 3, 3)
    model = nn.ModuleDict({"embed": embed, "conv": conv})
    (embed(torch.tensor([1, 2, 1])) ** 2).sum().backward()
    conv.weight.grad = torch.randn(3, 2, 3, 3).to(memory_format=torch.channels_last)
    assert conv.bias is not None
    conv.bias.grad = torch.ones(3)
    dense = [p.grad.to_dense().clone() for p in model.parameters() if p.grad is not None]
    total = _norm(dense)
    result = gradclip.torch.clip_module_(model, 1.0)
    assert result.total_norm == pytest.approx(total, rel=1e-6)
    for parameter, before in zip(model.parameters(), dense, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.to_dense(), before / total)


def test_what_is_passed_on_to_the_engine() -> None:
    model = _with_gradients(nn.Linear(3, 3))
    assert model.weight.grad is not None
    model.weight.grad[1, 2] = math.nan
    with pytest.raises(gradclip.NonFiniteGradientError, match=r"grads\['weight'\]: .* got 1 NaN and 0 inf"):
        gradclip.torch.clip_module_(model, 1.0)
    assert gradclip.torch.clip_module_(model, 1.0, nonfinite="zero").nonfinite == ("weight",)
    assert not model.weight.grad.any()
    scaled = _with_gradients(nn.Linear(3, 3))
    plain = _grads(scaled)
    for p in scaled.parameters():
        p.grad = 8.0 * p.grad if p.grad is not None else None
    result = gradclip.torch.clip_module_(scaled, 1e9, grad_scale=8.0, ord=1)
    assert result.total_norm == pytest.approx(sum(g.abs().sum().item() for g in plain.values()))
    for name, grad in _grads(scaled).items():
        assert torch.equal(grad, plain[name])
    doubled = gradclip.torch.clip_module_(scaled, 1e9, reduce=lambda sums: 4 * sums)
    assert doubled.total_norm == pytest.approx(2 * _norm(list(plain.values())))


def test_autograd_is_told_of_what_was_written() -> None:
    model = _with_gradients(nn.Linear(3, 3))
    assert model.weight.grad is not None
    version = model.weight.grad._version
    gradclip.torch.clip_module_(model, 1e9)
    assert model.weight.grad._version == version
    gradclip.torch.clip_module_(model, 1e-3)
    assert model.weight.grad._version > version


@pytest.mark.parametrize(
    ("groups", "error", "finding"),
    [
        ("layer", ValueError, "groups: expected .* got 'layer'"),
        (0, ValueError, "groups: expected a depth of at least 1, got 0"),
        (True, TypeError, "groups: expected .* got True"),
        (["a"], ValueError, "groups: expected a name for each of the 2 parameters, got 1"),
        (
            {"weight": "a"},
            ValueError,
            "groups: expected an entry for each of the parameters, got none for 'bias'",
        ),
        ({"weight": "a", "bias": "a", "c": "a"}, ValueError, "groups: expected the names of .*, got 'c'"),
        ({"weight": 0, "bias": 1}, TypeError, r"groups: expected .* got \[0, 1\]"),
        ([0, 1], TypeError, r"groups: expected .* got \[0, 1\]"),
        (2.0, TypeError, "groups: expected .* got 2.0"),
    ],
)
def test_groups_that_are_none(groups: Any, error: type[Exception], finding: str) -> None:
    model = _with_gradients(nn.Linear(2, 2))
    before = _grads(model)
    with pytest.raises(error, match=finding):
        gradclip.torch.clip_module_(model, 1e-3, groups=groups)
    assert all(torch.equal(grad, before[name]) for name, grad in _grads(model).items())


def test_gradients_that_cannot_be_clipped_are_named() -> None:
    bad: dict[str, tuple[Tensor, str]] = {
        "meta": (torch.ones(2, device="meta"), "memory of a CPU or a CUDA device"),
        "graph": (torch.ones(2, requires_grad=True) * 2, "does not require grad"),
        "int": (torch.ones(2, dtype=torch.int64), "dtype int64"),
    }
    for grad, finding in bad.values():
        good = nn.Parameter(torch.zeros(2))
        good.grad = torch.ones(2)

        holder = type("Holder", (Tensor,), {"grad": grad})
        wrong: Tensor = torch.zeros(2).as_subclass(holder)
        with pytest.raises(TypeError, match=rf"^h\.weight\.grad: expected .*{finding}"):
            gradclip.torch.clip_module_([("good", good), ("h.weight", wrong)], 0.1)
        assert good.grad.tolist() == [1.0, 1.0]
    with pytest.raises(TypeError, match=r"^h: expected a torch.Tensor, got builtins.int"):
        gradclip.torch.clip_module_([("h", 3)], 1.0)  # type: ignore[list-item]


# --- Parameter groups ---------------------------------------------------------------------------------


def _optimizer(*sizes: int, **options: Any) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = []
    for size in sizes:
        parameters = [nn.Parameter(torch.zeros(2)) for _ in range(size)]
        for parameter in parameters:
            parameter.grad = torch.tensor([3.0, 4.0])
        groups.append({"params": parameters, **{k: v[len(groups)] for k, v in options.items()}})
    return torch.optim.SGD(groups, lr=0.1)


def _values(optimizer: torch.optim.Optimizer) -> list[list[list[float]]]:
    return [[p.grad.tolist() for p in group["params"]] for group in optimizer.param_groups]


def test_a_threshold_for_each_parameter_group() -> None:
    optimizer = _optimizer(1, 4, 1)
    result = gradclip.torch.clip_param_groups_(optimizer, [2.5, 5.0, math.inf])
    assert result.named_group_norms() == {"0": 5.0, "1": 10.0, "2": 5.0}
    assert np.asarray(result.coefficient).tolist() == [0.5, 0.5, 1.0]
    assert _values(optimizer) == [[[1.5, 2.0]], [[1.5, 2.0]] * 4, [[3.0, 4.0]]]
    assert result.names is not None
    assert result.names[2] == "param_groups[1].params[1]"


def test_thresholds_from_the_options() -> None:
    optimizer = _optimizer(1, 1, max_norm=[1.0, 2.5])
    assert np.asarray(gradclip.torch.clip_param_groups_(optimizer).coefficient).tolist() == [0.2, 0.5]
    some = _optimizer(1, 1, max_norm=[1.0, None])
    assert np.asarray(gradclip.torch.clip_param_groups_(some).coefficient).tolist() == [0.2, 1.0]
    with pytest.raises(
        ValueError, match=r'optimizer: expected the option "max_norm" .*, got groups with .*lr'
    ):
        gradclip.torch.clip_param_groups_(_optimizer(1, 1))


def test_names_that_the_optimizer_knows() -> None:
    model = _with_gradients(nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    assert gradclip.torch.clip_param_groups_(optimizer, [1.0]).names == ("weight", "bias")


def test_no_group_is_written_where_one_is_refused() -> None:
    optimizer = _optimizer(1, 1)
    grad = optimizer.param_groups[1]["params"][0].grad
    grad[0] = math.inf
    with pytest.raises(gradclip.NonFiniteGradientError, match=re.escape("param_groups[1].params[0]")):
        gradclip.torch.clip_param_groups_(optimizer, [1.0, 1.0])
    assert _values(optimizer) == [[[3.0, 4.0]], [[math.inf, 4.0]]]
    with pytest.raises(ValueError, match="max_norms: expected one for each of the 2 parameter groups, got 1"):
        gradclip.torch.clip_param_groups_(optimizer, [1.0])
    with pytest.raises(ValueError, match=r"max_norm\[1\]: expected .* not negative, got -1.0"):
        gradclip.torch.clip_param_groups_(optimizer, [1.0, -1.0], nonfinite="propagate")
    number: Any = 1.0
    with pytest.raises(TypeError, match=r"max_norms: expected one for each parameter group, got 1\.0"):
        gradclip.torch.clip_param_groups_(optimizer, number)


# --- Weight regularisation ------------------------------------------------------------------------------


def test_regularisation_of_a_module() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    model[1].bias.grad = None
    expected = {
        name: parameter.grad.double()
        + 0.5 * parameter.detach().double()
        + 0.1 * parameter.detach().double().sign()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    weights = [p.detach().double() for p in model.parameters() if p.grad is not None]
    result = gradclip.torch.clip_module_(model, 1e-2, l2=0.5, l1=0.1)
    assert result.missing == ("1.bias",)
    for name, norm in result.named_norms().items():
        assert norm == pytest.approx(float(expected[name].norm()) if name in expected else 0.0, rel=1e-14)
    penalty = sum(0.25 * float(w.square().sum()) + 0.1 * float(w.abs().sum()) for w in weights)
    assert result.penalty == pytest.approx(penalty, rel=1e-14)
    for name, z in expected.items():
        grad = model.get_parameter(name).grad
        assert grad is not None
        assert torch.allclose(grad.double(), z * float(result.coefficient), rtol=1e-6)


def test_regularisation_that_cannot_be() -> None:
    model = torch.nn.Linear(2, 1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match=r"^l2: expected a number that is not negative, got -1"):
        gradclip.torch.clip_module_(model, 1.0, l2=-1.0)
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1, 1, 3])).sum().backward()
    with pytest.raises(ValueError, match=r"weight'\]: expected shape \(2, 2\), as .* has, got \(5, 2\)"):
        gradclip.torch.clip_module_(embedding, 1.0, l2=0.1)
    assert [p.grad.tolist() for p in model.parameters() if p.grad is not None] == [[[1.0, 1.0]], [1.0]]
