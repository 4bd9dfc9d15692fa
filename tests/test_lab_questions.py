"""The laboratory's questions: designs, sentences made of rows, and a report that needs nothing else."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

for _package in ("sklearn", "rich", "matplotlib", "pandas", "jinja2"):
    pytest.importorskip(_package)

import numpy as np  # noqa: E402

from gradclip._lab import report as report_module  # noqa: E402
from gradclip._lab.experiment import EXPLOSION, Settings, merged  # noqa: E402
from gradclip._lab.networks import layer_gains  # noqa: E402
from gradclip._lab.questions import QUESTIONS, frame  # noqa: E402
from gradclip._lab.questions._base import (  # noqa: E402
    CALM,
    HOT,
    LEARNT,
    listed,
    percent,
    power,
    spread,
    times,
)
from gradclip._lab.report import Section, _set, sections, write_report  # noqa: E402
from made_up_runs import World, made_up_row, made_up_rows  # noqa: E402

OF_THEIR_OWN = [name for name, question in QUESTIONS.items() if question.design(False)]
# What all runs together answer.
OF_ALL = [name for name in QUESTIONS if name not in OF_THEIR_OWN]
QUICK, WHOLE = (
    merged([one for question in QUESTIONS.values() for one in question.design(quick)])
    for quick in (True, False)
)


def design_of(name: str) -> list[Settings]:
    """What a question has to have: of those that need no runs of their own, some trainings."""
    of_others = [one for other in ("clipping", "depth", "recurrent") for one in QUESTIONS[other].design(True)]
    return merged(QUESTIONS[name].design(True) or of_others)


def answer_of(name: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    return QUESTIONS[name].answer(frame(rows))


# Designs.


def test_questions_have_the_names_that_they_are_asked_by() -> None:
    assert [question.name for question in QUESTIONS.values()] == list(QUESTIONS)
    assert len({question.title for question in QUESTIONS.values()}) == len(QUESTIONS) == 12
    assert OF_ALL == ["warning", "cost"]


@pytest.mark.parametrize("name", OF_THEIR_OWN)
def test_a_quick_look_is_a_part_of_the_whole_and_every_run_is_one(name: str) -> None:
    quick, whole = (merged(QUESTIONS[name].design(is_quick)) for is_quick in (True, False))
    assert len(set(quick)) == len(quick)
    assert len(set(whole)) == len(whole)
    assert set(quick) < set(whole)
    in_detail = {one for one in whole if one.in_detail}
    assert {one for one in quick if one.in_detail} == in_detail & set(quick)


@pytest.mark.parametrize("name", OF_THEIR_OWN)
def test_the_whole_has_five_seeds_of_each_and_a_quick_look_has_one(name: str) -> None:
    for is_quick, seeds in ((True, [0]), (False, [0, 1, 2, 3, 4])):
        found: dict[Settings, list[int]] = {}
        for one in merged(QUESTIONS[name].design(is_quick)):
            found.setdefault(replace(one, seed=0), []).append(one.seed)
        assert all(numbers == seeds for numbers in found.values())


def test_runs_that_questions_share_are_run_once_in_the_detail_that_one_of_them_needs() -> None:
    for runs, is_quick in ((QUICK, True), (WHOLE, False)):
        asked = [one for question in QUESTIONS.values() for one in question.design(is_quick)]
        assert len(runs) == len(set(runs)) == len(set(asked)) < len(asked)
        detailed = {one for one in asked if one.in_detail}
        assert detailed
        assert {one for one in runs if one.in_detail} == detailed
    assert len(QUICK) < 200  # some minutes


# Sentences.

# Figures that sentences may name although no row changes them, beside those of designs and definitions.
_CONSTANT = {
    "growth": {"1.13", "float32", "5"},  # the largest slope; activation functions
    "relu-or-tanh": {"0", "10", "20"},  # the slope of what is saturated, a guess, layers
    "normalisation": {"1.2", "2019", "arXiv:1902.08129"},
    "recurrent": {"39"},  # characters
    "remedies": {"6"},  # troubles
}


def words(sentence: str) -> list[str]:
    return [word.strip(".,;:()") for word in sentence.split()]


def with_figures(sentence: str) -> bool:
    return bool(re.search(r"\d", sentence))


def allowed(name: str) -> set[str]:
    design = design_of(name)
    values = {value for one in design for value in one.varied().values() if isinstance(value, int | float)}
    definitions = [EXPLOSION, *(100 * share for share in LEARNT.values()), len(design)]
    named = {one.regularisation.upper() for one in design}
    return {f"{value:g}" for value in (*values, *definitions)} | named | _CONSTANT.get(name, set())


def changed(sentence: list[str], others: list[list[str]]) -> set[int]:
    """The places of words that are others in another answer, in the sentence that is most like this one."""

    def matcher(other: list[str]) -> SequenceMatcher[str]:
        return SequenceMatcher(None, sentence, other, autojunk=False)

    nearest = max(map(matcher, others), key=lambda found: found.ratio())
    if nearest.ratio() < 0.5:
        return set()
    return {i for tag, begin, end, _, _ in nearest.get_opcodes() if tag != "equal" for i in range(begin, end)}


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_figure_in_every_sentence_follows_from_the_rows(name: str) -> None:
    design = design_of(name)
    answers = [
        [words(sentence) for sentence in answer_of(name, made_up_rows(design, i, seeds=1 + i % 2))]
        for i in range(6)
    ]
    assert all(answers)
    for i, answer in enumerate(answers):
        for sentence in filter(lambda found: with_figures(" ".join(found)), answer):
            moved = set().union(*(changed(sentence, other) for j, other in enumerate(answers) if j != i))
            assert moved, f"no row changes: {' '.join(sentence)}"
            fixed = {word for place, word in enumerate(sentence) if place not in moved and with_figures(word)}
            assert fixed <= allowed(name), f"no row changes {fixed - allowed(name)}: {' '.join(sentence)}"


@pytest.fixture
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where words and tables are looked at alone."""
    for question in QUESTIONS.values():
        monkeypatch.setattr(question, "plots", lambda rows: iter(()))


