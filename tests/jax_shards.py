"""gradclip.jax over four devices: run as a script, with XLA's flag for them; prints what it found as JSON."""

from __future__ import annotations

import json
import math
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

import gradclip
import gradclip.jax
from jax_trees import bits
from matrices import values

P: Any = PartitionSpec
LINE = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
GRID = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)

EXPLICIT = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)

GRADS = {
    "columns": values("float32", (3, 512), seed=1),
    "narrow": values("bfloat16", (8, 6), seed=2),
    "rows": values("float32", (16, 5), seed=3),
    "same": values("float16", (7,), seed=4),
}
LINE_SPECS = {"columns": P(None, "x"), "narrow": P("x"), "rows": P("x"), "same": P()}
GRID_SPECS = {"columns": P(None, ("x", "y")), "narrow": P("y"), "rows": P("x"), "same": P()}
OVER_ROWS = {"columns": GRADS["columns"], "same": GRADS["same"]}
LIMIT = 0.25


def _in_shards(mesh: Any, specs: Any, axes: Any, max_norm: Any, checks: bool = True, **options: Any) -> Any:
    """A clip, its result, and the global norm as each device has it."""

    def clip(grads: Any) -> Any:
        clipped, result = gradclip.jax.clip(grads, max_norm, axis_name=axes, **options)
        return clipped, result, result.total_norm[None]

    out_specs = (specs, P(), P(mesh.axis_names))
    return jax.jit(jax.shard_map(clip, mesh=mesh, in_specs=(specs,), out_specs=out_specs, check_vma=checks))


def _compare(mesh: Any, specs: Any, grads: Any, max_norm: Any = LIMIT, **options: Any) -> dict[str, Any]:
    """Whether shards have the bits of one device that has everything, and what they hand on."""
    checks = options.pop("checks", True)
    sharded = _in_shards(mesh, specs, mesh.axis_names, max_norm, checks, **options).lower(grads).compile()
    clipped, result, totals = sharded(grads)
    whole, of_whole = gradclip.jax.clip(grads, max_norm, **options)
    return {
        "clipped": bool(of_whole.clipped),
        "equal values": bits(clipped) == bits(whole),
        "equal results": bits(result) == bits(of_whole),
        "equal on all devices": bits(totals) == [np.full(4, of_whole.total_norm).tobytes()],
        "moved": _bytes_moved(sharded.as_text()),
    }


def _compare_placed(mesh: Any, specs: Any, **options: Any) -> dict[str, Any]:
    """The same of arrays that lie in shards, without axis_name."""
    placed = {key: jax.device_put(GRADS[key], jax.NamedSharding(mesh, specs[key])) for key in GRADS}
    clip = jax.jit(lambda grads: gradclip.jax.clip(grads, LIMIT, **options), donate_argnums=0)
    compiled = clip.lower(placed).compile()
    kept = {key: array.sharding for key, array in placed.items()}
    clipped, result = compiled(placed)
    whole, of_whole = gradclip.jax.clip(GRADS, LIMIT, **options)
    totals = [shard.data for shard in result.total_norm.addressable_shards]
    return {
        "clipped": bool(of_whole.clipped),
        "equal values": bits(clipped) == bits(whole),
        "equal results": bits(result) == bits(of_whole),
        "equal on all devices": bits(totals) == [of_whole.total_norm.tobytes()] * 4,
        "kept": all(clipped[key].sharding.is_equivalent_to(kept[key], clipped[key].ndim) for key in kept),
        "moved": _bytes_moved(compiled.as_text() or ""),
    }


def _compare_norms() -> float:
    """Outside of compiled programs: how far those of shards are from those of whole arrays, whose tiles are
    others."""
    placed = [jax.device_put(GRADS[key], jax.NamedSharding(GRID, GRID_SPECS[key])) for key in GRADS]
    whole = gradclip.tensor_norms(list(GRADS.values()))
    return float(np.max(np.abs(gradclip.tensor_norms(placed) / whole - 1)))


def _with_nan() -> dict[str, Any]:
    rows = GRADS["rows"].copy()
    rows[9, 2] = np.nan  # on the third of four devices
    return GRADS | {"rows": rows}


