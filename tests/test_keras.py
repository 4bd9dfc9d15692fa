"""Keras on PyTorch, which trains through gradclip as by itself: who is reached, what is left to Keras.

(KERAS_BACKEND is set in conftest.py. The other backends: test_keras_backends.py.)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch

import gradclip
import gradclip.keras
from gradclip import _versions
from gradclip.keras import _clip, _optimizers

# Of Keras's variables, when NumPy reads them.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

OPTIONS = {"clipnorm": 0.5, "global_clipnorm": 0.5, "clipvalue": 0.01}
CLIPS: dict[str, Callable[..., gradclip.ClipResult]] = {
    "clipnorm": gradclip.clip_by_norm_,
    "global_clipnorm": gradclip.clip_by_global_norm_,
    "clipvalue": gradclip.clip_by_value_,
}
_RNG = np.random.default_rng(0)
X, Y = (_RNG.standard_normal((64, width)).astype("float32") for width in (8, 2))
STEPS = 12


@pytest.fixture(autouse=True)
def _uninstalled() -> Iterator[None]:
    assert keras.backend.backend() == "torch"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two in a small model mostly wait
    yield
    torch.set_num_threads(threads)
    gradclip.keras.uninstall()


def _train(optimizer: Any) -> tuple[Any, list[float], list[Any]]:
    """Deep, and far from its targets: every step clips, where anything clips."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(8, "tanh") for _ in range(2)]
    model = keras.Sequential([keras.Input((8,)), *layers, keras.layers.Dense(2)])
    model.compile(optimizer, loss="mse")
    losses = model.fit(X, 20 * Y, batch_size=16, epochs=3, verbose=0, shuffle=False).history["loss"]
    return model, losses, [_numpy(v) for v in model.trainable_variables]


def _numpy(variable: Any) -> Any:
    return variable.value.detach().to(torch.float64).numpy()


def _variables(*shapes: tuple[int, ...], dtype: str = "float32") -> list[Any]:
    return [keras.Variable(np.zeros(s), dtype=dtype, name=f"v{i}") for i, s in enumerate(shapes)]


def _step(optimizer: Any, grads: Sequence[Any], variables: Sequence[Any] | None = None) -> list[Any]:
    """Of a learning rate of 1, from zeros: the clipped gradients, as float64."""
    if variables is None:
        variables = _variables(*(tuple(grad.shape) for grad in grads))
    optimizer.apply(list(grads), list(variables))
    return [-_numpy(variable) for variable in variables]


def _sgd(**options: Any) -> Any:
    return keras.optimizers.SGD(1.0, **options)


class OwnClip(keras.optimizers.SGD):  # type: ignore[misc]
    def _clip_gradients(self, grads: Any) -> Any:
        return [grad * 0.25 for grad in grads]


class ClippedAdam(gradclip.keras.ClippingMixin, keras.optimizers.Adam):  # type: ignore[misc]
    pass


