"""Clipping a model: parameters by name, layers by module, a threshold for each parameter group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from gradclip._api import NonFinite, Reduce, Rounding, Thresholds
from gradclip._measured import Policy, clip, formula_of, is_policy
from gradclip._result import ClipResult
from gradclip.torch._arguments import Tensors, warn_if_nothing
from gradclip.torch._dtensor import any_dtensor
from gradclip.torch._environment import in_float_environment, untraced
from gradclip.torch._gradients import WRITING, OnDevice, read_or_convert
from gradclip.torch._optimizer import param_groups_of
from gradclip.torch._spread import SpreadGradients

__all__ = ["ModuleGroups", "by_name", "clip_module_", "clip_named_", "clip_param_groups_", "groups_of"]

ModuleGroups: TypeAlias = (
    Literal["tensor", "module", "row", "sample", "unit", "unit_last"]
    | int
    | Sequence[str]
    | Mapping[str, str]
    | None
)


@in_float_environment
def clip_module_(
    module: torch.nn.Module | Iterable[tuple[str, Tensor]],
    max_norm: Thresholds | Policy,
    *,
    ord: float = 2,
    groups: ModuleGroups = None,
    grad_scale: float = 1.0,
    nonfinite: NonFinite = "raise",
    reduce: Reduce | None = None,
    rounding: Rounding = "nearest",
    l2: float = 0.0,
    l1: float = 0.0,
) -> ClipResult:
    """Clip the gradients of a module in place, and tell every parameter's norm by its name.

    :func:`gradclip.clip_by_global_norm_` for the gradients of a module, with its formula: the coefficient
    is ``max_norm / norm``, without PyTorch's 1e-6. A parameter that the module has under two names is
    clipped once, under the first.

    Args:
        module: A module, or what its ``named_parameters()`` yields. All gradients on one device. They may be
            DTensors (FSDP2, tensor and expert parallel): see ``docs/scaling.md``.
        max_norm: The threshold, not negative; with ``groups``, also one per group, in the order in which the
            groups first appear or by their names; ``None`` leaves a group alone. On a GPU also a tensor
            there. Or a policy, as for :func:`gradclip.clip_by_global_norm_`.
        ord: As for :func:`gradclip.tensor_norms`.
        groups: Parameters that share one norm. ``None``: all. ``"tensor"``: each its own. ``"module"``:
            those of one submodule, ``h.0.attn.weight`` and ``h.0.attn.bias``. A depth: those whose names
            begin with the same so many parts; at 2, ``h.0.attn.weight`` and ``h.0.mlp.bias``. ``"row"``,
            ``"sample"``, ``"unit"``, ``"unit_last"``: as for :func:`gradclip.clip_by_global_norm_`. Or a name
            of a group for each parameter, in their order or by their names.
        grad_scale: As for :func:`gradclip.clip_by_global_norm_`. The gradients are unscaled then, which a
            ``GradScaler`` does not know: not with ``scaler.get_scale()`` before ``scaler.step(optimizer)``,
            which would unscale them again. For that there is :func:`unscale_and_clip_` with ``module=``.
        nonfinite: As for :func:`gradclip.clip_by_global_norm_`.
        reduce: As for :func:`gradclip.clip_by_global_norm_`.
        rounding: As for :func:`gradclip.clip_by_global_norm_`.
        l2: As for :func:`gradclip.clip_by_global_norm_`, of the parameters themselves: weight decay as part
            of the gradient, which the optimizer then need not add (``weight_decay=0``). ``penalty`` of the
            result is of the parameters that have a gradient.
        l1: The same.

    Returns:
        The norms, by name in ``named_norms()``, and those of groups in ``named_group_norms()``.

    Raises:
        TypeError: A gradient is of a kind that cannot be clipped; it is named. ``module`` or ``groups`` is
            of the wrong kind.
        ValueError: As for :func:`gradclip.clip_by_global_norm_`; a depth is not positive; two parameters have
            one name.
        NonFiniteGradientError: As for :func:`gradclip.clip_by_global_norm_`.

    Example:
        >>> import torch, gradclip.torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
        >>> for parameter, value in zip(model.parameters(), [3.0, 4.0, 12.0, 0.0]):
        ...     parameter.grad = torch.full_like(parameter, value)
        >>> result = gradclip.torch.clip_module_(model, 6.0, groups="module")
        >>> result.named_group_norms()
        {'0': 5.0, '1': 12.0}
        >>> result.named_norms()
        {'0.weight': 3.0, '0.bias': 4.0, '1.weight': 12.0, '1.bias': 0.0}
        >>> [parameter.grad.item() for parameter in model.parameters()]
        [3.0, 4.0, 6.0, 0.0]
    """
    parameters = by_name(module)
    return clip_named_(
        parameters,
        groups_of(groups, list(parameters)),
        max_norm,
        ord,
        grad_scale,
        nonfinite,
        reduce,
        formula_of(rounding),
        l2,
        l1,
    )


@in_float_environment
def clip_param_groups_(
    optimizer: torch.optim.Optimizer,
    max_norms: Sequence[float | None] | Policy | None = None,
    *,
    ord: float = 2,
    grad_scale: float = 1.0,
    nonfinite: NonFinite = "raise",
) -> ClipResult:
    """Clip the gradients of every parameter group of an optimizer by its own norm and threshold.

    One pass over all of them: if one group cannot be clipped, none is written.

    Args:
        optimizer: Its ``param_groups`` are the groups, of norm 0 if they are empty; all gradients on one
            device. It may be wrapped (by Lightning, Accelerate).
        max_norms: One threshold per parameter group, ``None`` to leave one alone. ``None`` for all: the
            option ``"max_norm"`` of each parameter group; those without it are left alone. Or a policy, as
            for :func:`gradclip.clip_by_global_norm_`.
        ord: As for :func:`gradclip.tensor_norms`.
        grad_scale: As for :func:`clip_module_`.
        nonfinite: As for :func:`gradclip.clip_by_global_norm_`.

    Returns:
        As :func:`clip_module_`. Groups are named ``"0"``, ``"1"``, …; parameters as the optimizer names
        them, else ``"param_groups[0].params[3]"``.

    Raises:
        TypeError: As for :func:`clip_module_`; ``max_norms`` is a number.
        ValueError: As for :func:`clip_module_`; there is not one threshold for each group; no group has the
            option ``"max_norm"``.
        NonFiniteGradientError: As for :func:`clip_module_`.

    Example:
        >>> import torch, gradclip.torch
        >>> weight, bias = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
        >>> options = [{"params": [weight], "max_norm": 1.0}, {"params": [bias]}]
        >>> optimizer = torch.optim.SGD(options, lr=0.1)
        >>> weight.grad, bias.grad = torch.tensor([4.0]), torch.tensor([4.0])
        >>> gradclip.torch.clip_param_groups_(optimizer).coefficient
        array([0.25, 1.  ])
    """
    groups = param_groups_of(optimizer)
    everything = [(g, i, p) for g, options in enumerate(groups) for i, p in enumerate(options["params"])]
    names = [name for options in groups for name in options.get("param_names", ())]
    if len(set(names)) != len(everything):
        names = [f"param_groups[{g}].params[{i}]" for g, i, _ in everything]
    parameters = {name: p for name, (_, _, p) in zip(names, everything, strict=True)}
    labels = Labels([g for g, _, _ in everything], [str(g) for g in range(len(groups))])
    if max_norms is None:
        if not any("max_norm" in options for options in groups):
            options = sorted({str(option) for group in groups for option in group} - {"params"})
            raise ValueError(
                'optimizer: expected the option "max_norm" in a parameter group, or max_norms, got groups '
                f"with {', '.join(options)}"
            )
        max_norms = [options.get("max_norm") for options in groups]
    elif is_policy(max_norms):
        pass
    elif not isinstance(max_norms, Sized):
        raise TypeError(f"max_norms: expected one for each parameter group, got {max_norms!r}")
    elif len(max_norms) != len(groups):
        raise ValueError(
            f"max_norms: expected one for each of the {len(groups)} parameter groups, got {len(max_norms)}"
        )
    return clip_named_(parameters, labels, max_norms, ord, grad_scale, nonfinite, None)


class Labels(list[int]):
    """The group of each gradient by number, and the names of all groups, also of those without any."""

    def __init__(self, numbers: Iterable[int], group_names: Iterable[str]) -> None:
        super().__init__(numbers)
        self.group_names = tuple(group_names)


def by_name(module: object) -> dict[str, Tensor]:
    named = module.named_parameters() if isinstance(module, torch.nn.Module) else module
    expected = "module: expected a torch.nn.Module or pairs of a name and a parameter"
    if not isinstance(named, Iterable):
        raise TypeError(f"{expected}, got a {type(named).__module__}.{type(named).__qualname__}")
    parameters: dict[str, Tensor] = {}
    seen: set[int] = set()
    for i, pair in enumerate(named):
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[0], str):
            raise TypeError(f"{expected}, got a {type(pair).__module__}.{type(pair).__qualname__} at {i}")
        name, parameter = pair
        if id(parameter) in seen:
            continue
        if name in parameters:
            raise ValueError(f"module: expected names of one parameter each, got {name!r} of two")
        parameters[name] = parameter
        seen.add(id(parameter))
    return parameters


def groups_of(groups: ModuleGroups, names: Sequence[str]) -> Sequence[str] | None:
    """The name of every parameter's group; ``None`` where all share one; a word where rows have groups."""
    if groups is None:
        return None
    if isinstance(groups, str):
        if groups in ("row", "sample", "unit", "unit_last"):
            return groups
        if groups == "tensor":
            return names
        if groups == "module":
            return [name.rpartition(".")[0] for name in names]
        raise ValueError(
            "groups: expected None, 'tensor', 'module', 'row', 'sample', 'unit', 'unit_last', a depth or "
            f"names, got {groups!r}"
        )
    if isinstance(groups, int) and not isinstance(groups, bool):
        if groups < 1:
            raise ValueError(f"groups: expected a depth of at least 1, got {groups}")
        return [".".join(name.split(".")[:groups]) for name in names]
    if isinstance(groups, Mapping):
        groups = _in_order(groups, names)
    if isinstance(groups, Sequence) and all(isinstance(group, str) for group in groups):
        if len(groups) != len(names):
            raise ValueError(
                f"groups: expected a name for each of the {len(names)} parameters, got {len(groups)}"
            )
        return groups
    raise TypeError(f"groups: expected None, 'tensor', 'module', a depth, names or a mapping, got {groups!r}")


