"""A small transformer learns Python's reference manual by character, with its gradients clipped.

    python docs/examples/jax_transformer.py [--steps 400] [--plot norms.png]

JAX, optax and Equinox. The text comes with Python (what `help("for")` shows). The norm of every array is in
the state of the clip: logging reads no gradient a second time.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import gradclip.jax

WIDTH, HEADS, BLOCKS, CONTEXT, BATCH = 64, 4, 2, 48, 12
LEARNING_RATE, MAX_NORM = 3e-3, 0.5


class Block(eqx.Module):
    norm1: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    norm2: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        keys = jax.random.split(key, 3)
        self.norm1, self.norm2 = eqx.nn.LayerNorm(WIDTH), eqx.nn.LayerNorm(WIDTH)
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=keys[0])
        self.up = eqx.nn.Linear(WIDTH, 4 * WIDTH, key=keys[1])
        self.down = eqx.nn.Linear(4 * WIDTH, WIDTH, key=keys[2])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Of shape (characters, WIDTH), as what is returned."""
        seen = jnp.tril(jnp.ones((len(x), len(x)), bool))
        y = jax.vmap(self.norm1)(x)
        x = x + self.attention(y, y, y, mask=seen)
        y = jax.vmap(self.norm2)(x)
        return x + jax.vmap(self.down)(jax.nn.gelu(jax.vmap(self.up)(y)))


class Transformer(eqx.Module):
    characters: eqx.nn.Embedding
    positions: eqx.nn.Embedding
    blocks: list[Block]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, vocabulary: int, key: jax.Array) -> None:
        keys = jax.random.split(key, 3 + BLOCKS)
        self.characters = eqx.nn.Embedding(vocabulary, WIDTH, key=keys[0])
        self.positions = eqx.nn.Embedding(CONTEXT, WIDTH, key=keys[1])
        self.blocks = [Block(key) for key in keys[3:]]
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.head = eqx.nn.Linear(WIDTH, vocabulary, key=keys[2])

    def __call__(self, text: jax.Array) -> jax.Array:
        """From characters to the logits of those that follow."""
        x = jax.vmap(self.characters)(text) + jax.vmap(self.positions)(jnp.arange(len(text)))
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(jax.vmap(self.norm)(x))


@dataclass
class Training:
    """What was logged."""

    names: list[str]  # of all arrays
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    total_norms: list[float] = field(default_factory=list)  # before clipping, as norms
    norms: list[np.ndarray] = field(default_factory=list)
    clipped_steps: int = 0


def loss_of(model: Transformer, texts: jax.Array) -> jax.Array:
    logits = jax.vmap(model)(texts[:, :-1])
    losses: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, texts[:, 1:])
    return losses.mean()


def load() -> tuple[np.ndarray, int]:
    """The text as numbers, and how many there are to tell apart."""
    characters, text = np.unique(list("\n".join(topics.values())), return_inverse=True)
    return text.astype(np.int32), len(characters)


def batches(text: np.ndarray, steps: int) -> Iterator[jax.Array]:
    rng = np.random.default_rng(0)
    for _ in range(steps):
        first = rng.integers(len(text) - CONTEXT, size=(BATCH, 1))
        yield jnp.asarray(text[first + np.arange(CONTEXT + 1)])


def train(steps: int, every: int) -> Training:
    text, vocabulary = load()
    model = Transformer(vocabulary, jax.random.key(0))
    params = eqx.filter(model, eqx.is_array)
    optimizer = optax.chain(
        gradclip.jax.clip_by_global_norm(MAX_NORM),
        optax.adamw(optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, steps // 8, steps)),
    )
    state = optimizer.init(params)
    training = Training(names=list(gradclip.jax.named_norms(state[0], params)))

    @eqx.filter_jit(donate="all-except-first")
    def step(texts: jax.Array, model: Transformer, state: Any) -> tuple[Transformer, Any, jax.Array]:
        loss, grads = eqx.filter_value_and_grad(loss_of)(model, texts)
        updates, state = optimizer.update(grads, state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), state, loss

    for i, texts in enumerate(batches(text, steps), start=1):
        model, state, loss = step(texts, model, state)
        if i % every and i not in (1, steps):
            continue
        clip = state[0]  # the ClipState; the next step takes its memory, so read it now
        training.steps.append(i)
        training.losses.append(float(loss))
        training.total_norms.append(float(clip.total_norm))
        training.norms.append(np.array(clip.norms))
        training.clipped_steps = int(clip.clipped_steps)
        largest = np.argmax(training.norms[-1])
        print(
            f"step {i:4}   loss {loss:6.3f}   global norm {clip.total_norm:6.3f}   clipped so far "
            f"{training.clipped_steps:4}   largest {training.names[largest]} {clip.norms[largest]:.3f}"
        )
    return training


def plot(training: Training, path: Path) -> None:
    """The global norm, and the norm of every array, over steps."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1, 3])
    top.plot(training.steps, training.total_norms, color="#222222", label="global norm, before clipping")
    top.axhline(MAX_NORM, color="#D55E00", linestyle="--", label="max_norm")
    top.set_ylim(bottom=0)
    top.legend(frameon=False)
    norms = np.stack(training.norms).T
    mesh = bottom.pcolormesh(
        training.steps, np.arange(len(norms)), np.log10(np.where(norms > 0, norms, np.nan)), cmap="viridis"
    )
    bottom.set_yticks(np.arange(len(norms)), training.names, fontsize=7)
    bottom.invert_yaxis()
    bottom.set_xlabel("step")
    figure.colorbar(mesh, ax=bottom, label="log10 of the norm", pad=0.01)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> Training:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--log-every", type=int, default=20, metavar="STEPS")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the norm of every array over steps")
    options = parser.parse_args(arguments)
    training = train(options.steps, options.log_every)
    if options.plot:
        plot(training, options.plot)
    return training


if __name__ == "__main__":
    main()
