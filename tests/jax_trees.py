"""Pytrees of gradients for the tests of gradclip.jax, and what the core makes of them."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gradclip
from gradclip.jax._tree import leaf_names
from matrices import Array, values

# For programs that are run once: to compile them takes a second.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def layer(bias: str, weight: str, shape: tuple[int, ...] = (4, 3), seed: int = 1) -> dict[str, Array]:
    """Gradients of a layer, by dtype."""
    return {"b": values(bias, shape[:1], seed), "w": values(weight, shape, seed + 1)}


def to_jax(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def pointers(tree: Any) -> list[int]:
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


def _leaf_labels(tree: Any, groups: Any) -> Any:
    """Groups as the core takes them: a label for each gradient."""
    if groups is None or isinstance(groups, str):
        return groups
    if callable(groups):
        return [groups(name) for name in leaf_names(tree)]
    return jax.tree.leaves(jax.tree.broadcast(groups, tree))


def clipped_by_core(tree: Any, max_norm: Any, **options: Any) -> tuple[list[bytes], gradclip.ClipResult]:
    """What the core makes of copies, and its result."""
    arrays = dict(zip(leaf_names(tree), (leaf.copy() for leaf in jax.tree.leaves(tree)), strict=True))
    options = {"nonfinite": "propagate"} | options | {"groups": _leaf_labels(tree, options.get("groups"))}
    result = gradclip.clip_by_global_norm_(arrays, max_norm, **options)
    return [array.tobytes() for array in arrays.values()], result


def median_limit(tree: Any, **options: Any) -> float:
    """A threshold that clips some groups, which float32 has too."""
    norms = clipped_by_core(tree, math.inf, **options)[1].group_norms
    return float(np.float32(0.7 * norms[0] if len(norms) == 1 else np.median(norms[norms > 0])))
