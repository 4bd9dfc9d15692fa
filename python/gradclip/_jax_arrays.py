"""Pytrees of JAX arrays, and arrays with shards on several devices, as lists that an engine reads."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gradclip._dispatch import read, read_and_see

__all__ = ["Shards", "read_norms"]


class Shards:
    """The norms of JAX arrays from their shards on this process's devices, each counted once."""

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self._count = len(arrays)
        self._array_of: list[int] = []
        shards: dict[str, Any] = {}
        for i, (name, array) in enumerate(arrays.items()):
            # Devices may have the same shard.
            here = {str(shard.index): shard.data for shard in array.addressable_shards}
            shards |= {name if len(here) == 1 else f"{name}{index}": data for index, data in here.items()}
            self._array_of += [i] * len(here)
        self._read = read(shards)

    def tensor_norms(self, ord: object) -> npt.NDArray[np.float64]:
        # An array none of whose shards is here has norm 0.
        present, groups = np.unique(self._array_of, return_inverse=True)
        norms = np.zeros(self._count)
        norms[present] = self._read.measure(ord, groups, 1.0, None).group_norms
        return norms

    def global_norm(self, ord: object) -> float:
        return self._read.global_norm(ord)


def read_norms(grads: Any) -> Any:
    """What has norms of gradients: what reads them, or of JAX arrays that no engine reads, their shards."""
    try:
        return read_and_see(grads)[0]
    except (TypeError, ValueError):
        arrays = _concrete_arrays(grads)
        if not arrays:
            raise
    return Shards(arrays)


def _concrete_arrays(grads: Any) -> dict[str, Any] | None:
    """The leaves of all entries, by their paths, if they are JAX arrays with memory."""
    jax: Any = sys.modules.get("jax")
    if jax is None or not isinstance(grads, Mapping | Sequence):
        return None
    entries = list(grads.items() if isinstance(grads, Mapping) else enumerate(grads))
    arrays: dict[str, Any] = {}
    for name, entry in entries:
        try:
            paths = jax.tree_util.tree_flatten_with_path(entry)[0]
        except (TypeError, ValueError):  # keys that have no order
            return None
        for path, leaf in paths:
            if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer) or leaf.is_deleted():
                return None
            arrays[f"{name}{jax.tree_util.keystr(path)}"] = leaf
    return arrays
