"""One training run: the step, what is remembered of it, and how long its clipping took."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits  # type: ignore[import-untyped]

import gradclip
from gradclip._demo.network import Array, Labels, Momentum, Network

__all__ = [
    "BLOW_UP_FACTOR",
    "BlowUp",
    "Digits",
    "History",
    "Run",
    "Settings",
    "batches",
    "numpy_clip_",
    "split_digits",
]

# A layer has blown up when its norm is this many times its usual one: the median of the first steps.
BLOW_UP_FACTOR = 1000.0
USUAL_STEPS = 10


@dataclass(frozen=True)
class Settings:
    """Everything that both runs share, and the threshold that only one of them uses."""

    layers: int = 40
    steps: int = 600
    seed: int = 0
    width: int = 128
    gain: float = 1.4
    batch: int = 128
    learning_rate: float = 0.1
    max_norm: float = 0.5


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 1797 handwritten digits, 8 x 8 pixels, split at random."""

    train_x: Array
    train_y: Labels
    test_x: Array
    test_y: Labels


def split_digits(seed: int, test_share: float = 0.2) -> Digits:
    """Read the digits, centre and scale them by the training part, and split them."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    test, train = np.split(order, [round(test_share * len(labels))])
    x = (pixels - pixels[train].mean(axis=0)) / pixels[train].std()
    x = x.astype(np.float32)
    return Digits(x[train], labels[train], x[test], labels[test])


def batches(count: int, size: int, rng: np.random.Generator) -> Iterator[npt.NDArray[np.int64]]:
    """Indices of one batch after another, in a new random order every epoch, without end."""
    size = min(size, count)
    while True:
        order = rng.permutation(count)
        yield from (order[i : i + size] for i in range(0, count - size + 1, size))


def numpy_clip_(gradients: Mapping[str, Array], max_norm: float) -> float:
    """What one writes in NumPy to do the same: a norm per gradient, the norm over all, scale in place.

    ``np.linalg.norm`` is a BLAS dot product: here it takes a third of the time of ``np.sum(g * g)``.
    """
    norms = np.array([np.linalg.norm(g) for g in gradients.values()])
    total = float(np.linalg.norm(norms))
    if total > max_norm:
        for g in gradients.values():
            np.multiply(g, max_norm / total, out=g)
    return total


@dataclass(frozen=True)
class BlowUp:
    """The step and the layer at which the gradients of a run left their usual size."""

    step: int
    layer: int  # from 1, at the input
    usual: npt.NDArray[np.float64]  # of every layer


@dataclass
class History:
    """One entry per step in every list."""

    loss: list[float] = field(default_factory=list)
    total_norm: list[float] = field(default_factory=list)
    layer_norms: list[npt.NDArray[np.float64]] = field(default_factory=list)  # weight and bias together
    clipped: list[bool] = field(default_factory=list)
    nonfinite: list[tuple[int | str, ...]] = field(default_factory=list)
    loop_norm: list[float] = field(default_factory=list)  # as numpy_clip_ sees it
    seconds: list[tuple[float, float, float]] = field(default_factory=list)  # clip, NumPy loop, the rest

    def find_blow_up(self) -> BlowUp | None:
        """The first step at which a layer's norm was not finite or far above that layer's usual norm.

        If several layers got there in the same step: the one furthest above its usual norm; of several
        that are not finite the one nearest to the output, for backward got there first.
        """
        norms = np.array(self.layer_norms)
        usual = np.median(norms[:USUAL_STEPS], axis=0)
        finite = np.isfinite(norms)
        far = ~finite | (norms > BLOW_UP_FACTOR * usual)
        steps = np.flatnonzero(far.any(axis=1))
        if not steps.size:
            return None
        step = int(steps[0])
        if finite[step].all():
            layer = int(np.argmax(norms[step] / usual))
        else:
            layer = int(np.flatnonzero(~finite[step])[-1])
        return BlowUp(step, layer + 1, usual)

    def largest_norm(self) -> float:
        """The largest finite norm over all gradients."""
        return max((n for n in self.total_norm if math.isfinite(n)), default=math.nan)

    def milliseconds(self) -> tuple[float, float, float]:
        """Per step: gradclip, the NumPy loop, and all the rest of the step.

        Medians of the steps that were clipped and of those that were not, weighted by how many there are.
        """
        seconds, clipped = np.array(self.seconds), np.array(self.clipped)
        kinds = [kind for kind in (seconds[clipped], seconds[~clipped]) if len(kind)]
        clip, loop, rest = 1e3 * sum(len(kind) * np.median(kind, axis=0) for kind in kinds) / len(seconds)
        return float(clip), float(loop), float(rest)


class Run:
    """A network in training, with its gradients clipped to ``max_norm`` (``inf``: only measured)."""

    def __init__(self, title: str, settings: Settings, max_norm: float) -> None:
        sizes = [64] + [settings.width] * (settings.layers - 1) + [10]
        self.title = title
        self.settings = settings
        self.max_norm = max_norm
        self.network = Network(sizes, settings.gain, np.random.default_rng(settings.seed))
        self.history = History()
        self.test_loss = math.nan
        self.test_accuracy = math.nan
        self.stopped = False
        self._optimizer = Momentum(self.network.parameters)
        self._copies = {name: np.empty_like(p) for name, p in self.network.parameters.items()}

    def step(self, x: Array, labels: Labels) -> None:
        """Train on one batch and remember everything about it."""
        begin = perf_counter()
        loss, gradients = self.network.loss_and_gradients(x, labels)
        backward = perf_counter() - begin

        result, total, clip, loop = self._clip(gradients)

        begin = perf_counter()
        self._optimizer.step(gradients, self._learning_rate())
        rest = backward + perf_counter() - begin

        history = self.history
        history.loss.append(loss)
        history.total_norm.append(result.total_norm)
        # The norms come in the order of the parameters: weight, bias, weight, bias, ...
        history.layer_norms.append(np.sqrt(np.square(result.norms.reshape(-1, 2)).sum(axis=1)))
        history.clipped.append(result.clipped)
        history.nonfinite.append(result.nonfinite)
        history.loop_norm.append(total)
        history.seconds.append((clip, loop, rest))
        # A weight that is infinite or NaN stays so: there is nothing left to train.
        self.stopped = not all(np.isfinite(p).all() for p in self.network.parameters.values())

    def evaluate(self, digits: Digits) -> None:
        """Bring ``test_loss`` and ``test_accuracy`` up to date."""
        self.test_loss, self.test_accuracy = self.network.evaluate(digits.test_x, digits.test_y)

    def _clip(self, gradients: dict[str, Array]) -> tuple[gradclip.ClipResult, float, float, float]:
        """Clip with gradclip, and copies with the NumPy loop; the one that goes first alternates."""
        for name, g in gradients.items():
            np.copyto(self._copies[name], g)
        loop = 0.0
        # NumPy's turn comes before gradclip's in even steps and after it in odd ones.
        numpy_first = len(self.history.loss) % 2 == 0
        if numpy_first:
            begin = perf_counter()
            total = numpy_clip_(self._copies, self.max_norm)
            loop = perf_counter() - begin

        begin = perf_counter()
        # "propagate" changes nothing here: without a threshold nothing is written, and with one no
        # gradient gets as far as infinity.
        result = gradclip.clip_by_global_norm_(gradients, self.max_norm, nonfinite="propagate")
        clip = perf_counter() - begin

        if not numpy_first:
            begin = perf_counter()
            total = numpy_clip_(self._copies, self.max_norm)
            loop = perf_counter() - begin
        return result, total, clip, loop

    def _learning_rate(self) -> float:
        """Half a cosine, from the full rate down to 0."""
        progress = len(self.history.loss) / self.settings.steps
        return self.settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
