"""The demo is real: a right backward, a run that blows up, a clipped run that learns; its command line."""

from __future__ import annotations

import io
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest

import gradclip
from processes import HANGS_AFTER, output_of

pytest.importorskip("sklearn")
pytest.importorskip("rich")
matplotlib_image = pytest.importorskip("matplotlib.image")

from rich.console import Console  # noqa: E402

from gradclip.__main__ import PICTURES  # noqa: E402
from gradclip._lab.data import batches, split_digits  # noqa: E402
from gradclip._lab.demo import DemoSettings, run_demo, train  # noqa: E402
from gradclip._lab.demo.plot import save_plot  # noqa: E402
from gradclip._lab.demo.training import Run, numpy_clip_  # noqa: E402
from gradclip._lab.networks import Network, multilayer  # noqa: E402
from gradclip._lab.training import BlowUp, find_blow_up, one_thread  # noqa: E402
from gradclip._report.console import console_of_user  # noqa: E402

# Both runs, how the first one blew up, and what was printed.
Trained: TypeAlias = tuple[tuple[Run, Run], BlowUp | None, str]

COMMAND = [sys.executable, "-W", "error", "-m", "gradclip"]


def environment(columns: int | None = None) -> dict[str, str]:
    """Of a command whose output goes to a pipe."""
    inherited = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    return inherited | {"PYTHONIOENCODING": "utf-8"} | ({"COLUMNS": str(columns)} if columns else {})


def gradclip_command(
    *arguments: str, cwd: Path | None = None, columns: int | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        env=environment(columns),
        encoding="utf-8",
        capture_output=True,
        cwd=cwd,
        timeout=HANGS_AFTER,
        check=False,
    )


def sine_network(sizes: list[int], gain: float, seed: int, dtype: type = np.float32) -> Network:
    return multilayer(sizes, "sine", "orthogonal", np.random.default_rng(seed), gain=gain, dtype=dtype)


def trained(settings: DemoSettings, width: int, terminal: bool = False) -> Trained:
    pair = (Run("without clipping", settings, math.inf), Run("with gradclip", settings, settings.max_norm))
    console = Console(
        file=io.StringIO(), width=width, height=50, force_terminal=terminal, color_system=None, _environ={}
    )
    with one_thread():
        blow_up = train(pair, console)
    assert isinstance(console.file, io.StringIO)
    return pair, blow_up, console.file.getvalue()


# The parts.


def test_backward_is_the_derivative_of_forward() -> None:
    rng = np.random.default_rng(1)
    network = sine_network([5, 7, 7, 6, 4], 1.4, 1, np.float64)
    x, labels = rng.standard_normal((9, 5)), rng.integers(0, 4, 9)
    gradients = network.loss_and_gradients(x, labels)[1]
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
    network = sine_network([5, 7, 4], 1.0, 2)
    x, labels = rng.standard_normal((9, 5)).astype(np.float32), rng.integers(0, 4, 9)
    loss, gradients = network.loss_and_gradients(x, labels)
    assert network.evaluate(x, labels)[0] == pytest.approx(loss, rel=1e-6)
    assert {g.dtype for g in gradients.values()} == {np.dtype(np.float32)}


def test_outputs_that_are_not_finite_are_not_right() -> None:
    network = sine_network([5, 7, 4], 1.0, 3)
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


@pytest.mark.parametrize("explosion", [3, 10, 25])
def test_a_run_finds_its_blow_up_in_the_step_in_which_it_happens(explosion: int) -> None:
    run = Run("", DemoSettings(layers=3), math.inf)
    for step in range(30):
        run.history.layer_norms.append([1.0, 1e6 if step == explosion else 2.0, 3.0])
        found = run.find_blow_up()
        assert (found is not None) == (step == explosion)
        if found is not None:
            assert (found.step, found.layer) == (explosion, 1)
            break


# Both runs, as far as the first one gets.


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Ctrl-C as in a terminal: a shell has jobs in the background, and what they start, ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def runs() -> Trained:
    return trained(DemoSettings(steps=100, seed=3), width=100)


def test_both_runs_start_equal(runs: Trained) -> None:
    (without, clipped), _, _ = runs
    assert without.history.loss[0] == clipped.history.loss[0]
    assert without.history.total_norm[0] == clipped.history.total_norm[0]


def test_the_run_without_clipping_blows_up(runs: Trained) -> None:
    (without, _), blow_up, _ = runs
    history = without.history
    assert without.stopped
    assert without.steps_done < 100
    assert not without.clipped().any()
    assert history.nonfinite[-1]
    assert not any(history.nonfinite[:-1])
    assert not all(np.isfinite(p).all() for p in without.network.parameters.values())
    assert blow_up is not None
    assert history.layer_norms[blow_up.step][blow_up.layer] > 1000 * blow_up.usual[blow_up.layer]


