"""The sweep of the tuning constants, as far as it goes without a GPU: what it builds, how it judges."""

from __future__ import annotations

import difflib
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from rich.console import Console

import gradclip
from bench.cases import CASES, Load
from bench.errors import BenchError
from device import EmulatedBuffer, emulated_device
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
        ((_, value),) = variant.settings
        lines = difflib.ndiff(_HEADER.splitlines(), variant.applied_to(_HEADER).splitlines())
        added = [line for line in lines if line.startswith("+ ")]
        assert added
        assert all(f"{constant} = {value}" in line for line in added)


def test_no_two_variants_share_a_file() -> None:
    chosen = sweep.variants(list(sweep.VALUES), _HEADER)
    assert len({variant.module for variant in chosen}) == len(chosen) > 20


def test_a_constant_that_is_unknown_or_gone() -> None:
    with pytest.raises(BenchError, match=r"unknown constant kWarps; there are rows_in_flight, "):
        sweep.variants(["kWarps"], _HEADER)
    with pytest.raises(BenchError, match=r"kThreads: expected a constant that .*tuning\.hpp sets"):
        sweep.Variant((("kThreads", "1"),)).applied_to("constexpr int kWarps = kThreads / 32;")


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


def test_a_turn_is_the_time_of_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated: every job of every case, each call checked to have done it, after the bits were the CPU's."""
    taken: list[Path] = []
    clipped: list[bool] = []

    def clock(call: Callable[[], Any]) -> tuple[Any, tuple[float]]:
        answer = call()
        if isinstance(answer, gradclip.ClipResult):
            clipped.append(answer.to_host().clipped)
        return answer, (float(len(clipped)),)

    case = next(iter(gpu.SHAPES))
    load = Load(CASES["bytes-4K"])
    monkeypatch.setattr(sweep, "take_module", taken.append)
    monkeypatch.setattr(sweep, "GpuBuffer", EmulatedBuffer)
    monkeypatch.setattr(sweep, "device_clock", clock)
    monkeypatch.setattr(gpu, "load_of", lambda title: load)
    with emulated_device():
        found = sweep.measure_here(Path("a.so"), [case])
        times = {"norms": [0.0] * 7, "clipping": [*range(2, 9)], "not clipping": [*range(10, 17)]}
        assert found == {case: times}
        assert clipped == [True] * 8 + [False] * 8
        monkeypatch.setattr(gradclip, "global_norm", lambda grads: 1.0)
        with pytest.raises(AssertionError, match=r"norm: expected the CPU's 1\.0, got "):
            sweep.measure_here(Path("a.so"), [case])
    assert taken == [Path("a.so")] * 2


def test_combinations_are_of_constants_that_are_chosen() -> None:
    names = ["rows_in_flight", "kBlocksPerMultiprocessor"]
    together = [v.settings for v in sweep.variants(names, _HEADER) if len(v.settings) > 1]
    assert [tuple(name for name, _ in settings) for settings in together] == [tuple(names)] * 2
    both = sweep.Variant(together[0]).applied_to(_HEADER)
    assert "rows_in_flight = 4, " in both
    assert "kBlocksPerMultiprocessor = 4;" in both
    of_all = sweep.variants(list(sweep.VALUES), _HEADER)
    assert tuple(v.settings for v in of_all if len(v.settings) > 1) == sweep.COMBINATIONS


def test_a_variant_is_built_by_the_commands_of_what_is_committed(tmp_path: Path) -> None:
    """Its header is found first, its object comes before the library, and its module is its own."""
    ran: list[str] = []

    def run(command: list[str], where: Path) -> str:
        ran.append(command[-1])
        return ""

    with mock.patch.object(sweep, "_BUILT", tmp_path), mock.patch.object(sweep, "_run", run):
        folder = sweep.Variant().folder
        compiling = "nvcc -I/csrc -MD -MT a/engine.cu.o -MF a/e.d -x cu -c /csrc/engine.cu -o a/engine.cu.o"
        linking = ": && g++ -shared -o _cuda.so b.o a/libgradclip_cuda.a && cd a && strip _cuda.so"
        assert sweep._build_variant(sweep.Variant(), tmp_path, compiling, linking) == ""
    assert ran == [
        f"nvcc -I{folder}/include -I/csrc -x cu -c /csrc/engine.cu -o {folder}/engine.o",
        f": && g++ -shared -o {folder}/_cuda.so b.o {folder}/engine.o a/libgradclip_cuda.a",
    ]


def test_no_turn_begins_when_the_time_is_over() -> None:
    kept: list[int] = []

    def turn(variant: sweep.Variant, cases: list[str]) -> dict[str, object]:
        time.sleep(0.03)
        return {}

    with mock.patch.object(sweep, "_turn", turn):
        measured = sweep.measure(
            [sweep.Variant()],
            100,
            ["case"],
            0.1,
            lambda found: kept.append(len(found["samples"][sweep.BASE])),
        )
    assert 1 <= len(measured["samples"][sweep.BASE]) <= 5
    assert kept[-1] == len(measured["samples"][sweep.BASE])


def test_a_variant_that_fails_is_out_and_the_others_go_on() -> None:
    """Wrong bits in its second round, and no answer at all; what is there is kept after every round."""
    good, bad, late = (sweep.Variant(each) for each in ((), (("kThreads", "128"),), (("kThreads", "512"),)))
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
            60.0,
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
        sweep.measure([sweep.Variant()], 1, ["case"], 60.0, lambda _: None)


def test_what_was_built_is_of_these_sources(tmp_path: Path) -> None:
    with mock.patch.object(sweep, "_BUILT", tmp_path), mock.patch.object(sweep, "describe_gpu", dict):
        with pytest.raises(BenchError, match="nothing is built"):
            sweep.measure_built([sweep.Variant()], 1, [], 60.0, tmp_path / "out")
        (tmp_path / "built.json").write_text(json.dumps({"sources": "others", "left_out": {}}))
        with pytest.raises(BenchError, match="the sources are not those that were built"):
            sweep.measure_built([sweep.Variant()], 1, [], 60.0, tmp_path / "out")
        built = {"sources": sweep.hash_of_sources(), "left_out": {"kThreads = 128": "an error"}}
        (tmp_path / "built.json").write_text(json.dumps(built))
        sweep.measure_built([sweep.Variant()], 1, [], 60.0, tmp_path / "out")  # whose module is not there
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
