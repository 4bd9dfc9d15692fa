"""The parts of neural networks in plain NumPy, each with its forward and its backward pass.

A layer maps an array to an array. ``forward`` keeps what ``backward`` needs; ``backward`` takes the
derivative of the loss by the output, leaves that by every parameter in ``gradients``, and returns that by the
input. That is all there is to backpropagation: the chain rule, from the last layer to the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "ACTIVATIONS",
    "INITIALISATIONS",
    "LSTM",
    "Activation",
    "Array",
    "BatchNorm",
    "Chain",
    "Dense",
    "Elman",
    "Layer",
    "LayerNorm",
    "Recurrent",
    "Residual",
    "initial_weight",
    "rms",
]

Array: TypeAlias = npt.NDArray[np.floating[Any]]
Function: TypeAlias = Callable[[Array], Array]


# --- Activation functions, each with its derivative ------------------------------------------------

_GELU = math.sqrt(2 / math.pi)


def _sigmoid(x: Array) -> Array:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))  # exp(-x) would overflow


def _gelu_slope(x: Array) -> Array:
    inner = np.tanh(_GELU * (x + 0.044715 * x**3))
    slope = 0.5 * (1 + inner) + 0.5 * x * (1 - inner**2) * _GELU * (1 + 3 * 0.044715 * x**2)
    return np.asarray(slope)


def _sigmoid_slope(x: Array) -> Array:
    y = _sigmoid(x)
    return y * (1 - y)


# GELU as its authors approximate it (Hendrycks and Gimpel 2016, arXiv:1606.08415). Sine: SIREN (Sitzmann et
# al. 2020, arXiv:2006.09661).
ACTIVATIONS: dict[str, tuple[Function, Function]] = {
    "linear": (lambda x: x, np.ones_like),
    "relu": (lambda x: np.maximum(x, 0), lambda x: (x > 0).astype(x.dtype)),
    "leaky relu": (
        lambda x: np.where(x > 0, x, x * x.dtype.type(0.01)),
        lambda x: np.where(x > 0, x.dtype.type(1), x.dtype.type(0.01)),
    ),
    "gelu": (lambda x: 0.5 * x * (1 + np.tanh(_GELU * (x + 0.044715 * x**3))), _gelu_slope),
    "tanh": (np.tanh, lambda x: 1 - np.tanh(x) ** 2),
    "sigmoid": (_sigmoid, _sigmoid_slope),
    "sine": (np.sin, np.cos),
}


# --- Initial weights -------------------------------------------------------------------------------


def _orthogonal(inputs: int, outputs: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """A random matrix with orthonormal rows or columns, whichever there are fewer of."""
    larger = max(inputs, outputs)
    q, r = np.linalg.qr(rng.standard_normal((larger, larger)))
    # Without the signs of r, q is not uniformly distributed (Mezzadri 2007, arXiv:math-ph/0609050).
    return np.asarray((q * np.sign(np.diag(r)))[:inputs, :outputs], dtype=np.float64)


# The standard deviation of each weight, by the number of inputs and outputs of the layer.
_DEVIATIONS: dict[str, Callable[[int, int], float]] = {
    "near zero": lambda inputs, outputs: 0.01,
    "xavier": lambda inputs, outputs: math.sqrt(2 / (inputs + outputs)),  # Glorot and Bengio 2010
    "he": lambda inputs, outputs: math.sqrt(2 / inputs),  # He et al. 2015, arXiv:1502.01852
    "too large": lambda inputs, outputs: 2 * math.sqrt(2 / inputs),  # twice that of He
}
# Orthogonal: Saxe et al. 2014, arXiv:1312.6120.
INITIALISATIONS = (*_DEVIATIONS, "orthogonal")


def initial_weight(kind: str, inputs: int, outputs: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """A matrix of weights, shape ``(inputs, outputs)``, of one of :data:`INITIALISATIONS`."""
    if kind == "orthogonal":
        return _orthogonal(inputs, outputs, rng)
    return _DEVIATIONS[kind](inputs, outputs) * rng.standard_normal((inputs, outputs))


# --- Layers ----------------------------------------------------------------------------------------


class Layer:
    """What every layer has: parameters, their gradients after ``backward``, and both passes."""

    def __init__(self, **parameters: Array) -> None:
        self.parameters: dict[str, Array] = parameters
        self.gradients: dict[str, Array] = {}

    def forward(self, x: Array) -> Array:
        """The output."""
        raise NotImplementedError

    def backward(self, delta: Array) -> Array:
        """The derivative of the loss by the input, given that by the output; fills ``gradients``."""
        raise NotImplementedError


class Dense(Layer):
    """``x @ weight + bias``, for every vector along the last axis."""

    def __init__(self, weight: Array) -> None:
        super().__init__(weight=weight, bias=np.zeros(weight.shape[1], weight.dtype))

    def forward(self, x: Array) -> Array:
        self._x = x
        return np.asarray(x @ self.parameters["weight"] + self.parameters["bias"])

    def backward(self, delta: Array) -> Array:
        inputs, outputs = self.parameters["weight"].shape
        rows = delta.reshape(-1, outputs)
        self.gradients["weight"] = self._x.reshape(-1, inputs).T @ rows
        self.gradients["bias"] = rows.sum(axis=0)
        return np.asarray(delta @ self.parameters["weight"].T)


class Activation(Layer):
    """One of :data:`ACTIVATIONS`, applied to every element."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._function, self._slope = ACTIVATIONS[name]

    def forward(self, x: Array) -> Array:
        self._x = x
        return np.asarray(self._function(x))

    def backward(self, delta: Array) -> Array:
        return np.asarray(delta * self._slope(self._x))


