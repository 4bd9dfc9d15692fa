"""A perceptron of 30 layers learns digits if its gradients are clipped, and breaks if they are not.

    python docs/examples/jax_mlp.py [--steps 400] [--plot norms.png]

JAX, Equinox and optax. The norm of every layer comes from the state of the clip: no second pass over gradients.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import gradclip.jax

WIDTH, DEPTH, BATCH = 64, 30, 64


@dataclass
class Training:
    """What one training was like: a value for each step, and the names of the layers."""

    max_norm: float
    names: list[str]
    losses: list[Any] = field(default_factory=list)
    norms: list[Any] = field(default_factory=list)  # of every layer, before clipping
    clipped_steps: int = 0
    accuracy: float = 0.0


def make_model(key: jax.Array) -> eqx.nn.MLP:
    """Weights that keep the size of what passes through them (He et al. 2015)."""
    model = eqx.nn.MLP(64, 10, WIDTH, DEPTH, jax.nn.relu, use_bias=False, key=key)
    init = jax.nn.initializers.he_normal(in_axis=-1, out_axis=-2)
    keys = jax.random.split(key, len(model.layers))
    weights = [init(k, layer.weight.shape) for k, layer in zip(keys, model.layers, strict=True)]
    return eqx.tree_at(lambda m: [layer.weight for layer in m.layers], model, weights)


def loss_of(model: eqx.nn.MLP, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(x), y).mean()


def batches(x: np.ndarray, y: np.ndarray, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    while True:
        chosen = rng.choice(len(x), BATCH, replace=False)
        yield x[chosen], y[chosen]


def train(max_norm: float, steps: int, seed: int = 0) -> Training:
    digits = load_digits()
    x, y = (digits.data / 16 - 0.5).astype(np.float32), digits.target.astype(np.int32)
    train_x, train_y, test_x, test_y = x[:1400], y[:1400], x[1400:], y[1400:]

    model = make_model(jax.random.key(seed))
    optimizer = optax.chain(gradclip.jax.clip_by_global_norm(max_norm), optax.sgd(0.05, momentum=0.9))
    state = optimizer.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def step(model: eqx.nn.MLP, state: Any, x: jax.Array, y: jax.Array) -> tuple[eqx.nn.MLP, Any, jax.Array]:
        loss, grads = eqx.filter_value_and_grad(loss_of)(model, x, y)
        updates, state = optimizer.update(grads, state)
        return eqx.apply_updates(model, updates), state, loss

    training = Training(max_norm, list(gradclip.jax.named_norms(state[0], eqx.filter(model, eqx.is_array))))
    for i, (xs, ys) in zip(range(steps), batches(train_x, train_y, seed), strict=False):
        model, state, loss = step(model, state, xs, ys)
        clip = state[0]  # the ClipState: arrays that nobody has waited for
        training.losses.append(loss)
        training.norms.append(clip.norms)
        if i % max(steps // 10, 1) == 0:
            print(
                f"step {i:4}  loss {loss:8.4f}  global norm {clip.total_norm:10.4g}  "
                f"coefficient {clip.coefficient:8.2g}"
            )
    training.clipped_steps = int(state[0].clipped_steps)
    training.accuracy = float(jnp.mean(jnp.argmax(jax.vmap(model)(test_x), axis=-1) == test_y))
    return training


def main(arguments: list[str] | None = None) -> list[Training]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    r=[]
    for m in (math.inf, 1.0):
        t=train(m, options.steps)
        r.append(t)
        print(t.clipped_steps, t.accuracy)
    return r

if __name__ == "__main__":
    import time
    t=time.time()
    main()
    print(time.time()-t)