# --- The same training --------------------------------------------------------------------------------


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", ["SGD", "Adam", "Nadam"])
def test_the_same_training(kind: str, option: str) -> None:
    def make(**options: Any) -> Any:
        return getattr(keras.optimizers, kind)(0.05, **options)

    _, losses, weights = _train(make(**{option: OPTIONS[option]}))
    with gradclip.keras.patched() as counts:
        _, our_losses, our_weights = _train(make(**{option: OPTIONS[option]}))
    assert counts.taken == {option: STEPS}
    assert not counts.passed_on, counts.reasons
    np.testing.assert_allclose(our_losses, losses, rtol=1e-5)
    _, unclipped_losses, unclipped = _train(make())
    assert unclipped_losses[-1] != losses[-1]
    for ours, theirs, other in zip(our_weights, weights, unclipped, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
        assert np.max(np.abs(ours - other)) > 1e-3  # something was clipped


def test_the_same_training_of_one_optimizer_and_of_a_class() -> None:
    expected = _train(keras.optimizers.Adam(0.05, global_clipnorm=0.5))[1]
    counts = gradclip.keras.stats()
    before = counts.taken["global_clipnorm"]
    one = gradclip.keras.clipping(keras.optimizers.Adam(0.05, global_clipnorm=0.5))
    assert type(one) is type(keras.optimizers.Adam())  # so it keeps its fused update
    np.testing.assert_allclose(_train(one)[1], expected, rtol=1e-5)
    np.testing.assert_allclose(_train(ClippedAdam(0.05, global_clipnorm=0.5))[1], expected, rtol=1e-5)
    assert counts.taken["global_clipnorm"] == before + 2 * STEPS


def test_loss_scaling_and_accumulation() -> None:
    def scaled() -> Any:
        return keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05, clipnorm=0.5))

    def accumulating() -> Any:
        return keras.optimizers.SGD(0.05, global_clipnorm=0.5, gradient_accumulation_steps=3)

    expected = [_train(scaled())[1], _train(accumulating())[1]]
    with gradclip.keras.patched() as counts:
        np.testing.assert_allclose(_train(scaled())[1], expected[0], rtol=1e-5)
        np.testing.assert_allclose(_train(accumulating())[1], expected[1], rtol=1e-5)
    assert counts.taken == {"clipnorm": STEPS, "global_clipnorm": STEPS / 3}
    assert not counts.passed_on
    optimizer = gradclip.keras.clipping(_sgd(clipnorm=2.5, gradient_accumulation_steps=2))
    variables = _variables((2,))
    for value in (3.0, 5.0, 100.0):  # the last one has been added up, no more
        optimizer.apply([torch.full((2,), value)], variables)
    assert gradclip.keras.last_result(optimizer).total_norm == pytest.approx(4 * 2**0.5)


def test_the_optimizer_inside_of_a_loss_scale_optimizer_is_asked() -> None:
    optimizer = gradclip.keras.clipping(keras.optimizers.LossScaleOptimizer(_sgd(clipnorm=0.5)))
    model, _, _ = _train(optimizer)
    names = gradclip.keras.named_norms(optimizer)
    assert list(names) == [variable.path for variable in model.trainable_variables]


def test_what_is_saved_is_keras_own(tmp_path: Path) -> None:
    model, _, _ = _train(gradclip.keras.clipping(keras.optimizers.SGD(0.05, global_clipnorm=0.5)))
    model.save(tmp_path / "model.keras")
    saved = keras.saving.load_model(tmp_path / "model.keras").optimizer
    assert type(saved) is type(keras.optimizers.SGD())
    assert saved.global_clipnorm == 0.5
    assert len(saved.variables) == len(model.optimizer.variables)


def test_a_compiled_step() -> None:
    grads = [torch.tensor([3.0, 4.0]), torch.tensor([12.0])]
    variables = _variables((2,), (1,))
    optimizer = _sgd(global_clipnorm=6.5)
    optimizer.build(variables)
    step: Any = torch.compile(optimizer.apply, backend="eager")
    with gradclip.keras.patched() as counts, torch.no_grad():
        step(grads, variables)
    assert [(-_numpy(v)).tolist() for v in variables] == [[1.5, 2.0], [6.0]]
    assert counts.taken == {"global_clipnorm": 1}
    torch._dynamo.reset()


