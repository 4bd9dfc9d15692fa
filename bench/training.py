"""End to end: the share of a real training step that clipping takes, before and after.

Three models are trained, one step with each way to clip by turns: the same batch, the same weights. Where
the clip is a call of its own it is timed inside the step; where it is compiled into the step (JAX), its
time is that of the step less that of a step without.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gradclip

__all__ = ["MODELS", "Share", "Steps", "missing", "shares", "train"]

# Seconds of the whole step and of the clip in it, by way to clip; of the clip 0 where it is not a call.
Steps = dict[str, list[tuple[float, float]]]

_NO_CLIP = "no clipping"
_MAX_NORM = 1.0
_WARM_UP = 2  # steps of each way


Step = Callable[[], tuple[float, float]]


def _torch_steps(model: Any, loss_of: Callable[[Any], Any]) -> dict[str, Step]:
    torch: Any = importlib.import_module("torch")
    ours: Any = importlib.import_module("gradclip.torch")
    torch.set_num_threads(gradclip.get_num_threads())
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def by_torch() -> Any:
        return torch.nn.utils.clip_grad_norm_(parameters, _MAX_NORM)

    def by_gradclip() -> Any:
        return ours.clip_grad_norm_(parameters, _MAX_NORM)

    def deferred() -> Any:
        return ours.defer_clip_(optimizer, _MAX_NORM)

    def step(clip: Callable[[], Any]) -> tuple[float, float]:
        start = time.perf_counter()
        optimizer.zero_grad()
        loss_of(model).backward()
        before = time.perf_counter()
        clip()
        after = time.perf_counter()
        optimizer.step()
        return time.perf_counter() - start, after - before

    return {
        "PyTorch clip_grad_norm_": lambda: step(by_torch),
        "gradclip.torch clip_grad_norm_": lambda: step(by_gradclip),
        "gradclip.torch defer_clip_": lambda: step(deferred),
    }


def _gpt() -> dict[str, Step]:
    """Six layers of width 384, 16 million parameters, batches of 4 x 128 tokens."""
    torch: Any = importlib.import_module("torch")
    nn = torch.nn
    torch.manual_seed(0)
    width, vocabulary, length = 384, 8192, 128
    block = nn.TransformerEncoderLayer(width, 6, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
    model = nn.ModuleDict(
        {
            "tokens": nn.Embedding(vocabulary, width),
            "positions": nn.Embedding(length, width),
            "blocks": nn.TransformerEncoder(block, 6, nn.LayerNorm(width), enable_nested_tensor=False),
            "head": nn.Linear(width, vocabulary, bias=False),
        }
    )
    tokens = torch.randint(vocabulary, (4, length + 1))
    mask = nn.Transformer.generate_square_subsequent_mask(length)

    def loss(model: Any) -> Any:
        x = model["tokens"](tokens[:, :-1]) + model["positions"].weight
        logits = model["head"](model["blocks"](x, mask, is_causal=True))
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    return _torch_steps(model, loss)


def _resnet() -> dict[str, Step]:
    """The ResNet of 20 layers for 32 x 32 images (arXiv:1512.03385, section 4.2), batches of 32."""
    torch: Any = importlib.import_module("torch")
    nn = torch.nn
    torch.manual_seed(0)

    def convolution(inputs: int, outputs: int, size: int, stride: int) -> Any:
        padding = size // 2
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, size, stride, padding, bias=False), nn.BatchNorm2d(outputs)
        )

    class Block(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.first = convolution(inputs, outputs, 3, stride)
            self.second = convolution(outputs, outputs, 3, 1)
            self.shortcut = convolution(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

        def forward(self, x: Any) -> Any:
            return torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x))

    blocks, inputs = [convolution(3, 16, 3, 1), nn.ReLU()], 16
    for outputs in (16, 32, 64):
        for i in range(3):
            blocks.append(Block(inputs, outputs, 2 if i == 0 and outputs > 16 else 1))
            inputs = outputs
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    images, labels = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    return _torch_steps(model, lambda model: nn.functional.cross_entropy(model(images), labels))


def _optax() -> dict[str, Step]:
    """An MLP of 8 layers of width 1024 by Adam, batches of 64."""
    jax: Any = importlib.import_module("jax")
    optax: Any = importlib.import_module("optax")
    jnp = jax.numpy
    keys = jax.random.split(jax.random.key(0), 10)
    weights = [0.04 * jax.random.normal(key, (1024, 1024), jnp.float32) for key in keys[:8]]
    parameters = {"weights": weights, "biases": [jnp.zeros(1024, jnp.float32)] * 8}
    x = jax.random.normal(keys[8], (64, 1024), jnp.float32)
    y = jax.random.normal(keys[9], (64, 1024), jnp.float32)

    def loss(parameters: Any) -> Any:
        h = x
        for weight, bias in zip(parameters["weights"], parameters["biases"], strict=True):
            h = jnp.tanh(h @ weight + bias)
        return jnp.mean((h - y) ** 2)

    def steps_of(transform: Any) -> Step:
        state = {"parameters": parameters, "optimizer": transform.init(parameters)}

        def update(parameters: Any, optimizer: Any) -> Any:
            updates, optimizer = transform.update(jax.grad(loss)(parameters), optimizer, parameters)
            return optax.apply_updates(parameters, updates), optimizer

        compiled = jax.jit(update)

        def step() -> tuple[float, float]:
            start = time.perf_counter()
            new = compiled(state["parameters"], state["optimizer"])
            state["parameters"], state["optimizer"] = jax.block_until_ready(new)
            return time.perf_counter() - start, 0.0

        return step

    adam = optax.adam(1e-4)
    ours: Any = importlib.import_module("gradclip.jax")
    return {
        _NO_CLIP: steps_of(adam),
        "optax clip_by_global_norm": steps_of(optax.chain(optax.clip_by_global_norm(_MAX_NORM), adam)),
        "gradclip.jax clip_by_global_norm": steps_of(optax.chain(ours.clip_by_global_norm(_MAX_NORM), adam)),
    }


MODELS: Mapping[str, tuple[str, tuple[str, ...], Callable[[], dict[str, Step]]]] = {
    "gpt": ("small GPT, PyTorch, fused AdamW", ("torch",), _gpt),
    "resnet": ("ResNet-20, PyTorch, fused AdamW", ("torch",), _resnet),
    "mlp": ("MLP 8 x 1024, JAX, optax Adam", ("jax", "optax"), _optax),
}


def missing(model: str) -> list[str]:
    """The modules that the model needs and that are not installed."""
    return [name for name in MODELS[model][1] if importlib.util.find_spec(name) is None]


def train(model: str, rounds: int, tick: Callable[[float], None] = lambda _: None) -> Steps:
    """Train a model for so many steps with each way to clip; ``tick`` is told how much is done."""
    steps = MODELS[model][2]()
    taken: Steps = {way: [] for way in steps}
    gc.collect()
    gc.disable()
    try:
        for round_ in range(-_WARM_UP, rounds):
            tick(max(round_, 0) / rounds)
            for way, step in steps.items():
                seconds = step()
                if round_ >= 0:
                    taken[way].append(seconds)
    finally:
        gc.enable()
    return taken


@dataclass(frozen=True)
class Share:
    """Median seconds of a step and of the clip in it."""

    model: str
    way: str
    step: float
    clip: float

    @property
    def share(self) -> float:
        return self.clip / self.step


def shares(training: Mapping[str, Steps]) -> list[Share]:
    """What clipping costs, by model and way."""
    found = []
    for model, steps in training.items():
        without = statistics.median(step for step, _ in steps[_NO_CLIP]) if _NO_CLIP in steps else None
        for way, taken in steps.items():
            step = statistics.median(step for step, _ in taken)
            clip = statistics.median(clip for _, clip in taken)
            if without is not None:
                clip = step - without
            if way != _NO_CLIP:
                found.append(Share(MODELS[model][0], way, step, max(clip, 0.0)))
    return found
