"""The laboratory's rows: kept whatever happens, run once, and refused if they are not what they should be."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pandas = pytest.importorskip("pandas")

from gradclip._lab import command, runner  # noqa: E402
from gradclip._lab.command import LabError, chosen_runs, run_lab  # noqa: E402
from gradclip._lab.experiment import Settings, merged  # noqa: E402
from gradclip._lab.questions import QUESTIONS  # noqa: E402
from gradclip._lab.store import Store  # noqa: E402
from made_up_runs import die, made_up_row  # noqa: E402
from processes import HANGS_AFTER  # noqa: E402

# Five runs, one step each: their report is short.
FEW: dict[str, Any] = {"only": ["growth"], "where": {"activation": ["relu"]}, "quick": True}
RUNS = chosen_runs(**FEW)


class Runs:
    """In place of the processes: rows that are made up.

    Attributes:
        done: What was run.
        stop_after: How many rows until ``error`` is raised.
    """

    def __init__(self) -> None:
        self.done: list[Settings] = []
        self.stop_after: int | None = None
        self.error: BaseException = KeyboardInterrupt()

    def __call__(self, settings: Sequence[Settings], store: Store, console: object) -> None:
        del console
        for i, one in enumerate(settings):
            if i == self.stop_after:
                raise self.error
            store.add(made_up_row(one))
            self.done.append(one)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    found = Runs()
    monkeypatch.setattr(command, "run_all", found)
    return found


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rows_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


def settings_in(folder: Path) -> list[Settings]:
    return [Settings(**{name: row[name] for name in Settings.names()}) for row in rows_in(folder)]


@pytest.fixture(scope="module")
def _five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, found = tmp_path_factory.mktemp("five"), Runs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "run_all", found)
        run_lab(path, **FEW)
    assert found.done == RUNS
    return path


@pytest.fixture
def folder(tmp_path: Path, runs: Runs, _five: Path) -> Path:
    """Five rows and their report; nothing was run yet."""
    del runs  # which nothing runs without
    return shutil.copytree(_five, tmp_path / "lab")


# Resuming.


def test_made_up_rows_have_what_real_ones_have() -> None:
    for settings in (
        Settings(depth=3, steps=2, in_detail=True),
        Settings(depth=3, steps=2, clipping="global"),
        Settings(network="elman", activation="tanh", initialisation="orthogonal", steps=1),
    ):
        real = runner._run(settings)
        for world in ("mixed", "calm", "broken"):
            made_up = made_up_row(settings, world=world)
            assert set(made_up) == set(real)
            assert made_up["layers"] == real["layers"]
            for name in ("first_norms", "signal_rms", "delta_rms", *(["memory"] * ("memory" in real))):
                assert len(made_up[name]) == len(real[name]), name


def test_rows_are_those_of_the_runs_one_a_line_and_pandas_reads_them(folder: Path) -> None:
    assert rows_in(folder) == [made_up_row(one) for one in RUNS]
    read = pandas.read_json(folder / "rows.jsonl", lines=True)
    assert read["initialisation"].tolist() == [one.initialisation for one in RUNS]
    expected = [made_up_row(one)["test_accuracy"] for one in RUNS]
    assert read["test_accuracy"].tolist() == pytest.approx(expected, rel=1e-12)
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    assert about["gradclip"] == version("gradclip")
    assert about["numpy"] == np.__version__


def test_what_was_run_is_not_run_again(folder: Path, runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    before = bytes_in(folder)
    run_lab(folder, **FEW)
    assert runs.done == []
    assert bytes_in(folder) == before
    assert f"{len(RUNS)} runs are there already" in capsys.readouterr().out


def test_only_what_is_missing_is_run_and_rows_are_added_at_the_end(folder: Path, runs: Runs) -> None:
    before = (folder / "rows.jsonl").read_bytes()
    about = (folder / "about.json").read_bytes()
    others: dict[str, Any] = FEW | {"where": {"initialisation": ["he"]}}
    run_lab(folder, **others)
    assert runs.done == [one for one in chosen_runs(**others) if one not in RUNS]
    assert len(runs.done) == 4
    assert (folder / "rows.jsonl").read_bytes().startswith(before)
    assert (folder / "about.json").read_bytes() == about
    assert settings_in(folder) == RUNS + runs.done


def test_a_run_is_done_again_where_more_detail_is_asked_for(tmp_path: Path) -> None:
    plain = Settings(depth=3)
    detailed = replace(plain, in_detail=True)
    store = Store(tmp_path)
    assert not store.has(plain)
    store.begin()
    store.add(made_up_row(plain))
    for opened in (store, Store(tmp_path)):
        assert opened.has(plain)
        assert not opened.has(detailed)
        assert not opened.has(replace(plain, seed=1))
    store.add(made_up_row(detailed))
    for opened in (store, Store(tmp_path)):
        assert opened.has(plain)
        assert opened.has(detailed)


def test_ctrl_c_leaves_a_report_of_what_there_is_and_the_rest_for_later(
    tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        run_lab(tmp_path, **FEW)
    assert settings_in(tmp_path) == RUNS[:2]
    assert "Not answered" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Interrupted" in capsys.readouterr().out
    runs.stop_after = None
    run_lab(tmp_path, **FEW)
    assert runs.done == RUNS  # two before, three after
    assert settings_in(tmp_path) == RUNS


def test_ctrl_c_before_the_first_row_leaves_a_folder_to_go_on_with(tmp_path: Path, runs: Runs) -> None:
    runs.stop_after = 0
    with pytest.raises(KeyboardInterrupt):
        run_lab(tmp_path, **FEW)
    assert rows_in(tmp_path) == []
    runs.stop_after = None
    run_lab(tmp_path, **FEW)
    assert settings_in(tmp_path) == RUNS


def test_a_report_is_made_of_what_there_is_without_a_run(folder: Path, runs: Runs) -> None:
    before = bytes_in(folder)
    (folder / "report.html").unlink()
    run_lab(folder, report_only=True)
    assert runs.done == []
    assert bytes_in(folder) == before


def test_there_is_no_report_of_nothing(tmp_path: Path, runs: Runs) -> None:
    with pytest.raises(LabError, match="expected rows to report on, got none"):
        run_lab(tmp_path / "nothing", report_only=True)
    assert runs.done == []
    assert not (tmp_path / "nothing").exists()


# Half-written and damaged rows.


@pytest.mark.parametrize("cut", [1, 2, 200], ids=["no end of line", "no brace", "half"])
def test_a_half_written_row_is_noticed_left_out_removed_and_run_again(
    folder: Path, runs: Runs, capsys: pytest.CaptureFixture[str], cut: int
) -> None:
    path = folder / "rows.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    before = bytes_in(folder)
    store = Store(folder)
    assert store.cut_off
    assert store.rows == rows_in_bytes(whole)[:-1]
    assert not store.has(RUNS[-1])
    assert bytes_in(folder) == before  # looking changes nothing
    run_lab(folder, **FEW)
    assert runs.done == RUNS[-1:]
    assert path.read_bytes() == whole
    assert "half-written" in capsys.readouterr().out
    assert not Store(folder).cut_off


def rows_in_bytes(text: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_begin_removes_no_more_than_the_half_written_row(folder: Path) -> None:
    path = folder / "rows.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"network": "ml')
    store = Store(folder)
    store.begin()
    assert path.read_bytes() == whole


def test_a_file_that_is_but_half_a_row_is_an_empty_one(folder: Path, runs: Runs) -> None:
    path = folder / "rows.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    run_lab(folder, **FEW)
    assert runs.done == RUNS
    assert path.read_bytes() == whole


def damaged(line: bytes, how: str) -> bytes:
    row = json.loads(line)
    return {
        "cut": line[: len(line) // 2],
        "empty": b"",
        "no object": b"3",
        "nothing": b"null",
        "no settings": b"{}",
        "no seed": json.dumps({key: value for key, value in row.items() if key != "seed"}).encode(),
        "unknown activation": json.dumps(row | {"activation": "softmax"}).encode(),
        "zeros": bytes(len(line)),
        "other bytes": b"\xff" + line[1:],
    }[how]


@pytest.mark.parametrize(
    "how",
    [
        "cut", "empty", "no object", "nothing", "no settings", "no seed", "unknown activation", "zeros",
        "other bytes",
    ],
)  # fmt: skip
def test_a_damaged_row_is_named_and_nothing_is_changed(folder: Path, runs: Runs, how: str) -> None:
    path = folder / "rows.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[2] = damaged(lines[2], how)
    path.write_bytes(b"\n".join(lines))
    before = bytes_in(folder)
    with pytest.raises(LabError) as caught:
        run_lab(folder, only=["growth"], quick=True)
    assert str(path) in str(caught.value)
    assert "line 3" in str(caught.value)
    assert "nothing was changed" in str(caught.value)
    assert runs.done == []
    assert bytes_in(folder) == before


@pytest.mark.parametrize(
    ("about", "names"),
    [
        ({"format": 0}, "format"),
        ({"format": None}, "format"),
        ({"data": "00000000"}, "got 00000000"),
        (None, "about.json"),
        ("{", "about.json"),
        ("[1]", "about.json"),
        ("{}", "about.json"),
    ],
    ids=["old format", "no format", "other data", "missing", "cut", "a list", "empty"],
)
def test_rows_of_another_kind_are_refused_and_nothing_is_changed(
    folder: Path, runs: Runs, about: dict[str, Any] | str | None, names: str
) -> None:
    path = folder / "about.json"
    if isinstance(about, dict):
        text = json.dumps(json.loads(path.read_text(encoding="utf-8")) | about)
    else:
        text = about or ""
    path.write_text(text, encoding="utf-8")
    if about is None:
        path.unlink()
    before = bytes_in(folder)
    with pytest.raises(LabError) as caught:
        run_lab(folder, only=["growth"], quick=True)
    assert str(path) in str(caught.value)
    assert names in str(caught.value)
    assert runs.done == []
    assert bytes_in(folder) == before


# Folders and disks.


@pytest.mark.parametrize("below", ["lab", "lab/of/mine", "."])
def test_a_folder_that_cannot_be_made_is_known_before_the_first_run(
    tmp_path: Path, runs: Runs, below: str
) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(LabError, match="expected a folder that can be written") as caught:
        run_lab(tmp_path / "file" / below, **FEW)
    assert str(tmp_path / "file") in str(caught.value)
    assert runs.done == []
    assert bytes_in(tmp_path) == {"file": b"mine"}


def test_a_disk_that_is_nearly_full_is_known_before_the_first_run(
    tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=49_000_000))
    with pytest.raises(LabError, match="expected 50 MB of free space, got 49 MB"):
        run_lab(tmp_path / "lab", **FEW)
    assert runs.done == []
    assert bytes_in(tmp_path) == {}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=51_000_000))
    run_lab(tmp_path / "lab", **FEW)
    assert runs.done == RUNS


def test_a_disk_that_gets_full_ends_the_runs_and_keeps_the_rows(
    folder: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "rows.jsonl"
    kept = path.read_bytes()

    def fill(settings: Sequence[Settings], store: Store, console: object) -> None:
        path.rename(folder / "kept.jsonl")
        path.symlink_to("/dev/full")
        runs(settings, store, console)

    monkeypatch.setattr(command, "run_all", fill)
    with pytest.raises(LabError, match="No space left on device; the 5 rows before are kept") as caught:
        run_lab(folder, only=["growth"], quick=True)
    assert str(path) in str(caught.value)
    assert runs.done == []
    assert (folder / "kept.jsonl").read_bytes() == kept


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """A write beyond it writes what fits and fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_row_of_which_a_part_was_written_damages_none_that_follow(folder: Path) -> None:
    path = folder / "rows.jsonl"
    before = path.read_bytes()
    store = Store(folder)
    store.begin()
    more = [replace(RUNS[0], seed=seed) for seed in (1, 2)]
    with no_file_above(len(before) + 100), pytest.raises(LabError, match="the 5 rows before are kept"):
        store.add(made_up_row(more[0]))
    assert len(store.rows) == 5
    assert path.read_bytes().startswith(before)
    assert Store(folder).rows == rows_in_bytes(before)  # a killed process leaves no more than half a row
    store.add(made_up_row(more[1]))  # space again: what other processes had begun is stored
    found = Store(folder)
    assert [found.has(one) for one in more] == [False, True]
    assert len(found.rows) == 6