# --- What is written ----------------------------------------------------------------------------------


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_bits_of_gradclip(option: str, dtype: torch.dtype) -> None:
    grads = [torch.linspace(-1, 2, n, dtype=dtype) for n in (5, 0, 300)]
    expected = [grad.clone() for grad in grads]
    threshold = 0.109375  # of all dtypes: those of gradclip.clip_by_value_ are rounded towards zero
    assert CLIPS[option](expected, threshold).clipped
    clipped = gradclip.keras.clipping(_sgd(**{option: threshold}))._clip_gradients(grads)
    assert all(a is b for a, b in zip(clipped, grads, strict=True)), "in place"
    assert all(torch.equal(a, b) for a, b in zip(clipped, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_have_the_bits_of_keras(dtype: torch.dtype) -> None:
    grads = [torch.linspace(-1, 2, 300, dtype=dtype)]
    expected = _sgd(clipvalue=0.1)._clip_gradients(grads)
    assert torch.equal(expected[0], gradclip.keras.clipping(_sgd(clipvalue=0.1))._clip_gradients(grads)[0])


@pytest.mark.parametrize("option", ["clipnorm", "global_clipnorm"])
def test_1e20_is_clipped(option: str) -> None:
    def grads() -> list[torch.Tensor]:
        return [torch.tensor([3e20, 4e20])]

    alone = _step(_sgd(**{option: 1.0}), grads())[0]
    assert not alone.any() or np.isnan(alone).all(), "Keras has learned it"
    with gradclip.keras.patched():
        np.testing.assert_allclose(_step(_sgd(**{option: 1.0}), grads())[0], [0.6, 0.8], rtol=1e-6)


def test_a_training_survives_1e20() -> None:
    def losses() -> list[float]:
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(2)])
        model.compile(keras.optimizers.SGD(0.1, global_clipnorm=1.0), loss="mae", loss_weights=[1e21])
        history: list[float] = model.fit(X, Y, batch_size=16, epochs=2, verbose=0).history["loss"]
        return history

    assert np.isnan(losses()).any(), "Keras has learned it"
    with gradclip.keras.patched():
        first, second = losses()
    assert second < first


@pytest.mark.parametrize("option", ["clipnorm", "global_clipnorm"])
def test_what_needs_no_clipping_keeps_its_bits(option: str) -> None:
    grads = [torch.linspace(-1, 2, 300)]  # c * (1 / c) is not 1 for 41
    original, version = grads[0].clone(), grads[0]._version
    gradclip.keras.clipping(_sgd(**{option: 41.0}))._clip_gradients(grads)
    assert torch.equal(grads[0], original)
    assert grads[0]._version == version, "nothing was written"


def test_mixed_dtypes() -> None:
    dtypes = [torch.float16, torch.float32, torch.bfloat16, torch.float64]
    grads = [torch.linspace(-1, 2, 100, dtype=dtype) for dtype in dtypes]
    exact = [grad.double() / torch.cat([each.double() for each in grads]).norm() for grad in grads]
    theirs = _sgd(global_clipnorm=1.0)._clip_gradients(grads)
    ours = gradclip.keras.clipping(_sgd(global_clipnorm=1.0))._clip_gradients(grads)
    for a, b, expected, dtype in zip(ours, theirs, exact, dtypes, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
        torch.testing.assert_close(b.double(), expected, rtol=2e-2, atol=1e-3)  # summed in 16 bits


# --- What may come -------------------------------------------------------------------------------------


def test_missing_gradients() -> None:
    variables = _variables((2,), (3,), (1,))
    optimizer = gradclip.keras.clipping(_sgd(global_clipnorm=6.5))
    grads = [torch.tensor([3.0, 4.0]), None, torch.tensor([12.0])]
    with pytest.warns(UserWarning, match="Gradients do not exist for variables"):
        clipped = _step(optimizer, grads, variables)
    assert [each.tolist() for each in clipped] == [[1.5, 2.0], [0.0] * 3, [6.0]]
    assert gradclip.keras.named_norms(optimizer) == {"v0": 5.0, "v2": 12.0}
    assert optimizer._clip_gradients([None]) == [None]


def test_no_gradients() -> None:
    optimizer = gradclip.keras.clipping(_sgd(global_clipnorm=1.0))
    optimizer.apply([])
    assert optimizer._clip_gradients([]) == []
    with gradclip.keras.patched() as counts:
        model = keras.Sequential([keras.Input((8,)), keras.layers.ReLU()])
        model.compile(_sgd(global_clipnorm=1.0), loss="mse")
        with pytest.warns(UserWarning, match="does not have any trainable weights"):
            model.fit(X, X, epochs=1, verbose=0)
    assert not counts.taken
    assert not counts.passed_on


def test_nothing_to_clip_by() -> None:
    grads = [torch.tensor([3.0, 4.0])]
    with gradclip.keras.patched() as counts:
        assert _step(_sgd(), grads)[0].tolist() == [3.0, 4.0]
        assert _step(_sgd(clipnorm=0.0), grads)[0].tolist() == [3.0, 4.0]
    assert not counts.taken
    assert not counts.passed_on


@pytest.mark.parametrize("option", ["clipnorm", "global_clipnorm"])
def test_nan_is_not_lost(option: str) -> None:
    def grads(bad: float) -> list[torch.Tensor]:
        return [torch.tensor([3.0, bad]), torch.tensor([12.0])]

    optimizer = gradclip.keras.clipping(_sgd(**{option: 1.0}))
    for bad in (math.nan, math.inf):
        theirs = _step(_sgd(**{option: 1.0}), grads(bad))
        ours = _step(optimizer, grads(bad), variables := _variables((2,), (1,)))
        assert gradclip.keras.last_result(optimizer).nonfinite == (variables[0].path,)
        if option == "global_clipnorm" and bad == math.inf:  # all is NaN to Keras
            theirs = [np.array([0.0, math.nan]), np.array([0.0])]
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b)
        optimizer = gradclip.keras.clipping(_sgd(**{option: 1.0}))


