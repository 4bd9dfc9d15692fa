"""The demo is real: a right backward, a run that blows up, a clipped run that learns; its command line."""

from __future__ import annotations

import io
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gradclip
from processes import output_of

pytest.importorskip("sklearn")
pytest.importorskip("rich")
matplotlib_image = pytest.importorskip("matplotlib.image")

from rich.console import Console  # noqa: E402

from gradclip._demo import Settings, train  # noqa: E402
from gradclip._demo.network import Network  # noqa: E402
from gradclip._demo.training import BlowUp, History, Run, batches, numpy_clip_, split_digits  # noqa: E402


def gradclip_command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "gradclip", *arguments],
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        encoding="utf-8",
        capture_output=True,
        cwd=cwd,
        timeout=120,
        check=False,
    )


# The parts.


def test_backward_is_the_derivative_of_forward() -> None:
    rng = np.random.default_rng(1)
    network = Network([5, 7, 7, 6, 4], gain=1.4, rng=rng, dtype=np.float64)
    x, labels = rng.standard_normal((9, 5)), rng.integers(0, 4, 9)
    gradients = {name: g.copy() for name, g in network.loss_and_gradients(x, labels)[1].items()}
    assert list(gradients) == list(network.parameters)
    for name, parameter in network.parameters.items():
        for index in np.ndindex(parameter.shape):
            before = parameter[index]
            losses = []
            for step in (1e-5, -1e-5):
                parameter[index] = before + step
                losses.append(network.loss_and_gradients(x, labels)[0])
            parameter[index] = before
            assert gradients[name][index] == pytest.approx((losses[0] - losses[1]) / 2e-5, abs=1e-8), name


def test_training_and_testing_use_the_same_network() -> None:
    rng = np.random.default_rng(2)
    network = Network([5, 7, 4], gain=1.0, rng=rng)
    x, labels = rng.standard_normal((9, 5)).astype(np.float32), rng.integers(0, 4, 9)
    loss, gradients = network.loss_and_gradients(x, labels)
    assert network.evaluate(x, labels)[0] == pytest.approx(loss, rel=1e-6)
    assert {g.dtype for g in gradients.values()} == {np.dtype(np.float32)}


def test_outputs_that_are_not_finite_are_not_right() -> None:
    network = Network([5, 7, 4], gain=1.0, rng=np.random.default_rng(3))
    network.parameters["layer02.bias"][:] = np.nan
    loss, accuracy = network.evaluate(np.ones((3, 5), np.float32), np.zeros(3, np.int64))
    assert math.isnan(loss)
    assert accuracy == 0.0


@pytest.mark.parametrize("max_norm", [0.5, 1e9, math.inf])
def test_the_numpy_loop_does_what_gradclip_does(max_norm: float) -> None:
    rng = np.random.default_rng(4)
    shapes = [(64, 128), (128,), (128, 128), (10,)]
    loop = {str(i): rng.standard_normal(shape).astype(np.float32) for i, shape in enumerate(shapes)}
    ours = {name: g.copy() for name, g in loop.items()}
    result = gradclip.clip_by_global_norm_(ours, max_norm)
    assert numpy_clip_(loop, max_norm) == pytest.approx(result.total_norm, rel=1e-5)
    for name, g in loop.items():
        np.testing.assert_allclose(ours[name], g, rtol=1e-5)


def test_the_split_is_a_split() -> None:
    digits = split_digits(seed=0)
    assert digits.train_x.shape == (1438, 64)
    assert digits.test_x.shape == (359, 64)
    assert digits.train_x.dtype == np.float32
    rows = {row.tobytes() for row in digits.train_x}
    assert not any(row.tobytes() in rows for row in digits.test_x)


def test_every_digit_comes_once_per_epoch() -> None:
    indices = batches(100, 20, np.random.default_rng(5))
    for _ in range(3):
        epoch = np.concatenate([next(indices) for _ in range(5)])
        assert sorted(epoch.tolist()) == list(range(100))


def history_of(*layer_norms: list[float]) -> History:
    return History(layer_norms=[np.array(norms) for norms in layer_norms])


def test_the_layer_that_went_first_is_the_first_far_above_its_own_norm() -> None:
    calm = [[50.0, 1.0, 2.0]] * 10
    assert history_of(*calm, [900.0, 5.0, 1900.0]).find_blow_up() is None
    # Layer 2 is 1100 times its usual norm; layer 1 is larger, but usually so.
    found = history_of(*calm, [900.0, 1100.0, 2.0], [1e9, 1e9, 1e9]).find_blow_up()
    assert found is not None
    assert (found.step, found.layer) == (10, 2)
    assert found.usual.tolist() == calm[0]


def test_of_layers_that_are_not_finite_the_one_nearest_to_the_output_went_first() -> None:
    found = history_of(*[[1.0] * 4] * 10, [math.nan, math.inf, math.nan, 1e30]).find_blow_up()
    assert found is not None
    assert (found.step, found.layer) == (10, 3)


# Both runs, as far as the first one gets.


