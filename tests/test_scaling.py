"""docs/scaling.md: its examples run, its tables are those of tools/scaling.py, which follows the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from processes import output_of
from tools import scaling

_DOCUMENT = Path(__file__).parents[1] / "docs" / "scaling.md"
_EVEN = scaling.ALPHA + scaling.MESSAGE * scaling.BETA


def _even(count: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.full(count, _EVEN)


def test_its_tables_are_those_of_the_script() -> None:
    text = _DOCUMENT.read_text()
    assert scaling.fill(text) == text, "expected the tables of: python -m tools.scaling docs/scaling.md"


def test_its_examples_run() -> None:
    code = f"""
        import doctest, os
        print(doctest.testfile({str(_DOCUMENT)!r}, module_relative=False), flush=True)
        os._exit(0)  # threads of PyTorch's process groups end a process by std::terminate, now and then
    """
    done = output_of(code)
    assert done.startswith("TestResults(failed=0, attempted=1"), done


@pytest.mark.parametrize("ranks", [2, 8, 64, 1024])
def test_even_hops_take_what_the_model_says(ranks: int) -> None:
    for name, algorithm in (("doubling", scaling.doubling), ("tree", scaling.tree), ("ring", scaling.ring)):
        done = algorithm(np.zeros(ranks), _even).max()
        assert done == pytest.approx(scaling.model(name, ranks, scaling.MESSAGE), rel=0.01), name


@pytest.mark.parametrize("ranks", [2, 3, 7, 100])
def test_nobody_is_done_before_the_last_arrives(ranks: int) -> None:
    """As an all-reduce has it: every result depends on every rank."""
    for algorithm in (scaling.doubling, scaling.tree, scaling.ring):
        for late in range(ranks):
            arrivals = np.zeros(ranks)
            arrivals[late] = 1.0
            done = algorithm(arrivals, _even)
            assert done.shape == (ranks,)
            assert (done > 1.0).all(), (algorithm, late)
        assert (algorithm(np.zeros(ranks), _even) < 0.01).all()


def test_a_document_without_a_place_for_a_table() -> None:
    with pytest.raises(ValueError, match="expected one place for the table 'traffic', got 0"):
        scaling.fill("text")
