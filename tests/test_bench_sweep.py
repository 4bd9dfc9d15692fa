"""The sweep of the tuning constants, as far as it goes without a GPU: what it builds, how it judges."""

from __future__ import annotations

import difflib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from rich.console import Console

from bench.errors import BenchError
from gradclip._dispatch import why_no_gpu
from tools import gpu, sweep

_ROOT = Path(__file__).resolve().parent.parent
_HEADER = (_ROOT / sweep._TUNING).read_text(encoding="utf-8")


@pytest.mark.parametrize("constant", sweep.VALUES)
def test_a_variant_changes_one_constant(constant: str) -> None:
    base, *varied = sweep.variants([constant], _HEADER)
    assert base == sweep.Variant()
    assert base.applied_to(_HEADER) == _HEADER
    assert len(varied) >= len(sweep.VALUES[constant]) - 1 >= 1
    for variant in varied:
        lines = difflib.ndiff(_HEADER.splitlines(), variant.applied_to(_HEADER).splitlines())
        added = [line for line in lines if line.startswith("+ ")]
        assert added
        assert all(f"{constant} = {variant.value}" in line for line in added)


def test_no_two_variants_share_a_file() -> None:
    chosen = sweep.variants(list(sweep.VALUES), _HEADER)
    assert len({variant.module for variant in chosen}) == len(chosen) > 20


def test_a_constant_that_is_unknown_or_gone() -> None:
    with pytest.raises(BenchError, match=r"unknown constant kWarps; there are rows_in_flight, "):
        sweep.variants(["kWarps"], _HEADER)
    with pytest.raises(BenchError, match=r"kThreads: expected a constant that .*tuning\.hpp sets"):
        sweep.Variant("kThreads", "1").applied_to("constexpr int kWarps = kThreads / 32;")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rounds", "0"], "--rounds: expected 1 or more, got 0"),
        (["--build"], "--build: expected --arch with it"),
        (
            ["--build", "--arch", "90", "--constants", "kNone"],
            "unknown constant kNone; there are rows_in_flight",
        ),
        (["--build", "--measure"], "not allowed with argument"),
    ],
)
def test_mistakes(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(sys, "argv", ["sweep", *arguments]), pytest.raises(SystemExit) as stopped:
        sweep.main()
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if not why_no_gpu():  # as it is: no skip, since on a GPU the command itself is what runs
        return
    told = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tools.sweep", "--out", str(tmp_path / "out")],
        cwd=_ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert told.returncode == gpu.NO_GPU
    assert told.stderr.startswith("no GPU: ")
    assert list(tmp_path.iterdir()) == []


def test_the_first_error_of_a_command_is_told() -> None:
    said = "print('one'); print('x.cu(3): error: no such thing'); print('error again'); raise SystemExit(2)"
    assert sweep._run([sys.executable, "-c", "pass"]) == ""
    assert sweep._run([sys.executable, "-c", said]) == "x.cu(3): error: no such thing"


def test_a_turn_is_the_time_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Path] = []
    rows: dict[str, Any] = {job: {"gradclip": {"device": [1.0], "host": [2.0]}} for job in gpu.JOBS}
    results = {"cases": {"case": rows | {"failures": {}}}}
    monkeypatch.setattr(sweep, "take_module", taken.append)
    monkeypatch.setattr(gpu, "run", lambda **_: results)
    assert sweep.measure_here(Path("a.so"), ["case"]) == {"case": {job: [1.0] for job in gpu.JOBS}}
    assert taken == [Path("a.so")]
    results["cases"]["case"]["failures"] = {"norms": "wrong answer"}
    with pytest.raises(AssertionError, match=r"case: .*wrong answer"):
        sweep.measure_here(Path("a.so"), ["case"])


