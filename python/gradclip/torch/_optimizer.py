"""Optimizers, and what frameworks wrap around them."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["param_groups_of", "unwrapped"]

# Their wrappers have it in ``.optimizer``: they hand reads on to it, and keep writes to themselves.
_FRAMEWORKS = ("accelerate", "lightning", "lightning_fabric", "pytorch_lightning")


def unwrapped(optimizer: object) -> torch.optim.Optimizer:
    """The optimizer that steps: of a wrapper of Lightning's or Accelerate's, what is in it.

    Raises:
        TypeError: It is no optimizer, or in another wrapper.
    """
    found: Any = optimizer
    while any(kind.__module__.partition(".")[0] in _FRAMEWORKS for kind in type(found).__mro__):
        found = found.optimizer
    # A wrapper may say that it is one, by its class; it has not the groups themselves.
    if isinstance(found, torch.optim.Optimizer) and "param_groups" in vars(found):
        return found
    got = f"{type(found).__module__}.{type(found).__qualname__}"
    if hasattr(found, "param_groups"):
        raise TypeError(
            f"optimizer: expected a torch.optim.Optimizer, got a {got} around one: pass the optimizer itself"
        )
    raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got a {got}")


def param_groups_of(optimizer: object) -> list[dict[str, Any]]:
    """The parameter groups of an optimizer, or of anything that has them.

    Raises:
        TypeError: It has none.
    """
    groups = getattr(optimizer, "param_groups", None)
    if isinstance(groups, list) and all(isinstance(group, dict) and "params" in group for group in groups):
        return groups
    got = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got a {got}")
