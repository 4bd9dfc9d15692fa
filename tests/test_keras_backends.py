"""Keras on JAX and on NumPy clips through gradclip, each in a process of its own.

A process has the backend that Keras found when it was imported. (On PyTorch: test_keras.py.)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from processes import output_of

_START = """
import json, sys, warnings
# Of Keras's variables, when they are saved.
warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy keyword")
import numpy as np
import keras
sys.modules["optax"] = None  # which is needed for transformations alone
before = set(sys.modules)
import gradclip, gradclip.keras as ours
results = {"imported": sorted(set(sys.modules) - before)}

rng = np.random.default_rng(0)
x, y = rng.standard_normal((64, 8)).astype("float32"), rng.standard_normal((64, 2)).astype("float32")

def sgd(**options):
    return keras.optimizers.SGD(1.0, **options)

class OwnClip(keras.optimizers.SGD):
    def _clip_gradients(self, grads):
        return [grad * 0.25 for grad in grads]

def step(optimizer, *grads):
    # Of a learning rate of 1, from zeros: the clipped gradients.
    variables = [keras.Variable(np.zeros(g.shape, "float32"), name=f"v{i}") for i, g in enumerate(grads)]
    optimizer.apply([keras.ops.array(g) for g in grads], variables)
    return [(-np.asarray(v.value)).tolist() for v in variables]

