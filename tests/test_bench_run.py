"""How the benchmark measures, and how it survives contenders that are wrong, raise or kill their process."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import bench.run
from bench import peers, results, tables, worker
from bench.cases import CASES, Load
from bench.jobs import CLIP, NORMS, key
from bench.peers.with_numpy import NumpyDot
from bench.run import run
from bench.suite import Experiment, Training
from bench.timing import Contender, Protocol, measure
from bench.worker import Outcome, measure_experiment
from bench.workload import READ, ROOFLINE, Location
from processes import HANGS_AFTER
from tools import docs, guard, instructions

_LOAD = Load(CASES["bytes-4K"])
_FEW = Experiment((_LOAD,), (NORMS, CLIP), rounds=2, seconds=5)


class _Wrong(NumpyDot):
    """Its second gradient is clipped too much."""

    key, title = "wrong", "wrong one"

    def clip(self, max_norm: float) -> tuple[float, list[float] | None]:
        answer = super().clip(max_norm)
        self.grads[1].flat[3] *= 0.9
        return answer


class _Raising(NumpyDot):
    key, title = "raising", "raising one"

    def norms(self) -> list[float]:
        raise ArithmeticError("no norm today\nand no second line")


class _Fading(NumpyDot):
    """Does not clip any more after a few calls."""

    key, title = "fading", "fading one"
    calls = 0

    def clip(self, max_norm: float) -> tuple[float, list[float] | None]:
        self.calls += 1
        return super().clip(max_norm) if self.calls < 4 else (0.0, None)


class _Leaving(NumpyDot):
    """Ends its process as if all were well."""

    key, title = "leaving", "leaving one"

    def clip(self, max_norm: float) -> tuple[float, list[float] | None]:
        sys.exit(0)


class _Hanging(NumpyDot):
    key, title = "hanging", "hanging one"

    def clip(self, max_norm: float) -> tuple[float, list[float] | None]:
        time.sleep(1000)
        raise AssertionError("awake")


class _Deadly(NumpyDot):
    key, title = "deadly", "deadly one"

    def clip(self, max_norm: float) -> tuple[float, list[float] | None]:
        os.kill(os.getpid(), signal.SIGSEGV)
        raise AssertionError("alive")


_ODD = {peer.key: peer for peer in (_Wrong, _Raising, _Fading, _Leaving, _Hanging, _Deadly)}


@pytest.fixture
def _odd_peers() -> Iterator[None]:
    """More contenders than there are."""
    known: Any = peers.PEERS
    known.update(_ODD)
    yield
    for name in _ODD:
        del known[name]


@pytest.mark.usefixtures("_odd_peers")
def test_wrong_and_raising_contenders_are_told_and_stop_nobody() -> None:
    wanted = ["gradclip", "wrong", "raising", "fading", "numpy-dot"]
    outcome = measure_experiment(_FEW, wanted, (), lambda *_: None)
    failures = {name.removeprefix(f"{_LOAD.key}/"): why for name, why in outcome.failures.items()}
    wrong = failures.pop("clip/wrong")
    assert wrong.startswith("WrongAnswerError: gradient 1: expected ")
    assert failures.pop("clip/fading").startswith("AssertionError: norm 0.0, threshold ")
    assert failures == {
        "norms/raising": "ArithmeticError: no norm today",
        "clip/raising": "not tried: see its norms",
    }
    timed = {key(_LOAD.key, job, p) for job in (NORMS, CLIP) for p in ("gradclip", "numpy-dot")}
    timed |= {key(_LOAD.key, NORMS, "wrong"), key(_LOAD.key, NORMS, "fading")}
    rooflines = {name for name in outcome.samples if ROOFLINE in name}
    assert set(outcome.samples) - rooflines == timed
    assert len(rooflines) == 2

    found = results.Results({}, {_LOAD.key: results.LoadFacts.of(_LOAD)}, failures=outcome.failures)
    found.samples = outcome.samples
    cells = {row[0]: row[1] for table in tables.of_load(found, _LOAD.key) for row in table.rows}
    assert cells["wrong one"] == wrong
    assert cells["raising one"] == "not tried: see its norms"


def _work_with_odd_peers(
    pipe: Any,
    tasks: Sequence[tuple[int, Experiment | Training]],
    wanted: Sequence[str],
    skip: Collection[str],
) -> None:
    """What the worker's process runs: there, too, the odd contenders are known."""
    known: Any = peers.PEERS
    known.update(_ODD)
    worker.work(pipe, tasks, wanted, skip)


