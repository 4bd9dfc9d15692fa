"""The trainings of docs/examples do what they say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

_EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"


def _load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, _EXAMPLES / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look there
    specification.loader.exec_module(module)
    return module


def _assert_picture(path: Path) -> None:
    assert path.read_bytes().startswith(b"\x89PNG")
    assert 10_000 < path.stat().st_size < 150_000


# --- The trainings ----------------------------------------------------------------------------------


def test_mlp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = 60
    mlp = _load("jax_mlp", monkeypatch)
    unclipped, clipped = mlp.main(["--steps", str(steps), "--plot", str(tmp_path / "norms.png")])
    for training in (unclipped, clipped):
        assert training.layers == [f"layers.{i}" for i in range(25)]
        assert training.norms.shape == (steps, 25)
        assert np.isfinite(training.norms).all()
        assert (training.norms > 0).all()
        assert np.isfinite(training.losses).all()
    assert unclipped.clipped_steps == 0
    assert clipped.clipped_steps == (np.linalg.norm(clipped.norms, axis=1) > 0.5).sum() > steps / 2
    assert (unclipped.norms[0] == clipped.norms[0]).all()  # measured before anything is clipped
    assert clipped.losses[-10:].mean() < 0.5 * clipped.losses[:3].mean()
    assert clipped.losses[-10:].mean() < 0.7 * unclipped.losses[-10:].mean()
    assert f"{clipped.clipped_steps} of {steps} steps clipped" in capsys.readouterr().out
    _assert_picture(tmp_path / "norms.png")


def test_transformer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformer = _load("jax_transformer", monkeypatch)
    arguments = ["--steps", "16", "--log-every", "4", "--plot", str(tmp_path / "norms.png")]
    training = transformer.main(arguments)
    assert training.steps == [1, 4, 8, 12, 16]
    assert training.losses[-1] < training.losses[0] - 0.5
    norms = np.stack(training.norms)
    assert norms.shape == (5, len(training.names)) == (5, 30)
    assert {"characters.weight", "blocks.1.attention.query_proj.weight", "head.bias"} < set(training.names)
    assert np.isfinite(norms).all()
    assert (norms > 0).all()
    np.testing.assert_allclose(np.linalg.norm(norms, axis=1), training.total_norms, rtol=1e-6)
    assert 0 < training.clipped_steps <= 16
    assert "step   16   loss" in capsys.readouterr().out
    _assert_picture(tmp_path / "norms.png")
