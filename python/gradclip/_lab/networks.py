"""The networks of the laboratory, and what theory says of their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from gradclip._lab.data import Labels
from gradclip._lab.layers import (
    ACTIVATIONS,
    LSTM,
    Activation,
    Array,
    BatchNorm,
    Chain,
    Dense,
    Elman,
    Layer,
    LayerNorm,
    Recurrent,
    Residual,
    initial_weight,
    rms,
)

__all__ = ["NORMALISATIONS", "Network", "elman", "layer_gains", "lstm", "memory", "multilayer", "per_layer"]

NORMALISATIONS: dict[str, Callable[[int, npt.DTypeLike], Layer]] = {"layer": LayerNorm, "batch": BatchNorm}


class Network:
    """Layers one after another, and the mean cross-entropy of the softmax of what comes out.

    Args:
        layers: By name, that of the input first.

    Attributes:
        parameters: By name, such as ``layer01.weight``: arrays that an optimizer changes in place.
        trace: Whether to leave the two that follow.
        signal_rms: After ``loss_and_gradients``: the root mean square of each layer's output.
        delta_rms: The same of the derivative of an example's loss by each layer's output.
    """

    trace = False

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self.layers = dict(layers)
        self.parameters: dict[str, Array] = {
            f"{name}.{key}": value
            for name, layer in layers.items()
            for key, value in layer.parameters.items()
        }
        self.signal_rms = np.zeros(len(layers))
        self.delta_rms = np.zeros(len(layers))

    def forward(self, x: Array) -> Array:
        """The logits: classes along the last axis."""
        for i, layer in enumerate(self.layers.values()):
            x = layer.forward(x)
            if self.trace:
                self.signal_rms[i] = rms(x)
        return x

    def loss_and_gradients(self, x: Array, labels: Labels) -> tuple[float, dict[str, Array]]:
        """Mean cross-entropy over a batch, and its gradient by every parameter, by the parameter's name."""
        loss, delta = cross_entropy(self.forward(x), labels)
        gradients: dict[str, Array] = {}
        for i, (name, layer) in reversed(list(enumerate(self.layers.items()))):
            if self.trace:
                self.delta_rms[i] = rms(delta) * labels.size
            delta = layer.backward(delta)
            gradients |= {f"{name}.{key}": value for key, value in layer.gradients.items()}
        return loss, {name: gradients[name] for name in self.parameters}

    def evaluate(self, x: Array, labels: Labels) -> tuple[float, float]:
        """Mean cross-entropy, and share of right answers: an output that is not finite is no answer."""
        for layer in self._parts():
            layer.training = False
        logits = self.forward(x)
        for layer in self._parts():
            layer.training = True
        right = (logits.argmax(axis=-1) == labels) & np.isfinite(logits).all(axis=-1)
        return cross_entropy(logits, labels)[0], float(right.mean())

    def _parts(self) -> list[BatchNorm]:
        """What behaves otherwise in a test."""
        chains = [layer for layer in self.layers.values() if isinstance(layer, Chain)]
        return [part for chain in chains for part in chain.layers.values() if isinstance(part, BatchNorm)]


