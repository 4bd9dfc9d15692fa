"""From samples to rows, verdicts, tables, plots, pages and the comparison of two runs."""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench import commands, tables
from bench.cases import CASES, Load
from bench.compare import SAME, compare, gone, show_changes
from bench.errors import BenchError
from bench.html import write_report
from bench.jobs import CLIP, JOBS, LOG, NO_CLIP, NORMS, key
from bench.results import LoadFacts, Results, load, save
from bench.rows import Moved, Row, moved, rows
from bench.targets import TARGETS, judge
from bench.timing import Rounds
from bench.training import shares
from bench.workload import READ, READ_WRITE, ROOFLINE
from tools import docs

_MACHINE = {
    "cpu": "A <b>CPU</b>", "threads": 2, "isa": "avx2", "caches": ["L1d 32K"], "memory_gb": 8.0, "seconds": 3,
    "read_gb_per_s": 10.0, "read_write_gb_per_s": 15.0,
    "system": "Linux", "python": "3", "versions": {"a": "1"},
    "date": "2026-01-01", "commit": "0123456789abcdef", "uncommitted_changes": False,
}  # fmt: skip
_READ_SECONDS, _WRITE_SECONDS = 1.0e-2, 1.2e-2
# Seconds by job and contender; a clip of gradclip is 5 % slower than the machine's own passes.
_SECONDS = {
    NORMS: {"gradclip": 1.0e-2, "torch": 1.1e-2, "numpy-sum": 4e-2, "optax": 0.8e-2},
    CLIP: {"gradclip": 2.31e-2, "torch": 2.3e-2, "numpy-sum": 6e-2},
    NO_CLIP: {"gradclip": 1.0e-2, "torch": 2.3e-2, "numpy-sum": 5e-2},
    LOG: {"gradclip": 2.3e-2, "torch": 1.5e-2},
}
_GPT2 = Load(CASES["gpt2"]).key


def _turns(seconds: float) -> Rounds:
    return [[seconds * x, seconds] for x in (0.98, 1.0, 1.02, 1.01, 0.99)]


def _results(slower: float = 1.0, machine: float = 1.0) -> Results:
    """A run over GPT-2 and two points of each axis; ``slower`` is gradclip's loss."""
    results = Results(_MACHINE | {}, left_out=["apex: not installed"])
    for case in ("gpt2", "count-1", "count-100", "bytes-4K", "bytes-1M"):
        facts = Load(CASES[case])
        results.loads[facts.key] = LoadFacts.of(facts)
        results.samples[key(facts.key, READ, ROOFLINE)] = _turns(_READ_SECONDS * machine)
        results.samples[key(facts.key, READ_WRITE, ROOFLINE)] = _turns(_WRITE_SECONDS * machine)
        for job, peers in _SECONDS.items():
            for peer, seconds in peers.items():
                own = slower if peer == "gradclip" else 1.0
                results.samples[key(facts.key, job, peer)] = _turns(seconds * machine * own)
        # As fast as gradclip, but not in the same turns.
        results.samples[key(facts.key, CLIP, "torch")].reverse()
    results.errors[key(_GPT2, NORMS, "torch")] = 8e-4
    results.failures[key(_GPT2, NORMS, "numba")] = "WrongAnswerError: norm: expected 1, got <2>"
    results.training = {
        "gpt": {"PyTorch clip_grad_norm_": [(0.2, 0.02), (0.3, 0.03)], "gradclip": [(0.2, 0.01)] * 2},
        "mlp": {"no clipping": [(0.1, 0.0)], "optax": [(0.13, 0.0)]},
    }
    results.verdicts = [judge(target, results.samples) for target in TARGETS if target.load in results.loads]
    return results


def _row(job: str, peer: str, load: str = _GPT2) -> Row:
    return next(r for r in rows(_results()) if (r.load, r.job, r.peer) == (load, job, peer))


def test_a_row_says_time_bytes_roofline_and_ratio() -> None:
    nbytes = Load(CASES["gpt2"]).nbytes
    row = _row(CLIP, "numpy-sum")
    assert row.seconds is not None
    assert row.ratio is not None
    assert row.of_roofline is not None
    assert row.seconds.median == pytest.approx(6e-2, rel=0.02)
    assert row.nbytes == 5 * nbytes  # the temporary is written and read again
    assert row.bytes_per_second == pytest.approx(5 * nbytes / 6e-2, rel=0.02)
    assert row.of_roofline == pytest.approx((_READ_SECONDS + _WRITE_SECONDS) / 6e-2, rel=0.02)
    assert row.ratio.median == pytest.approx(6 / 2.31, rel=0.02)
    assert row.ratio.low <= row.ratio.median <= row.ratio.high
    assert _row(NORMS, "torch").error == 8e-4
    assert _row(NORMS, "numba").failure.startswith("WrongAnswerError")