@pytest.fixture(scope="module")
def runs() -> tuple[tuple[Run, Run], BlowUp | None, str]:
    settings = Settings(steps=100, seed=3)
    pair = (Run("without", settings, math.inf), Run("with", settings, settings.max_norm))
    console = Console(file=io.StringIO(), width=100)
    blow_up = train(pair, split_digits(settings.seed), console)
    assert isinstance(console.file, io.StringIO)
    return pair, blow_up, console.file.getvalue()


def test_both_runs_start_equal(runs: tuple[tuple[Run, Run], BlowUp | None, str]) -> None:
    (without, clipped), _, _ = runs
    assert without.history.loss[0] == clipped.history.loss[0]
    assert without.history.total_norm[0] == clipped.history.total_norm[0]


def test_the_run_without_clipping_blows_up(runs: tuple[tuple[Run, Run], BlowUp | None, str]) -> None:
    (without, _), blow_up, _ = runs
    history = without.history
    assert without.stopped
    assert len(history.loss) < 100
    assert not any(history.clipped)
    assert history.nonfinite[-1]
    assert not any(history.nonfinite[:-1])
    assert not all(np.isfinite(p).all() for p in without.network.parameters.values())
    assert blow_up is not None
    assert history.layer_norms[blow_up.step][blow_up.layer - 1] > 1000 * blow_up.usual[blow_up.layer - 1]


def test_the_clipped_run_goes_on(runs: tuple[tuple[Run, Run], BlowUp | None, str]) -> None:
    (_, clipped), _, _ = runs
    history = clipped.history
    assert len(history.loss) == 100
    assert not clipped.stopped
    assert history.find_blow_up() is None
    assert history.loss[-1] < 0.5 * history.loss[0]
    for norm, was_clipped in zip(history.total_norm, history.clipped, strict=True):
        assert was_clipped == (norm > clipped.max_norm)


def test_the_layers_make_up_the_global_norm(runs: tuple[tuple[Run, Run], BlowUp | None, str]) -> None:
    for run in runs[0]:
        layers = np.array(run.history.layer_norms)
        np.testing.assert_allclose(np.linalg.norm(layers, axis=1), run.history.total_norm, rtol=1e-12)


def test_the_report_has_every_layer(runs: tuple[tuple[Run, Run], BlowUp | None, str]) -> None:
    _, blow_up, text = runs
    assert blow_up is not None
    assert f"layer {blow_up.layer} blew up first, in step {blow_up.step + 1}" in text
    assert re.findall(r"^ +(\d+) +[\d.e+]+ +[\d.e+]+ ", text, re.MULTILINE) == [str(i) for i in range(1, 41)]


# The command.


def test_the_whole_demo(tmp_path: Path) -> None:
    done = gradclip_command("demo", "--out", "picture.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert "blew up first" in done.stdout
    accuracy = re.search(r"test accuracy +│ +([\d.]+)[^│]*│ +([\d.]+)", done.stdout)
    assert accuracy is not None, done.stdout
    assert float(accuracy[1]) < 0.2
    assert float(accuracy[2]) > 0.9

    pixels = matplotlib_image.imread(tmp_path / "picture.png")
    assert pixels.shape[:2] == (1000, 1600)
    colours = np.unique((pixels[..., :3] * 255).astype(np.uint8).reshape(-1, 3), axis=0)
    assert len(colours) > 500


def test_a_network_that_does_not_blow_up_is_not_said_to(tmp_path: Path) -> None:
    done = gradclip_command("demo", "--layers", "3", "--steps", "30", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "No layer blew up" in done.stdout
    assert (tmp_path / "gradclip-demo.png").stat().st_size > 10_000


def test_without_a_command_it_prints_help() -> None:
    done = gradclip_command()
    assert done.returncode == 0
    assert "demo" in done.stdout
    assert "info" in done.stdout


def test_info_names_the_version() -> None:
    done = gradclip_command("info")
    assert done.returncode == 0, done.stderr
    assert gradclip.__version__ in done.stdout


@pytest.mark.parametrize(
    "arguments", [("--layers", "1"), ("--steps", "0"), ("--steps", "x"), ("--out", "no/folder/x.png")]
)
def test_wrong_options_end_with_status_2_and_no_traceback(arguments: tuple[str, str], tmp_path: Path) -> None:
    done = gradclip_command("demo", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert arguments[0] in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_package_gives_one_line_with_the_command_that_installs_it() -> None:
    text = output_of(
        """
        import contextlib, io, sys
        sys.modules["rich"] = None  # as if it were not installed
        from gradclip.__main__ import main
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            assert main(["demo"]) == 2
        print(errors.getvalue(), end="")
        """
    )
    assert text == f"gradclip demo needs more packages: {sys.executable} -m pip install rich"


def test_importing_gradclip_imports_nothing_of_the_demo() -> None:
    loaded = output_of("import gradclip, sys; print({'rich', 'matplotlib', 'sklearn'} & set(sys.modules))")
    assert loaded == "set()"
    assert output_of("import gradclip, sys; print('gradclip._demo' in sys.modules)") == "False"