class _Normalisation(Layer):
    """Mean 0 and variance 1 along an axis, then a scale and a shift that are learnt."""

    axis: int
    _eps = 1e-5

    def __init__(self, width: int, dtype: npt.DTypeLike) -> None:
        super().__init__(scale=np.ones(width, dtype), shift=np.zeros(width, dtype))

    def forward(self, x: Array) -> Array:
        mean, variance = self._statistics(x)
        self._inverse = 1 / np.sqrt(variance + self._eps)
        self._normal = (x - mean) * self._inverse
        return np.asarray(self._normal * self.parameters["scale"] + self.parameters["shift"])

    def backward(self, delta: Array) -> Array:
        self.gradients["scale"] = (delta * self._normal).reshape(-1, delta.shape[-1]).sum(axis=0)
        self.gradients["shift"] = delta.reshape(-1, delta.shape[-1]).sum(axis=0)
        delta = delta * self.parameters["scale"]
        # Moving the whole input, or stretching it, changes nothing: those parts of the derivative are 0.
        mean = delta.mean(axis=self.axis, keepdims=True)
        along = (delta * self._normal).mean(axis=self.axis, keepdims=True)
        return np.asarray(self._inverse * (delta - mean - self._normal * along))

    def _statistics(self, x: Array) -> tuple[Array, Array]:
        return x.mean(axis=self.axis, keepdims=True), x.var(axis=self.axis, keepdims=True)


class LayerNorm(_Normalisation):
    """Of the units of each example (Ba et al. 2016, arXiv:1607.06450)."""

    axis = -1


class BatchNorm(_Normalisation):
    """Of each unit over the batch (Ioffe and Szegedy 2015, arXiv:1502.03167).

    For tests it keeps a running mean and variance of the batches that it was trained with.
    """

    axis = 0
    training = True
    _momentum = 0.9

    def __init__(self, width: int, dtype: npt.DTypeLike) -> None:
        super().__init__(width, dtype)
        self._running = (np.zeros((1, width), dtype), np.ones((1, width), dtype))

    def _statistics(self, x: Array) -> tuple[Array, Array]:
        if not self.training:
            return self._running
        now, keep = super()._statistics(x), x.dtype.type(self._momentum)
        mean, variance = (keep * old + (1 - keep) * new for old, new in zip(self._running, now, strict=True))
        self._running = (mean, variance)
        return now


class Chain(Layer):
    """Layers one after another; their parameters under their names, those of an unnamed one as they are."""

    def __init__(self, **layers: Layer) -> None:
        super().__init__()
        self.layers = layers
        for name, layer in layers.items():
            self.parameters |= {_joined(name, key): value for key, value in layer.parameters.items()}

    def forward(self, x: Array) -> Array:
        for layer in self.layers.values():
            x = layer.forward(x)
        return x

    def backward(self, delta: Array) -> Array:
        for name, layer in reversed(self.layers.items()):
            delta = layer.backward(delta)
            self.gradients |= {_joined(name, key): value for key, value in layer.gradients.items()}
        return delta


def _joined(name: str, key: str) -> str:
    return key if name == "dense" else f"{name}.{key}"


class Residual(Chain):
    """``x + chain(x)``: the gradient has a way around the layers (He et al. 2016, arXiv:1512.03385)."""

    def forward(self, x: Array) -> Array:
        return x + super().forward(x)

    def backward(self, delta: Array) -> Array:
        return delta + super().backward(delta)


class Recurrent(Layer):
    """A layer over ``(batch, time, inputs)`` with a state ``h`` that goes from one step of time to the next.

    Attributes:
        by_state: After ``backward``, the derivative of the loss by the state that every step hands on,
            ``(batch, time, units)``: ``h[t]``, or of an LSTM ``c[t]``.
    """

    by_state: Array