def test_a_promise_and_a_row_say_the_same() -> None:
    """Of the same samples, also of those whose medians come from different rounds."""
    results = _results()
    name = key(_GPT2, CLIP, "torch")
    results.samples[name] = [[seconds] for seconds in (0.9, 0.1, 0.2, 0.8, 0.05)]
    found = {(row.load, row.job, row.peer): row for row in rows(results)}
    of_clip = next(t for t in TARGETS if t.above == name)
    assert judge(of_clip, results.samples).value == found[_GPT2, CLIP, "torch"].ratio
    of_read = next(t for t in TARGETS if (t.load, t.job, t.what) == (_GPT2, NORMS, "time / read"))
    value, row = judge(of_read, results.samples).value, found[_GPT2, NORMS, "gradclip"]
    assert value is not None
    assert row.of_roofline == pytest.approx(1 / value.median)


def test_traffic_is_held_against_the_clock() -> None:
    found = {(m.job, m.peer): m for m in moved(_results())}
    assert {m.load for m in found.values()} == {_GPT2}  # what comes from memory
    torch: Moved = found[NO_CLIP, "torch"]
    assert (torch.floor, torch.written) == (1, 3)
    assert torch.at_most == pytest.approx(2.3, rel=0.03)
    assert torch.verdict == "moves 3 N at the speed of memory"
    assert found[NO_CLIP, "gradclip"].verdict == "moves no more than it must"
    assert found[NORMS, "numpy-sum"].verdict == "moves 3 N and is slower than memory"
    assert found[NORMS, "optax"].verdict == "moves less than 1 N: faster than memory allows for that"
    assert found[LOG, "torch"].verdict == "moves less than 4 N: faster than memory allows for that"


def test_losses_are_told() -> None:
    table = tables.losses(_results())
    gpt2 = [row for row in table.rows if row[0].startswith("GPT-2")]
    assert [(row[1], row[2], row[4]) for row in gpt2] == [
        ("norms", "optax, jit", "clearly"),
        ("clip, clipping", "PyTorch foreach", "within the noise"),
        ("all norms and clip", "PyTorch foreach", "clearly"),
    ]


def test_the_clips_share_of_a_step() -> None:
    """Inside of the step where it is a call, and by the difference where it is compiled into it."""
    found = {(share.model.split(",")[0], share.way): share.share for share in shares(_results().training)}
    assert found == {
        ("small GPT", "PyTorch clip_grad_norm_"): pytest.approx(0.1),
        ("small GPT", "gradclip"): pytest.approx(0.05),
        ("MLP 8 x 1024", "optax"): pytest.approx(0.03 / 0.13),
    }


def test_a_training_that_failed_is_told() -> None:
    results = _results()
    results.failures["training/resnet"] = "RuntimeError: no memory"
    table = tables.training(results)
    assert table is not None
    assert table.rows[-1][:2] == ("ResNet-20, PyTorch, fused AdamW", "RuntimeError: no memory")
    assert table.marks[-1] == "bad"


def test_a_promise_about_two_loads_does_not_need_equal_rounds() -> None:
    """``--cases gpt2 --dtypes float32 bfloat16`` measures them one after the other."""
    target = next(t for t in TARGETS if t.load == "gpt2/bfloat16")
    verdict = judge(target, {target.above: [[2.0]] * 7, target.below[0]: [[1.0]] * 5})
    assert verdict.value is not None
    assert verdict.value.median == verdict.value.low == pytest.approx(1.0)


def test_traffic_of_other_models_is_told_where_the_usual_ones_are_not_measured() -> None:
    results = _results()
    for name in list(results.samples):
        results.samples[name.replace("gpt2/", "resnet50/")] = results.samples.pop(name)
    results.loads["resnet50/float32"] = LoadFacts.of(Load(CASES["resnet50"]))
    table = tables.traffic(results)
    assert table is not None
    assert {row[0] for row in table.rows} == {"resnet50/float32"}