@pytest.mark.usefixtures("_no_plots")
@pytest.mark.parametrize("name", QUESTIONS)
def test_an_answer_does_not_depend_on_the_order_in_which_runs_ended(name: str) -> None:
    rows = made_up_rows(QUICK, seeds=2)
    [expected] = sections(rows, [name])
    random.Random(1).shuffle(rows)
    [found] = sections(rows, [name])
    assert found.answer == expected.answer
    assert found.basis == expected.basis
    assert found.tables == expected.tables


@dataclass(frozen=True)
class Claim:
    """What the answer of a question has to say of some of its rows, once they are changed.

    Attributes:
        of: The rows.
        change: Values; of a list the first row has the first, and so on, again and again; or a function.
        figure: A word of the answer then; ``{fifth}`` and ``{all}`` are numbers of rows.
    """

    name: str
    of: Callable[[dict[str, Any]], bool]
    change: dict[str, Any]
    figure: str


# One of five exploded, was lost and learnt, whichever of them a sentence counts.
_ONE_OF_FIVE = {
    "exploded_step": [9, *[None] * 4],
    "lost": [True, *[False] * 4],
    "test_accuracy": [0.97, *[0.11] * 4],
    "first_loss": 2.0,
    "last_loss": 1.0,
}


def is_like(settings: Settings, *but: str) -> Callable[[dict[str, Any]], bool]:
    """Rows of these settings, but for a seed and what is named."""
    expected = {key: value for key, value in settings.varied().items() if key not in ("seed", *but)}
    return lambda row: all(row[key] == value for key, value in expected.items())