def test_the_clipped_run_goes_on(runs: Trained) -> None:
    (_, clipped), _, _ = runs
    history = clipped.history
    assert clipped.steps_done == 100
    assert not clipped.stopped
    assert find_blow_up(np.array(history.layer_norms)) is None
    assert history.loss[-1] < 0.5 * history.loss[0]
    assert clipped.clipped().tolist() == [norm > clipped.max_norm for norm in history.total_norm]


def test_gradclip_and_the_loop_saw_the_same_gradients(runs: Trained) -> None:
    for run in runs[0]:
        assert len(run.clip.seconds) == len(run.clip.loop_norm) == run.steps_done
        both = np.column_stack([run.clip.loop_norm, run.history.total_norm])
        both = both[np.isfinite(both).all(axis=1)]
        assert len(both) > 20
        np.testing.assert_allclose(both[:, 0], both[:, 1], rtol=1e-4)
        assert min(run.milliseconds()) > 0


def test_the_layers_make_up_the_global_norm(runs: Trained) -> None:
    for run in runs[0]:
        finite = np.isfinite(run.history.total_norm)
        layers = np.array(run.history.layer_norms)[finite]
        total = np.array(run.history.total_norm)[finite]
        np.testing.assert_allclose(np.linalg.norm(layers, axis=1), total, rtol=1e-12)


def test_the_report_has_every_layer(runs: Trained) -> None:
    _, blow_up, text = runs
    assert blow_up is not None
    assert f"layer {blow_up.layer + 1} blew up first, in step {blow_up.step + 1}" in text
    assert re.findall(r"^ +(\d+) +[\d.e+]+ +[\d.e+]+ ", text, re.MULTILINE) == [str(i) for i in range(1, 41)]


@pytest.mark.parametrize("suffix", PICTURES)
def test_the_picture_has_the_format_of_its_suffix(suffix: str, runs: Trained, tmp_path: Path) -> None:
    pair, blow_up, _ = runs
    out = tmp_path / f"picture.{suffix.upper()}"
    save_plot(pair, blow_up, out)
    begins = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml", "eps": b"%!PS", "webp": b"RIFF"}
    begins |= dict.fromkeys(("jpg", "jpeg"), b"\xff\xd8") | dict.fromkeys(("tif", "tiff"), b"II*\0")
    assert out.read_bytes().startswith(begins[suffix])


# Narrow consoles.


@pytest.fixture(scope="module")
def narrow() -> Trained:
    return trained(DemoSettings(layers=25, steps=40, gain=1.8), width=60, terminal=True)


def test_on_a_narrow_terminal_nothing_is_cut_off(narrow: Trained) -> None:
    (without, clipped), blow_up, text = narrow
    assert blow_up is not None
    assert without.stopped
    assert "…" not in text
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")
    assert max(map(len, text.splitlines())) <= 60
    assert f"stopped in step {without.steps_done}: gradients not finite" in text
    assert f"clipped {clipped.clipped().sum()} of 40 steps" in text
    layers = text[text.index(" usual ") : text.rindex("╭")]
    assert re.findall(r"^ +(\d+) +\S+ +\S+ +\S+ +█+", layers, re.MULTILINE)[-1] == "25"


@pytest.mark.parametrize("columns", [20, 45, 60])
def test_piped_output_is_wrapped_to_columns(columns: int, tmp_path: Path) -> None:
    done = gradclip_command(
        "demo", "--layers", "60", "--steps", "3", "--out", "a.svg", cwd=tmp_path, columns=columns
    )
    assert done.returncode == 0, done.stderr
    loading, *lines = done.stdout.splitlines()
    assert loading.startswith("Loading")  # before the library that wraps
    assert max(map(len, lines)) <= columns
    assert "…" not in done.stdout
    # In narrow columns, words are folded.
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert "accuracy" in "".join(row[0] for row in rows)
    assert "(100%,tonorm0.5)" in "".join(row[2] for row in rows).replace(" ", "")
    assert "a.svg" in "".join(lines[-2:])


def test_piped_output_without_columns_is_not_wrapped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for columns, lines in (("40", 8), ("", 1), ("0", 1), ("many", 1)):
        monkeypatch.setenv("COLUMNS", columns)
        console_of_user().print("a word " * 40)
        assert capsys.readouterr().out.count("\n") == lines, columns


# The command.