@pytest.mark.usefixtures("_odd_peers")
@pytest.mark.parametrize(
    ("odd", "how"),
    [
        ("deadly", "crashed: signal 11"),
        ("leaving", "crashed: exit status 0"),
        ("hanging", "hangs: no answer in 20 s"),
    ],
)
def test_a_contender_that_ends_or_stops_its_process_is_told_and_stops_nobody(
    odd: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.run, "_PATIENCE_SECONDS", 20.0)
    said = io.StringIO()
    wanted = ["gradclip", odd, "numpy-dot"]
    experiments = [_FEW, Experiment((Load(CASES["tiny"]),), (NORMS,), rounds=1)]
    found = run(experiments, wanted, Console(file=said, width=200), True, False, target=_work_with_odd_peers)
    assert found.failures == {key(_LOAD.key, CLIP, odd): how}
    for peer in ("gradclip", "numpy-dot"):
        assert key(_LOAD.key, CLIP, peer) in found.samples
        assert key("tiny/float32", NORMS, peer) in found.samples
    assert key(_LOAD.key, NORMS, odd) in found.samples
    assert f"bytes-4K/float32/clip/{odd} {how}: measuring again without it" in said.getvalue()
    assert found.machine["interrupted"] is False


def test_ctrl_c_keeps_what_was_measured_and_makes_no_noise(tmp_path: Path) -> None:
    """Sent to the whole group, as a terminal does."""
    command = [
        sys.executable, "-m", "bench", "--quick", "--cases", "bytes-4K", "gpt2", "--contenders", "numpy-dot",
        "--out", str(tmp_path / "r.json"),
    ]  # fmt: skip
    said = tmp_path / "said"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    with said.open("w") as error:
        process = subprocess.Popen(
            command, cwd=docs.ROOT, stdout=subprocess.PIPE, stderr=error, text=True, start_new_session=True,
            env=os.environ | {"COLUMNS": "140"},
        )  # fmt: skip
        while "1/2 bytes-4K/float32: " not in said.read_text():
            assert process.poll() is None, said.read_text()
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        shown, _ = process.communicate(timeout=HANGS_AFTER)
    assert process.returncode == 130
    assert "Traceback" not in said.read_text()
    assert "left out: gpt2/float32: interrupted" in said.read_text()
    assert "NumPy dot loop" in shown
    found = results.load(tmp_path / "r.json")
    assert key(_LOAD.key, CLIP, "numpy-dot") in found.samples
    assert found.left_out[-1] == "gpt2/float32: interrupted"
    assert (tmp_path / "r.html").is_file()


def _die_between_turns(pipe: Any, tasks: Sequence[Any], wanted: Sequence[str], skip: Collection[str]) -> None:
    if tasks[0][0] == 0:
        pipe.send(("begin", 0))
        os._exit(7)
    worker.work(pipe, tasks, wanted, skip)


def test_a_process_that_dies_in_nobodys_turn_costs_its_experiment_alone() -> None:
    found = run([_FEW, _FEW], ["gradclip"], Console(file=io.StringIO()), True, False, _die_between_turns)
    assert "bytes-4K/float32: its process crashed: exit status 7" in found.left_out
    assert key(_LOAD.key, CLIP, "gradclip") in found.samples


def test_what_does_not_fit_into_memory_is_left_out_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    large = Load(CASES["bytes-256M"])
    outcome = Outcome()

    def chosen(free: float) -> list[str] | None:
        monkeypatch.setattr(Location, "free_memory", staticmethod(lambda: int(free)))
        return worker.fitting(large, Location, ["gradclip", "optax-donated", "optax", "torch"], (), outcome)

    assert chosen(5e9) == ["gradclip", "optax-donated", "optax", "torch"]
    assert outcome.left_out == []
    assert chosen(1.3e9) == ["gradclip", "optax-donated", "torch"]
    assert outcome.left_out == ["bytes-256M/float32: optax, jit: needs 537 MB more memory than is free"]
    assert chosen(0.3e9) is None
    assert outcome.left_out[1] == "bytes-256M/float32, cpu: needs 403 MB, 240 MB are free"
    many = Load(CASES["many"])
    assert worker.fitting(many, Location, ["optax"], (), outcome) == []