# What is asked for.


def test_an_unknown_question_is_refused_and_those_there_are_listed() -> None:
    with pytest.raises(LabError) as caught:
        chosen_runs(["growth", "everything"], {}, False)
    assert str(caught.value) == f"--only: expected one of {', '.join(QUESTIONS)}, got everything"


def test_an_unknown_axis_is_refused_and_those_there_are_listed() -> None:
    with pytest.raises(LabError) as caught:
        chosen_runs([], {"colour": ["red"]}, False)
    assert str(caught.value) == (f"--where: expected an axis of {', '.join(Settings.names())}, got colour")
    with pytest.raises(LabError, match="got in_detail"):
        chosen_runs([], {"in_detail": ["True"]}, False)


@pytest.mark.parametrize("axis", Settings.names())
def test_an_unknown_value_is_refused_and_those_there_are_listed(axis: str) -> None:
    there = sorted({getattr(one, axis) for one in QUESTIONS["remedies"].design(True)})
    for values in (["none of these"], [str(there[0]), "none of these"]):
        with pytest.raises(LabError) as caught:
            chosen_runs(["remedies"], {axis: values}, True)
        assert str(caught.value) == (
            f"--where {axis}: expected one of {', '.join(map(str, there))}, got none of these"
        )


def test_a_value_that_only_other_questions_have_is_refused() -> None:
    assert chosen_runs(["remedies"], {"depth": ["40"]}, True)
    with pytest.raises(LabError) as caught:
        chosen_runs(["clipping"], {"depth": ["40"]}, True)
    assert str(caught.value) == "--where depth: expected one of 20, got 40"