def _twice() -> list[Any]:
    grad = torch.tensor([3.0, 4.0])
    return [grad, grad]


UNSUPPORTED: dict[str, tuple[Callable[[], list[Any]], str]] = {
    "integers": (lambda: [torch.tensor([3, 4]), torch.tensor([12])], "v0: expected"),
    "one of integers": (lambda: [torch.tensor([3.0, 4.0]), torch.tensor([12])], "v1: expected"),
    "requiring grad": (
        lambda: [torch.tensor([3.0, 4.0], requires_grad=True) * 1, torch.tensor([12.0])],
        "v0: expected",
    ),
    "twice the same": (_twice, "v1"),
    "a subclass": (
        lambda: [torch.nn.Parameter(torch.tensor([3.0, 4.0]))],
        "v0: expected a torch.Tensor, got",
    ),
    "a variable": (
        lambda: [torch.tensor([3.0, 4.0]), keras.Variable(np.ones(1))],
        "v1: expected a torch.Tens",
    ),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_what_is_not_supported_is_left_to_keras(kind: str) -> None:
    make, named = UNSUPPORTED[kind]
    expected = _step(_sgd(global_clipnorm=1.0), make())
    grads = make()
    before = [np.array(keras.ops.convert_to_numpy(grad)) for grad in grads]
    optimizer = _sgd(global_clipnorm=1.0)
    with gradclip.keras.patched() as counts:
        found = _step(optimizer, grads)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    for grad, original in zip(grads, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(grad), original)  # nothing was written
    assert counts.passed_on == {"global_clipnorm": 1}
    assert not counts.taken
    ((reason, number),) = counts.reasons.items()
    assert number == 1
    assert named in reason
    with pytest.raises(ValueError, match="optimizer: expected one whose last step was clipped by gradclip"):
        gradclip.keras.last_result(optimizer)


class HalfClip(keras.optimizers.SGD):  # type: ignore[misc]
    def _clip_gradients(self, grads: Any) -> Any:
        return [grad / 2 for grad in super()._clip_gradients(grads)]


def test_a_clip_of_its_own_that_calls_keras_own_is_reached() -> None:
    with gradclip.keras.patched() as counts:
        assert _step(HalfClip(1.0, clipnorm=2.5), [torch.tensor([3.0, 4.0])])[0].tolist() == [0.75, 1.0]
    assert counts.taken == {"clipnorm": 1}
    assert not counts.passed_on


def test_an_optimizer_with_a_clip_of_its_own_is_left_alone() -> None:
    with gradclip.keras.patched() as counts:
        assert _step(OwnClip(1.0, clipnorm=1.0), [torch.tensor([3.0, 4.0])])[0].tolist() == [0.75, 1.0]
    assert counts.passed_on == {"_clip_gradients": 1}
    assert counts.reasons == {"OwnClip has a _clip_gradients of its own": 1}
    with pytest.raises(
        TypeError, match="optimizer: expected an optimizer that clips as Keras does, got OwnC"
    ):
        gradclip.keras.clipping(OwnClip(1.0, clipnorm=1.0))
    with pytest.raises(TypeError, match="Both: expected an optimizer that clips as Keras does, got OwnClip"):
        type("Both", (gradclip.keras.ClippingMixin, OwnClip), {})


def test_what_is_no_optimizer_of_keras_is_refused() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    for other, name in ((torch.optim.SGD([parameter]), "torch.optim.sgd.SGD"), ("adam", "builtins.str")):
        for call in (gradclip.keras.clipping, gradclip.keras.last_result, gradclip.keras.clip_state):
            with pytest.raises(
                TypeError, match=f"optimizer: expected a keras.optimizers.Optimizer, got a {name}"
            ):
                call(other)
    with pytest.raises(
        TypeError,
        match=r"Other: expected ClippingMixin before a keras\.optimizers\.Optimizer, got Cl.*, Adam",
    ):
        type("Other", (gradclip.keras.ClippingMixin, torch.optim.Adam), {})
    with pytest.raises(TypeError, match=r"before a keras\.optimizers\.Optimizer, got Adam, ClippingMixin"):
        type("Behind", (keras.optimizers.Adam, gradclip.keras.ClippingMixin), {})


def test_a_mixin_of_ones_own() -> None:
    class Mine(gradclip.keras.ClippingMixin):
        pass

    optimizer = type("MySGD", (Mine, keras.optimizers.SGD), {})(1.0, clipnorm=2.5)
    assert _step(optimizer, [torch.tensor([3.0, 4.0])])[0].tolist() == [1.5, 2.0]
    assert gradclip.keras.last_result(optimizer).clipped


def test_what_one_optimizer_is_given_is_checked() -> None:
    with pytest.raises(
        ValueError, match="expected clipnorm, global_clipnorm or clipvalue, or a transformation"
    ):
        gradclip.keras.clipping(_sgd())
    with pytest.raises(ValueError, match=r"unless Keras runs on JAX \(KERAS_BACKEND=jax\), got 'torch'"):
        gradclip.keras.clipping(_sgd(), "any")
    with pytest.raises(ValueError, match="optimizer: expected one that clips by a transformation"):
        gradclip.keras.clip_state(_sgd())


def test_other_backends_are_left_to_keras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_clip, "BACKEND", "tensorflow")
    monkeypatch.setattr(_optimizers, "BACKEND", "tensorflow")
    with gradclip.keras.patched() as counts:
        assert _step(_sgd(clipnorm=2.5), [torch.tensor([3.0, 4.0])])[0].tolist() == [1.5, 2.0]
    assert counts.passed_on == {"clipnorm": 1}
    assert counts.reasons == {
        "expected Keras to run on torch, jax, numpy, got tensorflow, where it clips by itself": 1
    }
    with pytest.raises(ValueError, match=r"Keras to run on torch, jax, numpy \(KERAS_BACKEND\), got 'tensor"):
        gradclip.keras.clipping(_sgd(clipnorm=1.0))


