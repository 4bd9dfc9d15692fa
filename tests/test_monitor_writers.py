"""What a monitor writes, shows and draws: read back by the library that it was written with."""

from __future__ import annotations

import csv
import io
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import rich.console
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

import gradclip
from gradclip.monitor import (
    CsvWriter,
    GradientMonitor,
    JsonlWriter,
    LiveView,
    MlflowWriter,
    TensorBoardWriter,
    WandbWriter,
)

_STEPS = 12


def _train(monitor: GradientMonitor) -> None:
    """Twelve steps, of which the last explodes."""
    for step in range(1, _STEPS + 1):
        grads = {"a.w": np.array([3.0]), "a.b": np.array([4.0 if step < _STEPS else 4e6])}
        monitor.update(gradclip.clip_by_global_norm_(grads, max_norm=10.0), loss=1 / step)


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for _ in range(2):  # written on after
        with GradientMonitor(writers=[JsonlWriter(path)], write_every=5) as monitor:
            _train(monitor)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 12] * 2
    assert (lines[0]["total_norm"], lines[0]["norms/a.w"], lines[0]["loss"]) == (5.0, 3.0, 0.2)
    assert lines[2]["alerts"][0]["kind"] == "exploded"
    assert "alerts" not in lines[0]


def test_jsonl_is_json_whatever_the_norm(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with GradientMonitor(writers=[JsonlWriter(path)]) as monitor:
        monitor.update(gradclip.clip_by_global_norm_([np.array([math.nan])], 1.0, nonfinite="skip"))

    def refuse(text: str) -> None:
        raise AssertionError(text)

    line = json.loads(path.read_text(), parse_constant=refuse)
    assert line["total_norm"] is None
    assert line["skipped"] is True


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    with GradientMonitor(writers=[CsvWriter(path)]) as monitor:
        _train(monitor)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == _STEPS
    assert float(rows[3]["norms/a.b"]) == 4.0
    assert float(rows[11]["coefficient"]) == pytest.approx(2.5e-6)
    assert rows[3]["alerts"] == ""
    assert rows[11]["alerts"].startswith("exploded: a.b has 1e+06 times its usual norm")


def test_tensorboard(tmp_path: Path) -> None:
    with GradientMonitor(writers=[TensorBoardWriter(tmp_path)]) as monitor:
        _train(monitor)
    events = EventAccumulator(str(tmp_path)).Reload()
    norms = events.Scalars("gradclip/norms/a.b")
    assert [(event.step, event.value) for event in norms[:2]] == [(1, 4.0), (2, 4.0)]
    assert len(norms) == _STEPS
    assert events.Scalars("gradclip/loss")[3].value == 0.25
    (text,) = events.Tensors("gradclip/exploded/text_summary")
    assert text.step == _STEPS
    assert b"a.b has 1e+06 times" in text.tensor_proto.string_val[0]


def _records(log: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format, after its header: blocks of 32 KB, records in pieces."""
    at, whole = 7, b""
    while at + 7 <= len(log):
        if 32768 - at % 32768 < 7:  # padded
            at += 32768 - at % 32768
        _, length, kind = struct.unpack_from("<IHB", log, at)
        whole += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # all of it, or its last piece
            yield whole
            whole = b""


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(tmp_path: Path) -> None:
    run = wandb.init(
        project="gradclip", dir=str(tmp_path), mode="offline", settings=wandb.Settings(silent=True)
    )
    with GradientMonitor(writers=[WandbWriter(run)]) as monitor:
        _train(monitor)
    run.finish()
    wandb.teardown()  # what it writes is on disk only now
    (path,) = tmp_path.rglob("*.wandb")
    rows, titles = [], []
    for data in _records(path.read_bytes()):
        record: Any = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(data)
        if record.HasField("history"):
            rows.append({
                "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.history.item
            })  # fmt: skip
        if record.HasField("alert"):
            titles.append(record.alert.title)
    assert len(rows) == _STEPS
    assert rows[3]["gradclip/norms/a.b"] == 4.0
    assert rows[3]["gradclip/step"] == 4
    assert "a.b has 1e+06" in rows[11]["gradclip/alerts"]
    assert titles == ["gradclip: exploded"]


@pytest.mark.filterwarnings("ignore")
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    with pytest.raises(ValueError, match=r"^run_id: expected one, or an active run"):
        MlflowWriter()
    with mlflow.start_run() as run, GradientMonitor(writers=[MlflowWriter()]) as monitor:
        _train(monitor)
    client = mlflow.MlflowClient()
    norms = client.get_metric_history(run.info.run_id, "gradclip/norms/a.b")
    assert sorted((metric.step, metric.value) for metric in norms)[:2] == [(1, 4.0), (2, 4.0)]
    tags = client.get_run(run.info.run_id).data.tags
    assert "a.b has 1e+06 times" in tags[f"gradclip.exploded.{_STEPS}"]


def test_the_live_view() -> None:
    screen = io.StringIO()
    console = rich.console.Console(file=screen, force_terminal=True, width=100)
    monitor = GradientMonitor()
    with LiveView(monitor, layers=1, console=console, auto_refresh=False) as view:
        console.print(view.render())
        _train(monitor)
        console.print(view.render())
    shown = screen.getvalue()
    assert "waiting for the first step" in shown
    assert f"step {_STEPS}" in shown
    assert "norm 4e+06" in shown
    assert "a.b" in shown
    assert "a.w" not in shown.split("alert")[0]
    assert "▁▁▁▁▁▁▁▁▁▁▁█" in shown
    assert "step 12: a.b has 1e+06 times its usual norm" in shown


def test_the_live_view_of_what_is_zero_or_not_finite() -> None:
    monitor = GradientMonitor()
    for value in (1.0, 0.0, math.inf):
        monitor.update(gradclip.clip_by_global_norm_([np.array([value])], 1.0, nonfinite="skip"))
    console = rich.console.Console(file=io.StringIO(), width=80)
    console.print(LiveView(monitor).render())
    assert "▁ !" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("with_loss", [True, False])
def test_the_picture(tmp_path: Path, with_loss: bool) -> None:
    monitor = GradientMonitor(window=30)
    rng = np.random.default_rng(0)
    for step in range(60):
        norms = rng.lognormal(size=50) * (1000.0 if step == 40 else 1.0)
        norms[3] = 0.0
        if step == 50:
            norms[7] = math.nan
        grads = {f"h.{i}.w": np.array([norm]) for i, norm in enumerate(norms)}
        result = gradclip.clip_by_global_norm_(grads, 8.0, nonfinite="skip")
        monitor.update(result, loss=float(rng.random()) if with_loss else None)
    path = tmp_path / "monitor.png"
    figure = monitor.plot(path)
    assert path.stat().st_size > 20_000
    axes = figure.axes
    assert len(axes) == 3 + with_loss  # one is the colour bar
    assert axes[0].get_xlim()[0] > 20
    labels = {text.get_text() for text in axes[0].get_legend().get_texts()}  # type: ignore[union-attr]
    assert labels == {"global norm", "after clipping", "not finite"}
    image = axes[1].get_images()[0].get_array()
    assert image is not None
    assert image.shape == (50, 30)
    assert {text.get_text() for text in axes[0].texts} >= {"nonfinite"}


def test_the_picture_of_nothing() -> None:
    monitor = GradientMonitor(["a"])
    monitor.plot()