def test_runs_are_those_of_the_questions_with_the_values_that_are_asked_for() -> None:
    whole = [one for question in QUESTIONS.values() for one in question.design(False)]
    assert chosen_runs([], {}, False) == merged(whole)
    assert len(chosen_runs([], {}, False)) == len(set(whole)) < len(whole)
    two = merged([*QUESTIONS["clipping"].design(True), *QUESTIONS["depth"].design(True)])
    assert chosen_runs(["clipping", "depth"], {}, True) == two
    of_one = chosen_runs(["clipping"], {"clipping": ["agc"], "learning_rate": ["0.05"], "seed": ["3"]}, False)
    assert of_one == [Settings(clipping="agc", learning_rate=0.05, seed=3)]
    assert of_one[0].in_detail
    of_some = chosen_runs(["clipping"], {"clipping": ["agc", "none"], "seed": ["0", "1", "4"]}, False)
    assert {(one.clipping, one.seed) for one in of_some} == {
        (clipping, seed) for clipping in ("agc", "none") for seed in (0, 1, 4)
    }
    assert len(of_some) == 12


@pytest.mark.parametrize("bad", [{"only": ["nothing"]}, {"where": {"steps": ["7"]}}])
def test_a_wrong_request_leaves_everything_as_it_is(folder: Path, runs: Runs, bad: dict[str, Any]) -> None:
    before = bytes_in(folder)
    with pytest.raises(LabError):
        run_lab(folder, **bad)
    assert runs.done == []
    assert bytes_in(folder) == before


