"""One run: its settings, and what is found out by training with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np

from gradclip._lab.data import batches, split_digits, split_text
from gradclip._lab.layers import ACTIVATIONS, INITIALISATIONS
from gradclip._lab.networks import NORMALISATIONS, Network, elman, lstm, memory, multilayer
from gradclip._lab.training import CLIPPINGS, REGULARISATIONS, SCHEDULES, Clip, History, Training

__all__ = ["AXES", "EXPLOSION", "Settings", "merged", "run"]

# Healthy runs of these networks have gradients with norms of 0.1 to 100.
EXPLOSION = 1000.0
WIDTH = 64
BATCH = {"digits": 64, "text": 32}
POINTS = 60  # of a curve

# What can be varied by name.
AXES: dict[str, tuple[str, ...]] = {
    "network": ("mlp", "residual", "elman", "lstm"),
    "activation": tuple(ACTIVATIONS),
    "initialisation": INITIALISATIONS,
    "normalisation": ("none", *NORMALISATIONS),
    "schedule": tuple(SCHEDULES),
    "regularisation": tuple(REGULARISATIONS),
    "clipping": tuple(CLIPPINGS),
}


@dataclass(frozen=True)
class Settings:
    """A point of the design. Two runs with equal settings are the same run.

    Attributes:
        gain: What initial weights are multiplied by, but those of the last layer.
        depth: Layers with weights, of a multilayer perceptron or a residual network.
        in_detail: Whether curves, and the norm of every layer at their steps, are kept, too.
    """

    network: str = "mlp"
    activation: str = "relu"
    initialisation: str = "he"
    gain: float = 1.0
    depth: int = 20
    normalisation: str = "none"
    learning_rate: float = 0.05
    schedule: str = "constant"
    regularisation: str = "none"
    clipping: str = "none"
    steps: int = 300
    seed: int = 0
    in_detail: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        for axis, values in AXES.items():
            value = getattr(self, axis)
            if value not in values:
                raise ValueError(f"{axis}: expected one of {', '.join(values)}, got {value!r}")

    @property
    def subject(self) -> str:
        """What is learnt."""
        return "text" if self.network in ("elman", "lstm") else "digits"

    def varied(self) -> dict[str, Any]:
        """What makes it this run, by name."""
        return {key: value for key, value in asdict(self).items() if key != "in_detail"}

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Of what can be varied."""
        return tuple(f.name for f in fields(cls) if f.compare)


def merged(settings: Sequence[Settings]) -> list[Settings]:
    """Each run once, in the order in which they come; in detail if any of the equal ones has them."""
    found: dict[Settings, Settings] = {}
    for one in settings:
        known = found.setdefault(one, one)
        if one.in_detail:
            found[one] = replace(known, in_detail=True)
    return list(found.values())


def run(settings: Settings) -> dict[str, Any]:
    """Train once; return the settings and what was found, as plain objects for JSON.

    What is not finite is ``None``.
    """
    # Whatever the network is: the same examples in the same order.
    weights, order = (np.random.default_rng([settings.seed, i]) for i in range(2))
    subject = settings.subject
    data = (split_text if subject == "text" else split_digits)(settings.seed)
    network = _network(settings, data.train_x.shape[-1], data.classes, weights)
    found: dict[str, Any] = {}
    if subject == "text":
        found["memory"] = _rounded(memory(network, data.train_x[: BATCH[subject]], order))
    training = Training(
        network,
        data,
        batches(len(data.train_y), BATCH[subject], order),
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        schedule=settings.schedule,
        clip=Clip(settings.clipping, network.parameters, REGULARISATIONS[settings.regularisation]),
    )
    while len(training.history.loss) < settings.steps and not training.stopped:
        training.step()
    return settings.varied() | {"subject": subject} | found | _findings(training, settings.in_detail)


def _network(settings: Settings, inputs: int, classes: int, rng: np.random.Generator) -> Network:
    if settings.network == "lstm":
        return lstm(inputs, WIDTH, classes, settings.initialisation, rng, gain=settings.gain)
    if settings.network == "elman":
        return elman(
            inputs, WIDTH, classes, settings.activation, settings.initialisation, rng, gain=settings.gain
        )
    return multilayer(
        [inputs] + [WIDTH] * (settings.depth - 1) + [classes], settings.activation, settings.initialisation,
        rng, gain=settings.gain, normalisation=settings.normalisation,
        residual=settings.network == "residual",
    )  # fmt: skip


def _findings(training: Training, in_detail: bool) -> dict[str, Any]:
    history = training.history
    test_loss, test_accuracy = training.evaluate()
    seconds = np.median(history.seconds, axis=0)
    step, layer = _explosion(history)
    growing = [alert.step for alert in training.monitor.alerts if alert.kind == "growing"]
    warned = [alert for alert in training.monitor.alerts if alert.is_warning]
    finite = [norm for norm in history.total_norm if math.isfinite(norm)]
    found = {
        "layers": list(history.layers),
        "first_norms": _rounded(history.layer_norms[0]),
        "first_norm": _rounded([history.total_norm[0]])[0],
        "signal_rms": _rounded(history.signal_rms),
        "delta_rms": _rounded(history.delta_rms),
        "steps_done": len(history.loss),
        "lost": training.stopped,
        "exploded_step": step,
        "exploded_layer": layer,
        "growing_step": growing[0] if growing else None,
        "warned_step": warned[0].step if warned else None,
        "warned_of": warned[0].kind if warned else None,
        "largest_norm": _rounded([max(finite, default=math.nan)])[0],
        "clipped_share": float(np.mean(np.array(history.coefficient) < 1)),
        "first_loss": _rounded([history.loss[0]])[0],
        "last_loss": _rounded([float(np.median(history.loss[-20:]))])[0],
        "test_loss": _rounded([test_loss])[0],
        "test_accuracy": round(test_accuracy, 4),
        "seconds_clip": float(f"{seconds[0]:.3g}"),
        "seconds_rest": float(f"{seconds[1]:.3g}"),
    }
    if in_detail:
        chosen = sorted(set(np.linspace(0, len(history.loss) - 1, POINTS).round().astype(int).tolist()))
        found["steps_shown"] = [i + 1 for i in chosen]
        found["losses"] = _rounded([history.loss[i] for i in chosen])
        found["norms"] = _rounded([history.total_norm[i] for i in chosen])
        found["layer_norms"] = [_rounded(history.layer_norms[i]) for i in chosen]
    return found


def _explosion(history: History) -> tuple[int | None, str | None]:
    """The first step, from 1, in which the global norm was not finite or beyond the limit, and the layer.

    The layer is that with the largest norm; of those that are not finite the one nearest to the output, for
    the backward pass got there first.
    """
    for step, total in enumerate(history.total_norm):
        if not total <= EXPLOSION:
            norms = np.array(history.layer_norms[step])
            broken = np.flatnonzero(~np.isfinite(norms))
            return step + 1, history.layers[int(broken[-1] if broken.size else norms.argmax())]
    return None, None


def _rounded(values: Any) -> list[float | None]:
    """To four digits: what two machines have in common, and a fifth of the file."""
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in map(float, values)]
