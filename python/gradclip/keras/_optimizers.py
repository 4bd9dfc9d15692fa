"""One optimizer, or one class of optimizers, that clips through gradclip; and what was measured."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from gradclip._result import ClipResult, named
from gradclip.keras._clip import (
    BACKEND,
    BACKENDS,
    apply_gradients,
    clip_gradients,
    names_of,
    option_of,
    reroute,
)
from gradclip.keras._install import check_keras

if TYPE_CHECKING:
    from gradclip.jax import ClipState

__all__ = ["ClippingMixin", "clip_state", "clipping", "last_result", "named_norms"]


class ClippingMixin:
    """Before an optimizer of Keras among the bases of a class: its optimizers clip through gradclip.

    As :func:`gradclip.keras.install` does it for all. (On PyTorch, Keras updates the variables of its own
    classes all together, and those of any subclass one by one: :func:`clipping` keeps the class.)

    Raises:
        TypeError: For a class that comes from others than ``keras.optimizers.Optimizer``, or has that before
            the mixin, or a ``_clip_gradients`` of its own behind it.

    Example:
        >>> import keras, gradclip.keras
        >>> class ClippedAdam(gradclip.keras.ClippingMixin, keras.optimizers.Adam):
        ...     pass
        >>> optimizer = ClippedAdam(0.001, global_clipnorm=1.0)
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        behind = cls.__mro__[cls.__mro__.index(ClippingMixin) + 1 :]
        if cls.__mro__[1:] == (ClippingMixin, object):  # a mixin, too
            return
        if keras.optimizers.Optimizer not in behind:
            bases = ", ".join(base.__qualname__ for base in cls.__bases__)
            raise TypeError(
                f"{cls.__qualname__}: expected ClippingMixin before a keras.optimizers.Optimizer, got {bases}"
            )
        _refuse_own(cls.__qualname__, behind)
        check_keras()

    def _backend_apply_gradients(self, grads: Sequence[Any], trainable_variables: Sequence[Any]) -> Any:
        theirs = super()._backend_apply_gradients  # type: ignore[misc]
        if reroute.is_installed:
            return theirs(grads, trainable_variables)
        return apply_gradients(self, theirs, grads, trainable_variables)

    def _clip_gradients(self, grads: Sequence[Any]) -> Any:
        theirs = super()._clip_gradients  # type: ignore[misc]
        return theirs(grads) if reroute.is_installed else clip_gradients(self, theirs, grads)

    _clip_gradients.is_gradclip = True  # type: ignore[attr-defined]


def _refuse_own(name: str, classes: Sequence[type]) -> None:
    owner = next(each for each in classes if "_clip_gradients" in vars(each))
    if not issubclass(keras.optimizers.Optimizer, owner) and owner is not ClippingMixin:
        raise TypeError(
            f"{name}: expected an optimizer that clips as Keras does, got {owner.__qualname__}, which has a "
            "_clip_gradients of its own"
        )


def clipping(optimizer: Any, transformation: Any = None) -> Any:
    """Make one optimizer of Keras clip through gradclip.

    What the optimizer was told (``clipnorm``, ``global_clipnorm`` or ``clipvalue``) is done by gradclip, as
    :func:`gradclip.keras.install` does it for all. Its class, its variables and what is saved of it stay as
    they are; call this again after a model was loaded.

    Args:
        optimizer: A ``keras.optimizers.Optimizer``. Of a ``LossScaleOptimizer`` the inner one clips. On JAX,
            before the first ``fit`` of its model: a train step that was traced stays as it is.
        transformation: On JAX, one of gradclip.jax, instead: with groups, a policy, a schedule of the
            threshold. Its state becomes variables of the optimizer, behind those that it has, and is saved
            with them. The optimizer must be new: these variables are made when it is built.

    Returns:
        The same optimizer.

    Raises:
        TypeError: For what is no optimizer of Keras, or has a ``_clip_gradients`` of its own.
        ValueError: If Keras does not run on PyTorch, JAX or NumPy; if there is nothing to clip by, or two
            things; with a transformation, on another backend than JAX or for an optimizer that was built.

    Example:
        >>> import keras, gradclip.keras
        >>> optimizer = gradclip.keras.clipping(keras.optimizers.Adam(global_clipnorm=1.0))
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model.compile(optimizer, loss="mse")
    """
    inner = _inner(optimizer)
    if BACKEND not in BACKENDS:
        raise ValueError(
            f"optimizer: expected Keras to run on {', '.join(BACKENDS)} (KERAS_BACKEND), got {BACKEND!r}"
        )
    _refuse_own("optimizer", type(inner).__mro__)
    check_keras()
    own = option_of(inner)
    if transformation is None:
        if own is None:
            raise ValueError(
                "optimizer: expected clipnorm, global_clipnorm or clipvalue, or a transformation, to clip by"
            )
        inner._backend_apply_gradients = _rerouted(inner, "_backend_apply_gradients", apply_gradients)
        inner._clip_gradients = _rerouted(inner, "_clip_gradients", clip_gradients)
        return optimizer
    if own is not None:
        raise ValueError("transformation: expected none, since the optimizer has a threshold of its own")
    if BACKEND != "jax":
        raise ValueError(
            f"transformation: expected none, unless Keras runs on JAX (KERAS_BACKEND=jax), got {BACKEND!r}"
        )
    from gradclip.keras import _jax  # noqa: PLC0415 (of those who run Keras on JAX)

    _jax.keep_state(inner, transformation)
    return optimizer


