"""Around a call: the compiler, the floating-point environment, autograd."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from gradclip import _core, _dispatch
from gradclip.torch._arguments import Tensors

__all__ = ["in_float_environment", "mark_written", "untraced"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


def untraced(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """The function, which ``torch.compile`` runs between its graphs: traced, what it sets would be lost."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        disable: Callable[[Any], Callable[_P, _T]] = torch.compiler.disable  # which imports the compiler
        return disable(function)(*args, **kwargs)

    return call


def in_float_environment(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """The function, whose own arithmetic and PyTorch's are done as if nobody flushed denormals to zero."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        saved = _core.enter_float_environment()
        try:
            return function(*args, **kwargs)
        finally:
            _core.leave_float_environment(saved)

    return call


def mark_written(grads: Tensors) -> None:
    """Tell autograd that the gradients were changed in place, so that whoever saved one finds out."""
    _dispatch.mark_written([grad for grad in grads if grad is not None])
