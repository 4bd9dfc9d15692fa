"""Gradients on many ranks: what ``rank_checks.py`` says holds on each of 2 and of 4."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest

import rank_checks
from ranks import Outcomes, outcomes_of

_WORLDS = (2, 4)
_CASES = [(world, check.__name__) for world in _WORLDS for check in rank_checks.checks_for(world)]


@functools.cache
def _outcomes() -> dict[int, Outcomes]:
    with tempfile.TemporaryDirectory() as directory:
        return outcomes_of(Path(directory), *_WORLDS)


@pytest.mark.parametrize(("world", "check"), _CASES)
def test_on_every_rank(world: int, check: str) -> None:
    texts = _outcomes()[world].get(check)
    assert texts is not None, "no rank got there"
    failed = [f"rank {rank}:\n{text}" for rank, text in enumerate(texts) if text]
    assert not failed, "\n".join(failed)
