"""Trainings that blow up, and quiet ones, step by step: what the monitor is judged by.

    python -m tools.monitor docs/monitor.md

Each yields the loss and the result of a clip (of a measurement, where the threshold is infinite), and then
makes the step. All is seeded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn

import gradclip
import gradclip.monitor
import gradclip.torch
from gradclip._lab.data import batches, split_digits
from gradclip._lab.demo.training import DemoSettings, network_of
from gradclip._lab.training import Momentum

__all__ = ["BLOW_UPS", "QUIET", "Steps", "Verdict", "judge"]

Steps = Iterator[tuple[float, gradclip.ClipResult]]


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[], Tensor],
    max_norm: float,
    scale: float = 1.0,
) -> Steps:
    while True:
        loss = loss_of()
        optimizer.zero_grad()
        (loss * scale).backward()  # type: ignore[no-untyped-call]
        result = gradclip.torch.clip_module_(model, max_norm, grad_scale=scale, nonfinite="propagate")
        yield loss.item(), result
        optimizer.step()


class _Transformer(nn.Module):
    """Four layers of 32, a vocabulary of 32, contexts of 16; layer norms after each block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(32, 32), nn.Embedding(16, 32)
        layer = nn.TransformerEncoderLayer(32, 2, 128, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(32, 32)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(16))

    def forward(self, tokens: Tensor) -> Tensor:
        states: Tensor = self.embed(tokens) + self.place.weight
        return self.head(self.body(states, mask=self.mask))  # type: ignore[no-any-return]


def _markov_chain(length: int, seed: int) -> Tensor:
    rng = np.random.default_rng(seed)
    steps = rng.dirichlet(np.full(32, 0.1), size=32).cumsum(axis=1)
    tokens, state = np.empty(length, np.int64), 0
    for i, chance in enumerate(rng.random(length)):
        state = min(int(np.searchsorted(steps[state], chance)), 31)
        tokens[i] = state
    return torch.from_numpy(tokens)


def transformer(seed: int, rate: float, max_norm: float) -> Steps:
    """Predicts a Markov chain, by momentum."""
    torch.manual_seed(seed)
    text, model = _markov_chain(20_000, seed), _Transformer()

    def loss_of() -> Tensor:
        windows = text[torch.randint(0, len(text) - 17, (16, 1)) + torch.arange(17)]
        return nn.functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    return _train(model, torch.optim.SGD(model.parameters(), rate, momentum=0.9), loss_of, max_norm)


class _Lstm(nn.Module):
    """Two layers of 64, whose recurrent weights are twice an orthogonal matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(2, 64, 2, batch_first=True), nn.Linear(64, 1)
        for name, parameter in self.body.named_parameters():
            if "weight_hh" in name:
                nn.init.orthogonal_(parameter, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])  # type: ignore[no-any-return]


def lstm(seed: int, rate: float, max_norm: float, length: int = 30) -> Steps:
    """The adding problem (Hochreiter and Schmidhuber 1997), by momentum."""
    torch.manual_seed(seed)
    model = _Lstm()

    def loss_of() -> Tensor:
        values, marks = torch.rand(32, length), torch.zeros(32, length)
        marks.scatter_(1, torch.rand(32, length).argsort(dim=1)[:, :2], 1.0)
        return nn.functional.mse_loss(
            model(torch.stack([values, marks], 2)), (values * marks).sum(1, keepdim=True)
        )

    return _train(model, torch.optim.SGD(model.parameters(), rate, momentum=0.9), loss_of, max_norm)


def half(seed: int, rate: float, max_norm: float, scale: float = 1.0) -> Steps:
    """Digits in float16 all through: weights, activations, gradients, updates."""
    torch.manual_seed(seed)
    layers = [nn.Linear(64, 64) if i % 2 == 0 else nn.ReLU() for i in range(12)]
    model = nn.Sequential(*layers, nn.Linear(64, 10)).half()
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor((pixels - pixels.mean(0)) / pixels.std()).half(), torch.tensor(labels)

    def loss_of() -> Tensor:
        batch = torch.randint(0, len(x), (128,))
        return nn.functional.cross_entropy(model(x[batch]).float(), y[batch])

    return _train(model, torch.optim.SGD(model.parameters(), rate, momentum=0.9), loss_of, max_norm, scale)


def demo(seed: int, max_norm: float, layers: int = 40) -> Steps:
    """The network of ``python -m gradclip demo``."""
    digits, settings = split_digits(seed), DemoSettings(seed=seed, layers=layers)
    network = network_of(settings)
    optimizer = Momentum(network.parameters)
    for batch in batches(len(digits.train_y), settings.batch, np.random.default_rng(seed)):
        loss, gradients = network.loss_and_gradients(digits.train_x[batch], digits.train_y[batch])
        yield loss, gradclip.clip_by_global_norm_(gradients, max_norm, nonfinite="propagate")
        optimizer.step(gradients, settings.learning_rate)


BLOW_UPS: dict[str, Callable[[int], Steps]] = {
    "the demo's network without clipping": lambda seed: demo(seed, math.inf),
    "a transformer, learning rate 1": lambda seed: transformer(seed, 1.0, math.inf),
    "a transformer, learning rate 3": lambda seed: transformer(seed, 3.0, math.inf),
    "an LSTM without clipping": lambda seed: lstm(seed, 1.0, math.inf),
    "float16 without loss scaling": lambda seed: half(seed, 2.0, math.inf),
}
QUIET: dict[str, Callable[[int], Steps]] = {
    "the demo's network": lambda seed: demo(seed, 0.5),
    "a transformer": lambda seed: transformer(seed, 0.2, 1.0),
    "an LSTM": lambda seed: lstm(seed, 0.05, 1.0, 20),
    "float16 with loss scaling": lambda seed: half(seed, 0.05, 1.0, 128.0),
}


@dataclass
class Verdict:
    """What a monitor said of one training."""

    steps: int  # to the first loss or norm that was not finite, or all
    broke: bool
    warnings: list[gradclip.monitor.Alert]  # before that

    @property
    def ahead(self) -> int | None:
        """How many steps before the end the first warning came."""
        return self.steps - self.warnings[0].step if self.warnings else None


def judge(training: Steps, steps: int) -> Verdict:
    """Watch a training until it breaks, or for so many steps."""
    monitor = gradclip.monitor.GradientMonitor(clips=False)
    warnings: list[gradclip.monitor.Alert] = []
    for step, (loss, result) in zip(range(1, steps + 1), training, strict=False):
        if not (math.isfinite(loss) and math.isfinite(result.total_norm)):
            return Verdict(step, True, warnings)
        warnings += [alert for alert in monitor.update(result, loss) if alert.is_warning]
    return Verdict(steps, False, warnings)
