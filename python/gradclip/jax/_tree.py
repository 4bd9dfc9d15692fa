"""Pytrees of gradients are read and checked while they are traced: errors name the leaf by its path."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from gradclip.jax._config import NONFINITE, Config

if TYPE_CHECKING:
    from collections.abc import Hashable

__all__ = ["Leaves", "leaf_names", "make_config", "read", "read_limits", "read_scale"]

_DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")


@dataclasses.dataclass
class Leaves:
    """The leaves of a pytree, in its order."""

    arrays: tuple[Any, ...]
    tree: Any
    treedef: Any
    argument: str

    def rebuilt(self, arrays: Sequence[Any]) -> Any:
        return jax.tree.unflatten(self.treedef, arrays)

    def with_arrays(self, arrays: tuple[Any, ...]) -> Leaves:
        return dataclasses.replace(self, arrays=arrays)

    def path(self, index: int) -> str:
        """As one would write it: ``grads['layer']['w']``."""
        path, _ = jax.tree_util.tree_flatten_with_path(self.tree)[0][index]
        return self.argument + jax.tree_util.keystr(path)


def leaf_names(tree: Any) -> tuple[str, ...]:
    """The paths of the leaves, joined by dots."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return tuple(jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths)


def read(tree: Any, argument: str = "grads") -> Leaves:
    """The leaves as arrays of real or complex floats."""
    arrays, treedef = jax.tree.flatten(tree)
    leaves = Leaves((), tree, treedef, argument)
    if not arrays:
        raise ValueError(f"{argument}: expected at least one array, got none in {tree!r}")
    leaves.arrays = tuple(_array(leaves, i, array) for i, array in enumerate(arrays))
    return leaves


def _array(leaves: Leaves, index: int, leaf: Any) -> Any:
    expected = ", ".join(_DTYPES[:-1]) + " or " + _DTYPES[-1]
    dtype = getattr(leaf, "dtype", None)
    if (
        dtype is None
        or not hasattr(leaf, "shape")
        or not isinstance(leaf, (jax.Array, np.ndarray, np.generic))
    ):
        kind = type(leaf)
        raise TypeError(
            f"{leaves.path(index)}: expected an array of {expected}, got "
            f"{kind.__module__}.{kind.__qualname__}"
        )
    if dtype.name not in _DTYPES:
        raise TypeError(f"{leaves.path(index)}: expected an array of {expected}, got one of {dtype.name}")
    if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted():
        raise ValueError(
            f"{leaves.path(index)}: expected an array with memory, got a jax.Array that was deleted (donated)"
        )
    return jnp.asarray(leaf)


def make_config(
    leaves: Leaves,
    *,
    ord: Any = 2,
    groups: Any = None,
    nonfinite: str = "propagate",
    rounding: str = "nearest",
    axis_name: Any = None,
) -> tuple[Config, tuple[Hashable, ...] | None]:
    """What a call is, and the names of its groups, if they have any."""
    order = _number("ord", ord)
    if not order > 0:
        raise ValueError(f"ord: expected a positive number or infinity, got {ord!r}")
    if nonfinite == "raise":
        raise ValueError(
            "nonfinite: expected 'propagate', 'zero' or 'skip', since a compiled program cannot raise, got "
            "'raise' (look at the result's nonfinite)"
        )
    if nonfinite not in NONFINITE:
        raise ValueError(f"nonfinite: expected 'propagate', 'zero' or 'skip', got {nonfinite!r}")
    if rounding not in ("nearest", "down"):
        raise ValueError(f"rounding: expected 'nearest' or 'down', got {rounding!r}")
    axis_names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())
    kind, parts, labels, names = _groups(leaves, groups)
    config = Config(
        parts=parts,
        groups=kind,
        labels=labels,
        ord=order,
        nonfinite=nonfinite,
        down=rounding == "down",
        all_float64=all(a.dtype.name in ("float64", "complex128") for a in leaves.arrays),
        axis_names=axis_names,
    )
    return config, names


