"""The laboratory's networks: right gradients, theory that holds, training that does what its axes say."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("sklearn")

import gradclip
from gradclip._lab.data import CONTEXT, Data, batches, english, split_digits, split_text
from gradclip._lab.experiment import AXES, EXPLOSION, Settings, _explosion, merged, run
from gradclip._lab.layers import (
    ACTIVATIONS,
    INITIALISATIONS,
    LSTM,
    Activation,
    Array,
    BatchNorm,
    Chain,
    Dense,
    Elman,
    Layer,
    LayerNorm,
    Residual,
    initial_weight,
    rms,
)
from gradclip._lab.networks import (
    Network,
    cross_entropy,
    elman,
    layer_gains,
    lstm,
    memory,
    multilayer,
    per_layer,
)
from gradclip._lab.training import (
    CLIPPINGS,
    REGULARISATIONS,
    SCHEDULES,
    Clip,
    History,
    Training,
    find_blow_up,
    one_thread,
)
from gradclip.policies import AGC, AutoClip, ZClip

Floats = npt.NDArray[np.float64]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def moved(network: Network, rng: np.random.Generator) -> Network:
    """With no parameter left at 0 or 1, where a wrong gradient may look right."""
    for parameter in network.parameters.values():
        parameter[:] += 0.3 * rng.standard_normal(parameter.shape)
    return network


def by_differences(value: Callable[[], float], array: Array, step: float = 1e-6) -> Floats:
    """The derivative of a value by every element of an array that it depends on."""
    found = np.empty(array.shape)
    for index in np.ndindex(array.shape):
        before = array[index]
        array[index] = before + step
        above = value()
        array[index] = before - step
        found[index] = (above - value()) / (2 * step)
        array[index] = before
    return found


def check_gradients(network: Network, x: Array, labels: npt.NDArray[np.int64]) -> dict[str, Array]:
    def value() -> float:
        return cross_entropy(network.forward(x), labels)[0]

    loss, found = network.loss_and_gradients(x, labels)
    gradients = {name: g.copy() for name, g in found.items()}
    assert loss == value()
    assert list(gradients) == list(network.parameters)
    for name, parameter in network.parameters.items():
        expected = by_differences(value, parameter)
        np.testing.assert_allclose(gradients[name], expected, rtol=1e-6, atol=2e-9, err_msg=name)
    return gradients


# Gradients.


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("normalisation", AXES["normalisation"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_of_a_multilayer_perceptron_is_the_derivative_of_its_loss(
    activation: str, normalisation: str, residual: bool
) -> None:
    rng = np.random.default_rng(1)
    network = multilayer(
        [4, 5, 5, 5, 3], activation, "xavier", rng,
        gain=1.3, normalisation=normalisation, residual=residual, dtype=np.float64,
    )  # fmt: skip
    assert [type(layer) for layer in network.layers.values()] == [
        Chain, *[Residual if residual else Chain] * 2, Chain,
    ]  # fmt: skip
    gradients = check_gradients(moved(network, rng), rng.standard_normal((7, 4)), rng.integers(0, 3, 7))
    assert min(np.abs(g).max() for name, g in gradients.items() if name.endswith("weight")) > 1e-3


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_backward_of_an_elman_network_is_the_derivative_of_its_loss(activation: str) -> None:
    rng = np.random.default_rng(2)
    network = elman(4, 5, 3, activation, "xavier", rng, gain=1.2, dtype=np.float64)
    x, labels = rng.standard_normal((3, 6, 4)), rng.integers(0, 3, (3, 6))
    gradients = check_gradients(moved(network, rng), x, labels)
    assert min(np.abs(gradient).max() for gradient in gradients.values()) > 1e-3


def test_backward_of_an_lstm_is_the_derivative_of_its_loss() -> None:
    rng = np.random.default_rng(3)
    network = lstm(4, 5, 3, "xavier", rng, gain=1.2, dtype=np.float64)
    x, labels = rng.standard_normal((3, 6, 4)), rng.integers(0, 3, (3, 6))
    gradients = check_gradients(moved(network, rng), x, labels)
    assert min(np.abs(gradient).max() for gradient in gradients.values()) > 1e-3


def _layers() -> dict[str, tuple[Layer, tuple[int, ...]]]:
    rng = np.random.default_rng(4)
    square, wide = rng.standard_normal((4, 4)), rng.standard_normal((4, 16))
    return {
        "dense": (Dense(square), (6, 4)),
        "layer norm": (LayerNorm(4, np.float64), (6, 4)),
        "batch norm": (BatchNorm(4, np.float64), (6, 4)),
        "chain": (Chain(dense=Dense(square), activation=Activation("sine")), (6, 4)),
        "residual": (Residual(dense=Dense(square), activation=Activation("gelu")), (6, 4)),
        "elman": (Elman(square, 0.7 * square.T, "tanh"), (3, 5, 4)),
        "lstm": (LSTM(wide, wide[:, ::-1].copy()), (3, 5, 4)),
    }


@pytest.mark.parametrize("name", _layers())
def test_backward_returns_the_derivative_by_the_input(name: str) -> None:
    layer, shape = _layers()[name]
    rng = np.random.default_rng(5)
    x = rng.standard_normal(shape)
    delta = rng.standard_normal(layer.forward(x).shape)
    found = layer.backward(delta)
    expected = by_differences(lambda: float((delta * layer.forward(x)).sum()), x)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes_are_those_of_the_functions(activation: str) -> None:
    function, slope = ACTIVATIONS[activation]
    x = np.array([-30.0, -3.0, -0.7, -1e-3, 1e-3, 0.4, 2.0, 30.0])
    np.testing.assert_allclose(slope(x), (function(x + 1e-6) - function(x - 1e-6)) / 2e-6, atol=1e-7)


def test_activations_are_the_functions_of_their_names() -> None:
    x = np.array([-3.0, -0.5, 0.0, 0.5, 3.0])
    expected: dict[str, Any] = {
        "linear": x,
        "relu": [0, 0, 0, 0.5, 3],
        "leaky relu": [-0.03, -0.005, 0, 0.5, 3],
        "gelu": [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x],
        "tanh": [math.tanh(v) for v in x],
        "sigmoid": [1 / (1 + math.exp(-v)) for v in x],
        "sine": [math.sin(v) for v in x],
    }
    assert list(expected) == list(ACTIVATIONS)
    for name, values in expected.items():
        near = 5e-4 if name == "gelu" else 1e-14  # its authors' approximation
        np.testing.assert_allclose(ACTIVATIONS[name][0](x), values, atol=near, err_msg=name)


def test_cross_entropy_is_the_negative_logarithm_of_the_probability_of_the_right_class() -> None:
    rng = np.random.default_rng(6)
    logits, labels = 3 * rng.standard_normal((5, 2, 4)), rng.integers(0, 4, (5, 2))
    losses = [
        -math.log(math.exp(logits[i, t, labels[i, t]]) / math.fsum(map(math.exp, logits[i, t])))
        for i in range(5)
        for t in range(2)
    ]
    loss, gradient = cross_entropy(logits, labels)
    assert loss == pytest.approx(math.fsum(losses) / 10, rel=1e-14)
    expected = by_differences(lambda: cross_entropy(logits, labels)[0], logits)
    np.testing.assert_allclose(gradient, expected, atol=1e-9)


def test_cross_entropy_of_logits_that_exp_cannot_hold_is_right() -> None:
    loss, gradient = cross_entropy(np.array([[1e4, 0.0], [-1e4, 0.0]]), np.array([1, 1]))
    assert loss == 5000.0
    assert gradient.tolist() == [[0.5, -0.5], [0.0, 0.0]]


def test_gradients_have_the_dtype_of_the_parameters() -> None:
    rng = np.random.default_rng(7)
    x, labels = rng.standard_normal((7, 5)).astype(np.float32), rng.integers(0, 4, 7)
    for activation in ACTIVATIONS:
        for normalisation in AXES["normalisation"]:
            network = multilayer([5, 6, 6, 4], activation, "he", rng, normalisation=normalisation)
            gradients = network.loss_and_gradients(x, labels)[1]
            assert {g.dtype for g in gradients.values()} == {np.dtype(np.float32)}, (
                activation,
                normalisation,
            )


# Testing.


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_testing_uses_the_running_statistics_of_batch_normalisation(residual: bool) -> None:
    rng = np.random.default_rng(8)
    network = multilayer(
        [3, 4, 4, 2], "tanh", "xavier", rng, normalisation="batch", residual=residual, dtype=np.float64
    )
    p = moved(network, rng).parameters

    def dense(x: Floats, layer: int) -> Floats:
        return np.asarray(x @ p[f"layer0{layer}.weight"] + p[f"layer0{layer}.bias"])

    def after(x: Floats, layer: int, mean: Floats, variance: Floats) -> Floats:
        z = (dense(x, layer) - mean) / np.sqrt(variance + 1e-5)
        y = np.tanh(z * p[f"layer0{layer}.norm.scale"] + p[f"layer0{layer}.norm.shift"])
        return x + y if residual and layer == 2 else y

    statistics = {layer: (np.zeros(4), np.ones(4)) for layer in (1, 2)}
    for _ in range(5):
        x = 5 + 2 * rng.standard_normal((20, 3))  # shifted: far from mean 0 and variance 1
        network.loss_and_gradients(x, rng.integers(0, 2, 20))
        for layer in (1, 2):
            mean, variance = dense(x, layer).mean(axis=0), dense(x, layer).var(axis=0)
            before = statistics[layer]
            statistics[layer] = (0.9 * before[0] + 0.1 * mean, 0.9 * before[1] + 0.1 * variance)
            x = after(x, layer, mean, variance)

    test_x, labels = 5 + 2 * rng.standard_normal((6, 3)), rng.integers(0, 2, 6)
    for chosen in (slice(None), slice(0, 1)):  # of one example the batch has no variance
        logits = dense(after(after(test_x[chosen], 1, *statistics[1]), 2, *statistics[2]), 3)
        for _ in range(2):  # testing teaches nothing
            loss, accuracy = network.evaluate(test_x[chosen], labels[chosen])
            assert loss == pytest.approx(cross_entropy(logits, labels[chosen])[0], rel=1e-12)
            assert accuracy == np.mean(logits.argmax(axis=1) == labels[chosen])
    # And training goes on with those of its batch.
    first = network.loss_and_gradients(test_x, labels)[0]
    assert first == network.loss_and_gradients(test_x, labels)[0]
    assert first != pytest.approx(network.evaluate(test_x, labels)[0], rel=1e-3)


def test_without_batch_normalisation_training_and_testing_use_the_same_network() -> None:
    rng = np.random.default_rng(9)
    for normalisation in ("none", "layer"):
        network = multilayer([5, 7, 7, 4], "relu", "he", rng, normalisation=normalisation, dtype=np.float64)
        x, labels = rng.standard_normal((9, 5)), rng.integers(0, 4, 9)
        assert network.evaluate(x, labels)[0] == network.loss_and_gradients(x, labels)[0]


def test_outputs_that_are_not_finite_are_not_right() -> None:
    network = multilayer([5, 7, 4], "relu", "he", np.random.default_rng(10))
    x, labels = np.ones((3, 5), np.float32), np.ones(3, np.int64)
    network.parameters["layer02.bias"][1] = 1e9
    assert network.evaluate(x, labels)[1] == 1.0
    network.parameters["layer02.bias"][1] = np.nan  # which argmax takes for the largest
    loss, accuracy = network.evaluate(x, labels)
    assert math.isnan(loss)
    assert accuracy == 0.0


# Initial weights.


@pytest.mark.parametrize(
    ("kind", "deviation"),
    [
        ("near zero", 0.01),
        ("xavier", math.sqrt(2 / (300 + 500))),
        ("he", math.sqrt(2 / 300)),
        ("too large", 2 * math.sqrt(2 / 300)),
    ],
)
def test_initial_weights_have_the_deviation_of_their_paper(kind: str, deviation: float) -> None:
    weight = initial_weight(kind, 300, 500, np.random.default_rng(11))
    assert weight.shape == (300, 500)
    assert weight.std() == pytest.approx(deviation, rel=0.01)
    assert abs(weight.mean()) < deviation / 80  # five times the deviation of the mean


@pytest.mark.parametrize("shape", [(40, 40), (40, 7), (7, 40)])
def test_orthogonal_weights_are_orthogonal(shape: tuple[int, int]) -> None:
    weight = initial_weight("orthogonal", *shape, np.random.default_rng(12))
    assert weight.shape == shape
    product = weight @ weight.T if shape[0] < shape[1] else weight.T @ weight
    np.testing.assert_allclose(product, np.eye(min(shape)), atol=1e-13)


def test_orthogonal_weights_prefer_no_direction() -> None:
    # The trace of a uniformly distributed rotation or reflection has mean 0 and variance 1.
    rng = np.random.default_rng(13)
    traces = [np.trace(initial_weight("orthogonal", 8, 8, rng)) for _ in range(400)]
    assert abs(np.mean(traces)) < 4 / math.sqrt(400)
    assert np.var(traces) == pytest.approx(1, abs=0.3)


def test_biases_begin_at_0_and_that_of_the_forget_gate_at_1() -> None:
    rng = np.random.default_rng(14)
    for network in (multilayer([5, 7, 4], "relu", "he", rng), elman(5, 6, 4, "tanh", "xavier", rng)):
        biases = [p for name, p in network.parameters.items() if name.endswith("bias")]
        assert len(biases) == 2
        assert not any(bias.any() for bias in biases)
    assert lstm(5, 2, 4, "xavier", rng).parameters["recurrent.bias"].tolist() == [0, 0, 1, 1, 0, 0, 0, 0]


def test_the_gain_is_for_all_layers_but_the_last_and_for_the_recurrent_matrix() -> None:
    def ratios(make: Callable[[float], Network]) -> dict[str, float]:
        one, three = make(1.0).parameters, make(3.0).parameters
        return {
            name: round(rms(three[name]) / rms(one[name]), 5) for name in one if not name.endswith("bias")
        }

    assert ratios(
        lambda gain: multilayer([5, 6, 6, 4], "relu", "he", np.random.default_rng(15), gain=gain)
    ) == {"layer01.weight": 3.0, "layer02.weight": 3.0, "layer03.weight": 1.0}
    recurrent = {"recurrent.input": 1.0, "recurrent.weight": 3.0, "output.weight": 1.0}
    assert (
        ratios(lambda gain: elman(5, 6, 4, "tanh", "he", np.random.default_rng(15), gain=gain)) == recurrent
    )
    assert ratios(lambda gain: lstm(5, 6, 4, "he", np.random.default_rng(15), gain=gain)) == recurrent


# Theory.


def test_gains_of_functions_that_can_be_calculated_with_a_pencil() -> None:
    for activation, variance, gain in (
        ("linear", 3.0, math.sqrt(3)),
        ("relu", 2.0, 1.0),  # half of the inputs pass
        ("relu", 8.0, 2.0),
        ("leaky relu", 2.0, math.sqrt(1 + 0.01**2)),
    ):
        gains = layer_gains(activation, variance, 30)
        assert gains["forward"] == pytest.approx([gain] * 30, rel=1e-12), activation
        assert gains["backward"] == pytest.approx([gain] * 30, rel=1e-12), activation
    # The mean of cos(z)^2 over a normal z of variance v is (1 + exp(-2 v)) / 2.
    before, gains = 0.7, layer_gains("sine", 1.5, 3, mean_square=0.7)
    for forward, backward in zip(gains["forward"], gains["backward"], strict=True):
        after = (1 - math.exp(-2 * 1.5 * before)) / 2
        assert forward == pytest.approx(math.sqrt(after / before), rel=1e-9)
        assert backward == pytest.approx(math.sqrt(1.5 * (1 - after)), rel=1e-9)
        before = after


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "gelu"])
def test_gains_are_the_integrals_of_the_theory(activation: str) -> None:
    function, slope = ACTIVATIONS[activation]
    z = np.linspace(-12, 12, 400_001)
    weights = np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()
    before, gains = 1.0, layer_gains(activation, 8.0, 5)
    for forward, backward in zip(gains["forward"], gains["backward"], strict=True):
        x = math.sqrt(8 * before) * z
        after = float(weights @ function(x) ** 2)
        assert forward == pytest.approx(math.sqrt(after / before), rel=1e-6)
        assert backward == pytest.approx(math.sqrt(8 * float(weights @ slope(x) ** 2)), rel=1e-6)
        before = after


@pytest.mark.parametrize("variance", [0.5, 1.0, 2.0, 8.0])
def test_tanh_cannot_make_gradients_grow_by_more_than_its_weights_do(variance: float) -> None:
    backward = layer_gains("tanh", variance, 20)["backward"]
    assert all(gain < math.sqrt(variance) for gain in backward)
    # Saturation: of a larger signal the gain is smaller.
    first = [layer_gains("tanh", variance, 1, size)["backward"][0] for size in (1e-6, 1.0, 100.0)]
    assert first == sorted(first, reverse=True)
    assert first[0] == pytest.approx(math.sqrt(variance), rel=1e-4)
    assert first[2] < 0.5 * first[0]


@pytest.mark.parametrize(
    ("activation", "initialisation", "variance"),
    [
        ("relu", "he", 2.0),
        ("gelu", "he", 2.0),
        ("tanh", "xavier", 1.0),
        ("tanh", "too large", 8.0),
        ("sigmoid", "too large", 8.0),
    ],
)
def test_a_wide_random_network_has_the_gains_that_theory_predicts(
    activation: str, initialisation: str, variance: float
) -> None:
    layers, seeds = 6, 3
    forward, backward = np.zeros((2, seeds, layers - 1))
    for seed in range(seeds):
        rng = np.random.default_rng([16, seed])
        network = multilayer([512] * (layers + 1) + [10], activation, initialisation, rng)
        network.trace = True
        x = rng.standard_normal((128, 512)).astype(np.float32)
        network.loss_and_gradients(x / np.float32(rms(x)), rng.integers(0, 10, 128))
        signal, delta = network.signal_rms[:-1], network.delta_rms[:-1]
        forward[seed], backward[seed] = signal[1:] / signal[:-1], delta[:-1] / delta[1:]
    gains = layer_gains(activation, variance, layers)
    np.testing.assert_allclose(np.median(forward, axis=0), gains["forward"][1:], rtol=0.05)
    np.testing.assert_allclose(np.median(backward, axis=0), gains["backward"][1:], rtol=0.05)


def test_the_trace_has_the_size_of_every_signal_and_gradient() -> None:
    rng = np.random.default_rng(17)
    network = multilayer([5, 6, 4], "tanh", "xavier", rng, dtype=np.float64)
    x, labels = rng.standard_normal((8, 5)), rng.integers(0, 4, 8)
    network.trace = True
    network.loss_and_gradients(x, labels)
    hidden = np.tanh(x @ network.parameters["layer01.weight"])
    logits = hidden @ network.parameters["layer02.weight"]
    by_logits = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True) - np.eye(4)[labels]
    by_hidden = by_logits @ network.parameters["layer02.weight"].T
    np.testing.assert_allclose(
        network.signal_rms, [math.sqrt((a**2).mean()) for a in (hidden, logits)], rtol=1e-12
    )
    np.testing.assert_allclose(
        network.delta_rms, [math.sqrt((a**2).mean()) for a in (by_hidden, by_logits)], rtol=1e-12
    )


# Memory.


@pytest.mark.parametrize("gain", [0.5, 1.0, 1.25])
def test_a_rotation_keeps_the_gradient_and_a_multiple_of_one_multiplies_it_in_every_step(gain: float) -> None:
    rng = np.random.default_rng(18)
    network = elman(7, 16, 7, "linear", "orthogonal", rng, gain=gain, dtype=np.float64)
    before = {name: p.copy() for name, p in network.parameters.items()}
    sizes = memory(network, rng.standard_normal((3, 40, 7)), rng)
    np.testing.assert_allclose(sizes, gain ** np.arange(39.0, -1, -1), rtol=1e-12)
    assert all(np.array_equal(before[name], p) for name, p in network.parameters.items())


def test_what_an_elman_network_remembers_is_the_derivative_by_its_state() -> None:
    rng = np.random.default_rng(19)
    layer = Elman(np.eye(4), rng.standard_normal((4, 4)), "tanh")
    x = rng.standard_normal((3, 6, 4))
    h = layer.forward(x)
    by_input = layer.backward(rng.standard_normal(h.shape))
    # The input is added to what tanh is given: its derivative is that by the state, times tanh's slope.
    np.testing.assert_allclose(layer.by_state * (1 - h**2), by_input, rtol=1e-12)


def test_what_an_lstm_remembers_is_the_derivative_by_its_cell() -> None:
    rng = np.random.default_rng(20)
    units = 4
    incoming, weight = np.zeros((units, 4 * units)), rng.standard_normal((units, 4 * units))
    incoming[:, 3 * units :] = np.eye(units)  # the input is for the candidate alone
    layer = LSTM(incoming, weight)
    x = rng.standard_normal((3, 6, units))
    found = layer.forward(x)
    by_input = layer.backward(rng.standard_normal(found.shape))

    def sigmoid(z: Floats) -> Floats:
        return np.asarray(1 / (1 + np.exp(-z)))

    h = c = np.zeros((3, units))
    for t in range(6):
        enter, keep, leave, candidate = np.split(h @ weight + layer.parameters["bias"], 4, axis=1)
        candidate = np.tanh(candidate + x[:, t])
        c = sigmoid(keep) * c + sigmoid(enter) * candidate
        h = sigmoid(leave) * np.tanh(c)
        np.testing.assert_allclose(found[:, t], h, rtol=1e-12)
        by_cell = by_input[:, t] / (sigmoid(enter) * (1 - candidate**2))
        np.testing.assert_allclose(layer.by_state[:, t], by_cell, rtol=1e-10)


# Training.


def test_schedules_at_the_begin_in_the_middle_and_at_the_end() -> None:
    steps = (0, 9, 10, 25, 49, 50, 99)  # of a hundred, from 0
    expected = {
        "constant": [1.0] * 7,
        "warm-up": [0.1, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
        "cosine": [1.0, 0.9801, 0.9755, 0.8536, 0.5157, 0.5, 0.0002],
        "step": [1.0, 1.0, 1.0, 1.0, 1.0, 0.1, 0.1],
    }
    assert list(expected) == list(SCHEDULES)
    for name, values in expected.items():
        assert [SCHEDULES[name](step, 100) for step in steps] == pytest.approx(values, abs=5e-5), name
    rising = [SCHEDULES["warm-up"](step, 100) for step in range(10)]
    assert rising == pytest.approx([0.1 * (step + 1) for step in range(10)])  # no step is wasted


def made_up_data(rng: np.random.Generator) -> Data:
    x, y = rng.standard_normal((40, 5)).astype(np.float32), rng.integers(0, 4, 40)
    return Data(x[:30], y[:30], x[30:], y[30:], 4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_training_is_descent_with_momentum_at_the_rate_of_the_schedule(schedule: str) -> None:
    rng = np.random.default_rng(21)
    data = made_up_data(rng)
    ours, theirs = (
        multilayer([5, 6, 4], "tanh", "xavier", np.random.default_rng(22), dtype=np.float64) for _ in range(2)
    )
    order = [np.arange(i, i + 8) for i in range(8)]
    training = Training(
        ours, data, iter(order), steps=8, learning_rate=0.3, schedule=schedule,
        clip=Clip("none", ours.parameters),
    )  # fmt: skip
    velocity = {name: np.zeros_like(p) for name, p in theirs.parameters.items()}
    for i, batch in enumerate(order):
        training.step()
        loss, gradients = theirs.loss_and_gradients(data.train_x[batch], data.train_y[batch])
        for name, p in theirs.parameters.items():
            velocity[name] = 0.9 * velocity[name] + gradients[name]
            p[:] -= 0.3 * SCHEDULES[schedule](i, 8) * velocity[name]
            np.testing.assert_allclose(ours.parameters[name], p, rtol=1e-10)
        history = training.history
        assert history.loss[i] == pytest.approx(loss, rel=1e-10)
        squares = {name: float((g**2).sum()) for name, g in gradients.items()}
        layers = [
            math.sqrt(sum(s for name, s in squares.items() if name.startswith(layer)))
            for layer in ("layer01", "layer02")
        ]
        assert history.layer_norms[i] == pytest.approx(layers, rel=1e-9)
        assert history.total_norm[i] == pytest.approx(math.hypot(*layers), rel=1e-9)
    assert history.layers == ("layer01", "layer02")
    assert not training.stopped
    assert training.evaluate() == ours.evaluate(data.test_x, data.test_y)


def test_training_stops_where_a_parameter_is_not_finite() -> None:
    rng = np.random.default_rng(23)
    network = multilayer([5, 6, 4], "relu", "he", rng)
    data = made_up_data(rng)
    training = Training(
        network, data, batches(30, 10, rng), steps=9, learning_rate=1e38, schedule="constant",
        clip=Clip("none", network.parameters),
    )  # fmt: skip
    while not training.stopped:
        training.step()
    assert len(training.history.loss) <= 3
    assert training.evaluate()[1] == 0.0


def made_up_gradients(rng: np.random.Generator, scale: float) -> dict[str, Array]:
    shapes = {"layer01.weight": (5, 6), "layer01.bias": (6,), "layer02.weight": (6, 4), "layer02.bias": (4,)}
    return {name: (scale * rng.standard_normal(s)).astype(np.float32) for name, s in shapes.items()}


# What each kind does, in calls of gradclip alone.
_DIRECT: dict[str, Callable[[dict[str, Array]], Callable[[dict[str, Array]], gradclip.ClipResult]]] = {
    "none": lambda parameters: lambda g: gradclip.clip_by_global_norm_(g, math.inf),
    "global": lambda parameters: lambda g: gradclip.clip_by_global_norm_(g, 1.0),
    "value": lambda parameters: lambda g: gradclip.clip_by_value_(g, 0.01),
    "agc": lambda parameters: _direct(AGC(parameters, clipping=0.02, axis=-1)),
    "zclip": lambda parameters: _direct(ZClip()),
    "autoclip": lambda parameters: _direct(AutoClip()),
}


def _direct(policy: Any) -> Callable[[dict[str, Array]], gradclip.ClipResult]:
    return lambda gradients: gradclip.clip_by_global_norm_(gradients, policy)


@pytest.mark.parametrize("kind", CLIPPINGS)
def test_every_kind_of_clipping_is_that_of_gradclip(kind: str) -> None:
    rng = np.random.default_rng(24)
    parameters = made_up_gradients(rng, 1.0)
    clip, direct = Clip(kind, parameters), _DIRECT[kind](parameters)
    clipped = 0
    # Forty calm steps, for those that learn, and then a spike.
    for scale in [*np.linspace(0.02, 0.03, 40), 5.0]:
        ours = made_up_gradients(rng, float(scale))
        before = {name: g.copy() for name, g in ours.items()}
        theirs = {name: g.copy() for name, g in ours.items()}
        result = clip(ours)
        direct(theirs)
        assert result.total_norm == pytest.approx(gradclip.global_norm(before), rel=1e-6)  # before clipping
        for name, g in ours.items():
            np.testing.assert_array_equal(g, theirs[name])
        clipped += any((g != before[name]).any() for name, g in ours.items())
    assert (clipped == 0) == (kind == "none")
    if kind == "global":
        assert clipped == 1
        assert gradclip.global_norm(ours) == pytest.approx(1, rel=1e-6)
    if kind == "value":
        assert max(float(np.abs(g).max()) for g in ours.values()) == np.float32(0.01)


def test_agc_holds_the_gradient_of_every_unit_to_a_share_of_its_weights() -> None:
    rng = np.random.default_rng(25)
    parameters, gradients = made_up_gradients(rng, 1.0), made_up_gradients(rng, 0.1)
    expected = {}
    for name, g in gradients.items():
        # A column of a matrix is what leads to one unit; the biases of a layer are one together.
        weights, norms = (np.sqrt(np.square(a, dtype=float).sum(axis=0)) for a in (parameters[name], g))
        expected[name] = g * np.minimum(1, 0.02 * np.maximum(weights, 1e-3) / norms)
    Clip("agc", parameters)(gradients)
    for name, g in gradients.items():
        np.testing.assert_allclose(g, expected[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", REGULARISATIONS)
def test_regularisation_is_part_of_what_is_measured_and_clipped(kind: str) -> None:
    rng = np.random.default_rng(26)
    parameters, gradients = made_up_gradients(rng, 1.0), made_up_gradients(rng, 1.0)
    l2, l1 = {"none": (0.0, 0.0), "l2": (1e-3, 0.0), "l1": (0.0, 1e-4)}[kind]
    expected = {
        name: g + l2 * parameters[name] + l1 * np.sign(parameters[name]) for name, g in gradients.items()
    }
    if kind != "none":
        assert max(float(np.abs(g - gradients[name]).max()) for name, g in expected.items()) > 5e-5
    norm = math.sqrt(math.fsum(float(np.square(g, dtype=float).sum()) for g in expected.values()))
    clipped = {name: g.copy() for name, g in gradients.items()}
    Clip("none", parameters, REGULARISATIONS[kind])(gradients)
    result = Clip("global", parameters, REGULARISATIONS[kind])(clipped)
    assert result.total_norm == pytest.approx(norm, rel=1e-6)
    for name, g in expected.items():
        np.testing.assert_allclose(gradients[name], g, rtol=1e-6, atol=1e-7, err_msg=name)
        np.testing.assert_allclose(clipped[name], g / norm, rtol=1e-5, atol=1e-7, err_msg=name)


# Where it went wrong.


def test_norms_of_a_layer_are_those_of_its_parameters_together() -> None:
    norms = {"a.weight": 3.0, "a.norm.scale": 4.0, "b.weight": math.inf, "b.bias": 1.0, "c.weight": math.nan}
    found = per_layer(norms | {"c.bias": 1.0, "d.weight": 3e200, "d.bias": 4e200})
    assert found == pytest.approx({"a": 5.0, "b": math.inf, "c": math.nan, "d": 5e200}, nan_ok=True)
    assert list(found) == ["a", "b", "c", "d"]


def test_the_layer_that_blew_up_is_the_first_far_above_its_own_norm() -> None:
    calm = [[50.0, 1.0, 2.0]] * 10
    assert find_blow_up(np.array([*calm, [900.0, 5.0, 1900.0]])) is None
    # The second layer is 1100 times its usual norm; the first is larger, but usually so.
    found = find_blow_up(np.array([*calm, [900.0, 1100.0, 2.0], [1e9, 1e9, 1e9]]))
    assert found is not None
    assert (found.step, found.layer) == (10, 1)
    assert found.usual.tolist() == calm[0]


def test_of_layers_that_are_not_finite_the_one_nearest_to_the_output_blew_up_first() -> None:
    found = find_blow_up(np.array([*[[1.0] * 4] * 10, [math.nan, math.inf, math.nan, 1e30]]))
    assert found is not None
    assert (found.step, found.layer) == (10, 2)


def test_what_is_usual_is_that_of_the_first_ten_steps() -> None:
    found = find_blow_up(np.array([[1.0]] * 6 + [[5.0]] * 4 + [[2000.0]] * 20))
    assert found is not None
    assert found.step == 10
    assert found.usual.tolist() == [1.0]


def history_of(*norms: list[float]) -> History:
    total = [math.sqrt(sum(n * n for n in step)) for step in norms]
    return History(("a", "b", "c"), total_norm=total, layer_norms=[list(step) for step in norms])


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        ([[1.0, 2.0, 3.0], [EXPLOSION, 0.0, 0.0]], (None, None)),  # not beyond
        ([[1.0, 2.0, 3.0], [1.0, EXPLOSION, 1.0], [5e3, 1.0, 1.0]], (2, "b")),
        ([[600.0, 600.0, 601.0]], (1, "c")),  # no layer alone
        ([[1.0, 1.0, 1.0], [1.0, math.nan, 1e9]], (2, "b")),
        ([[math.nan, math.inf, 1.0]], (1, "b")),
        ([[math.nan] * 3], (1, "c")),
    ],
)
def test_an_explosion_is_the_first_step_beyond_the_limit_and_the_layer_that_was_first(
    norms: list[list[float]], expected: tuple[int | None, str | None]
) -> None:
    assert _explosion(history_of(*norms)) == expected


# One run.


@pytest.mark.parametrize(
    "settings",
    [
        Settings(depth=4, steps=4, normalisation="batch", in_detail=True),
        Settings(depth=4, steps=4, network="residual", clipping="zclip", regularisation="l2"),
        Settings(network="elman", activation="tanh", initialisation="orthogonal", steps=2),
        Settings(network="lstm", initialisation="orthogonal", steps=2, clipping="agc"),
    ],
    ids=lambda settings: settings.network,
)
def test_the_same_settings_find_the_same(settings: Settings) -> None:
    first, second, other = (run(s) for s in (settings, settings, replace(settings, seed=1)))
    assert json.loads(json.dumps(first, allow_nan=False)) == first
    for row in (first, second, other):
        assert row.pop("seconds_clip") > 0
        assert row.pop("seconds_rest") > 0
    assert first == second
    assert first["first_norm"] != other["first_norm"]
    assert {name: first[name] for name in Settings.names()} == settings.varied()
    assert first["steps_done"] == settings.steps
    assert not first["lost"]


def test_a_run_that_explodes_says_in_which_step_and_layer() -> None:
    row = run(Settings(initialisation="too large", learning_rate=0.05, steps=8, in_detail=True))
    assert row["first_norm"] > EXPLOSION
    assert row["exploded_step"] == 1
    largest = int(np.argmax(row["first_norms"]))
    assert row["exploded_layer"] == row["layers"][largest] == f"layer{largest + 1:02d}"
    # What the weights were multiplied by makes the next step infinite, and the run ends there.
    assert row["lost"]
    assert row["steps_done"] < 8
    assert row["steps_shown"] == list(range(1, row["steps_done"] + 1))
    assert row["losses"][-1] is None
    assert row["norms"][-1] is None
    assert None in row["layer_norms"][-1]
    assert row["last_loss"] is None
    assert row["test_accuracy"] == 0.0
    assert row["largest_norm"] == max(norm for norm in row["norms"] if norm is not None)


def test_a_clipped_run_says_how_much_of_it_was_clipped_and_learns() -> None:
    row = run(Settings(depth=3, learning_rate=0.05, clipping="global", steps=60))
    assert row["exploded_step"] is None
    assert row["exploded_layer"] is None
    assert 0 < row["clipped_share"] < 1
    assert row["last_loss"] < 0.3 * row["first_loss"]
    assert row["test_accuracy"] > 0.85
    assert "losses" not in row


@pytest.mark.parametrize("axis", AXES)
def test_settings_refuse_what_there_is_not_and_list_what_there_is(axis: str) -> None:
    def with_value(value: Any) -> Settings:
        return Settings(**{axis: value})

    with pytest.raises(ValueError, match=f"^{axis}: expected one of ") as caught:
        with_value("something else")
    assert str(caught.value).endswith(f"{', '.join(AXES[axis])}, got 'something else'")
    for value in AXES[axis]:
        assert getattr(with_value(value), axis) == value


def test_every_axis_that_is_named_has_what_it_names() -> None:
    assert AXES["activation"] == tuple(ACTIVATIONS)
    assert AXES["initialisation"] == INITIALISATIONS
    assert AXES["clipping"] == tuple(CLIPPINGS)
    assert set(AXES) <= set(Settings.names())
    assert "in_detail" not in Settings.names()


def test_runs_that_are_the_same_are_one_and_in_detail_if_one_of_them_is() -> None:
    plain, other = Settings(seed=1), Settings(seed=2)
    detailed = replace(plain, in_detail=True)
    for given in ([plain, other, detailed, plain], [detailed, other, plain]):
        found = merged(given)
        assert found == [plain, other]
        assert [one.in_detail for one in found] == [True, False]


# Data.


def test_the_split_of_the_digits_is_a_split() -> None:
    digits = split_digits(0)
    assert digits.train_x.shape == (1438, 64)
    assert digits.test_x.shape == (359, 64)
    rows = {row.tobytes() for row in digits.train_x}
    assert not any(row.tobytes() in rows for row in digits.test_x)
    assert abs(float(digits.train_x.mean())) < 1e-6
    assert float(digits.train_x.std()) < 1
    assert digits.test_y.tolist() != split_digits(1).test_y.tolist()


def test_every_character_is_labelled_with_the_next_and_no_test_is_known_from_training() -> None:
    data = split_text(0)
    alphabet = sorted(set(english().encode("ascii", "replace").decode()))
    assert data.classes == len(alphabet)

    def read(one_hot: Array) -> str:
        return "".join(alphabet[i] for i in one_hot.argmax(axis=-1))

    assert data.train_x.shape[1:] == (CONTEXT, data.classes)
    assert (data.train_x[::50].sum(axis=-1) == 1).all()
    for x, y in ((data.train_x, data.train_y), (data.test_x, data.test_y)):
        for i in (0, 7, len(x) - 1):
            assert read(x[i])[1:] == "".join(alphabet[j] for j in y[i][:-1])
    text = english().encode("ascii", "replace").decode()
    last = read(data.train_x[-1]) + alphabet[data.train_y[-1][-1]]
    assert text.index(last) + len(last) <= text.index(read(data.test_x[0]))


def test_every_example_comes_once_in_an_epoch_and_each_epoch_in_another_order() -> None:
    indices = batches(100, 20, np.random.default_rng(27))
    epochs = [np.concatenate([next(indices) for _ in range(5)]).tolist() for _ in range(3)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert len(next(batches(3, 20, np.random.default_rng(27)))) == 3