def _compare_pmap() -> dict[str, bool]:
    """What has no types counts once a shard."""
    parts = {"rows": GRADS["rows"].reshape(4, 4, 5), "same": np.stack([GRADS["same"]] * 4)}
    clipped, result = jax.pmap(lambda grads: gradclip.jax.clip(grads, LIMIT, axis_name="x"), axis_name="x")(
        parts
    )
    whole, of_whole = gradclip.jax.clip(parts, LIMIT)
    return {
        "equal values": bits(clipped) == bits(whole),
        "equal norms": bits(result.norms) == [np.stack([of_whole.norms] * 4).tobytes()],
    }


def _compare_updates() -> dict[str, bool]:
    """As a transformation of optax, whose state is the same everywhere."""
    whole, across = (gradclip.jax.clip_by_global_norm(LIMIT, axis_name=axes) for axes in (None, "x"))
    state = whole.init(GRADS)
    update = jax.shard_map(across.update, mesh=LINE, in_specs=(LINE_SPECS, P()), out_specs=(LINE_SPECS, P()))
    return {"equal": bits(jax.jit(update)(GRADS, state)) == bits(whole.update(GRADS, state))}


def _compare_derivatives() -> float:
    """How far derivatives across shards are from those of one device, relative to the largest."""
    grads = {key: jnp.asarray(GRADS[key], jnp.float32) for key in ("rows", "same")}

    def of_one(grads: Any, axes: Any) -> Any:
        result = gradclip.jax.clip(grads, LIMIT, ord=3, axis_name=axes)[1]
        return result.total_norm + 1000 * result.coefficient

    specs = {key: GRID_SPECS[key] for key in grads}
    across = jax.shard_map(
        lambda grads: of_one(grads, ("x", "y")), mesh=GRID, in_specs=(specs,), out_specs=P()
    )
    found = jax.jit(jax.grad(across))(grads)
    expected = jax.jit(jax.grad(lambda grads: of_one(grads, None)))(grads)
    ratios = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)), found, expected)
    return float(max(jax.tree.leaves(ratios)))


def _bytes_moved(text: str) -> dict[str, int]:
    """The bytes that each kind of collective operation of a compiled program hands on."""
    moved: dict[str, int] = {}
    kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast"
    for shapes, kind in re.findall(rf"= (\S.*?) ({kinds})(?:-start)?\(", text):
        for width, dims in re.findall(r"[a-z]+(\d*)\w*\[([\d,]*)\]", shapes):
            size = math.prod(int(n) for n in dims.split(",") if n) * max(int(width or 8) // 8, 1)
            moved[kind] = moved.get(kind, 0) + size
    return moved


def main() -> None:
    of_rows = {key: LINE_SPECS[key] for key in OVER_ROWS}
    all_sharded = {"columns": P(None, "x"), "rows": P("x")}
    halves = {key: GRADS[key] for key in all_sharded}
    found = {
        "devices": len(jax.devices()),
        "cases": {
            "one axis": _compare(LINE, LINE_SPECS, GRADS),
            "two axes": _compare(GRID, GRID_SPECS, GRADS),
            "largest of tensors": _compare(LINE, LINE_SPECS, GRADS, groups="tensor", ord=math.inf),
            "rows": _compare(LINE, of_rows, OVER_ROWS, 1.0, groups="row"),
            "types that do not tell": _compare(LINE, all_sharded, halves, checks=False, ord=3),
            "skip": _compare(LINE, LINE_SPECS, _with_nan(), nonfinite="skip"),
            "zero": _compare(GRID, GRID_SPECS, _with_nan(), nonfinite="zero", ord=1),
        },
        "placed": {
            "one axis": _compare_placed(LINE, LINE_SPECS),
            "two axes": _compare_placed(GRID, GRID_SPECS, groups="tensor", ord=3),
            "explicit axes": _compare_placed(EXPLICIT, GRID_SPECS, ord=math.inf),
        },
        "norms": _compare_norms(),
        "pmap": _compare_pmap(),
        "updates": _compare_updates(),
        "derivatives": _compare_derivatives(),
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