def test_a_file_brings_back_the_run(tmp_path: Path) -> None:
    results = _results()
    save(results, tmp_path / "r.json")
    again = load(tmp_path / "r.json")
    assert (again.machine, again.loads, again.errors) == (results.machine, results.loads, results.errors)
    assert (again.failures, again.left_out) == (results.failures, results.left_out)
    assert again.verdicts == results.verdicts
    for name, rounds in results.samples.items():
        for turn, before in zip(again.samples[name], rounds, strict=True):
            assert turn == pytest.approx(before, abs=1e-9)
    save(again, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == (tmp_path / "r.json").read_text()


def test_the_report_needs_nothing_else_and_escapes(tmp_path: Path) -> None:
    written = write_report(_results(), tmp_path / "r.html")
    text = written[0].read_text()
    names = {path.stem for path in written[1:]}
    assert names == {
        "training", "time-by-count-cpu", "time-by-bytes-cpu", "bars-gpt2-float32-cpu",
        *(f"ratios-{job}-cpu" for job in _SECONDS),
    }  # fmt: skip
    assert all(path.stat().st_size > 10_000 for path in written[1:])
    assert text.count("<svg") == len(names)
    assert not re.findall(r"<(?:script|link|img)\b|url\(\s*[\"']?http|@import", text)
    assert "A &lt;b&gt;CPU&lt;/b&gt;" in text
    assert "norm: expected 1, got &lt;2&gt;" in text
    assert "apex: not installed" in text


def test_a_report_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "r.html").mkdir()
    with pytest.raises(BenchError, match=r"r\.html: expected a report that can be written: Is a directory"):
        commands._report(_results(), tmp_path / "r.json", Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("asked", "interrupted", "name"),
    [
        ({}, False, "a-2-threads-avx2"),
        ({"quick": True}, False, "a-2-threads-avx2-quick"),
        ({"quick": True, "cases": ["tiny"]}, False, "a-2-threads-avx2-part"),
        ({}, True, "a-2-threads-avx2-part"),
    ],
)
def test_only_a_whole_run_takes_the_machines_name(
    asked: dict[str, Any], interrupted: bool, name: str
) -> None:
    arguments = {"quick": False, "cases": None, "contenders": None, "jobs": None} | asked
    results = Results(_MACHINE | {"cpu": "A (family 1)", "interrupted": interrupted})
    kind = commands._kind(argparse.Namespace(**arguments), results)
    assert commands._default_name(results.machine, kind) == name


def test_the_terminal_shows_every_table() -> None:
    out = io.StringIO()
    tables.show(_results(), Console(file=out, width=200))
    text = out.getvalue()
    for expected in ("Promises", "In a training step", "Where gradclip is not first", "numba loops", "apex"):
        assert expected in text
    for job in _SECONDS:
        assert f"caches cold: {JOBS[job].title}" in text


def _verdicts(old: Results, new: Results) -> set[tuple[str, str]]:
    return {(change.peer, change.verdict) for change in compare(old, new) if change.verdict != SAME}


def test_a_comparison_finds_what_got_slower_or_faster() -> None:
    assert _verdicts(_results(), _results(slower=1.3)) == {("gradclip", "slower")}
    assert _verdicts(_results(slower=1.3), _results()) == {("gradclip", "faster")}
    changes = compare(_results(), _results(slower=1.3))
    assert changes[0].peer == "gradclip"
    assert changes[0].ratio == pytest.approx(1.3)
    assert changes[0].certainty == 1.0


def test_a_comparison_does_not_take_the_machine_or_noise_for_a_loss() -> None:
    assert _verdicts(_results(), _results(machine=1.5)) == set()
    assert _verdicts(_results(), _results(slower=1.08)) == set()
    disturbed = _results()
    for name, rounds in disturbed.samples.items():
        if name.endswith(ROOFLINE):
            rounds[:] = [[x * 1.5 for x in turn] for turn in rounds]
    assert _verdicts(_results(), disturbed) == set()
    noisy = _results(slower=1.3)
    for rounds in (rounds for name, rounds in noisy.samples.items() if name.endswith("/gradclip")):
        rounds[0] = [x / 1.4 for x in rounds[0]]  # one turn of five was faster than all old ones
    assert _verdicts(_results(), noisy) == set()


