"""Keras's optimizers on JAX: they clip inside of the compiled train step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import keras

import gradclip.jax
from gradclip.jax._transforms import clip_elements
from gradclip.jax._tree import read

if TYPE_CHECKING:
    from gradclip.jax import ClipState

__all__ = ["clip", "keep_state", "state_of"]


def clip(option: str, threshold: Any, grads: list[Any]) -> list[Any]:
    """Clip as an optimizer's own option says; called where a step is traced."""
    if option == "clipvalue":
        leaves = read(grads)
        clipped: list[Any] = leaves.rebuilt(clip_elements(leaves, threshold))
        return clipped
    clipped, _ = gradclip.jax.clip(grads, threshold, groups="tensor" if option == "clipnorm" else None)
    return clipped


def keep_state(optimizer: Any, transformation: Any) -> None:
    """Clip by a transformation, with its state among the variables of an optimizer, once it is built."""
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
        optimizer._gradclip_state = tuple(kept)  # Keras watches lists for variables

    def clip_gradients(grads: Sequence[Any]) -> Any:
        clipped, state = transformation.update(grads, state_of(optimizer))
        for variable, value in zip(optimizer._gradclip_state, jax.tree.leaves(state), strict=True):
            variable.assign(value)
        return clipped

    clip_gradients.is_gradclip = True  # type: ignore[attr-defined]
    optimizer.build, optimizer._clip_gradients = build_with_state, clip_gradients


def state_of(optimizer: Any) -> ClipState:
    values = [variable.value for variable in optimizer._gradclip_state]
    state: ClipState = jax.tree.unflatten(optimizer._gradclip_treedef, values)
    return state