def last_result(optimizer: Any) -> ClipResult:
    """What was measured and done in the last step of an optimizer, on PyTorch and NumPy.

    Args:
        optimizer: One that clips through gradclip, whichever way.

    Returns:
        The :class:`gradclip.ClipResult`; gradients are named by the paths of their variables. Of
        ``clipvalue``, norms are largest magnitudes. Of gradients on a GPU this waits for the clip.

    Raises:
        TypeError: For what is no optimizer of Keras.
        ValueError: There was no step, or gradclip did not clip in it. On JAX what was measured stays in the
            compiled step, or is in :func:`clip_state`.

    Example:
        >>> import numpy as np, keras, gradclip.keras
        >>> weights = keras.Variable(np.zeros(2, "float32"), name="weights")
        >>> optimizer = gradclip.keras.clipping(keras.optimizers.SGD(1.0, clipnorm=1.0))
        >>> optimizer.apply([keras.ops.array([3.0, 4.0])], [weights])
        >>> gradclip.keras.last_result(optimizer).named_norms()
        {'weights': 5.0}
    """
    last = getattr(_inner(optimizer), "_gradclip_last", None)
    if last is None or last.result is None:
        where = ", on JAX by a transformation: see clip_state" if BACKEND == "jax" else ""
        raise ValueError(f"optimizer: expected one whose last step was clipped by gradclip{where}")
    result: ClipResult = last.result.to_host()
    if not last.variables:
        return result
    names = names_of(last.variables)
    return dataclasses.replace(
        result,
        names=names,
        nonfinite=named(result.nonfinite, names),  # type: ignore[arg-type]
        missing=named(result.missing, names),  # type: ignore[arg-type]
        group_names=names if np.ndim(result.coefficient) else None,
    )


def clip_state(optimizer: Any) -> ClipState:
    """The state of the transformation that an optimizer was given on JAX: of its last step.

    Args:
        optimizer: One that :func:`clipping` was given with a transformation, and that was built.

    Returns:
        A :class:`gradclip.jax.ClipState`.

    Raises:
        TypeError: For what is no optimizer of Keras.
        ValueError: For any other.
    """
    inner = _inner(optimizer)
    if not hasattr(inner, "_gradclip_treedef"):
        raise ValueError("optimizer: expected one that clips by a transformation of gradclip, and was built")
    from gradclip.keras import _jax  # noqa: PLC0415 (of those who run Keras on JAX)

    return _jax.state_of(inner)


def named_norms(optimizer: Any) -> dict[str, float]:
    """The norm of the gradient of every variable in the last step, by its path.

    Args:
        optimizer: As of :func:`last_result`; on JAX as of :func:`clip_state`.

    Returns:
        A dictionary of path to norm, before clipping.

    Raises:
        TypeError: As they do.
        ValueError: As they do.
    """
    if BACKEND != "jax":
        return last_result(optimizer).named_norms()
    norms, variables = clip_state(optimizer).norms, _inner(optimizer)._trainable_variables
    return dict(zip(names_of(variables), map(float, norms), strict=True))


def _inner(optimizer: Any) -> Any:
    """The optimizer that clips: that inside of a LossScaleOptimizer."""
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        kind = type(optimizer)
        raise TypeError(
            f"optimizer: expected a keras.optimizers.Optimizer, got a {kind.__module__}.{kind.__qualname__}"
        )
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return _inner(optimizer.inner_optimizer)
    return optimizer


def _rerouted(optimizer: Any, name: str, ours: Callable[..., Any]) -> Callable[..., Any]:
    """A method of one optimizer, unless those of all have been replaced."""

    def method(*args: Any, **kwargs: Any) -> Any:
        theirs = functools.partial(getattr(type(optimizer), name), optimizer)
        return theirs(*args, **kwargs) if reroute.is_installed else ours(optimizer, theirs, *args, **kwargs)

    method.is_gradclip = True  # type: ignore[attr-defined]
    return method
