"""Rerouting Keras's own method, so that all optimizers get gradclip's that have none of their own.

``_clip_gradients`` is defined once, by the class that all optimizers of Keras come from. It is replaced
there, with ``_backend_apply_gradients``, which calls it and knows the variables.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import keras

from gradclip._reroute import Stats
from gradclip._versions import warn_if_untried
from gradclip.keras._clip import apply_gradients, clip_gradients, reroute

__all__ = ["check_keras", "install", "patched", "stats", "uninstall"]

_TRIED = ("3.15",)
_PARAMETERS = {
    "_backend_apply_gradients": ["self", "grads", "trainable_variables"],
    "_clip_gradients": ["self", "grads"],
}


def install() -> None:
    """Let the optimizers of Keras clip through gradclip, in this process, until :func:`uninstall`.

    What an optimizer was told (``clipnorm``, ``global_clipnorm`` or ``clipvalue``) is done by gradclip,
    whenever the optimizer was made, with the same meaning: but norms do not overflow, and gradients that
    need no clipping keep their bits. PyTorch tensors and NumPy arrays are clipped in place; on JAX a train
    step that was traced before (of a model that has been fitted) stays as it is. What gradclip does not
    support is left to Keras and counted, and so is everything on TensorFlow and OpenVINO. Installing twice is
    installing once; the counts of :func:`stats` start at 0.

    Raises:
        RuntimeError: This Keras is built in another way; it is left as it is.

    Warns:
        UserWarning: Of a version of Keras that this was not tried with.

    Example:
        >>> import keras, gradclip.keras
        >>> gradclip.keras.install()
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model.compile(keras.optimizers.Adam(global_clipnorm=1.0), loss="mse")
        >>> gradclip.keras.uninstall()
    """
    check_keras()
    reroute.install(_replace)


def uninstall() -> None:
    """Give Keras's method back its own way. Without an :func:`install` before, nothing happens."""
    reroute.uninstall()


def patched() -> AbstractContextManager[Stats]:
    """Install the reroute for a ``with`` block; what was installed before stays so.

    It is the process's, not the thread's; of blocks in several threads the last to end takes it away.

    Returns:
        A context manager; it gives the counts, as of :func:`stats`.

    Example:
        >>> import numpy as np, keras, gradclip.keras
        >>> weights = keras.Variable(np.zeros(2, "float32"), name="weights")
        >>> optimizer = keras.optimizers.SGD(1.0, global_clipnorm=1.0)
        >>> with gradclip.keras.patched() as counts:
        ...     optimizer.apply([keras.ops.array([3e20, 4e20])], [weights])
        >>> counts.taken["global_clipnorm"]
        1
    """
    check_keras()
    return reroute.patched(_replace)


def stats() -> Stats:
    """How many clips went where since :func:`install`, by option; it goes on counting.

    On JAX a compiled step counts once, when it is traced. An optimizer whose class has a ``_clip_gradients``
    of its own is left alone, and its steps are counted as ``passed_on["_clip_gradients"]``.
    """
    return reroute.stats


def check_keras() -> None:
    """Warn of a Keras that this was not tried with.

    Raises:
        RuntimeError: It has not the methods that are replaced.
    """
    warn_if_untried("keras", _TRIED)
    for name, expected in _PARAMETERS.items():
        method = getattr(keras.optimizers.Optimizer, name, None)
        found = list(inspect.signature(method).parameters) if callable(method) else None
        if found != expected:
            raise RuntimeError(
                f"keras.optimizers.Optimizer.{name}: expected a method of {', '.join(expected)}, as of Keras "
                f"{', '.join(_TRIED)}, got {found and ', '.join(found)} in {keras.__version__}"
            )


def _replace() -> list[Callable[[], None]]:
    undo: list[Callable[[], None]] = []
    for name, ours in (("_backend_apply_gradients", apply_gradients), ("_clip_gradients", clip_gradients)):
        owner = next(each for each in keras.optimizers.Optimizer.__mro__ if name in vars(each))
        theirs = vars(owner)[name]
        setattr(owner, name, _rerouted(ours, theirs))
        undo.append(functools.partial(setattr, owner, name, theirs))
    return undo


def _rerouted(ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(self, functools.partial(theirs, self), *args, **kwargs)

    method.is_gradclip = True  # type: ignore[attr-defined]
    return method