# For real: processes, signals.


def test_growth_is_measured_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})  # no more than two processes
    run_lab(tmp_path, only=["growth"], quick=True)
    rows = rows_in(tmp_path)
    design = chosen_runs(["growth"], {}, True)
    assert len(rows) == 25
    assert set(settings_in(tmp_path)) == set(design)
    for row in rows:
        assert row["steps_done"] == 1
        assert len(row["delta_rms"]) == row["depth"] == 30
    by_weights = {(row["activation"], row["initialisation"]): row for row in rows}
    for activation, weights, gain in (
        ("relu", "he", 1.0),
        ("leaky relu", "too large", 2.0),
        ("relu", "xavier", 0.5**0.5),
    ):
        deltas = by_weights[activation, weights]["delta_rms"]
        assert (deltas[0] / deltas[28]) ** (1 / 28) == pytest.approx(gain, rel=0.1), (activation, weights)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count('class="answer"') == 1
    assert QUESTIONS["growth"].title in page
    assert (tmp_path / "figures" / "growth.png").exists()


def test_a_process_that_dies_is_told_of_and_rows_are_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (folder / "rows.jsonl").read_bytes()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    monkeypatch.setattr(runner, "_run", die)
    monkeypatch.setattr(command, "run_all", runner.run_all)
    with pytest.raises(LabError, match="was killed"):
        run_lab(folder, only=["growth"], quick=True)
    assert (folder / "rows.jsonl").read_bytes() == before


