"""What README.md and docs/lab.md say of the laboratory is what its committed rows say."""

from __future__ import annotations

import pytest

for package in ("sklearn", "rich", "matplotlib", "pandas", "jinja2"):
    pytest.importorskip(package)

from gradclip._lab.command import chosen_runs  # noqa: E402
from gradclip._lab.report import sections  # noqa: E402
from gradclip._lab.store import Store  # noqa: E402
from tools.docs import ROOT, replaced  # noqa: E402
from tools.lab import MARKS, ROWS, pages  # noqa: E402


def test_every_sentence_is_that_of_the_committed_rows() -> None:
    store = Store(ROWS)
    assert all(store.has(settings) for settings in chosen_runs([], {}, False)), (
        "a run is missing: not the whole"
    )
    for name, text in pages(sections(store.rows)).items():
        page = (ROOT / name).read_text(encoding="utf-8")
        assert page == replaced(page, MARKS[name], text), f"{name}: run python -m tools.lab"
