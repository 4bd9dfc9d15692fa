"""The trainings of docs/examples do what they say; and Keras trains with gradclip as it does by itself."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from processes import output_of

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


# --- Keras ------------------------------------------------------------------------------------------

_KERAS = """
import doctest, json, warnings
# Of Keras's variables, when they are saved.
warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy keyword")
import numpy as np
import keras
import gradclip, gradclip.jax
import gradclip.jax.keras as ours
from gradclip.policies import AdaGC

rng = np.random.default_rng(0)
x, y = rng.standard_normal((64, 8)).astype("float32"), rng.standard_normal((64, 2)).astype("float32")
results = {"examples": doctest.testmod(ours).failed}
"""

# Deep, and far from its targets: every step clips, where anything clips.
_TRAININGS = """
def train(optimizer, *, scale=20.0):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(8, "tanh") for _ in range(2)]
    model = keras.Sequential([keras.Input((8,)), *layers, keras.layers.Dense(2)])
    model.compile(optimizer, loss="mse")
    losses = model.fit(x, scale * y, batch_size=16, epochs=3, verbose=0, shuffle=False).history["loss"]
    return model, losses, [np.asarray(v.value).ravel().tolist() for v in model.trainable_variables]

for name, threshold in [("clipnorm", 0.5), ("global_clipnorm", 0.5), ("clipvalue", 0.01)]:
    def make():
        return keras.optimizers.SGD(0.05, momentum=0.9, **{name: threshold})
    results[name] = train(make())[1:], train(ours.clipping(make()))[1:]
results["unclipped"] = train(keras.optimizers.SGD(0.05, momentum=0.9))[1:]
results["high"] = train(ours.clipping(keras.optimizers.SGD(0.05, momentum=0.9, global_clipnorm=41.0)))[1:]
"""

# One layer of zeros, a learning rate of 1: after a step the weights are the clipped gradients, negative.
_GRADIENTS = """
def gradients(optimizer, *, scale=1.0):
    layer = keras.layers.Dense(2, kernel_initializer="zeros")
    model = keras.Sequential([keras.Input((8,)), layer])
    model.compile(optimizer, loss="mse")
    model.fit(x, scale * y, batch_size=64, epochs=1, verbose=0, shuffle=False)
    return [-np.asarray(v.value) for v in model.trainable_variables]

def sgd(**options):
    return keras.optimizers.SGD(1.0, **options)

clips = {
    "clipnorm": gradclip.clip_by_norm_,
    "global_clipnorm": gradclip.clip_by_global_norm_,
    "clipvalue": gradclip.clip_by_value_,
}
for name, clip in clips.items():
    expected = gradients(sgd())
    assert clip(expected, 0.125).clipped
    found = gradients(ours.clipping(sgd(**{name: 0.125})))
    results["bits " + name] = all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))
# A threshold c for which c * (1 / c) is not 1.
results["bits unclipped"] = all(
    np.array_equal(a, b)
    for a, b in zip(gradients(sgd()), gradients(ours.clipping(sgd(global_clipnorm=41.0))), strict=True)
)
results["norm of 1e20"] = gradclip.global_norm(
    gradients(ours.clipping(sgd(global_clipnorm=1.0)), scale=1e20)
)
"""

_STATES = """
optimizer = ours.clipping(keras.optimizers.Adam(0.01), gradclip.jax.clip_by_global_norm(0.5))
model, losses, _ = train(optimizer)
state = ours.clip_state(model.optimizer)
results["state"] = {
    "losses": losses,
    "steps": int(state.steps),
    "clipped_steps": int(state.clipped_steps),
    "norms": ours.named_norms(optimizer),
    "total_norm": float(state.total_norm),
    "paths": [v.path for v in model.trainable_variables],
}

optimizer = keras.optimizers.Adam(0.01, gradient_accumulation_steps=3)
train(ours.clipping(optimizer, gradclip.jax.clip_by_global_norm(AdaGC())))
results["accumulated"] = int(ours.clip_state(optimizer).steps)

inner = keras.optimizers.SGD(0.01, global_clipnorm=0.5)
model, losses, _ = train(ours.clipping(keras.optimizers.LossScaleOptimizer(inner)))
results["scaled"] = losses