# --- What was measured ----------------------------------------------------------------------------------


@pytest.mark.parametrize("option", OPTIONS)
def test_the_last_result(option: str) -> None:
    first, second = _variables((2,), (1,))
    optimizer = gradclip.keras.clipping(_sgd(**{option: 1.0}))
    with pytest.raises(ValueError, match=r"optimizer: expected one whose last step was clipped by gradclip$"):
        gradclip.keras.last_result(optimizer)
    optimizer.build([first, second])
    optimizer.apply([torch.tensor([12.0]), torch.tensor([3.0, 4.0])], [second, first])  # in another order
    result = gradclip.keras.last_result(optimizer)
    of_first = 4.0 if option == "clipvalue" else 5.0
    assert result.named_norms() == {"v1": 12.0, "v0": of_first}
    assert result.total_norm == (12.0 if option == "clipvalue" else 13.0)
    assert result.clipped
    if option == "clipnorm":
        assert result.named_group_norms() == result.named_norms()
    else:
        assert result.group_names is None
    # Gradients that came without their variables have no names.
    optimizer._clip_gradients([torch.tensor([1.0, 0.0])])
    assert gradclip.keras.last_result(optimizer).names is None


def test_variables_of_one_name() -> None:
    variables = [keras.Variable(np.zeros(1), name=name) for name in ("w", "b", "w")]
    optimizer = gradclip.keras.clipping(_sgd(global_clipnorm=1.0))
    _step(optimizer, [torch.tensor([value]) for value in (1.0, 2.0, 3.0)], variables)
    assert gradclip.keras.named_norms(optimizer) == {"w[0]": 1.0, "b": 2.0, "w[2]": 3.0}


