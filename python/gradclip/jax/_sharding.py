"""Sharded gradients: sums of shards are added without gathering what they are of.

Each device measures what it holds. Its sums go into a place of their own in an array of zeros, so that an
all-reduce of integers lays those of all shards side by side: exactly, and in the same order on every device.
Then all add them up alike (``_kernels.combine``). 24 bytes travel for each shard of each gradient.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["by_device", "lay_out"]


def lay_out(words: Any, places: Any, shards: int, axes: tuple[str, ...]) -> Any:
    """Sums of the shards of all devices, of shape (shards, parts, 6).

    Args:
        words: The sums that this device has, of shape (parts, 6).
        places: The number of the shard that each of them is of; -1: another device has the same.
        shards: How many there are.
        axes: Over which mapped axes.
    """
    here = jnp.arange(shards)[:, None] == places
    return lax.psum(jnp.where(here[..., None], words, jnp.uint32(0)), axes)


def by_device(call: Callable[..., Any], combine: Callable[[Any], Any] | None, replicated: int) -> Any:
    """A call that each device makes with its own shards, in a program for several; on one device it is the
    call.

    Args:
        call: Of arrays; without ``combine`` it returns as many arrays as it was given after the replicated
            ones, sharded as these. It may not care for the order of elements in memory of arrays that are
            sharded.
        combine: From the sums of shards to those of all; where given, ``call`` returns sums of its arrays,
            one each.
        replicated: How many of the first arrays every device needs whole.
    """
    wrapped = custom_partitioning(call)

    def partition(mesh: Any, arguments: Sequence[Any], result: Any) -> Any:
        shardings = [_even(argument) for argument in arguments]
        devices = shardings[0]._device_assignment
        mesh = Mesh(np.array(devices), ("devices",)) if mesh.empty else mesh
        whole = NamedSharding(mesh, PartitionSpec())
        shardings = [whole] * replicated + shardings[replicated:]
        if combine is None:
            return mesh, call, type(result)(shardings[replicated:]), tuple(shardings)

        places = np.stack([_places(a, s, devices) for a, s in zip(arguments, shardings, strict=True)], axis=1)
        shards, axes = int(places.max()) + 1, tuple(mesh.axis_names)

        def local(*arrays: Any) -> Any:
            mine = jnp.asarray(places)[lax.axis_index(axes)]
            return combine(lay_out(call(*arrays), mine, shards, axes))

        return mesh, local, whole, tuple(shardings)

    def infer(mesh: Any, arguments: Sequence[Any], result: Any) -> Any:
        shardings = [argument.sharding for argument in arguments]
        return _whole(shardings[0]) if combine is not None else type(result)(shardings[replicated:])

    def rule(mesh: Any, values: Sequence[Any], results: Sequence[Any]) -> Any:
        return _sharding_rule([len(value.shape) for value in values], replicated, combine is not None)

    wrapped.def_partition(partition, infer_sharding_from_operands=infer, sharding_rule=rule)
    return wrapped


def _even(argument: Any) -> Any:
    """The sharding of an array; replicated, where shards of several sizes would be padded."""
    sharding = argument.sharding
    try:
        sharding.shard_shape(argument.shape)
    except ValueError:
        return _whole(sharding)
    return sharding


def _whole(sharding: Any) -> Any:
    """All of an array on each device of a sharding."""
    return NamedSharding(Mesh(np.array(sharding._device_assignment), ("devices",)), PartitionSpec())


def _places(argument: Any, sharding: Any, devices: Sequence[Any]) -> Any:
    """Of each device, the number of the shard that it has; -1 if an earlier one has the same."""
    indices = sharding.devices_indices_map(argument.shape)
    seen: dict[Any, int] = {}
    places = []
    for device in devices:
        shard = tuple((s.start, s.stop) for s in indices[device])
        places.append(-1 if shard in seen else seen.setdefault(shard, len(seen)))
    return np.array(places)


def _sharding_rule(ranks: Sequence[int], replicated: int, is_sum: bool) -> Any:
    """For Shardy: axes of the leaves are free; those of what is replicated, and of sums, are not to be
    sharded."""
    numbers = itertools.count()
    arguments = [[f"x{next(numbers)}" for _ in range(rank)] for rank in ranks]
    results = [[f"x{next(numbers)}" for _ in range(2)]] if is_sum else arguments[replicated:]
    whole = [name for names in arguments[:replicated] + results * is_sum for name in names]
    rule = " -> ".join(", ".join(map(" ".join, side)) for side in (arguments, results))
    return rule, {"need_replication_factors": tuple(whole)}
