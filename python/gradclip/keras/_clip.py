"""What becomes of ``_clip_gradients`` of Keras's optimizers, whichever way it was replaced."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from gradclip._dispatch import read
from gradclip._reroute import Reroute
from gradclip._result import ClipResult

__all__ = [
    "BACKEND",
    "BACKENDS",
    "Last",
    "apply_gradients",
    "clip_gradients",
    "names_of",
    "option_of",
    "reroute",
]

BACKEND: str = keras.backend.backend()  # settled when Keras was imported
BACKENDS = ("torch", "jax", "numpy")  # where gradclip clips
# In the order in which Keras looks at them: the first that is set is done.
_OPTIONS = ("clipnorm", "global_clipnorm", "clipvalue")

# It outlives a reload of this module, for it is all that knows Keras's own methods.
reroute: Reroute = globals().get("reroute") or Reroute()


@dataclass
class Last:
    """The last step of an optimizer."""

    variables: Sequence[Any] = ()  # whose gradients they are, as far as is known
    result: ClipResult | None = None
    is_reached: bool = False  # by clip_gradients


def option_of(optimizer: Any) -> tuple[str, Any] | None:
    """What an optimizer clips by: the name of the option and the threshold."""
    for option in _OPTIONS:
        threshold = getattr(optimizer, option)
        if threshold and threshold > 0:
            return option, threshold
    return None


def names_of(variables: Sequence[Any]) -> tuple[str, ...]:
    """The paths of variables; a path that several have, with their positions."""
    paths = [str(variable.path) for variable in variables]
    if len(set(paths)) == len(paths):
        return tuple(paths)
    return tuple(path if paths.count(path) == 1 else f"{path}[{i}]" for i, path in enumerate(paths))


def apply_gradients(
    optimizer: Any, theirs: Callable[..., Any], grads: Sequence[Any], trainable_variables: Sequence[Any]
) -> Any:
    """In place of ``_backend_apply_gradients``, which calls ``_clip_gradients``: keeps the variables."""
    before = getattr(optimizer, "_gradclip_last", None)
    last = optimizer._gradclip_last = Last(trainable_variables)
    returned = theirs(grads, trainable_variables)
    if last.is_reached:
        return returned
    optimizer._gradclip_last = before  # it accumulates
    if not hasattr(optimizer._clip_gradients, "is_gradclip"):
        reroute.stats.passed_on["_clip_gradients"] += 1
        reroute.stats.reasons[f"{type(optimizer).__name__} has a _clip_gradients of its own"] += 1
    return returned


def clip_gradients(optimizer: Any, theirs: Callable[..., Any], grads: Sequence[Any]) -> Any:
    """In place of ``_clip_gradients``."""
    last = getattr(optimizer, "_gradclip_last", None)
    if last is None or last.is_reached or len(last.variables) != len(grads):
        last = optimizer._gradclip_last = Last()  # not by apply_gradients, or of other gradients
    last.is_reached = True
    chosen = option_of(optimizer)
    if chosen is None:
        return theirs(grads)
    option, threshold = chosen
    try:
        clipped, last.result = _clip(option, threshold, list(grads))
    except (TypeError, ValueError, RuntimeError) as reason:  # nothing has been written
        reroute.stats.passed_on[option] += 1
        reroute.stats.reasons[_with_paths(str(reason), last.variables)] += 1
        return theirs(grads)
    reroute.stats.taken[option] += 1
    return clipped


def _with_paths(message: str, variables: Sequence[Any]) -> str:
    """The path of a variable for ``grads[2]``."""
    names = names_of(variables)
    return re.sub(r"\bgrads\[(\d+)\]", lambda match: names[int(match[1])] if names else match[0], message)


def _clip(option: str, threshold: Any, grads: list[Any]) -> tuple[list[Any], ClipResult | None]:
    if BACKEND == "jax":
        from gradclip.keras import _jax  # noqa: PLC0415 (of those who run Keras on JAX)

        return _jax.clip(option, threshold, grads), None
    if BACKEND not in BACKENDS:
        raise TypeError(
            f"expected Keras to run on {', '.join(BACKENDS)}, got {BACKEND}, where it clips by itself"
        )
    kind = sys.modules["torch"].Tensor if BACKEND == "torch" else np.ndarray
    for i, grad in enumerate(grads):
        if type(grad) is not kind and grad is not None:
            got = f"{type(grad).__module__}.{type(grad).__qualname__}"
            raise TypeError(f"grads[{i}]: expected a {kind.__module__}.{kind.__qualname__}, got a {got}")
    gradients = read(grads)
    if option == "clipvalue":
        return grads, gradients.clip_by_value(threshold, to_nearest=True)  # as PyTorch and NumPy round it
    groups = "tensor" if option == "clipnorm" else None
    return grads, gradients.clip(threshold, 2, groups, 1.0, "propagate", None, "nearest")


if BACKEND == "torch":
    from gradclip.torch._environment import untraced

    clip_gradients = untraced(clip_gradients)  # torch.compile calls it between its graphs
