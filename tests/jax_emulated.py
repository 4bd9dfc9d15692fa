"""gradclip.jax over the emulated CUDA engine: run as a script, which ends well if its bits are the core's.

XLA for CPUs calls the handlers that are meant for GPUs: their memory is the host's.
"""

from __future__ import annotations

import importlib
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import gradclip
from gradclip import _core
from matrices import NAMES, values

_cuda: Any = importlib.import_module("gradclip._cuda_emulated")
_core.jax_handlers = _cuda.jax_handlers  # read when gradclip.jax is imported

import gradclip.jax  # noqa: E402

jax.config.update("jax_enable_x64", True)

ORDS = (2, 1, math.inf, 3)
KINDS = (None, "tensor", "row", "sample", "unit", "unit_last")


def tree_of(groups: Any, seed: int) -> dict[str, Any]:
    tree = {name: values(name, (4, 3, 5), seed + i) for i, name in enumerate(NAMES)}
    tree |= {"large": values("float32", (4, 9001), seed), "column": values("bfloat16", (4,), seed)}
    if groups in (None, "tensor"):
        tree |= {"empty": np.zeros((0, 3), np.float32), "scalar": values("float32", (), seed)}
    return tree


def bits(arrays: Any) -> list[bytes]:
    return [np.asarray(array).tobytes() for array in arrays]


def clipped_by_core(tree: dict[str, Any], max_norm: Any, **options: Any) -> tuple[list[bytes], Any]:
    arrays = {name: tree[name].copy() for name in sorted(tree)}
    labels = options.get("groups")
    if isinstance(labels, dict):
        options["groups"] = [labels[name] for name in arrays]
    result = gradclip.clip_by_global_norm_(arrays, max_norm, **{"nonfinite": "propagate"} | options)
    return bits(arrays.values()), result


def check(tree: dict[str, Any], max_norm: Any, **options: Any) -> None:
    """As the core clips."""
    written, expected = clipped_by_core(tree, max_norm, **options)
    grads = jax.tree.map(jnp.asarray, tree)
    clipped, result = gradclip.jax.clip(grads, max_norm, **options)
    assert bits(jax.tree.leaves(clipped)) == written, options
    for field in ("total_norm", "norms", "group_norms", "coefficient", "clipped"):
        np.testing.assert_array_equal(np.asarray(getattr(result, field)), getattr(expected, field), field)
    names = zip(sorted(tree), result.nonfinite.tolist(), strict=True)
    assert tuple(name for name, is_odd in names if is_odd) == expected.nonfinite


def check_bits() -> None:
    for groups, ord in itertools.product(KINDS, ORDS):
        check(tree_of(groups, 1), 2.5, groups=groups, ord=ord, grad_scale=4.0)
    for groups in KINDS:
        check(tree_of(groups, 2), 1e9, groups=groups)
        check(tree_of(groups, 3), 0.75, groups=groups, rounding="down")
    labels = {name: len(name) % 3 for name in tree_of(None, 1)}
    check(tree_of(None, 1), 2.5, groups=labels)
    check(tree_of("row", 1), 0.0, groups="row")


def check_nonfinite() -> None:
    for groups, nonfinite in itertools.product((None, "row", "unit_last"), ("skip", "zero")):
        tree = tree_of(groups, 4)
        tree["float32"][2, 1, 3] = math.nan
        tree["complex64"][1, 0, 0] = math.inf
        check(tree, 1.5, groups=groups, nonfinite=nonfinite, ord=2 if groups else math.inf)


def check_transformations() -> None:
    """Batches of decisions, of limits of each width, and shards."""
    tree = {"w": values("float32", (5, 3, 7), 1), "b": values("bfloat16", (5, 9), 2)}
    limits = np.array([0.5, 1e9, 2.0, 0.0, 3.0])
    for dtype, ord in ((jnp.float32, 2), (jnp.float64, 3)):
        clip = jax.jit(jax.vmap(lambda grads, limit, ord=ord: gradclip.jax.clip(grads, limit, ord=ord)))
        clipped, result = clip(jax.tree.map(jnp.asarray, tree), jnp.asarray(limits, dtype))
        for i, limit in enumerate(limits):
            written, expected = clipped_by_core({n: a[i] for n, a in tree.items()}, limit, ord=ord)
            assert bits(a[i] for a in jax.tree.leaves(clipped)) == written
            assert float(result.total_norm[i]) == expected.total_norm

    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    def in_shards(grads: Any) -> Any:
        return gradclip.jax.clip(grads, 0.5, axis_name="x")[0]

    assert bits(jax.tree.leaves(in_shards(tree))) == clipped_by_core(tree, 0.5)[0]


def check_launches() -> None:
    """Of a clip: one for each of measuring, deciding and changing, whatever the number of gradients."""
    grads = [jnp.ones(10 + i % 5) for i in range(300)]
    clip = jax.jit(lambda grads: gradclip.jax.clip(grads, 1.0))
    clip(grads)
    launches, allocations, copies, waits = _cuda.counters()
    jax.block_until_ready(clip(grads))
    # XLA copies arguments that are not donated itself.
    assert _cuda.counters() == (launches + 3, allocations, copies, waits)


def check_unusable() -> None:
    """What is traced and no threshold, or no scale, makes NaN: nothing waits to raise."""
    grads = {"w": jnp.ones(4, jnp.float32)}
    for limit in (-1.0, math.nan):
        clipped, result = jax.jit(gradclip.jax.clip)(grads, limit)
        assert np.isnan(clipped["w"]).all()
        assert result.total_norm == 2.0
    clipped, result = jax.jit(lambda g, s: gradclip.jax.clip(g, 1.0, grad_scale=s))(grads, -1.0)
    assert np.isnan(clipped["w"]).all()
    assert np.isnan(result.total_norm)


if __name__ == "__main__":
    before = _cuda.counters()[0]
    _cuda.set_machine(seed=3, blocks_at_once=2)
    check_bits()
    check_nonfinite()
    check_transformations()
    check_launches()
    check_unusable()
    print(_cuda.counters()[0] - before)