def test_the_whole_demo(tmp_path: Path) -> None:
    done = gradclip_command("demo", "--out", "picture.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert "blew up first" in done.stdout
    assert max(map(len, done.stdout.splitlines())) > 100
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
    ("option", "value", "message"),
    [
        ("--layers", "1", "expected an integer of at least 2, got '1'"),
        ("--steps", "0", "expected an integer of at least 1, got '0'"),
        ("--steps", "x", "expected an integer of at least 1, got 'x'"),
        ("--seed", "-1", "expected an integer of at least 0, got '-1'"),
        ("--out", "no/folder/x.png", "expected a file in a folder that exists, got no/folder/x.png"),
        ("--out", "folder.png", "expected a file in a folder that exists, got folder.png"),
        ("--out", "x.txt", "expected a name with one of the suffixes png, pdf, svg, "),
        ("--out", "picture", "got picture"),
        ("--out", ".png", "got .png"),
        ("--out", "/proc/x.png", "expected a file that can be written, got /proc/x.png (No such file"),
        ("--out", f"{'x' * 300}.png", "expected a file that can be written, got xxx"),
    ],
)
def test_wrong_options_end_with_status_2_before_anything_is_done(
    option: str, value: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "folder.png").mkdir()
    done = gradclip_command("demo", option, value, cwd=tmp_path)
    assert done.returncode == 2
    assert option in done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_a_wrong_command_is_named_in_the_error() -> None:
    done = gradclip_command("dmeo")
    assert done.returncode == 2
    assert "argument command: invalid choice: 'dmeo'" in done.stderr


def test_no_permission_to_write_is_said_before_the_training(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    taken = tmp_path / "taken.png"
    taken.write_bytes(b"a picture")
    taken.chmod(0o400)
    if os.access(taken, os.W_OK):
        pytest.skip("root may write everywhere")
    for out in ("locked/x.png", "taken.png"):
        done = gradclip_command("demo", "--out", out, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr == (
            f"gradclip demo --out: expected a file that can be written, got {out} (Permission denied)\n"
        )
    assert taken.read_bytes() == b"a picture"


def test_what_is_loaded_is_said_before_it_is_loaded() -> None:
    """The process ends where the import begins, and leaves what it has not flushed."""
    text = output_of(
        """
        import os, sys
        from gradclip.__main__ import main

        class End:
            def find_spec(self, name, path=None, target=None):
                if name == "gradclip._lab":
                    assert not {"sklearn", "matplotlib", "rich"} & set(sys.modules)
                    os._exit(0)

        sys.meta_path.insert(0, End())
        main(["demo"])
        """
    )
    assert text == "Loading scikit-learn, matplotlib, rich ..."


def test_the_demo_loads_no_packages_but_its_own() -> None:
    output_of(
        """
        import sys
        for other in ("pandas", "jinja2", "markupsafe"):
            sys.modules[other] = None  # as if it were not installed
        import gradclip._lab.demo
        """
    )


# Ctrl-C.


@contextmanager
def demo_process(*arguments: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*COMMAND, "demo", *arguments],
        env=environment(),
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=cwd,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_an_interrupted_demo_reports_on_the_steps_that_were_done(tmp_path: Path) -> None:
    with demo_process("--steps", "100000", "--layers", "12", cwd=tmp_path) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("step "):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        text, errors = process.communicate(timeout=HANGS_AFTER)
    assert errors == ""
    assert process.returncode == 130
    interrupted = re.search(r"Interrupted after step (\d+) of 100000", text)
    assert interrupted is not None, text
    assert re.search(rf"│ +{interrupted[1]} of 100000 │", text)
    assert "No layer blew up" not in text
    assert "test accuracy" in text
    assert (tmp_path / "gradclip-demo.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupt_before_the_first_step_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gradclip._lab.demo.Run", interrupting_run)
    with pytest.raises(KeyboardInterrupt):
        run_demo(DemoSettings(layers=3), tmp_path / "x.png")
    assert "Interrupted after step 0 of 600" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def interrupting_run(title: str, settings: DemoSettings, max_norm: float) -> Run:
    if math.isinf(max_norm):  # once: the second time is for good
        signal.raise_signal(signal.SIGINT)
    return Run(title, settings, max_norm)


def test_a_second_interrupt_is_obeyed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Impatient(Run):
        def evaluate(self) -> None:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("gradclip._lab.demo.Run", Impatient)
    with pytest.raises(KeyboardInterrupt):
        run_demo(DemoSettings(layers=3), tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_one_step_is_enough_for_a_report_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_demo(DemoSettings(layers=2, steps=1), tmp_path / "x.png")
    assert "1 of 1" in capsys.readouterr().out
    assert (tmp_path / "x.png").stat().st_size > 10_000


# What is missing, and what is not loaded.


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
    assert output_of("import gradclip, sys; print('gradclip._lab' in sys.modules)") == "False"
