"""docs/frameworks.md shows what tools/integrations measured, and that is what was promised."""

from __future__ import annotations

import json

import pytest

from tools.integrations import __main__ as integrations
from tools.integrations.timing import Comparison, compare

_KEPT = json.loads(integrations.FILE.read_text())
_ROWS = [Comparison(**fields) for part in _KEPT.values() for fields in part["rows"]]


def test_the_table_is_that_of_the_run() -> None:
    assert list(_KEPT) == list(integrations.PARTS)
    page = integrations.PAGE.read_text()
    first, last = integrations.MARKS
    assert page[page.index(first) + len(first) : page.index(last)] == integrations.table(_KEPT)


@pytest.mark.parametrize(
    ("where", "what", "load", "at_least"),
    [
        ("on PyTorch", "`global_clipnorm`", "160 tensors", 5),
        ("on PyTorch", "`global_clipnorm`", "300 tensors", 20),
        ("on JAX", "`global_clipnorm`", "160 tensors", 1),
        ("Flower", "`fixedclipping_mod`", "a CNN", 1.3),
        ("Flower", "`fixedclipping_mod`", "LoRA", 1.3),
        ("Flower", "`fixedclipping_mod`", "ResNet-18", 1.3),
        ("Flower", "`fixedclipping_mod`", "GPT-2", 1.3),
        ("PyTorch", "`add_`, then gradclip's norms", "bfloat16", 1.5),
    ],
)
def test_what_was_promised(where: str, what: str, load: str, at_least: float) -> None:
    """The rest of the table says where less was reached."""
    (row,) = [row for row in _ROWS if where in row.where and what == row.what and load in row.load]
    assert row.ratio >= at_least


def test_a_ratio_is_that_of_neighbours() -> None:
    assert Comparison("", "", "", theirs=[2.0, 8.0, 3.0], ours=[1.0, 2.0, 3.0]).ratio == 2.0


def test_both_are_timed_in_turns_after_they_were_prepared() -> None:
    calls: list[str] = []
    row = compare(
        "x", "y", "z",
        lambda: calls.append("theirs"), lambda: calls.append("ours"),
        prepare=lambda: calls.append("prepare"), seconds=0, least=3,
    )  # fmt: skip
    assert calls == ["prepare", "theirs", "prepare", "ours"] * 4  # the first to warm up
    assert len(row.theirs) == len(row.ours) == 3
