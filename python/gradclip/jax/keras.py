"""Keras's optimizers clip through gradclip, inside of the compiled train step, where Keras runs on JAX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import keras

import gradclip.jax

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradclip.jax import ClipState

__all__ = ["clip_state", "clipping", "named_norms"]


def clipping(optimizer: Any, transformation: Any = None) -> Any:
    """Make an optimizer of Keras clip through gradclip.

    What the optimizer was told (``clipnorm``, ``global_clipnorm`` or ``clipvalue``) is done by gradclip: same
    meaning, but norms that do not overflow, bits of :func:`gradclip.clip_by_global_norm_`, and gradients that
    need no clipping keep theirs. Its class, its variables and what is saved of it stay as they are; call this
    again after a model was loaded.

    Args:
        optimizer: A ``keras.optimizers.Optimizer``, before the first ``fit`` of its model: a train step that
            was traced stays as it is. Of a ``LossScaleOptimizer`` the inner one clips.
        transformation: One of gradclip.jax, instead: with groups, a policy, a schedule of the threshold. Its
            state becomes variables of the optimizer, behind those that it has, and is saved with them. The
            optimizer must be new: these variables are made when it is built.

    Returns:
        The same optimizer.

    Raises:
        TypeError: For what is no optimizer of Keras.
        ValueError: If Keras does not run on JAX; if there is nothing to clip by, or two things; with a
            transformation, for an optimizer that was built.

    Example:
        >>> import keras, gradclip.jax.keras
        >>> optimizer = gradclip.jax.keras.clipping(keras.optimizers.Adam(global_clipnorm=1.0))
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model.compile(optimizer, loss="mse")
    """
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(f"optimizer: expected one of Keras, got {type(optimizer).__name__}")
    if keras.backend.backend() != "jax":
        raise ValueError(
            f"optimizer: expected Keras to run on JAX (KERAS_BACKEND=jax), got {keras.backend.backend()!r}"
        )
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        clipping(optimizer.inner_optimizer, transformation)
        return optimizer
    own = _own_clipping(optimizer)
    if transformation is None and own is None:
        raise ValueError(
            "optimizer: expected clipnorm, global_clipnorm or clipvalue, or a transformation, to clip by"
        )
    if transformation is not None:
        if own is not None:
            raise ValueError("transformation: expected none, since the optimizer has a threshold of its own")
        _keep_state(optimizer, transformation)
    optimizer._clip_gradients = lambda grads: _clip(optimizer, transformation, grads)
    return optimizer


def _own_clipping(optimizer: Any) -> Any:
    """What Keras would do, read anew where a step is traced."""
    if optimizer.clipnorm and optimizer.clipnorm > 0:
        return gradclip.jax.clip_by_norm(optimizer.clipnorm)
    if optimizer.global_clipnorm and optimizer.global_clipnorm > 0:
        return gradclip.jax.clip_by_global_norm(optimizer.global_clipnorm)
    if optimizer.clipvalue and optimizer.clipvalue > 0:
        return gradclip.jax.clip_by_value(optimizer.clipvalue)
    return None


def _clip(optimizer: Any, transformation: Any, grads: Sequence[Any]) -> Any:
    """In place of ``_clip_gradients``: Keras calls it where a step is traced, with gradients of variables."""
    if transformation is None:
        own = _own_clipping(optimizer)
        return list(grads) if own is None else own.update(grads, own.init(grads))[0]
    grads, state = transformation.update(grads, clip_state(optimizer))
    for variable, value in zip(optimizer._gradclip_variables, jax.tree.leaves(state), strict=True):
        variable.assign(value)
    return grads


def _keep_state(optimizer: Any, transformation: Any) -> None:
    """Have the state of a transformation among the variables of an optimizer, once it is built."""
    if optimizer.built:
        raise ValueError("optimizer: expected one that is new, got one that was built (its variables exist)")
    build = optimizer.build

    def build_with_state(variables: Sequence[Any]) -> None:
        build(variables)
        state = transformation.init([variable.value for variable in variables])
        leaves, optimizer._gradclip_treedef = jax.tree_util.tree_flatten_with_path(state)
        kept = []
        for path, value in leaves:
            name = "gradclip_" + jax.tree_util.keystr(path, simple=True, separator="_").replace("/", "_")
            kept.append(keras.Variable(value, dtype=value.dtype.name, trainable=False, name=name))
            optimizer._track_variable(kept[-1])
        optimizer._gradclip_variables = tuple(kept)  # Keras watches lists for variables

    optimizer.build = build_with_state


def clip_state(optimizer: Any) -> ClipState:
    """The state of the transformation that an optimizer was given: of its last step.

    Args:
        optimizer: One that :func:`clipping` was given with a transformation, and that was built.

    Returns:
        A :class:`gradclip.jax.ClipState`.

    Raises:
        ValueError: For any other.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if not hasattr(optimizer, "_gradclip_variables"):
        raise ValueError("optimizer: expected one that clips by a transformation of gradclip, and was built")
    values = [variable.value for variable in optimizer._gradclip_variables]
    state: ClipState = jax.tree.unflatten(optimizer._gradclip_treedef, values)
    return state


def named_norms(optimizer: Any) -> dict[str, float]:
    """The norm of the gradient of every variable in the last step, by its path.

    Args:
        optimizer: As of :func:`clip_state`.

    Returns:
        A dictionary of path to norm, before clipping.

    Raises:
        ValueError: As :func:`clip_state` does.
    """
    norms = clip_state(optimizer).norms
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    return {
        variable.path: float(norm)
        for variable, norm in zip(optimizer._trainable_variables, norms, strict=True)
    }
