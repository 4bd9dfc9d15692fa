"""A perceptron of 25 layers, with and without clipping: with it the digits are learnt, without it nothing is.

    python docs/examples/jax_mlp.py [--steps 300] [--plot norms.png]

JAX, optax and Equinox; the digits are scikit-learn's. The norm of every layer is in the state of the clip:
logging reads no gradient a second time.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits  # type: ignore[import-untyped]

import gradclip.jax

WIDTH, HIDDEN_LAYERS, BATCH, TRAINING_EXAMPLES = 64, 24, 64, 1400
LEARNING_RATE, MOMENTUM, MAX_NORM = 0.05, 0.9, 0.5


class Perceptron(eqx.Module):
    """A chain of matrices, which at the beginning keep the size of what passes through them."""

    layers: list[jax.Array]

    def __init__(self, sizes: Sequence[int], key: jax.Array) -> None:
        keys = jax.random.split(key, len(sizes) - 1)
        self.layers = [
            jax.random.normal(key, (size, before)) * math.sqrt(1.5 / before)
            for key, before, size in zip(keys, sizes[:-1], sizes[1:], strict=True)
        ]

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers[:-1]:
            x = jnp.tanh(layer @ x)
        return self.layers[-1] @ x


@dataclass
class Training:
    """What there is to tell of one training."""

    max_norm: float
    layers: list[str]  # names
    losses: np.ndarray  # of each step
    norms: np.ndarray  # of each step and layer, before clipping
    clipped_steps: int
    accuracy: float


def loss_of(model: Perceptron, x: jax.Array, y: jax.Array) -> jax.Array:
    losses: jax.Array = optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(x), y)
    return losses.mean()


def load() -> tuple[jax.Array, jax.Array]:
    digits = load_digits()
    return jnp.asarray(digits.data / 8 - 1), jnp.asarray(digits.target)


def batches(examples: int, steps: int) -> Iterator[np.ndarray]:
    """Which examples each step is made of."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        yield rng.choice(examples, BATCH, replace=False)


def train(max_norm: float, steps: int) -> Training:
    x, y = load()
    model = Perceptron([64, *[WIDTH] * HIDDEN_LAYERS, 10], jax.random.key(0))
    params = eqx.filter(model, eqx.is_array)
    optimizer = optax.chain(
        gradclip.jax.clip_by_global_norm(max_norm),
        optax.sgd(LEARNING_RATE, MOMENTUM),
    )
    state = optimizer.init(params)

    @eqx.filter_jit
    def step(model: Perceptron, state: Any, batch: jax.Array) -> tuple[Perceptron, Any, jax.Array]:
        loss, grads = eqx.filter_value_and_grad(loss_of)(model, x[batch], y[batch])
        updates, state = optimizer.update(grads, state)
        return eqx.apply_updates(model, updates), state, loss

    losses, norms = [], []
    for i, batch in enumerate(batches(TRAINING_EXAMPLES, steps), start=1):
        model, state, loss = step(model, state, jnp.asarray(batch))
        clip = state[0]  # the ClipState; nothing waits for these arrays until they are printed
        losses.append(loss)
        norms.append(clip.norms)
        if i % max(steps // 6, 1) == 0:
            print(
                f"step {i:4}   loss {loss:6.3f}   global norm {clip.total_norm:9.3g}   "
                f"first layer {clip.norms[0]:9.3g}   last layer {clip.norms[-1]:9.3g}   "
                f"clipped so far {clip.clipped_steps:3}"
            )
    predicted = jax.vmap(model)(x[TRAINING_EXAMPLES:]).argmax(axis=-1)
    return Training(
        max_norm=max_norm,
        layers=list(gradclip.jax.named_norms(state[0], params)),
        losses=np.stack(losses),
        norms=np.stack(norms),
        clipped_steps=int(state[0].clipped_steps),
        accuracy=float(np.mean(predicted == y[TRAINING_EXAMPLES:])),
    )


def title(training: Training) -> str:
    clipping = "no clipping" if math.isinf(training.max_norm) else f"clipped to {training.max_norm:g}"
    return f"{clipping}: {training.accuracy:.0%} of new digits right"


def plot(trainings: Sequence[Training], path: Path) -> None:
    """The norm of every layer over steps, one panel for each training."""
    logs = [np.log10(np.where(t.norms > 0, t.norms, np.nan)).T for t in trainings]
    low, high = np.nanpercentile(np.concatenate(logs, axis=1), [1, 99.9])
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, len(trainings), sharey=True)
    for ax, training, log in zip(axes, trainings, logs, strict=True):
        end = len(training.losses) + 0.5
        image = ax.imshow(
            log,
            aspect="auto",
            cmap="viridis",
            vmin=low,
            vmax=high,
            interpolation="nearest",
            extent=(0.5, end, log.shape[0] + 0.5, 0.5),
        )
        ax.set_title(title(training), loc="left", fontsize=10)
        ax.set_xlabel("step")
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="log10 of the gradient's norm, before clipping", pad=0.01)
    figure.savefig(path, dpi=100)


def main(arguments: Sequence[str] | None = None) -> list[Training]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of each training")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the norm of every layer over steps")
    options = parser.parse_args(arguments)
    trainings = []
    for max_norm in (math.inf, MAX_NORM):
        training = train(max_norm, options.steps)
        print(f"{title(training)}, {training.clipped_steps} of {options.steps} steps clipped\n")
        trainings.append(training)
    if options.plot:
        plot(trainings, options.plot)
    return trainings


if __name__ == "__main__":
    main()
