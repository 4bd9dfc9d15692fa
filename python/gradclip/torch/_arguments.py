"""What PyTorch's functions take: checked, and what errors call it."""

from __future__ import annotations

import math
import re
import types
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import SupportsFloat, TypeAlias

import torch
from torch import Tensor

from gradclip._result import warn_of_nothing

__all__ = [
    "PARAMETERS",
    "TENSORS",
    "Names",
    "Tensors",
    "as_limit",
    "as_list",
    "as_norm",
    "as_number",
    "as_threshold",
    "check_tensor",
    "gradients_of",
    "name_of",
    "naming",
    "warn_if_nothing",
]

Tensors: TypeAlias = Sequence[Tensor | None]
# What entries are called in errors: a pattern for their positions, or one name each.
Names: TypeAlias = str | Sequence[str]
PARAMETERS, TENSORS = "parameters[{}].grad", "tensors[{}]"


def as_number(value: SupportsFloat | str, name: str) -> float:
    """``float(value)``, as PyTorch takes thresholds and orders.

    Raises:
        TypeError: It cannot be made a number.
        ValueError: It is NaN, or text that is no number.
    """
    try:
        number = float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: expected a number, got {value!r}") from None
    if math.isnan(number):
        raise ValueError(f"{name}: expected a number, got {value!r}")
    return number


def as_threshold(value: SupportsFloat, name: str) -> float:
    """A number that is not negative; errors as of :func:`as_number`."""
    number = as_number(value, name)
    if number < 0:
        raise ValueError(f"{name}: expected a number that is not negative, got {value!r}")
    return number


def as_limit(max_norm: SupportsFloat) -> float | Tensor:
    """A threshold: on a GPU the tensor itself, so that nothing waits for it; else :func:`as_threshold`."""
    if isinstance(max_norm, Tensor) and max_norm.is_cuda:
        return max_norm.detach()
    return as_threshold(max_norm, "max_norm")


def as_norm(value: Tensor) -> Tensor:
    """A total norm as float64.

    Raises:
        TypeError: It is not a real tensor.
        ValueError: It has not one element.
    """
    check_tensor(value, "total_norm")
    if value.is_complex():
        raise TypeError(f"total_norm: expected a real number, got dtype {str(value.dtype)[6:]}")
    if value.numel() != 1:
        raise ValueError(f"total_norm: expected a 0-d tensor, got one of shape {tuple(value.shape)}")
    return value.detach().to(torch.float64).reshape(())


def as_list(tensors: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def gradients_of(parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Their ``.grad``s, ``None`` where there is none: so the positions stay.

    Raises:
        TypeError: An entry is not a tensor.
    """
    try:
        return [parameter.grad for parameter in parameters]
    except AttributeError:
        for i, parameter in enumerate(parameters):
            check_tensor(parameter, f"parameters[{i}]")
        raise


def warn_if_nothing(grads: Tensors, parameters: object = None) -> None:
    """Warn the caller once where there is no gradient; of an empty generator in PyTorch's words."""
    if any(grad is not None for grad in grads):
        return
    if isinstance(parameters, types.GeneratorType) and not grads:
        warn_of_nothing("`parameters` is an empty generator, no gradient clipping will occur.")
    else:
        warn_of_nothing()


def check_tensor(value: object, name: str) -> None:
    if not isinstance(value, Tensor):
        got = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(f"{name}: expected a torch.Tensor, got {got}")


def name_of(names: Names, i: int) -> str:
    """What errors call entry ``i``."""
    return names.format(i) if isinstance(names, str) else names[i]


@contextmanager
def naming(names: Names) -> Iterator[None]:
    """An engine's error with the name that the caller knows: ``parameters[3].grad`` for ``grads[3]``."""
    try:
        yield
    except (TypeError, ValueError) as error:
        message = re.sub(r"\bgrads\[(\d+)\]", lambda match: name_of(names, int(match[1])), str(error))
        if message == str(error):
            raise
        raise type(error)(message) from None