def test_a_variant_that_fails_is_out_and_the_others_go_on() -> None:
    """Wrong bits in its second round, and no answer at all; what is there is kept after every round."""
    good, bad, late = sweep.Variant(), sweep.Variant("kThreads", "128"), sweep.Variant("kThreads", "512")
    turns: list[str] = []
    kept: list[list[int]] = []

    def turn(command: list[str], timeout: float, **_: object) -> subprocess.CompletedProcess[str]:
        turns.append(command[command.index("--turn") + 1])
        if turns[-1] == str(late.module):
            raise subprocess.TimeoutExpired(command, timeout)
        if turns[-1] == str(bad.module) and turns.count(turns[-1]) == 2:
            return subprocess.CompletedProcess(command, 1, "", "Traceback\nAssertionError: not the bits\n")
        return subprocess.CompletedProcess(command, 0, 'a warning\n{"case": {"norms": [1.0]}}\n', "")

    with mock.patch("subprocess.run", turn):
        measured = sweep.measure(
            [good, bad, late],
            3,
            ["case"],
            lambda found: kept.append(list(map(len, found["samples"].values()))),
        )
    assert [turns.count(str(v.module)) for v in (good, bad, late)] == [3, 2, 1]
    assert measured["samples"] == {sweep.BASE: [{"case": {"norms": [1.0]}}] * 3}
    assert measured["failures"] == {
        bad.name: "kThreads = 128: AssertionError: not the bits",
        late.name: "kThreads = 512: no answer within 120 s",
    }
    assert kept == [[1, 1], [2], [3]]


def test_without_what_is_committed_there_is_nothing_to_compare() -> None:
    def turn(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "RuntimeError: out of memory\n")

    with (
        mock.patch("subprocess.run", turn),
        pytest.raises(BenchError, match="as committed: RuntimeError: out of memory"),
    ):
        sweep.measure([sweep.Variant()], 1, ["case"], lambda _: None)


def test_what_was_built_is_of_these_sources(tmp_path: Path) -> None:
    with mock.patch.object(sweep, "_BUILT", tmp_path), mock.patch.object(sweep, "describe_gpu", dict):
        with pytest.raises(BenchError, match="nothing is built"):
            sweep.measure_built([sweep.Variant()], 1, [], tmp_path / "out")
        (tmp_path / "built.json").write_text(json.dumps({"sources": "others", "left_out": {}}))
        with pytest.raises(BenchError, match="the sources are not those that were built"):
            sweep.measure_built([sweep.Variant()], 1, [], tmp_path / "out")
        built = {"sources": sweep.hash_of_sources(), "left_out": {"kThreads = 128": "an error"}}
        (tmp_path / "built.json").write_text(json.dumps(built))
        sweep.measure_built([sweep.Variant()], 1, [], tmp_path / "out")  # whose module is not there
    assert json.loads((tmp_path / "out").read_text())["left_out"] == built["left_out"]


def test_the_tables_pair_the_turns_of_a_round() -> None:
    """One turn of what is committed lacks the case: its round does not count."""
    case = next(iter(gpu.SHAPES))
    faster = "kBlocksPerMultiprocessor = 4"
    base = [{case: {"norms": seconds}} for seconds in ([2.0, 1.0, 3.0], [4.0], [1.0])]
    ours = [{case: {"norms": seconds}} for seconds in ([1.0], [3.0], [0.25], [7.0])]
    base.insert(1, {})
    ours.insert(1, {case: {"norms": [100.0]}})
    results: dict[str, Any] = {"cases": list(gpu.SHAPES), "samples": {sweep.BASE: base, faster: ours}}
    assert sweep.ratios(results["samples"], faster, case, "norms") == [0.5, 0.75, 0.25]
    text = io.StringIO()
    for table in sweep.tables(results):
        Console(file=text, width=100).print(table)
    assert text.getvalue().count("time over that of the committed constants") == len(gpu.SHAPES)
    (line,) = (line for line in text.getvalue().splitlines() if "0.500 (0.250 … 0.750)" in line)
    assert faster in line
    assert "1.000 (1.000 … 1.000)" in text.getvalue()