_CLAIMS = [
    Claim(
        "growth",
        lambda row: row["activation"] == "relu" and row["initialisation"] == "he",
        {"delta_rms": [[1e7, *[1.0] * 29]]},
        "10^7",
    ),
    Claim(
        "growth",
        lambda row: row["activation"] == "sigmoid" and row["initialisation"] == "too large",
        {"delta_rms": [[0.037, *[1.0] * 29]]},
        "0.037",
    ),
    Claim("growth", lambda row: True, {"delta_rms": [[1e-4, *[1.0] * 29]]}, "25"),
    Claim(
        "relu-or-tanh",
        lambda row: row["activation"] == "relu" and row["gain"] > 1.41 and row["clipping"] == "none",
        _ONE_OF_FIVE,
        "{fifth} of {all}",
    ),
    Claim(
        "relu-or-tanh",
        lambda row: row["activation"] == "tanh" and row["gain"] == 2.83 and row["clipping"] == "none",
        {"first_norm": 0.037},
        "0.037",
    ),
    Claim(
        "relu-or-tanh",
        lambda row: row["activation"] == "sigmoid",
        {"test_accuracy": [0.123, 0.374]},
        "37 %",
    ),
    Claim(
        "initialisation",
        lambda row: (
            row["activation"] == "tanh" and row["initialisation"] == "xavier" and row["clipping"] == "none"
        ),
        {"test_accuracy": [0.99, 0.874, 0.1, 0.873, 0.875]},
        "87 %",
    ),
    Claim(
        "initialisation", lambda row: row["initialisation"] == "near zero", _ONE_OF_FIVE, "{fifth} of {all}"
    ),
    Claim(
        "initialisation",
        lambda row: row["initialisation"] == "too large" and row["clipping"] == "none",
        _ONE_OF_FIVE,
        "{fifth} of {all}",
    ),
    Claim(
        "depth",
        lambda row: (
            row["network"] == "residual"
            and row["depth"] == 40
            and row["clipping"] == row["normalisation"] == "none"
        ),
        {"first_norm": 12345.0},
        "1.23e+04",
    ),
    Claim(
        "depth",
        lambda row: row["network"] == "mlp" and row["depth"] == 40 and row["clipping"] == "global",
        {"test_accuracy": 0.637},
        "64 %",
    ),
    Claim(
        "depth",
        lambda row: row["normalisation"] == "batch",
        {"test_accuracy": lambda row: 0.95 if row["depth"] == 5 else 0.2},
        "batch norm 5",
    ),
    Claim(
        "learning-rate",
        lambda row: row["learning_rate"] >= 0.05 and row["clipping"] == "none",
        _ONE_OF_FIVE,
        "{fifth} of {all}",
    ),
    Claim(
        "learning-rate",
        lambda row: row["schedule"] == "cosine",
        {"test_accuracy": lambda row: 0.95 if row["learning_rate"] <= 0.05 else 0.2},
        "cosine 0.05",
    ),
    Claim("clipping", is_like(HOT), {"test_accuracy": 0.373}, "37 %"),
    Claim("clipping", is_like(replace(HOT, clipping="zclip")), {"test_accuracy": 0.953}, "ZClip 95 %"),
    Claim("clipping", is_like(HOT), _ONE_OF_FIVE, "{fifth} of {all}"),
    Claim("clipping", is_like(HOT), {"exploded_step": 123}, "123"),
    Claim(
        "clipping",
        is_like(CALM, "clipping"),
        {"test_accuracy": lambda row: {"none": 0.95, "agc": 0.737}.get(row["clipping"], 0.94)},
        "21.3 points less accuracy (AGC)",
    ),
    Claim(
        "regularisation",
        is_like(replace(HOT, regularisation="l1", clipping="global")),
        {"test_accuracy": 0.637},
        "64 %",
    ),
    Claim("regularisation", is_like(replace(HOT, regularisation="l2")), _ONE_OF_FIVE, "{fifth} of {all}"),
    Claim("normalisation", lambda row: row["normalisation"] == "batch", {"first_norm": 777.0}, "777"),
    Claim(
        "normalisation",
        lambda row: row["normalisation"] == "layer" and row["clipping"] == "global",
        _ONE_OF_FIVE,
        "{fifth} of {all}",
    ),
    Claim("recurrent", lambda row: row["network"] == "lstm", {"memory": [[0.037, *[1.0] * 39]]}, "0.037"),
    Claim(
        "recurrent",
        lambda row: row["network"] == "elman" and row["gain"] == 2.0,
        {"memory": [[0.037, *[1.0] * 39]]},
        "0.037",
    ),
    Claim(
        "recurrent",
        lambda row: row["network"] == "elman" and row["learning_rate"] == 0.5 and row["clipping"] == "global",
        _ONE_OF_FIVE,
        "{fifth}",
    ),
    Claim("remedies", is_like(HOT), _ONE_OF_FIVE, "20 %"),
    Claim(
        "remedies",
        is_like(replace(HOT, activation="tanh")),
        {"test_accuracy": [0.99, 0.99, 0.99, 0.1, 0.1]},
        "tanh",
    ),
    Claim(
        "warning",
        lambda row: True,
        {"exploded_step": [50, *[None] * 4], "warned_step": [37, *[None] * 4], "warned_of": "growing"},
        "{fifth} of {all}",
    ),
    Claim(
        "warning",
        lambda row: True,
        {"exploded_step": [50, *[None] * 4], "warned_step": [37, *[None] * 4], "warned_of": "growing"},
        "13 steps before",
    ),
    Claim(
        "warning",
        lambda row: True,
        {
            "exploded_step": [50, *[None] * 4],
            "warned_step": [60, 3, 3, 3, 3],
            "warned_of": ["growing", "vanishing", "vanishing", "growing", "vanishing"],
            "test_accuracy": 0.99,
        },
        "25 %",
    ),
    Claim(
        "cost",
        lambda row: row["clipping"] == "agc",
        {"seconds_clip": [3e-4, 1e-2, 1e-9], "seconds_rest": 7e-4},
        "AGC 30 %",
    ),
]