def _contender(name: str, log: list[str], fail_at: int = 99) -> Contender:
    calls = []

    def call() -> int:
        calls.append(0)
        log.append(f"{name} call")
        if len(calls) == fail_at:
            raise OSError("gone")
        return len(calls)

    def say(what: str) -> Callable[..., None]:
        return lambda *answer: log.append(f"{name} {what}")

    return Contender(name, call, say("restore"), say("caches"), say("confirm"), say("undo"))


def test_turns_restore_warm_up_and_undo_between_calls() -> None:
    log: list[str] = []
    protocol = Protocol(rounds=1, calls=2, turn_seconds=60, warm_up=1, settle=0)
    samples = measure([_contender("a", log)], protocol).samples
    assert [len(turn) for turn in samples["a"]] == [2]
    once = ["caches", "call", "confirm"]
    expected = ["restore", *once, "undo", *once, "undo", *once]
    assert log == [f"a {what}" for what in expected]


def test_contenders_take_turns_and_one_that_fails_leaves() -> None:
    log: list[str] = []
    ticks: list[str] = []
    protocol = Protocol(rounds=5, calls=1, warm_up=0, settle=0)
    contenders = [_contender("a", log), _contender("b", log, fail_at=3), _contender("c", log)]
    measured = measure(contenders, protocol, lambda name, _: ticks.append(name))
    assert measured.failures == {"b": "OSError: gone"}
    assert {name: len(rounds) for name, rounds in measured.samples.items()} == {"a": 5, "c": 5}
    assert sorted(ticks[:3]) == sorted(ticks[3:6]) == ["a", "b", "c"]
    assert ticks.count("b") == 3


def test_no_round_begins_when_the_time_is_over() -> None:
    protocol = Protocol(rounds=50, seconds=1e-9, calls=1, warm_up=0, settle=0, least_rounds=2)
    assert len(measure([_contender("a", [])], protocol).samples["a"]) == 2


def test_the_guard_finds_a_loss_and_gives_noise_another_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = guard.Bound("tiny/float32", NORMS, "gradclip", ((READ, ROOFLINE),), 2.0)
    roofline = {key("tiny/float32", READ, ROOFLINE): [[1.0, 5.0], [9.0]]}
    tries: list[int] = []

    def samples(times: list[float]) -> Callable[[object], object]:
        def one(bounds: object) -> object:
            tries.append(0)
            seconds = times[min(len(tries), len(times)) - 1]
            return roofline | {key("tiny/float32", NORMS, "gradclip"): [[9.0], [seconds]]}

        return one

    monkeypatch.setattr(guard, "_samples", samples([2.5, 1.9]))
    assert guard.check_ratios([bound]) == []
    assert len(tries) == 2
    tries.clear()
    monkeypatch.setattr(guard, "_samples", samples([2.5]))
    told = guard.check_ratios([bound])
    assert told == ["tiny/float32, norms: gradclip / (read): expected at most 2.0, got more 3 times"]


def test_the_guard_finds_more_instructions() -> None:
    assert guard.check_instructions({"a": 1140, "b": 500}, {"a": 1000, "b": 1000}) == []
    told = guard.check_instructions({"a": 1160, "b": 500}, {"a": 1000, "b": 1000})
    assert told == ["a: expected at most 1.15 x 1000 instructions, got 1160"]


def test_only_the_librarys_own_instructions_count() -> None:
    """Not those of what it calls, and names that are only numbers the second time."""
    profile = """
events: Ir

ob=(1) /lib/_core.so
fl=(1) ???
fn=(1) clip
0 10
+3 5
cob=(2) /lib/libc.so
cfn=(2) memcpy
calls=7 0
* 900
0 1

ob=(2)
fn=(2)
0 800
ob=(1)
fn=(3) norm
0 100

totals: 916
"""
    assert instructions.cost_of_object(profile, "_core.so") == 116
    assert instructions.cost_of_object(profile, "libc.so") == 800