# --- Installing -----------------------------------------------------------------------------------------


def _is_ours() -> bool:
    return bool(np.isfinite(_step(_sgd(global_clipnorm=1.0), [torch.full((4,), 1e20)])[0]).all())


def test_installing_twice_and_nesting() -> None:
    owner = keras.optimizers.Optimizer
    own = [getattr(owner, name) for name in ("_clip_gradients", "_backend_apply_gradients")]
    optimizer = _sgd(global_clipnorm=1.0)  # made before
    gradclip.keras.install()
    gradclip.keras.install()
    assert np.isfinite(_step(optimizer, [torch.full((4,), 1e20)])[0]).all()
    with gradclip.keras.patched() as counts:
        assert _is_ours()
    assert _is_ours(), "it was installed before the block"
    assert counts.taken == {"global_clipnorm": 3}
    gradclip.keras.uninstall()
    assert not _is_ours()
    gradclip.keras.uninstall()
    assert [getattr(owner, name) for name in ("_clip_gradients", "_backend_apply_gradients")] == own
    with pytest.raises(ZeroDivisionError), gradclip.keras.patched():
        assert 1 // int(not _is_ours()), "never reached"
    assert not _is_ours()


def test_two_ways_at_once_clip_once() -> None:
    one = gradclip.keras.clipping(keras.optimizers.Adam(clipnorm=2.5))
    with gradclip.keras.patched() as counts:
        for optimizer in (one, ClippedAdam(clipnorm=2.5)):
            _step(optimizer, [torch.tensor([3.0, 4.0])])
            assert gradclip.keras.last_result(optimizer).coefficient.tolist() == [0.5]  # type: ignore[union-attr]
            _step(optimizer, [torch.tensor([3, 4])], optimizer._trainable_variables)
    assert counts.taken == {"clipnorm": 2}
    assert counts.passed_on == {"clipnorm": 2}


def test_a_keras_that_is_built_otherwise_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = keras.optimizers.Optimizer
    monkeypatch.setattr(owner, "_clip_gradients", lambda self, grads, more: grads)
    with pytest.raises(
        RuntimeError,
        match=r"_clip_gradients: expected a method of self, grads, as of Keras 3\.15, got self, grads, more",
    ):
        gradclip.keras.install()
    assert not hasattr(owner._backend_apply_gradients, "is_gradclip")


# --- Versions -------------------------------------------------------------------------------------------


def test_a_keras_that_was_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_versions, "_warned", set())
    monkeypatch.setattr(_versions, "version", lambda package: "3.150.1")
    with pytest.warns(UserWarning, match="which gradclip was tried with") as caught:
        gradclip.keras.install()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradclip.keras.clipping(_sgd(clipnorm=1.0))  # once
    (warning,) = caught
    assert str(warning.message) == "keras: expected 3.15, which gradclip was tried with, got 3.150.1"
    assert warning.filename == __file__
    assert _is_ours(), "all the same"


@pytest.mark.parametrize("installed", ["3.15", "3.15.1", "4.0.dev1"])
def test_versions_that_were_tried(monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    monkeypatch.setattr(_versions, "_warned", set())
    monkeypatch.setattr(_versions, "version", lambda package: installed)
    _versions.warn_if_untried("any", ["3.15", "4.0"])  # warnings are errors