class Ended(NamedTuple):
    """What a process left."""

    status: int
    text: str  # in one line
    rows: bytes


# Twelve runs, one after another, in a second or so; Ctrl-C works, whatever the tests were started by.
_CLIPPING = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from gradclip._lab.command import run_lab
from gradclip._lab.questions import QUESTIONS

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    question = QUESTIONS["clipping"]
    design = question.design
    question.design = lambda quick: [replace(one, steps=60) for one in design(quick)]
    run_lab(Path(sys.argv[1]), only=["clipping"], quick=True)
"""


def run_clipping(folder: Path, interrupt_after: int | None = None) -> Ended:
    """In a process of its own; Ctrl-C, as from a terminal to all of its processes, after some rows."""
    script = folder.parent / "clipping.py"
    script.write_text(textwrap.dedent(_CLIPPING), encoding="utf-8")
    rows = folder / "rows.jsonl"
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        if interrupt_after is not None:
            end = time.monotonic() + HANGS_AFTER
            while not rows.exists() or rows.read_bytes().count(b"\n") < interrupt_after:
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() < end
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGINT)
        text, _ = process.communicate(timeout=HANGS_AFTER)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return Ended(process.returncode, " ".join(text.split()), rows.read_bytes())


def test_ctrl_c_stores_what_had_begun_and_the_same_command_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "lab"
    first = run_clipping(folder, interrupt_after=2)
    assert first.status == -signal.SIGINT, first.text
    assert "Interrupted" in first.text
    assert "Not answered" in first.text
    assert first.rows.endswith(b"\n")
    there = rows_in_bytes(first.rows)
    assert 3 <= len(there) < 12  # two, and at least that which was running
    assert (folder / "report.html").exists()

    second = run_clipping(folder)
    assert second.status == 0, second.text
    assert f"{len(there)} runs are there already" in second.text
    assert "Not answered" not in second.text
    assert second.rows.startswith(first.rows)
    wanted = [replace(one, steps=60) for one in QUESTIONS["clipping"].design(True)]
    found = settings_in(folder)
    assert len(found) == len(wanted)
    assert set(found) == set(wanted)
    for row in rows_in(folder):
        assert row["steps_done"] == 60 or row["lost"]
        assert ("losses" in row) == next(
            one.in_detail for one in wanted if one.learning_rate == row["learning_rate"]
        )