def _in_order(groups: Mapping[str, str], names: Sequence[str]) -> list[str]:
    """The parameters' groups, which were given by their names."""
    for name in names:
        if name not in groups:
            raise ValueError(f"groups: expected an entry for each of the parameters, got none for {name!r}")
    for name in groups.keys() - set(names):
        raise ValueError(f"groups: expected the names of parameters, got {name!r}")
    return [groups[name] for name in names]


@untraced
def clip_named_(
    parameters: dict[str, Tensor],
    group_of: Sequence[str] | Labels | None,
    max_norm: Any,
    ord: float,
    grad_scale: float,
    nonfinite: NonFinite,
    reduce: Reduce | None,
    formula: str | float = "nearest",
    l2: float = 0.0,
    l1: float = 0.0,
) -> ClipResult:
    """Clip the gradients of parameters with names, by a formula of ``gradclip._measured.clip``."""
    names = list(parameters)
    grads = {name: _grad(parameter, name) for name, parameter in parameters.items()}
    if any_dtensor(list(parameters.values())):
        spread = SpreadGradients(grads, list(parameters.values()), [f"{name}.grad" for name in names])
        beside = parameters if l2 != 0 or l1 != 0 else None
        return clip(spread, max_norm, ord, group_of, grad_scale, nonfinite, reduce, formula, beside, l2, l1)

    def clip_read(found: list[OnDevice], read: Tensors) -> ClipResult:
        beside = None
        if l2 != 0 or l1 != 0:
            pairs = zip(parameters.items(), read, strict=True)
            beside = {name: None if grad is None else parameter for (name, parameter), grad in pairs}
        gradients = found[0].read
        return clip(
            gradients, max_norm, ord, group_of, grad_scale, nonfinite, reduce, formula, beside, l2, l1
        )

    plain = list(grads.values())
    result = read_or_convert(plain, [f"{name}.grad" for name in names], WRITING, clip_read, names)
    if reduce is None:
        warn_if_nothing(plain)
    return result


def _grad(parameter: object, name: str) -> Tensor | None:
    if not isinstance(parameter, Tensor):
        got = f"{type(parameter).__module__}.{type(parameter).__qualname__}"
        raise TypeError(f"{name}: expected a torch.Tensor, got {got}")
    return parameter.grad