def cross_entropy(logits: Array, labels: Labels) -> tuple[float, Array]:
    """Mean cross-entropy of softmax, and its gradient by the logits: probabilities minus one-hot labels."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    exponentials = np.exp(shifted)
    sums = exponentials.sum(axis=-1, keepdims=True)
    chosen = labels[..., np.newaxis]
    loss = np.mean(np.log(sums) - np.take_along_axis(shifted, chosen, axis=-1))
    gradient = exponentials / sums
    np.put_along_axis(gradient, chosen, np.take_along_axis(gradient, chosen, axis=-1) - 1, axis=-1)
    return float(loss), gradient / labels.size


def multilayer(
    sizes: list[int],
    activation: str,
    initialisation: str,
    rng: np.random.Generator,
    *,
    gain: float = 1.0,
    normalisation: str = "none",
    residual: bool = False,
    dtype: npt.DTypeLike = np.float32,
) -> Network:
    """A multilayer perceptron: ``activation(x @ weight + bias)`` in all layers but the last, which is linear.

    Args:
        sizes: Width of the input, of every hidden layer, and of the output.
        activation: One of :data:`gradclip._lab.layers.ACTIVATIONS`.
        initialisation: One of :data:`gradclip._lab.layers.INITIALISATIONS`.
        rng: Where the weights come from.
        gain: What all initial weights but those of the last layer are multiplied by.
        normalisation: ``"none"``, ``"layer"`` or ``"batch"``: of what an activation function is given.
        residual: Whether the hidden layers between the first and the last are added to what they are given.
        dtype: Of all parameters, activations and gradients.
    """
    depth = len(sizes) - 1
    layers: dict[str, Layer] = {}
    for i, (inputs, outputs) in enumerate(pairwise(sizes), start=1):
        scale = gain if i < depth else 1.0
        dense = Dense((scale * initial_weight(initialisation, inputs, outputs, rng)).astype(dtype))
        parts: dict[str, Layer] = {"dense": dense}
        if i < depth:
            if normalisation != "none":
                parts["norm"] = NORMALISATIONS[normalisation](outputs, dtype)
            parts["activation"] = Activation(activation)
        kind = Residual if residual and 1 < i < depth else Chain
        layers[f"layer{i:02d}"] = kind(**parts)
    return Network(layers)


def elman(
    inputs: int, units: int, classes: int, activation: str, initialisation: str, rng: np.random.Generator,
    *, gain: float = 1.0, dtype: npt.DTypeLike = np.float32,
) -> Network:  # fmt: skip
    """An Elman network: a recurrent layer, and a linear one that guesses what comes next.

    Args as of :func:`multilayer`; ``gain`` is for the matrix that is applied in every step of time.
    """
    incoming = initial_weight(initialisation, inputs, units, rng).astype(dtype)
    weight = (gain * initial_weight(initialisation, units, units, rng)).astype(dtype)
    output = initial_weight(initialisation, units, classes, rng).astype(dtype)
    return Network({"recurrent": Elman(incoming, weight, activation), "output": Dense(output)})


def lstm(
    inputs: int, units: int, classes: int, initialisation: str, rng: np.random.Generator,
    *, gain: float = 1.0, dtype: npt.DTypeLike = np.float32,
) -> Network:  # fmt: skip
    """An LSTM in the place of the recurrent layer of :func:`elman`."""
    blocks = [initial_weight(initialisation, inputs, units, rng) for _ in range(4)]
    incoming = np.concatenate(blocks, axis=1).astype(dtype)
    blocks = [gain * initial_weight(initialisation, units, units, rng) for _ in range(4)]
    weight = np.concatenate(blocks, axis=1).astype(dtype)
    output = initial_weight(initialisation, units, classes, rng).astype(dtype)
    return Network({"recurrent": LSTM(incoming, weight), "output": Dense(output)})


def memory(network: Network, x: Array, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """How much of the gradient of the last step of time arrives in every step before it.

    Args:
        network: An Elman network or an LSTM; its parameters stay, what it kept for a backward pass is lost.
        x: Examples.
        rng: Where the gradient by the last output comes from: a standard normal vector for each example.

    Returns:
        The root mean square of the derivative by the state, for every step; 1 in the last.
    """
    layer = network.layers["recurrent"]
    assert isinstance(layer, Recurrent)
    delta = np.zeros_like(layer.forward(x))
    delta[:, -1] = rng.standard_normal(delta[:, -1].shape)
    layer.backward(delta)
    sizes = np.sqrt(np.mean(np.square(layer.by_state, dtype=np.float64), axis=(0, 2)))
    return np.asarray(sizes / sizes[-1])


def per_layer(norms: Mapping[str, float]) -> dict[str, float]:
    """Norms of gradients, put together by layer: what stands before the first dot of the name."""
    found: dict[str, float] = {}
    for name, norm in norms.items():
        layer = name.split(".")[0]
        found[layer] = math.hypot(found.get(layer, 0.0), norm)
    return found


# --- Theory ----------------------------------------------------------------------------------------

# Half of them are below 0 and none is at it: with one there, where its slope jumps, ReLU's gain was 0.936.
_NODES = (np.arange(2000) - 999.5) / 125
_WEIGHTS = np.exp(-(_NODES**2) / 2) / np.exp(-(_NODES**2) / 2).sum()


def layer_gains(activation: str, variance: float, depth: int, mean_square: float = 1.0) -> dict[str, Any]:
    """What wide random networks do, by mean-field theory (Poole et al. 2016; Schoenholz et al. 2017).

    In a wide layer the inputs z of the activation function f are Gaussian. Their variance goes from layer to
    layer as ``q' = variance * E[f(z)^2]``; the mean square of the gradient, on its way back, is multiplied by
    ``variance * E[f'(z)^2]``: the gain of the layer. The gains of all layers multiply.

    Args:
        activation: One of :data:`gradclip._lab.layers.ACTIVATIONS`.
        variance: That of a weight, times the number of inputs of a layer: 1 for Xavier, 2 for He.
        depth: How many layers.
        mean_square: Of the input's elements.

    Returns:
        ``forward`` and ``backward``: for each layer, the factor by which the root mean square of the signal,
        and of the gradient, is multiplied.
    """
    function, slope = ACTIVATIONS[activation]
    forward, backward, before = [], [], mean_square
    for _ in range(depth):
        z = np.sqrt(variance * before) * _NODES
        after = float(_WEIGHTS @ function(z) ** 2)
        forward.append(math.sqrt(after / before) if before else 0.0)
        backward.append(math.sqrt(variance * float(_WEIGHTS @ slope(z) ** 2)))
        before = after
    return {"forward": forward, "backward": backward}
