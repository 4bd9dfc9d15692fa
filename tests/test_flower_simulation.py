"""Trainings on Flower's own engine, by gradclip and by Flower's own: what flower_simulation.py found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from processes import HANGS_AFTER

_NORM = 3.0
_CLIENT, _SERVER = "DifferentialPrivacyClientSide{}Clipping", "DifferentialPrivacyServerSide{}Clipping"
_TRAININGS = (
    f"{_CLIENT.format('Fixed')}/fixedclipping_mod",
    f"{_CLIENT.format('Adaptive')}/adaptiveclipping_mod",
    f"{_SERVER.format('Fixed')}/",
    f"{_SERVER.format('Adaptive')}/",
)


def simulate(home: Path, file: Path) -> str:
    """Run flower_simulation.py with ``file``; what it printed."""
    ray = tempfile.mkdtemp(prefix="ray")  # the path of a socket must be short
    environment = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_HOME": str(home),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on 127.0.0.1 alone
        "OMP_NUM_THREADS": "1",
    }
    script = Path(__file__).with_name("flower_simulation.py")
    try:
        done = subprocess.run(
            [sys.executable, script, ray, file],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=HANGS_AFTER,
            check=False,
        )
    finally:
        shutil.rmtree(ray, ignore_errors=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What came of all trainings of one simulation."""
    path = tmp_path_factory.mktemp("flower")
    simulate(path, path / "found.json")
    return json.loads((path / "found.json").read_text())


def test_the_first_clip_of_the_page(tmp_path: Path) -> None:
    said = simulate(tmp_path, Path(__file__).parent.parent / "docs" / "flower.md")
    assert "[array([0.99999994, 0.99999994, 0.99999994, 0.99999994], dtype=float32)]" in said


@pytest.mark.parametrize("training", _TRAININGS)
def test_it_trains_as_with_flowers_own(found: Any, training: str) -> None:
    ours, theirs = (found[f"{where}/{training}//"] for where in ("ours", "theirs"))
    assert ours["accuracies"][0] < 0.2
    assert ours["accuracies"][-1] > 0.9
    assert ours["norm"] == theirs["norm"]
    for a, b in zip(ours["arrays"], theirs["arrays"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def _norm(update: Any) -> Fraction:
    """Squared."""
    pairs = [pair for new, base in update for pair in zip(np.ravel(new), np.ravel(base), strict=True)]
    return sum(((Fraction(float(a)) - Fraction(float(b))) ** 2 for a, b in pairs), Fraction(0))


@pytest.mark.parametrize("training", _TRAININGS)
def test_the_bound_of_what_is_aggregated(found: Any, training: str) -> None:
    run = found[f"ours/{training}//"]
    assert len(run["updates"]) == 6  # of three clients in two rounds
    norms = [_norm(update) for update in run["updates"]]
    assert all(norm <= Fraction(_NORM) ** 2 for norm in norms)
    assert min(norms[:3]) > 0.999 * _NORM**2  # all of the first round were clipped
    if "Adaptive" in training:  # all clipped, then all again, to a lower norm: see docs/flower.md
        assert max(norms[3:]) < _NORM**2 * np.exp(-0.2 * 0.5 * 2) * 1.001


def test_with_noise(found: Any) -> None:
    for name in (f"{_SERVER.format('Fixed')}//noise", "/LocalDpMod/"):
        run = found[f"ours/{name}/"]
        assert run["accuracies"][-1] > 0.85
        exact = found[f"ours/{_TRAININGS[2]}//"]["arrays"]
        assert np.abs(np.subtract(run["arrays"][0], exact[0])).min() > 0


def test_a_client_with_nan(found: Any) -> None:
    """On the client the mod raises, and Flower sends an error; on the server the update is refused."""
    client = found[f"ours/{_TRAININGS[0]}//bad"]
    assert len(client["errors"]) == 1
    assert "fixedclipping_mod: expected an update of finite elements: 'b' holds 1 NaN" in client["errors"][0]
    server = found[f"ours/{_TRAININGS[2]}//bad"]
    assert not server["errors"]
    for run in (client, server):
        assert run["updates"] == []  # the round was left out
        assert run["accuracies"][0] == run["accuracies"][1]