model.save("model.keras")
saved = keras.saving.load_model("model.keras").optimizer.inner_optimizer
results["saved"] = [type(saved).__name__, saved.global_clipnorm]

def error_of(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

results["errors"] = [
    error_of(lambda: ours.clipping(keras.optimizers.SGD())),
    error_of(lambda: ours.clipping(sgd(clipnorm=1.0), gradclip.jax.clip_by_norm(1.0))),
    error_of(lambda: ours.clipping("adam")),
    error_of(lambda: ours.clipping(inner, None) and ours.clip_state(inner)),
    error_of(lambda: ours.clipping(model.optimizer, gradclip.jax.clip_by_norm(1.0))),
]
inner.global_clipnorm = None
results["errors"].append(error_of(lambda: ours.clipping(inner, gradclip.jax.clip_by_norm(1.0))))
"""


@pytest.fixture(scope="module")
def keras_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All that Keras does, in one process of its own: its backend is chosen when it is imported."""
    there = f"import os; os.chdir({str(tmp_path_factory.mktemp('keras'))!r})"
    code = "\n".join([_KERAS, there, _TRAININGS, _GRADIENTS, _STATES, "print(json.dumps(results))"])
    results: dict[str, Any] = json.loads(output_of(code, timeout=240, KERAS_BACKEND="jax"))
    return results


@pytest.mark.parametrize("name", ["clipnorm", "global_clipnorm", "clipvalue"])
def test_keras_trains_as_by_itself(keras_results: dict[str, Any], name: str) -> None:
    (losses, weights), (our_losses, our_weights) = keras_results[name]
    np.testing.assert_allclose(our_losses, losses, rtol=1e-6)
    for ours, theirs, unclipped in zip(our_weights, weights, keras_results["unclipped"][1], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
        assert np.max(np.abs(np.subtract(ours, unclipped))) > 1e-3  # something was clipped


@pytest.mark.parametrize("name", ["clipnorm", "global_clipnorm", "clipvalue", "unclipped"])
def test_keras_gets_the_bits_of_gradclip(keras_results: dict[str, Any], name: str) -> None:
    assert keras_results[f"bits {name}"]


def test_keras_survives_gradients_of_1e20(keras_results: dict[str, Any]) -> None:
    assert keras_results["norm of 1e20"] == pytest.approx(1.0, rel=1e-6)


def test_keras_keeps_the_state_of_a_transformation(keras_results: dict[str, Any]) -> None:
    state = keras_results["state"]
    assert state["losses"][-1] < state["losses"][0]
    assert state["steps"] == state["clipped_steps"] == 12
    assert list(state["norms"]) == state["paths"]
    assert np.linalg.norm(list(state["norms"].values())) == pytest.approx(state["total_norm"], rel=1e-6)
    assert keras_results["accumulated"] == 4  # of 12 batches, three of which make a step


def test_keras_scales_losses_and_saves_its_own_class(keras_results: dict[str, Any]) -> None:
    assert keras_results["scaled"][-1] < keras_results["scaled"][0]
    assert keras_results["saved"] == ["SGD", 0.5]


def test_keras_is_told_what_is_wrong(keras_results: dict[str, Any]) -> None:
    nothing, two, no_optimizer, no_state, *built = keras_results["errors"]
    assert "ValueError: optimizer: expected clipnorm, global_clipnorm or clipvalue, or a transfor" in nothing
    assert "ValueError: transformation: expected none, since the optimizer has a threshold of its own" in two
    assert no_optimizer == "TypeError: optimizer: expected one of Keras, got str"
    assert "ValueError: optimizer: expected one that clips by a transformation of gradclip" in no_state
    assert "threshold of its own" in built[0]
    assert "ValueError: optimizer: expected one that is new, got one that was built" in built[1]


def test_keras_examples_run(keras_results: dict[str, Any]) -> None:
    assert keras_results["examples"] == 0


def test_keras_on_another_backend_is_refused() -> None:
    code = f"{_KERAS}\nours.clipping(keras.optimizers.SGD(0.1, clipnorm=1.0))"
    with pytest.raises(
        AssertionError, match=r"expected Keras to run on JAX \(KERAS_BACKEND=jax\), got 'numpy'"
    ):
        output_of(code, KERAS_BACKEND="numpy")
