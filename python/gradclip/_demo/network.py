"""A deep multilayer perceptron in plain NumPy: forward, backward, momentum. No clipping in here."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "Labels", "Momentum", "Network", "layer_of"]

Array: TypeAlias = npt.NDArray[np.floating[Any]]
Labels: TypeAlias = npt.NDArray[np.integer[Any]]


class Network:
    """Layers of ``sin(x @ weight + bias)``, and a linear one at the end that gives the logits.

    Sine networks (SIREN, Sitzmann et al. 2020, arXiv:2006.09661) show the explosion in its pure form.
    Forward, sine keeps every activation within [-1, 1], whatever the weights. Backward, a layer multiplies
    the signal by its weights and by a cosine, whose mean square stays near 1/2 however large the weights
    grow: tanh would saturate and put its own fire out, sine does not. So a gain a little above 1 already
    makes the gradients grow from layer to layer on their way back.

    Args:
        sizes: Width of the input, of every hidden layer, and of the output.
        gain: Weights are orthogonal matrices (Saxe et al. 2014, arXiv:1312.6120) times this; those of the
            last layer are not multiplied.
        rng: Where the weights come from.
        dtype: Of all parameters, activations and gradients.
    """

    def __init__(
        self,
        sizes: list[int],
        gain: float,
        rng: np.random.Generator,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        self.depth = len(sizes) - 1
        self.parameters: dict[str, Array] = {}
        for layer, (inputs, outputs) in enumerate(pairwise(sizes), start=1):
            scale = gain if layer < self.depth else 1.0
            weight = scale * _orthogonal(inputs, outputs, rng)
            self.parameters[_name(layer, "weight")] = weight.astype(dtype)
            self.parameters[_name(layer, "bias")] = np.zeros(outputs, dtype)
        self._gradients = {name: np.empty_like(p) for name, p in self.parameters.items()}
        self._outputs: list[Array] = []
        self._slopes: list[Array] = []

    def logits(self, x: Array) -> Array:
        """The output of the last layer, shape ``(len(x), classes)``."""
        for layer in range(1, self.depth):
            x = np.sin(x @ self._weight(layer) + self._bias(layer))
        return x @ self._weight(self.depth) + self._bias(self.depth)

    def loss_and_gradients(self, x: Array, labels: Labels) -> tuple[float, dict[str, Array]]:
        """Mean cross-entropy over a batch, and its gradient by every parameter.

        Returns:
            The loss, and one gradient per parameter under the parameter's name, input side first. The
            next call writes its gradients into the same arrays.
        """
        outputs, slopes = self._forward(x)
        loss, delta = _cross_entropy(outputs[-1], labels)
        for layer in range(self.depth, 0, -1):
            np.sum(delta, axis=0, out=self._gradients[_name(layer, "bias")])
            np.matmul(outputs[layer - 1].T, delta, out=self._gradients[_name(layer, "weight")])
            if layer > 1:
                delta = delta @ self._weight(layer).T
                delta *= slopes[layer - 2]
        return loss, self._gradients

    def evaluate(self, x: Array, labels: Labels) -> tuple[float, float]:
        """Mean cross-entropy, and share of right answers: an output that is not finite is no answer."""
        logits = self.logits(x)
        right = (logits.argmax(axis=1) == labels) & np.isfinite(logits).all(axis=1)
        return _cross_entropy(logits, labels)[0], float(right.mean())

    def _forward(self, x: Array) -> tuple[list[Array], list[Array]]:
        """Outputs of every layer, the input first; slopes (cosines) of the hidden layers."""
        if not self._outputs or len(self._outputs[0]) != len(x):
            # Kept from step to step: fresh ones cost as much time in page faults as all the arithmetic.
            biases = [self._bias(layer) for layer in range(1, self.depth + 1)]
            self._outputs = [np.empty((len(x), b.size), b.dtype) for b in biases]
            self._slopes = [np.empty_like(output) for output in self._outputs[:-1]]
        inputs = x
        for layer, output in enumerate(self._outputs, start=1):
            np.matmul(inputs, self._weight(layer), out=output)
            np.add(output, self._bias(layer), out=output)
            if layer < self.depth:
                np.cos(output, out=self._slopes[layer - 1])
                np.sin(output, out=output)
            inputs = output
        return [x, *self._outputs], self._slopes

    def _weight(self, layer: int) -> Array:
        return self.parameters[_name(layer, "weight")]

    def _bias(self, layer: int) -> Array:
        return self.parameters[_name(layer, "bias")]


class Momentum:
    """Stochastic gradient descent with momentum (heavy ball)."""

    def __init__(self, parameters: dict[str, Array], momentum: float = 0.9) -> None:
        self._parameters = parameters
        self._momentum = momentum
        self._velocity = {name: np.zeros_like(p) for name, p in parameters.items()}

    def step(self, gradients: Mapping[str, Array], learning_rate: float) -> None:
        """Move every parameter once, in place."""
        for name, parameter in self._parameters.items():
            velocity = self._velocity[name]
            velocity *= self._momentum
            velocity += gradients[name]
            np.subtract(parameter, learning_rate * velocity, out=parameter)


def layer_of(name: str) -> int:
    """The layer that a parameter belongs to, counted from 1 at the input."""
    return int(name.partition(".")[0].removeprefix("layer"))


def _name(layer: int, kind: str) -> str:
    return f"layer{layer:02d}.{kind}"


def _cross_entropy(logits: Array, labels: Labels) -> tuple[float, Array]:
    """Mean cross-entropy of softmax, and its gradient by the logits: probabilities minus one-hot labels."""
    rows = np.arange(len(labels))
    shifted = logits - logits.max(axis=1, keepdims=True)
    gradient = np.exp(shifted)
    sums = gradient.sum(axis=1)
    loss = np.mean(np.log(sums) - shifted[rows, labels])
    gradient /= sums[:, np.newaxis]
    gradient[rows, labels] -= 1
    gradient /= len(labels)
    return float(loss), gradient


def _orthogonal(inputs: int, outputs: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """A random matrix with orthonormal rows or columns, whichever there are fewer of."""
    larger = max(inputs, outputs)
    q, r = np.linalg.qr(rng.standard_normal((larger, larger)))
    # Without the signs of r, q is not uniformly distributed (Mezzadri 2007, arXiv:math-ph/0609050).
    return np.asarray((q * np.sign(np.diag(r)))[:inputs, :outputs], dtype=np.float64)