def error_of(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def counted():
    counts = ours.stats()
    return [dict(counts.taken), dict(counts.passed_on), dict(counts.reasons)]

# What is clipped the same way on both.
large = [np.array([3e20, 4e20], "float32")]
halved = [np.array([3.0, 4.0], "float32"), np.array([12.0], "float32")]
with np.errstate(all="ignore"):
    results["theirs 1e20"] = step(sgd(global_clipnorm=1.0), *large)
with ours.patched():
    results["1e20"] = [step(sgd(**{name: 1.0}), *large)[0] for name in ("clipnorm", "global_clipnorm")]
    results["halved"] = step(sgd(global_clipnorm=6.5), *halved)
    results["values"] = step(sgd(clipvalue=3.5), *halved)
    results["counts"] = counted()
with ours.patched():
    results["integers"] = step(sgd(clipnorm=1.0), np.array([3, 4]))
    results["own"] = step(OwnClip(1.0), np.array([3.0, 4.0], "float32"))
    results["left to Keras"] = counted()
with np.errstate(all="ignore"):
    results["unpatched"] = step(sgd(global_clipnorm=1.0), *large)

class Clipped(ours.ClippingMixin, keras.optimizers.SGD):
    pass

results["mixin"] = step(Clipped(1.0, global_clipnorm=1.0), *large)
results["no optimizer"] = error_of(lambda: ours.clipping("adam"))
"""

# Deep, and far from its targets: every step clips, where anything clips.
_TRAININGS = """
del sys.modules["optax"]
import gradclip.jax
from gradclip.policies import AdaGC

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
    with ours.patched():
        installed = train(make())[1:]
        taken = dict(ours.stats().taken)
    results[name] = train(make())[1:], installed, taken
results["unclipped"] = train(keras.optimizers.SGD(0.05, momentum=0.9))[1:]
"""

# One layer of zeros, a learning rate of 1: after a step the weights are the clipped gradients, negative.
_GRADIENTS = """
def gradients(optimizer, *, scale=1.0):
    layer = keras.layers.Dense(2, kernel_initializer="zeros")
    model = keras.Sequential([keras.Input((8,)), layer])
    model.compile(optimizer, loss="mse")
    model.fit(x, scale * y, batch_size=64, epochs=1, verbose=0, shuffle=False)
    return [-np.asarray(v.value) for v in model.trainable_variables]

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

results["errors"] = [
    error_of(lambda: ours.clipping(keras.optimizers.SGD())),
    error_of(lambda: ours.clipping(sgd(clipnorm=1.0), gradclip.jax.clip_by_norm(1.0))),
    error_of(lambda: ours.last_result(sgd(clipnorm=1.0))),
    error_of(lambda: ours.clipping(inner, None) and ours.clip_state(inner)),
    error_of(lambda: ours.clipping(model.optimizer, gradclip.jax.clip_by_norm(1.0))),
]
inner.global_clipnorm = None
results["errors"].append(error_of(lambda: ours.clipping(inner, gradclip.jax.clip_by_norm(1.0))))
"""


_NUMPY = """
variables = [keras.Variable(np.zeros(n, "float32"), name=f"v{n}") for n in (2, 1)]
optimizer = ours.clipping(keras.optimizers.Adam(0.1, global_clipnorm=1.0))
for gradient in (3.0, 30.0):
    grads = [np.full(2, gradient, "float32"), np.full(1, 4.0, "float32")]
    optimizer.apply(grads, variables)
results["in place"] = float(gradclip.global_norm(grads))
results["norms"] = ours.last_result(optimizer).named_norms()
frozen = np.array([3.0, 4.0], "float32")
frozen.flags.writeable = False
with ours.patched():
    optimizer, variables = sgd(global_clipnorm=2.5), [keras.Variable(np.zeros(2, "float32"), name="v0")]
    optimizer.apply([frozen], variables)
    results["frozen"] = (-variables[0].value).tolist()
    results["left to Keras"] += counted()
results["errors"] = [error_of(lambda: ours.clipping(sgd(), "any")), error_of(lambda: ours.clip_state(sgd()))]
"""

BACKENDS = ("jax", "numpy")


def _results(where: Path, backend: str, *parts: str) -> dict[str, Any]:
    """All that Keras does on a backend, in one process."""
    there = f"import os; os.chdir({str(where)!r})"
    code = "\n".join([there, _START, *parts, "print(json.dumps(results))"])
    results: dict[str, Any] = json.loads(output_of(code, KERAS_BACKEND=backend))
    return results


@pytest.fixture(scope="module")
def on_jax(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _results(tmp_path_factory.mktemp("keras"), "jax", _TRAININGS, _GRADIENTS, _STATES)


@pytest.fixture(scope="module")
def on_numpy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _results(tmp_path_factory.mktemp("keras"), "numpy", _NUMPY)


@pytest.fixture(params=BACKENDS)
def on_both(request: pytest.FixtureRequest) -> dict[str, Any]:
    results: dict[str, Any] = request.getfixturevalue(f"on_{request.param}")
    return results


# --- On both --------------------------------------------------------------------------------------------


def test_what_is_clipped(on_both: dict[str, Any]) -> None:
    theirs = on_both["theirs 1e20"][0]
    assert not np.any(theirs) or np.isnan(theirs).all(), "Keras has learned it"
    assert on_both["unpatched"][0] == pytest.approx(theirs, nan_ok=True)
    for found in (*on_both["1e20"], on_both["mixin"][0]):
        assert found == pytest.approx([0.6, 0.8], rel=1e-6)
    assert on_both["halved"] == [[1.5, 2.0], [6.0]]
    assert on_both["values"] == [[3.0, 3.5], [3.5]]
    assert on_both["counts"] == [{"clipnorm": 1, "global_clipnorm": 2, "clipvalue": 1}, {}, {}]


def test_what_is_left_to_keras(on_both: dict[str, Any]) -> None:
    assert on_both["integers"][0] == pytest.approx([0.6, 0.8], rel=1e-6)
    assert on_both["own"] == [[0.75, 1.0]]
    taken, passed_on, reasons = on_both["left to Keras"][:3]
    assert not taken
    assert passed_on == {"clipnorm": 1, "_clip_gradients": 1}
    of_integers, of_own = reasons
    assert of_integers.startswith("v0: expected")
    assert of_own == "OwnClip has a _clip_gradients of its own"
    assert on_both["no optimizer"] == (
        "TypeError: optimizer: expected a keras.optimizers.Optimizer, got a builtins.str"
    )


# --- NumPy ----------------------------------------------------------------------------------------------


def test_numpy(on_numpy: dict[str, Any]) -> None:
    assert on_numpy["in place"] == pytest.approx(1.0, rel=1e-6)
    assert on_numpy["norms"] == {"v2": pytest.approx(30 * 2**0.5), "v1": 4.0}
    assert on_numpy["frozen"] == pytest.approx([1.5, 2.0])
    passed_on, reasons = on_numpy["left to Keras"][4:]
    assert passed_on == {"global_clipnorm": 1}
    assert next(iter(reasons)).startswith("v0: expected writable memory")
    no_jax, no_state = on_numpy["errors"]
    assert no_jax.startswith("ValueError: transformation: expected none, unless Keras runs on JAX")
    assert no_state.startswith("ValueError: optimizer: expected one that clips by a transformation")


def test_no_other_framework_is_imported(on_numpy: dict[str, Any]) -> None:
    imported = {name for name in on_numpy["imported"] if not name.startswith("gradclip")}
    assert not {name.partition(".")[0] for name in imported} & {
        "jax",
        "jaxlib",
        "torch",
        "optax",
        "tensorflow",
    }
    assert not {"gradclip.jax", "gradclip.torch"} & set(on_numpy["imported"])


def test_without_keras_it_says_what_to_install() -> None:
    code = """
    import sys
    sys.modules["keras"] = None
    import gradclip
    try:
        import gradclip.keras
    except ModuleNotFoundError as error:
        print(error.name, error)
    """
    assert output_of(code) == (
        "keras gradclip.keras: expected Keras 3 to be installed: pip install 'gradclip[keras]'"
    )


# --- JAX ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clipnorm", "global_clipnorm", "clipvalue"])
def test_jax_trains_as_by_itself(on_jax: dict[str, Any], name: str) -> None:
    (losses, weights), (our_losses, our_weights), taken = on_jax[name]
    assert taken == {name: 1}  # one step was traced
    np.testing.assert_allclose(our_losses, losses, rtol=1e-6)
    for ours, theirs, unclipped in zip(our_weights, weights, on_jax["unclipped"][1], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
        assert np.max(np.abs(np.subtract(ours, unclipped))) > 1e-3  # something was clipped


@pytest.mark.parametrize("name", ["clipnorm", "global_clipnorm", "clipvalue", "unclipped"])
def test_jax_gets_the_bits_of_gradclip(on_jax: dict[str, Any], name: str) -> None:
    assert on_jax[f"bits {name}"]


def test_jax_survives_gradients_of_1e20(on_jax: dict[str, Any]) -> None:
    assert on_jax["norm of 1e20"] == pytest.approx(1.0, rel=1e-6)


def test_jax_keeps_the_state_of_a_transformation(on_jax: dict[str, Any]) -> None:
    state = on_jax["state"]
    assert state["losses"][-1] < state["losses"][0]
    assert state["steps"] == state["clipped_steps"] == 12
    assert list(state["norms"]) == state["paths"]
    assert np.linalg.norm(list(state["norms"].values())) == pytest.approx(state["total_norm"], rel=1e-6)
    assert on_jax["accumulated"] == 4  # of 12 batches, three of which make a step


def test_jax_scales_losses_and_saves_keras_own_class(on_jax: dict[str, Any]) -> None:
    assert on_jax["scaled"][-1] < on_jax["scaled"][0]
    assert on_jax["saved"] == ["SGD", 0.5]


def test_jax_says_what_is_wrong(on_jax: dict[str, Any]) -> None:
    nothing, two, no_result, no_state, *built = on_jax["errors"]
    assert "ValueError: optimizer: expected clipnorm, global_clipnorm or clipvalue, or a transfor" in nothing
    assert "ValueError: transformation: expected none, since the optimizer has a threshold of its own" in two
    assert no_result.endswith("last step was clipped by gradclip, on JAX by a transformation: see clip_state")
    assert "ValueError: optimizer: expected one that clips by a transformation of gradclip" in no_state
    assert "threshold of its own" in built[0]
    assert "ValueError: optimizer: expected one that is new, got one that was built" in built[1]
