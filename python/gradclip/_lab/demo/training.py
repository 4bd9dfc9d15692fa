"""One of the demo's two runs: its network, and a clip that is compared with a loop in NumPy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import numpy.typing as npt

import gradclip
from gradclip._lab.data import batches, split_digits
from gradclip._lab.layers import Array
from gradclip._lab.networks import Network, multilayer
from gradclip._lab.training import USUAL_STEPS, BlowUp, History, Training, find_blow_up

__all__ = ["ComparedClip", "DemoSettings", "Run", "network_of", "numpy_clip_"]


@dataclass(frozen=True)
class DemoSettings:
    """Everything that both runs share, and the threshold that only one of them uses."""

    layers: int = 40
    steps: int = 600
    seed: int = 0
    width: int = 128
    gain: float = 1.4
    batch: int = 128
    learning_rate: float = 0.1
    max_norm: float = 0.5


def network_of(settings: DemoSettings) -> Network:
    """A sine network with orthogonal weights, those of all layers but the last multiplied by the gain.

    Sine networks (SIREN, Sitzmann et al. 2020, arXiv:2006.09661) show the explosion in its pure form.
    Forward, sine keeps every activation within [-1, 1], whatever the weights. Backward, a layer multiplies
    the signal by its weights and by a cosine, whose mean square stays near 1/2 however large the weights
    grow: tanh would saturate and put its own fire out, sine does not. So a gain a little above 1 already
    makes the gradients grow from layer to layer on their way back.
    """
    sizes = [64] + [settings.width] * (settings.layers - 1) + [10]
    return multilayer(sizes, "sine", "orthogonal", np.random.default_rng(settings.seed), gain=settings.gain)


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


class ComparedClip:
    """Clips with gradclip, and copies of the same gradients with the NumPy loop; both are timed.

    Args:
        parameters: Of the network.
        max_norm: The threshold; ``inf``: only measure.

    Attributes:
        loop_norm: In every step, the norm as the loop sees it.
        seconds: In every step, those of gradclip and those of the loop.
    """

    def __init__(self, parameters: Mapping[str, Array], max_norm: float) -> None:
        self.loop_norm: list[float] = []
        self.seconds: list[tuple[float, float]] = []
        self._max_norm = max_norm
        self._copies = {name: np.empty_like(p) for name, p in parameters.items()}

    def __call__(self, gradients: dict[str, Array]) -> gradclip.ClipResult:
        """Clip in place. The one that comes first finds cold caches: they take turns."""
        for name, g in gradients.items():
            np.copyto(self._copies[name], g)
        if len(self.seconds) % 2:
            result, clip = self._gradclip(gradients)
            total, loop = self._loop()
        else:
            total, loop = self._loop()
            result, clip = self._gradclip(gradients)
        self.loop_norm.append(total)
        self.seconds.append((clip, loop))
        return result

    def _gradclip(self, gradients: dict[str, Array]) -> tuple[gradclip.ClipResult, float]:
        begin = perf_counter()
        # "propagate" changes nothing here: without a threshold nothing is written, and with one no
        # gradient gets as far as infinity.
        result = gradclip.clip_by_global_norm_(gradients, self._max_norm, nonfinite="propagate")
        return result, perf_counter() - begin

    def _loop(self) -> tuple[float, float]:
        begin = perf_counter()
        total = numpy_clip_(self._copies, self._max_norm)
        return total, perf_counter() - begin


class Run:
    """A network in training, with its gradients clipped to ``max_norm`` (``inf``: only measured).

    Attributes:
        training: The laboratory's loop.
        clip: What it does to the gradients, and what that took.
        test_loss: On the test digits, at the last call of :meth:`evaluate`.
        test_accuracy: The same.
    """

    def __init__(self, title: str, settings: DemoSettings, max_norm: float) -> None:
        self.title = title
        self.settings = settings
        self.max_norm = max_norm
        self.network = network_of(settings)
        self.clip = ComparedClip(self.network.parameters, max_norm)
        digits = split_digits(settings.seed)
        self.training = Training(
            self.network,
            digits,
            batches(len(digits.train_y), settings.batch, np.random.default_rng(settings.seed)),
            steps=settings.steps,
            learning_rate=settings.learning_rate,
            schedule="cosine",
            clip=self.clip,
        )
        self.test_loss = math.nan
        self.test_accuracy = math.nan

    @property
    def history(self) -> History:
        """An entry for each step that is done."""
        return self.training.history

    @property
    def steps_done(self) -> int:
        """How many steps there are in the history."""
        return len(self.history.loss)

    @property
    def stopped(self) -> bool:
        """A weight is not finite: the run has ended."""
        return self.training.stopped

    def evaluate(self) -> None:
        """Bring ``test_loss`` and ``test_accuracy`` up to date."""
        self.test_loss, self.test_accuracy = self.training.evaluate()

    def clipped(self) -> npt.NDArray[np.bool_]:
        """In which steps the gradients were clipped."""
        return np.array(self.history.coefficient) < 1

    def find_blow_up(self) -> BlowUp | None:
        """What :func:`find_blow_up` says, called after every step: only the last one can be new."""
        norms = self.history.layer_norms
        found = find_blow_up(np.array(norms[:USUAL_STEPS] + norms[USUAL_STEPS:][-1:]))
        if found is None or found.step < USUAL_STEPS:
            return found
        return BlowUp(len(norms) - 1, found.layer, found.usual)

    def largest_norm(self) -> float:
        """The largest finite norm over all gradients."""
        return max((n for n in self.history.total_norm if math.isfinite(n)), default=math.nan)

    def milliseconds(self) -> tuple[float, float, float]:
        """Per step: gradclip, the NumPy loop, and all the rest of the step.

        Medians of the steps that were clipped and of those that were not, weighted by how many there are.
        """
        rest = [rest for _, rest in self.history.seconds]
        seconds, clipped = np.column_stack([np.array(self.clip.seconds), rest]), self.clipped()
        kinds = [kind for kind in (seconds[clipped], seconds[~clipped]) if len(kind)]
        clip, loop, rest_ms = 1e3 * sum(len(kind) * np.median(kind, axis=0) for kind in kinds) / len(seconds)
        return float(clip), float(loop), float(rest_ms)