@pytest.mark.parametrize("claim", _CLAIMS, ids=lambda claim: f"{claim.name}-{claim.figure}")
def test_sentences_say_what_the_rows_say(claim: Claim) -> None:
    for variant in range(3):  # it may have been said by chance before
        rows = made_up_rows(design_of(claim.name), variant, seeds=5)
        before = answer_of(claim.name, rows)
        chosen = [row for row in rows if claim.of(row)]
        assert chosen
        for i, row in enumerate(chosen):
            for key, value in claim.change.items():
                assert key in row
                many = isinstance(value, list)
                row[key] = value[i % len(value)] if many else value(row) if callable(value) else value
        figure = claim.figure.format(fifth=len(chosen) // 5, all=len(chosen))
        saying = [
            sentence
            for sentence in answer_of(claim.name, rows)
            if re.search(rf"(?<![\w.]){re.escape(figure)}(?!\w)", sentence)
        ]
        assert saying, answer_of(claim.name, rows)
        if set(saying) - set(before):
            return
    pytest.fail(f"{figure} is said whatever the rows are: {saying}")


def test_the_gains_of_layers_are_compared_with_those_of_theory() -> None:
    variances = {"near zero": 64 * 0.01**2, "xavier": 1.0, "he": 2.0, "too large": 8.0, "orthogonal": 1.0}
    for factor, expected in ((1.0, ["0", "0"]), (1.1, ["10", "10"])):
        rows = made_up_rows(design_of("growth"))
        for row in rows:
            gains = layer_gains(row["activation"], variances[row["initialisation"]], 29)["backward"]
            sizes = np.cumprod([factor * gain for gain in reversed(gains[1:])])
            row["delta_rms"] = [*sizes[::-1].tolist(), 1.0, 0.3]
        assert re.findall(r"(\d+) %", answer_of("growth", rows)[0]) == expected


@pytest.mark.parametrize("world", ["calm", "broken"])
@pytest.mark.parametrize("name", QUESTIONS)
def test_whatever_is_not_finite_no_answer_is_without_words(name: str, world: World) -> None:
    rows = made_up_rows(QUICK, world=world)
    [section] = sections(rows, [name])
    assert section.answer
    assert section.plots
    assert section.tables
    for _, what, figure in section.plots:
        assert what
        if world == "broken":
            figure.draw_without_rendering()
    for sentence in section.answer:
        assert sentence
        assert not {"nan", "inf", "None", "<NA>"} & set(re.findall(r"(?!None of)[\w<>]+", sentence)), sentence
    for table in section.tables:
        assert table.rows or name == "warning"
        for cells in table.rows:
            assert len(cells) == len(table.header)
            assert not {"nan", "None", "<NA>"} & set(cells), cells


def test_where_all_runs_learn_no_sentence_speaks_of_grief() -> None:
    for name in OF_THEIR_OWN:
        for sentence in answer_of(name, made_up_rows(design_of(name), world="calm")):
            for count in re.findall(r"(\d+) of \d+ runs (?:exploded|came to grief|lost)", sentence):
                assert count == "0", sentence
    broken = answer_of("clipping", made_up_rows(design_of("clipping"), world="broken"))
    assert "1 of 1 runs came to grief" in broken[0]


# Rows that are missing, or there twice.


@pytest.mark.usefixtures("_no_plots")
@pytest.mark.parametrize("name", OF_THEIR_OWN)
def test_with_a_row_missing_the_question_is_not_answered(name: str) -> None:
    design = design_of(name)
    for missing in (1, len(design)):
        [section] = sections(made_up_rows(design[missing:]), [name])
        assert section.basis == f"Not answered: {missing} of at least {len(design)} runs are missing."
        assert (section.answer, section.plots, section.tables) == ([], [], [])
    [section] = sections(made_up_rows(design), [name])
    assert section.basis == f"{len(design)} runs, 1 seed of each"
    assert section.answer


def test_of_no_trainings_nothing_is_said() -> None:
    one_step = made_up_rows([one for one in QUICK if one.steps == 1])
    for rows in ([], one_step):
        for section in sections(rows):
            assert section.answer == [] or (section.question.name == "growth" and rows)
            assert section.basis.startswith("Not answered") or section.answer


@pytest.mark.parametrize("name", QUESTIONS)
def test_an_interrupted_run_of_the_whole_is_answered_from_what_there_is(name: str) -> None:
    design = QUESTIONS[name].design(False) or WHOLE
    more = random.Random(2).sample(design, len(design) // 3)
    rows = [made_up_row(one) for one in merged([*QUICK, *more])]
    [section] = sections(rows, [name])
    assert section.answer
    assert section.plots
    assert section.tables


@pytest.mark.usefixtures("_no_plots")
@pytest.mark.parametrize("name", ["learning-rate", "clipping", *OF_ALL])
def test_a_run_that_was_done_again_in_more_detail_counts_once(name: str) -> None:
    rows = made_up_rows(QUICK)
    again = [
        {key: value for key, value in row.items() if key not in _DETAILS} for row in rows if "losses" in row
    ]
    assert again
    [expected], [found] = sections(rows, [name]), sections(again + rows, [name])
    assert found.basis == expected.basis
    assert found.answer == expected.answer
    assert found.tables == expected.tables


_DETAILS = ("steps_shown", "losses", "norms", "layer_norms")


@pytest.mark.usefixtures("_no_plots")
def test_rows_that_a_question_has_not_asked_for_change_no_answer() -> None:
    rows = [made_up_row(one) for one in merged([*QUICK, *(replace(one, seed=1) for one in QUICK)])]
    for name in OF_THEIR_OWN:
        asked = {tuple(one.varied().values()) for one in QUESTIONS[name].design(False)}
        own = [row for row in rows if tuple(row[key] for key in Settings.names()) in asked]
        assert len(own) < len(rows)
        [expected], [found] = sections(own, [name]), sections(rows, [name])
        assert found.answer == expected.answer
        assert found.basis == expected.basis
        assert found.tables == expected.tables


# Words for figures.


def test_trouble_is_an_explosion_or_a_loss_that_ends_above_where_it_began() -> None:
    calm = made_up_row(Settings(), world="calm")
    cases: list[tuple[dict[str, Any], bool]] = [
        ({"first_loss": 2.3, "last_loss": 2.3}, False),
        ({"first_loss": 2.3, "last_loss": 2.4}, True),
        ({"first_loss": 2.3, "last_loss": None}, True),
        ({"first_loss": 2.3, "last_loss": 0.1, "exploded_step": 7}, True),
        ({"first_loss": 2.3, "last_loss": 0.1, "lost": True}, True),
    ]
    rows = frame([calm | change for change, _ in cases])
    assert rows["trouble"].tolist() == [expected for _, expected in cases]
    assert rows["exploded"].tolist() == [False, False, False, True, False]


def test_learnt_is_another_share_of_digits_than_of_characters() -> None:
    digits, text = (made_up_row(Settings(network=network)) for network in ("mlp", "lstm"))
    rows = [
        row | {"test_accuracy": accuracy}
        for row, accuracy in ((digits, 0.9), (digits, 0.899), (text, 0.25), (text, 0.249))
    ]
    assert frame(rows)["learnt"].tolist() == [True, False, True, False]


def test_figures_are_written_as_a_person_writes_them() -> None:
    assert [percent(share) for share in (0.0, 0.944, 1.0)] == ["0 %", "94 %", "100 %"]
    assert [times(factor) for factor in (0.01, 1.64, 37.2, 999.0)] == ["0.01", "1.6", "37", "1e+03"]
    assert [times(factor) for factor in (0.0099, 1000.0, 3.2e7, 1e-35)] == ["10^-2", "10^3", "10^8", "10^-35"]
    assert [power(value) for value in (0.0, float("inf"), float("nan"), -1.0)] == ["0", *["not finite"] * 3]
    assert [listed(list(some)) for some in ("", "a", "ab", "abc")] == ["none", "a", "a and b", "a, b and c"]


def test_a_value_that_is_not_finite_is_the_highest() -> None:
    rows = frame(
        [made_up_row(Settings(seed=i)) | {"first_norm": norm} for i, norm in enumerate((3.0, None, 1.0))]
    )
    [found] = spread(rows, ["activation"], "first_norm").to_dict("records")
    assert found == {"median": 3.0, "min": 1.0, "max": np.inf, "count": 3}


# The report.


class Page(HTMLParser):
    """What a page consists of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.texts.setdefault(tag, []).append("")
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.texts[tag][-1] += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


ABOUT = {"format": 1, "data": "0", "gradclip": "1.2.3", "numpy": "4.5.6", "blas": "some BLAS"}


@pytest.fixture(scope="module")
def answered() -> list[Section]:
    """All questions."""
    return sections(made_up_rows(QUICK))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, answered: list[Section]) -> Path:
    """The folder of their report."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:  # they take seconds
        patch.setattr(report_module, "sections", lambda found: answered)
        assert write_report(made_up_rows(QUICK), ABOUT, folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def page(report: Path) -> Page:
    return Page((report / "report.html").read_text(encoding="utf-8"))


def test_the_report_needs_no_other_file_and_runs_nothing(report: Path, page: Page) -> None:
    text = (report / "report.html").read_text(encoding="utf-8")
    assert sorted(p.name for p in report.iterdir()) == ["figures", "report.html"]
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "img", "base"}
    for tag, attributes in page.tags:
        for key, value in attributes.items():
            assert not key.startswith("on"), (tag, key)
            if key in ("src", "href", "xlink:href", "action", "data"):
                assert value is not None
                assert value.startswith(("#", "data:image/png;base64,")), (tag, value)
    assert not re.search(r"url\((?!#|'#|\"#)", text)
    assert "@import" not in text


def test_the_report_has_every_question_with_its_answer(page: Page, answered: list[Section]) -> None:
    assert [title.strip() for title in page.texts["h2"]] == [
        question.title for question in QUESTIONS.values()
    ]
    text = " ".join(page.texts["html"][0].split())
    for section in answered:
        assert section.question.background in text
        assert section.basis in text
        for sentence in section.answer:
            assert re.sub(r"10\^(?=-?\d)", "10", sentence) in text
    assert f"{len(QUICK)} runs; gradclip 1.2.3, NumPy 4.5.6" in text
    # Links of the contents lead somewhere.
    identities = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    links = [attributes["href"] for attributes in page.of("a")]
    assert len(links) == len(QUESTIONS)
    assert all(link is not None and link[1:] in identities for link in links)


def test_powers_are_set_as_one_writes_them(report: Path, page: Page, answered: list[Section]) -> None:
    text = (report / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"10\^-?\d", text)
    powers = [
        exponent
        for section in answered
        for sentence in section.answer
        for exponent in re.findall(r"10\^(-?\d+)", sentence)
    ]
    assert powers
    assert page.texts["sup"] == powers
    assert "&lt;sup" not in text


def test_every_figure_of_the_report_has_a_caption_and_a_label(page: Page, answered: list[Section]) -> None:
    plots = [plot for section in answered for plot in section.plots]
    assert len(plots) >= len(QUESTIONS)
    assert [figure["id"] for figure in page.of("figure")] == [name for name, _, _ in plots]
    assert page.texts["figcaption"] == [what for _, what, _ in plots]
    drawings = page.of("svg")
    assert len(drawings) == len(plots)
    for drawing, (name, _, figure) in zip(drawings, plots, strict=True):
        assert drawing["role"] == "img"
        assert len(drawing["aria-label"] or "") > 10, name
        assert figure.get_label(), name
    assert all(group.get("aria-label") for group in page.of("div") if group.get("tabindex"))


def test_every_figure_is_a_picture_of_its_own_too(report: Path, answered: list[Section]) -> None:
    names = [name for section in answered for name, _, _ in section.plots]
    found = sorted((report / "figures").iterdir())
    assert [path.name for path in found] == sorted(f"{name}.png" for name in names)
    for path in found:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
        assert width > 700
        assert height > 150
        assert len(data) > 5000


def test_tables_of_the_report_have_every_cell(page: Page, answered: list[Section]) -> None:
    tables = [table for section in answered for table in section.tables]
    cells = [cell for table in tables for row in table.rows for cell in row]
    assert len(tables) == len(page.of("table"))
    assert page.texts["td"] == cells
    assert page.texts["th"] == [name for table in tables for name in table.header]


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    rows = made_up_rows(design_of("regularisation"))
    contents = []
    for name in ("one", "another"):
        folder = tmp_path / name
        folder.mkdir()
        write_report(rows, ABOUT, folder)
        contents.append({p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()})
    assert len(contents[0]) >= 4  # the page, and its figures
    assert contents[0] == contents[1]


def test_a_report_of_nothing_says_that_nothing_is_answered(tmp_path: Path) -> None:
    text = write_report([], ABOUT, tmp_path).read_text(encoding="utf-8")
    assert text.count("Not answered") == len(QUESTIONS)
    assert "<figure" not in text
    assert "0 runs; gradclip 1.2.3" in text


def test_text_of_rows_is_no_markup() -> None:
    assert str(_set("<b>&amp; 10^-6 and 10^12, 10^x")) == (
        "&lt;b&gt;&amp;amp; 10<sup>-6</sup> and 10<sup>12</sup>, 10^x"
    )
