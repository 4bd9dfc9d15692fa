"""Keras's clipping of gradients: by its optimizers, and by the same through gradclip."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

import gradclip.keras
from tools.integrations.timing import Comparison, compare

__all__ = ["measure"]

# By how they are called in the table: how many tensors, of which shape.
_LOADS = {"160 tensors, 25 M elements": (160, (250, 625)), "300 tensors of 64 elements": (300, (64,))}
_OPTIONS = ("global_clipnorm", "clipnorm")
_BACKENDS = {"torch": "PyTorch", "jax": "JAX, jit"}


def measure() -> Iterator[Comparison]:
    backend = keras.backend.backend()
    where = f"Keras {keras.__version__} on {_BACKENDS[backend]}"
    for load, (count, shape) in _LOADS.items():
        rng = np.random.default_rng(0)
        originals = [keras.ops.array(rng.standard_normal(shape, np.float32)) for _ in range(count)]
        for option in _OPTIONS:
            threshold = {"global_clipnorm": 1.0, "clipnorm": 0.1}[option]
            theirs = keras.optimizers.SGD(0.1, **{option: threshold})
            ours = gradclip.keras.clipping(keras.optimizers.SGD(0.1, **{option: threshold}))
            of_backend = _in_torch if backend == "torch" else _in_jax
            prepare, jobs = of_backend(originals, [theirs._clip_gradients, ours._clip_gradients])
            answers = []
            for job in jobs:
                prepare()
                answers.append([np.array(keras.ops.convert_to_numpy(grad)) for grad in job()])
            for expected, found in zip(*answers, strict=True):
                np.testing.assert_allclose(found, expected, rtol=1e-6)
            yield compare(where, f"`{option}`", load, *jobs, prepare=prepare)


def _in_torch(originals: list[Any], clips: list[Any]) -> tuple[Callable[[], None], list[Callable[[], Any]]]:
    torch = sys.modules["torch"]
    grads = [original.clone() for original in originals]

    def prepare() -> None:
        torch._foreach_copy_(grads, originals)

    return prepare, [functools.partial(clip, grads) for clip in clips]


def _in_jax(originals: list[Any], clips: list[Any]) -> tuple[Callable[[], None], list[Callable[[], Any]]]:
    """As within a train step: compiled, of gradients that nobody needs afterwards."""
    jax = sys.modules["jax"]
    grads: list[Any] = []

    def prepare() -> None:
        grads[:] = jax.block_until_ready([jax.numpy.array(original, copy=True) for original in originals])

    def run(compiled: Callable[..., Any]) -> Any:
        return jax.block_until_ready(compiled(list(grads)))

    return prepare, [functools.partial(run, jax.jit(clip, donate_argnums=0)) for clip in clips]
