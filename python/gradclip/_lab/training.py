"""One training run: the same loop for every network, on gradclip's public interface."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

import gradclip
from gradclip._lab.data import Data
from gradclip._lab.layers import Array
from gradclip._lab.networks import Network, per_layer
from gradclip.monitor import GradientMonitor
from gradclip.policies import AGC, AutoClip, ZClip

__all__ = [
    "BLOW_UP_FACTOR",
    "CLIPPINGS",
    "REGULARISATIONS",
    "SCHEDULES",
    "BlowUp",
    "Clip",
    "History",
    "Momentum",
    "Training",
    "find_blow_up",
    "one_thread",
]

# A layer has blown up when its norm is this many times its usual one: the median of the first steps.
BLOW_UP_FACTOR = 1000.0
USUAL_STEPS = 10


class Momentum:
    """Stochastic gradient descent with momentum (heavy ball)."""

    def __init__(self, parameters: dict[str, Array], momentum: float = 0.9) -> None:
        self._parameters = parameters
        self._momentum = momentum
        self._velocity = {name: np.zeros_like(p) for name, p in parameters.items()}

    def step(self, gradients: dict[str, Array], learning_rate: float) -> None:
        """Move every parameter once, in place."""
        for name, parameter in self._parameters.items():
            velocity = self._velocity[name]
            velocity *= self._momentum
            velocity += gradients[name]
            np.subtract(parameter, learning_rate * velocity, out=parameter)


# --- What is varied --------------------------------------------------------------------------------

# The part of the learning rate, by the steps that are done, and all of them. Warm-up: in the first tenth of
# the steps (Goyal et al. 2017, arXiv:1706.02677). Cosine: Loshchilov and Hutter 2017, arXiv:1608.03983.
SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "constant": lambda done, steps: 1.0,
    "warm-up": lambda done, steps: min(1.0, (done + 1) / (0.1 * steps)),
    "cosine": lambda done, steps: 0.5 * (1 + math.cos(math.pi * done / steps)),
    "step": lambda done, steps: 1.0 if 2 * done < steps else 0.1,
}
REGULARISATIONS: dict[str, dict[str, float]] = {"none": {}, "l2": {"l2": 1e-3}, "l1": {"l1": 1e-4}}


class Clip:
    """Measures gradients, adds the weight regularisation, and clips, as one value of the axis says.

    Args:
        kind: One of :data:`CLIPPINGS`.
        parameters: Of the network.
        regularisation: ``l2`` and ``l1`` for gradclip.
        max_norm: The threshold of ``"global"``.
    """

    def __init__(
        self,
        kind: str,
        parameters: dict[str, Array],
        regularisation: dict[str, float] | None = None,
        max_norm: float = 1.0,
    ) -> None:
        self._threshold, self._limit = CLIPPINGS[kind](parameters, max_norm)
        self._more: dict[str, Any] = dict(params=parameters, **regularisation) if regularisation else {}

    def __call__(self, gradients: dict[str, Array]) -> gradclip.ClipResult:
        """Clip in place.

        What is not finite stays, and the run ends there; but a limit of values makes a number of infinity, as
        PyTorch's does.
        """
        result = gradclip.clip_by_global_norm_(
            gradients, self._threshold, nonfinite="propagate", **self._more
        )
        if self._limit is not None:
            gradclip.clip_by_value_(gradients, self._limit)
        return result


# By name: the threshold of the norm and the limit of the values, of the parameters and a number.
CLIPPINGS: dict[str, Callable[[dict[str, Array], float], tuple[Any, float | None]]] = {
    "none": lambda parameters, max_norm: (math.inf, None),
    "global": lambda parameters, max_norm: (max_norm, None),
    "value": lambda parameters, max_norm: (math.inf, 0.01 * max_norm),
    "agc": lambda parameters, max_norm: (AGC(parameters, clipping=0.02, axis=-1), None),
    "zclip": lambda parameters, max_norm: (ZClip(), None),
    "autoclip": lambda parameters, max_norm: (AutoClip(), None),
}


# --- The loop --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlowUp:
    """The step and the layer at which the gradients of a run left their usual size."""

    step: int  # from 0
    layer: int  # from 0, at the input
    usual: npt.NDArray[np.float64]  # of every layer


def find_blow_up(norms: npt.NDArray[np.float64]) -> BlowUp | None:
    """The first step at which a layer's norm was not finite or far above that layer's usual norm.

    If several layers got there in the same step: the one furthest above its usual norm; of several that are
    not finite the one nearest to the output, for backward got there first.

    Args:
        norms: A row for each step, a column for each layer.
    """
    finite = np.isfinite(norms)
    broken = np.flatnonzero(~finite.all(axis=1))
    calm = norms[: min([USUAL_STEPS, *broken[:1]])]
    if not len(calm):  # from the first step on
        return BlowUp(0, int(np.flatnonzero(~finite[0])[-1]), norms[0]) if broken.size else None
    usual = np.median(calm, axis=0)
    steps = np.flatnonzero((~finite | (norms > BLOW_UP_FACTOR * usual)).any(axis=1))
    if not steps.size:
        return None
    step = int(steps[0])
    with np.errstate(divide="ignore", invalid="ignore"):  # a layer that usually has no gradient
        times = np.nan_to_num(norms[step] / usual, nan=0.0)
    layer = int(np.argmax(times) if finite[step].all() else np.flatnonzero(~finite[step])[-1])
    return BlowUp(step, layer, usual)


@dataclass
class History:
    """What a training leaves: an entry for each step in every list."""

    layers: tuple[str, ...] = ()
    loss: list[float] = field(default_factory=list)
    total_norm: list[float] = field(default_factory=list)  # before clipping
    layer_norms: list[list[float]] = field(default_factory=list)  # all parameters of a layer together
    coefficient: list[float] = field(default_factory=list)  # the lowest
    nonfinite: list[tuple[int | str, ...]] = field(default_factory=list)  # names of gradients
    seconds: list[tuple[float, float]] = field(default_factory=list)  # of the clip, of the rest
    signal_rms: list[float] = field(default_factory=list)  # in the first step, by layer
    delta_rms: list[float] = field(default_factory=list)  # in the first step, by layer

    def remember(self, loss: float, result: gradclip.ClipResult) -> None:
        """Append what is known of a step."""
        by_layer = per_layer({str(name): float(norm) for name, norm in result.named_norms().items()})
        self.layers = tuple(by_layer)
        self.loss.append(loss)
        self.total_norm.append(result.total_norm)
        self.layer_norms.append(list(by_layer.values()))
        self.coefficient.append(float(np.min(result.coefficient)))
        self.nonfinite.append(result.nonfinite)


class Training:
    """A network, what it learns, and how: one step after another, until a parameter is not finite.

    Args:
        network: Its parameters are changed.
        data: What it learns.
        batches: Indices of the examples of each step.
        steps: How many there will be, for the schedule.
        learning_rate: The highest.
        schedule: One of :data:`SCHEDULES`.
        clip: What is done to the gradients.

    Attributes:
        history: What has been.
        monitor: What has been warned of.
        stopped: A parameter is not finite and stays so: there is nothing left to train.
    """

    def __init__(
        self,
        network: Network,
        data: Data,
        batches: Iterator[npt.NDArray[np.int64]],
        *,
        steps: int,
        learning_rate: float,
        schedule: str,
        clip: Callable[[dict[str, Array]], gradclip.ClipResult],
    ) -> None:
        self.network = network
        self.history = History()
        self.monitor = GradientMonitor(clips=False)
        self.stopped = False
        self._data = data
        self._batches = batches
        self._steps = steps
        self._learning_rate = learning_rate
        self._schedule = SCHEDULES[schedule]
        self._clip = clip
        self._optimizer = Momentum(network.parameters)

    def step(self) -> None:
        """Train on the next batch and remember everything about it."""
        history, network, data = self.history, self.network, self._data
        done = len(history.loss)
        batch = next(self._batches)
        network.trace = done == 0
        # Overflow on the way to NaN is what this is about: no warnings.
        with np.errstate(all="ignore"):
            begin = perf_counter()
            loss, gradients = network.loss_and_gradients(data.train_x[batch], data.train_y[batch])
            before_clip = perf_counter()
            result = self._clip(gradients)
            after_clip = perf_counter()
            self._optimizer.step(gradients, self._learning_rate * self._schedule(done, self._steps))
            clip = after_clip - before_clip
            history.seconds.append((clip, perf_counter() - begin - clip))
            history.remember(loss, result)
        if network.trace:
            history.signal_rms, history.delta_rms = network.signal_rms.tolist(), network.delta_rms.tolist()
        self.monitor.update(result, loss)
        self.stopped = not all(np.isfinite(p).all() for p in network.parameters.values())

    def evaluate(self) -> tuple[float, float]:
        """Loss and accuracy on the test part."""
        with np.errstate(all="ignore"):
            return self.network.evaluate(self._data.test_x, self._data.test_y)


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrix products and gradclip on the calling thread alone.

    Arrays of 64 KB gain nothing from a second thread, and on a busy machine they wait for it: steps of
    80 ms instead of 10.
    """
    threads = gradclip.get_num_threads()
    gradclip.set_num_threads(1)
    try:
        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        gradclip.set_num_threads(threads)
