"""Rerouting PyTorch's own functions, so that frameworks which call them get gradclip's.

``torch.nn.utils.clip_grad_norm_`` calls two functions, one that measures and one that scales; they and
``clip_grad_value_`` are closures of one wrapper, ``_no_grad``, over the function proper. It is that cell
which is changed: so every caller is reached, also who imported a function by name long before.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import CellType, FrameType
from typing import Any

import torch
from torch.nn.utils import clip_grad

from gradclip._reroute import Reroute, Stats
from gradclip._result import NonFiniteGradientError
from gradclip.torch._arguments import PARAMETERS
from gradclip.torch._functional import clip_grad_value_, clip_grads_with_norm_, get_total_norm
from gradclip.torch._gradients import UnsupportedGradientError

__all__ = ["Stats", "install", "patched", "stats", "uninstall"]


_OURS: dict[str, Callable[..., Any]] = {
    "get_total_norm": get_total_norm,
    "clip_grads_with_norm_": clip_grads_with_norm_,
    "clip_grad_value_": clip_grad_value_,
}
_WRAPPERS: dict[str, Any] = {
    "get_total_norm": clip_grad._get_total_norm,
    "clip_grads_with_norm_": clip_grad._clip_grads_with_norm_,
    "clip_grad_value_": clip_grad.clip_grad_value_,
}
_CLIP_GRAD_NORM: Any = clip_grad.clip_grad_norm_  # the wrapper, with the function proper in it


# It outlives a reload of this module, for it is all that knows PyTorch's own functions.
_reroute: Reroute = globals().get("_reroute") or Reroute()
_stats = _reroute.stats


def install() -> None:
    """Let PyTorch's functions take gradclip's way, in this process, until :func:`uninstall`.

    ``torch.nn.utils.clip_grad_norm_``, ``get_total_norm``, ``clip_grads_with_norm_`` and
    ``clip_grad_value_`` are reached however they were imported, and with them whoever calls them:
    Lightning, Accelerate, the transformers Trainer. What gradclip does not support, and what is being
    compiled by ``torch.compile``, is left to PyTorch. Installing twice is installing once; the counts of
    :func:`stats` start at 0.

    Raises:
        RuntimeError: This PyTorch is built in another way; it is left as it is.

    Example:
        >>> import torch, gradclip.torch
        >>> gradclip.torch.install()
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3e20, 4e20])
        >>> torch.nn.utils.clip_grad_norm_([weight], 1.0)
        tensor(5.0000e+20)
        >>> gradclip.torch.stats().taken["get_total_norm"]
        1
        >>> gradclip.torch.uninstall()
    """
    _reroute.install(_replace)


def uninstall() -> None:
    """Give PyTorch's functions back their own way. Without an :func:`install` before, nothing happens."""
    _reroute.uninstall()


def patched() -> AbstractContextManager[Stats]:
    """Install the reroute for a ``with`` block; what was installed before stays so.

    It is the process's, not the thread's; of blocks in several threads the last to end takes it away.

    Returns:
        A context manager; it gives the counts, as of :func:`stats`.

    Example:
        >>> import torch, gradclip.torch
        >>> with gradclip.torch.patched() as counts:
        ...     total = torch.nn.utils.get_total_norm([torch.ones(4)])
        >>> counts.taken["get_total_norm"]
        1
    """
    return _reroute.patched(_replace)


def stats() -> Stats:
    """How many calls went where since :func:`install`; it goes on counting."""
    return _stats


def _replace() -> list[Callable[[], None]]:
    cells = {name: _cell_of(name) for name in _OURS}  # all are there, before the first is changed
    undo: list[Callable[[], None]] = []
    for name, cell in cells.items():
        theirs = cell.cell_contents
        cell.cell_contents = _rerouted(name, _OURS[name], theirs)
        undo.append(functools.partial(setattr, cell, "cell_contents", theirs))
    return undo


def _cell_of(name: str) -> CellType:
    function = _WRAPPERS[name]
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    if "func" not in names:
        raise RuntimeError(
            f"torch.nn.utils.{name}: expected a function wrapped by _no_grad, as of PyTorch 2.10 to 2.15, "
            f"got another one in {torch.__version__}"
        )
    cell: CellType = function.__closure__[names.index("func")]
    return cell


def _rerouted(name: str, ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    first = next(iter(inspect.signature(theirs).parameters))  # may be given by its name

    @functools.wraps(theirs)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not (args or first in kwargs):
            return theirs(*args, **kwargs)
        tensors, args = (args[0], args[1:]) if args else (kwargs.pop(first), ())
        if not isinstance(tensors, torch.Tensor):
            tensors = list(tensors)  # which two may have to go through
        caller = sys._getframe(2)  # behind the wrapper
        if name == "clip_grads_with_norm_" and _is_empty_generator(caller):
            return theirs(tensors, *args, **kwargs)  # PyTorch has warned of it
        try:
            result = ours(tensors, *args, **kwargs)
        except UnsupportedGradientError as reason:
            _stats.passed_on[name] += 1
            _stats.reasons[str(_of_parameters(reason, caller))] += 1
            return theirs(tensors, *args, **kwargs)
        except (TypeError, ValueError, RuntimeError) as error:
            raise _of_parameters(error, caller) from error.__cause__
        _stats.taken[name] += 1
        return result

    return call


def _is_clip_grad_norm(caller: FrameType) -> bool:
    """Whether it is PyTorch's own, which has the parameters."""
    return caller.f_code is _CLIP_GRAD_NORM.__wrapped__.__code__


def _is_empty_generator(caller: FrameType) -> bool:
    return (
        _is_clip_grad_norm(caller)
        and caller.f_locals.get("is_generator", False)
        and not caller.f_locals["parameters"]
    )


def _of_parameters(error: Exception, caller: FrameType) -> Exception:
    """With ``parameters[2].grad`` for ``tensors[0]``, where PyTorch handed on what has a gradient."""
    if not _is_clip_grad_norm(caller):
        return error
    parameters = caller.f_locals["parameters"]
    names = [PARAMETERS.format(i) for i, parameter in enumerate(parameters) if parameter.grad is not None]

    def named(text: Any) -> Any:
        return re.sub(r"\btensors\[(\d+)\]", lambda match: names[int(match[1])], text)

    if isinstance(error, NonFiniteGradientError):
        entries = [(named(entry), nan, inf) for entry, nan, inf in error.entries]
        return type(error)(named(str(error)), entries, error.norms)
    return type(error)(named(str(error)))