def _number(name: str, value: Any) -> float:
    if isinstance(value, (bool, str, jax.core.Tracer)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {value!r}") from None


# --- Groups -----------------------------------------------------------------------------------------


def _groups(leaves: Leaves, groups: Any) -> tuple[str, tuple[int, ...], tuple[int, ...], Any]:
    shapes = [array.shape for array in leaves.arrays]
    whole = (1,) * len(shapes)
    if groups is None:
        return "all", whole, (), None
    if isinstance(groups, str):
        if groups == "tensor":
            return "tensor", whole, (), leaf_names(leaves.tree)
        if groups in ("row", "unit", "unit_last"):
            fewest = 1 if groups == "row" else 2
            axis = -1 if groups == "unit_last" else 0
            sign = -1 if groups == "unit_last" else 1
            parts = tuple(sign * shape[axis] if len(shape) >= fewest else 1 for shape in shapes)
            return "row", parts, (), None
        if groups == "sample":
            return "sample", _samples(leaves), (), None
        raise ValueError(
            f"groups: expected None, 'tensor', 'row', 'sample', 'unit', 'unit_last', a pytree of labels or a "
            f"callable, got {groups!r}"
        )
    labels = _labels(leaves, groups)
    if all(isinstance(label, str) for label in labels):
        names = tuple(dict.fromkeys(labels))
        return "labels", whole, tuple(names.index(label) for label in labels), names
    numbers = []
    for i, label in enumerate(labels):
        try:
            number = -1 if isinstance(label, bool) else operator.index(label)
        except TypeError:
            number = -1
        if not 0 <= number < len(labels):
            raise ValueError(
                f"groups of {leaves.path(i)}: expected names, or labels from 0 to {len(labels) - 1}, "
                f"got {label!r}"
            )
        numbers.append(number)
    return "labels", whole, tuple(numbers), None


def _samples(leaves: Leaves) -> tuple[int, ...]:
    counts = []
    for i, array in enumerate(leaves.arrays):
        if array.ndim == 0:
            raise ValueError(
                f"{leaves.path(i)}: expected samples along the first axis, got an array without axes"
            )
        if array.shape[0] != leaves.arrays[0].shape[0]:
            raise ValueError(
                f"{leaves.path(i)}: expected {leaves.arrays[0].shape[0]} samples along the first axis, as "
                f"{leaves.path(0)} has, got {array.shape[0]}"
            )
        counts.append(array.shape[0])
    if counts[0] == 0:
        raise ValueError(f"{leaves.path(0)}: expected at least one sample along the first axis, got none")
    return tuple(counts)


def _labels(leaves: Leaves, groups: Any) -> list[Any]:
    if callable(groups):
        return [groups(name) for name in leaf_names(leaves.tree)]
    labels: list[Any] = []

    def extend(label: Any, below: Any) -> None:
        labels.extend([label] * len(jax.tree.leaves(below)))

    try:
        jax.tree.map(extend, groups, leaves.tree)
    except ValueError as error:
        raise ValueError(
            f"groups: expected labels in a prefix of the pytree of the {leaves.argument}: {error}"
        ) from None
    return labels


# --- Numbers and arrays that are decided by ---------------------------------------------------------


def read_limits(
    max_norm: Any, config: Config, names: tuple[Hashable, ...] | None, argument: str = "max_norm"
) -> Any:
    """One for all groups, or one for each; numbers as the words of float64s (see ``_kernels.decide``)."""
    count = config.num_groups
    if isinstance(max_norm, Mapping):
        max_norm = _in_order(max_norm, names, argument)
    if isinstance(max_norm, (list, tuple)):
        max_norm = [math.inf if limit is None else limit for limit in max_norm]
        if any(isinstance(limit, jax.Array) for limit in max_norm):
            max_norm = jnp.stack([jnp.asarray(limit, jnp.result_type(float)) for limit in max_norm])
    limits = max_norm if isinstance(max_norm, jax.Array) else _numbers(max_norm, argument)
    if limits.dtype.kind not in "fiu" and limits.dtype.name != "bfloat16":
        raise TypeError(f"{argument}: expected real numbers, got {limits.dtype.name}")
    if limits.shape not in ((), (1,), (count,)):
        more = "" if count == 1 else f", or of shape {(count,)}, one for each group"
        raise ValueError(
            f"{argument}: expected a number or an array of shape (){more}, got one of shape {limits.shape}"
        )
    limits = limits.reshape(-1)
    if isinstance(limits, jax.Array):
        return limits.astype(jnp.promote_types(limits.dtype, jnp.float32))
    if not np.all(limits >= 0):
        raise ValueError(f"{argument}: expected numbers that are not negative, got {max_norm!r}")
    return limits.astype(np.float64).view(np.uint32).reshape(-1, 2)


def _in_order(max_norm: Mapping[Any, Any], names: tuple[Hashable, ...] | None, argument: str) -> list[Any]:
    if names is None:
        raise ValueError(
            f"{argument}: expected numbers, since the groups of this call have no names, got a mapping"
        )
    if set(max_norm) != set(names):
        raise ValueError(f"{argument}: expected the names of groups, {list(names)}, got {list(max_norm)}")
    return [max_norm[name] for name in names]


def _numbers(values: Any, argument: str) -> Any:
    try:
        numbers = np.asarray(values)
    except ValueError:  # lists of several lengths
        numbers = np.asarray(None)
    if numbers.dtype.kind not in "fiu" and numbers.dtype.name != "bfloat16":
        raise TypeError(f"{argument}: expected a number or an array of numbers, got {values!r}")
    return numbers


def read_scale(grad_scale: Any) -> Any:
    """A positive number, as the words of a float64; or a float array of shape ()."""
    if isinstance(grad_scale, jax.Array):
        if grad_scale.shape != () or not jnp.issubdtype(grad_scale.dtype, jnp.floating):
            raise ValueError(
                f"grad_scale: expected a number or a float array of shape (), got one of "
                f"{grad_scale.dtype.name} and shape {grad_scale.shape}"
            )
        return grad_scale.astype(jnp.promote_types(grad_scale.dtype, jnp.float32))
    number = _number("grad_scale", grad_scale)
    if not (number > 0 and math.isfinite(number) and math.isfinite(1 / number)):
        raise ValueError(
            f"grad_scale: expected a positive finite number whose reciprocal is finite, got {grad_scale!r}"
        )
    return np.array([number]).view(np.uint32)
