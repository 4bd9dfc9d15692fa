"""``python -m tools.lab``: the laboratory's sentences and pictures in README.md and docs/lab.md.

All are made of docs/lab/rows.jsonl, which ``python -m gradclip lab --out docs/lab`` writes; a test compares.
"""

from __future__ import annotations

import re
import sys

from gradclip._lab.report import Section, sections
from gradclip._lab.store import Store
from gradclip._report.html import save_png
from tools.docs import ROOT, replaced

__all__ = ["MARKS", "ROWS", "main", "pages"]

ROWS = ROOT / "docs/lab"
_IMAGES = "images/lab"
MARKS = {
    "README.md": ("<!-- lab: python -m tools.lab -->\n", "<!-- end of lab -->\n"),
    "docs/lab.md": ("<!-- lab: python -m tools.lab -->\n", "<!-- end of lab -->\n"),
}
# README's picture, and its sentences: the question, and which sentence of its answer.
_PICTURE = "remedies"
_SENTENCES = (("relu-or-tanh", 0), ("learning-rate", 1), ("remedies", 0))


def pages(answered: list[Section]) -> dict[str, str]:
    """What is made here, by file."""
    by_name = {section.question.name: section for section in answered}
    sentences = [f"- {_set(by_name[name].answer[place])}\n" for name, place in _SENTENCES]
    picture = f"\n![Which remedy works when](docs/{_IMAGES}/{_PICTURE}.png)\n"
    return {"README.md": "".join(sentences) + picture, "docs/lab.md": "\n".join(map(_described, answered))}


def _described(section: Section) -> str:
    lines = [f"### {section.question.title}\n", f"{section.question.background}\n"]
    lines += [f"- {_set(sentence)}" for sentence in section.answer]
    lines.append(f"\n({section.basis}.)\n")
    lines += [f"![{what}]({_IMAGES}/{name}.png)\n" for name, what, _ in section.plots]
    return "\n".join(lines)


def _set(sentence: str) -> str:
    """Powers as Markdown shows them."""
    return re.sub(r"10\^(-?\d+)", r"10<sup>\1</sup>", sentence)


def main() -> int:
    """Write both pages and the pictures."""
    answered = sections(Store(ROWS).rows)
    for name, text in pages(answered).items():
        page = ROOT / name
        page.write_text(replaced(page.read_text(encoding="utf-8"), MARKS[name], text), encoding="utf-8")
    images = ROOT / "docs" / _IMAGES
    images.mkdir(parents=True, exist_ok=True)
    for section in answered:
        for name, _, figure in section.plots:
            save_png(figure, images / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