def test_a_comparison_tells_what_fails_now() -> None:
    out = io.StringIO()
    old, new = _results(), _results()
    name = key(_GPT2, CLIP, "gradclip")
    del new.samples[name]
    new.failures[name] = "crashed: signal 11"
    assert gone(old, new) == [name]
    show_changes(compare(old, new), old, new, Console(file=out, width=200))
    assert f"failed: {name}: crashed: signal 11" in out.getvalue()


def test_a_comparison_is_printed() -> None:
    out = io.StringIO()
    old, new = _results(), _results(slower=1.3)
    show_changes(compare(old, new), old, new, Console(file=out, width=200))
    assert "1.30 x" in out.getvalue()
    assert "20 slower, 0 faster" in out.getvalue()
    empty = io.StringIO()
    show_changes([], old, new, Console(file=empty))
    assert "no row in common" in empty.getvalue()


def test_marks_of_pages_are_needed_once() -> None:
    assert docs.replaced("a\n<1>\nold\n<2>\nb", ("<1>\n", "<2>\n"), "new\n") == "a\n<1>\nnew\n<2>\nb"
    with pytest.raises(BenchError, match="expected one line <1> and one <2>"):
        docs.replaced("a\n<1>\n<1>\n<2>\n", ("<1>\n", "<2>\n"), "new\n")


def _section(name: str) -> str:
    first, last = docs.MARKS[name]
    text = (docs.ROOT / name).read_text(encoding="utf-8")
    return text[text.index(first) + len(first) : text.index(last)]


def test_every_figure_of_the_pages_is_that_of_the_committed_run() -> None:
    path = re.search(r"bench/results/[\w.-]+\.json", _section("docs/performance.md"))
    assert path is not None
    made = docs.sections(load(docs.ROOT / path[0]), Path(path[0]))
    assert set(made) == set(docs.MARKS)
    for name, section in made.items():
        assert _section(name) == section, f"{name}: run python -m tools.docs {path[0]}"
        for image in re.findall(r"\]\(([\w/.-]+\.png)\)", section):
            assert ((docs.ROOT / name).parent / image).is_file()


_ODD: list[Any] = [
    None,
    "x",
    -1,
    0,
    math.nan,
    math.inf,
    [],
    {},
    True,
    "[red]x[/] [/b]",
    "<b>",
    1e400,
    "y" * 5000,
]


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every part of a file; of lists and loads only the first."""
    yield path
    if isinstance(value, dict):
        for name in list(value) if len(path) < 1 or path[0] == "machine" else list(value)[:1]:
            yield from _places(value[name], (*path, name))
    elif isinstance(value, list) and value:
        yield from _places(value[0], (*path, 0))


def _with(data: Any, path: tuple[Any, ...], odd: Any) -> Any:
    if not path:
        return odd
    changed = copy.copy(data)
    changed[path[0]] = _with(data[path[0]], path[1:], odd)
    return changed


def test_a_damaged_file_is_one_error_that_names_it_and_the_field(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    save(_results(), path)
    data = json.loads(path.read_text())
    console = Console(file=io.StringIO(), width=200)
    errors: list[tuple[tuple[Any, ...], str]] = []
    for place in _places(data):
        for odd in _ODD:
            path.write_text(json.dumps(_with(data, place, odd)))
            try:
                tables.show(load(path), console)
            except BenchError as error:
                errors.append((place, str(error)))
    assert len(errors) > 300
    for place, text in errors:
        assert text.startswith(f"{path}: expected a result file of python -m bench, but ")
        assert "\n" not in text
        assert not place or str(place[0]) in text


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "3", '"x"', "{}", "{", "[" * 100_000, '{"format": 1}', "\x00", "\ud800"]
)
def test_what_is_no_result_file(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(BenchError, match=r"run.json: expected a result file of python -m bench, but "):
        load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BenchError, match=r"run.json: expected a result file of python -m bench, but "):
        load(path)


def test_a_field_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    save(_results(), path)
    data = json.loads(path.read_text())
    for name in data:
        path.write_text(json.dumps({key: value for key, value in data.items() if key != name}))
        with pytest.raises(BenchError, match=name):
            load(path)
    for name in _MACHINE:
        machine = {key: value for key, value in data["machine"].items() if key != name}
        path.write_text(json.dumps(data | {"machine": machine}))
        with pytest.raises(BenchError, match=rf"machine: expected {name}, got none"):
            load(path)