class Elman(Recurrent):
    """``h[t] = f(x[t] @ input + h[t-1] @ weight + bias)`` (Elman 1990, "Finding structure in time").

    The gradient runs back through time, and is multiplied by the same matrix in every step: Pascanu et al.
    2013 (arXiv:1211.5063) clip it by its norm for that reason.
    """

    def __init__(self, incoming: Array, weight: Array, activation: str) -> None:
        super().__init__(input=incoming, weight=weight, bias=np.zeros(weight.shape[1], weight.dtype))
        self._function, self._slope = ACTIVATIONS[activation]

    def forward(self, x: Array) -> Array:
        incoming, weight, bias = self.parameters.values()
        self._x = x
        drive = x @ incoming + bias
        self._z = np.empty_like(drive)
        self._h = np.zeros((len(x), x.shape[1] + 1, weight.shape[0]), weight.dtype)  # h[-1] of step 0 first
        for t in range(x.shape[1]):
            self._z[:, t] = drive[:, t] + self._h[:, t] @ weight
            self._h[:, t + 1] = self._function(self._z[:, t])
        return self._h[:, 1:]

    def backward(self, delta: Array) -> Array:
        incoming, weight, _ = self.parameters.values()
        slopes = self._slope(self._z)
        by_drive = np.empty_like(self._z)
        by_h = np.zeros_like(delta[:, 0])
        self.by_state = np.empty_like(delta)
        for t in reversed(range(delta.shape[1])):
            by_h = by_h + delta[:, t]
            self.by_state[:, t] = by_h
            by_drive[:, t] = by_h * slopes[:, t]
            by_h = by_drive[:, t] @ weight.T
        self.gradients = _recurrent_gradients(self._x, self._h, by_drive)
        return by_drive @ incoming.T


class LSTM(Recurrent):
    """Long short-term memory (Hochreiter and Schmidhuber 1997; forget gate: Gers et al. 2000).

    The four columns of blocks in ``input``, ``weight`` and ``bias`` are input gate, forget gate, output gate
    and candidate. The bias of the forget gate begins at 1 (Jozefowicz et al. 2015).
    """

    def __init__(self, incoming: Array, weight: Array) -> None:
        units = weight.shape[0]
        bias = np.zeros(4 * units, weight.dtype)
        bias[units : 2 * units] = 1
        super().__init__(input=incoming, weight=weight, bias=bias)

    def forward(self, x: Array) -> Array:
        incoming, weight, bias = self.parameters.values()
        units = len(weight)
        self._x = x
        self._gates = x @ incoming + bias  # after the loop: what the functions make of it
        self._h = np.zeros((len(x), x.shape[1] + 1, units), weight.dtype)
        self._c = np.zeros_like(self._h)
        for t in range(x.shape[1]):
            gates = self._gates[:, t]
            gates += self._h[:, t] @ weight
            gates[:, : 3 * units] = _sigmoid(gates[:, : 3 * units])
            gates[:, 3 * units :] = np.tanh(gates[:, 3 * units :])
            enter, keep, leave, candidate = np.split(gates, 4, axis=1)
            self._c[:, t + 1] = keep * self._c[:, t] + enter * candidate
            self._h[:, t + 1] = leave * np.tanh(self._c[:, t + 1])
        return self._h[:, 1:]

    def backward(self, delta: Array) -> Array:
        incoming, weight, _ = self.parameters.values()
        by_drive = np.empty_like(self._gates)
        by_h = np.zeros_like(delta[:, 0])
        by_c = np.zeros_like(by_h)
        self.by_state = np.empty_like(delta)
        for t in reversed(range(delta.shape[1])):
            by_h = by_h + delta[:, t]
            enter, keep, leave, candidate = np.split(self._gates[:, t], 4, axis=1)
            out = np.tanh(self._c[:, t + 1])
            by_c = by_c + by_h * leave * (1 - out**2)
            self.by_state[:, t] = by_c
            by_drive[:, t] = np.concatenate(
                [
                    by_c * candidate * enter * (1 - enter),
                    by_c * self._c[:, t] * keep * (1 - keep),
                    by_h * out * leave * (1 - leave),
                    by_c * enter * (1 - candidate**2),
                ],
                axis=1,
            )
            by_h = by_drive[:, t] @ weight.T
            by_c = by_c * keep
        self.gradients = _recurrent_gradients(self._x, self._h, by_drive)
        return by_drive @ incoming.T


def _recurrent_gradients(x: Array, h: Array, by_drive: Array) -> dict[str, Array]:
    """By the parameters, which all steps share: the sums over all of them."""
    rows = by_drive.reshape(-1, by_drive.shape[-1])
    return {
        "input": x.reshape(-1, x.shape[-1]).T @ rows,
        "weight": h[:, :-1].reshape(-1, h.shape[-1]).T @ rows,
        "bias": rows.sum(axis=0),
    }


def rms(x: Array) -> float:
    """The root mean square of all elements, without overflow."""
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))
