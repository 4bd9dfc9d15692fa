"""gradclip.jax over four devices: sharded arrays have the bits of one device, and are not gathered."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from processes import output_of


@pytest.fixture(scope="module")
def shards() -> Any:
    """What a process with four devices has found (tests/jax_shards.py)."""
    tests = os.path.dirname(__file__)
    paths = os.pathsep.join(filter(None, [tests, os.environ.get("PYTHONPATH")]))
    flags = "--xla_force_host_platform_device_count=4"
    return json.loads(
        output_of(
            "import jax_shards; jax_shards.main()",
            PYTHONPATH=paths,
            XLA_FLAGS=flags,
            JAX_PLATFORMS="cpu",
        )
    )


_SHARDED = {
    "one axis": 4,
    "two axes": 4,
    "largest of tensors": 4,
    "rows": 3 + 7,
    "types that do not tell": 2,
    "skip": 4,
    "zero": 4,
}


def test_shards_are_over_four_devices(shards: Any) -> None:
    assert shards["devices"] == 4
    assert set(shards["cases"]) == set(_SHARDED)


@pytest.mark.parametrize(("case", "parts"), _SHARDED.items())
def test_shards_have_the_bits_of_one_device(shards: Any, case: str, parts: int) -> None:
    """And hand on nothing but sums, by an all-reduce: 24 bytes of each part and shard."""
    found = shards["cases"][case]
    assert found["equal values"]
    assert found["equal results"]
    assert found["equal on all devices"]
    assert found["clipped"] is (case != "skip")
    assert set(found["moved"]) == {"all-reduce"}
    assert 24 * parts <= found["moved"]["all-reduce"] <= 24 * parts * shards["devices"]


@pytest.mark.parametrize("case", ["one axis", "two axes", "explicit axes"])
def test_arrays_in_shards_are_not_gathered(shards: Any, case: str) -> None:
    """Under jit alone: they stay where they are, and keep the bits of one device."""
    found = shards["placed"][case]
    assert all(
        found[what] for what in ("clipped", "equal values", "equal results", "equal on all devices", "kept")
    )
    assert set(found["moved"]) == {"all-reduce"}
    assert found["moved"]["all-reduce"] <= 24 * 4 * shards["devices"]


def test_norms_of_arrays_in_shards(shards: Any) -> None:
    assert shards["norms"] < 2**-22


def test_shards_of_pmap(shards: Any) -> None:
    assert shards["pmap"] == {"equal values": True, "equal norms": True}


def test_updates_of_shards(shards: Any) -> None:
    assert shards["updates"]["equal"]


def test_derivatives_of_shards(shards: Any) -> None:
    assert shards["derivatives"] < 1e-5
