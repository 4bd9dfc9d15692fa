"""gradclip.jax from many threads, beside other programs, and on no threads but XLA's."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

import gradclip
import gradclip.jax
from jax_trees import bits, clipped_by_core, to_jax
from matrices import values
from processes import output_of


def test_many_threads_at_once() -> None:
    """Each its own gradients, by one program of a few megabytes."""
    clip = jax.jit(lambda grads: gradclip.jax.clip(grads, 1.0))

    def grads(seed: int) -> Any:
        return {"h": values("bfloat16", 70_001, seed), "w": values("float32", (700, 401), seed)}

    trees = [grads(seed) for seed in range(6)]
    expected = [clipped_by_core(tree, 1.0)[0] for tree in trees]
    clip(trees[0])
    start = threading.Barrier(6)

    def work(i: int) -> int:
        start.wait()
        for _ in range(4):
            assert bits(clip(trees[i])[0]) == expected[i]
            assert bits(gradclip.jax.clip(trees[i], 1.0)[0]) == expected[i]
        return i

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(work, range(6))) == list(range(6))


def test_other_programs_run_beside() -> None:
    """What shares XLA's threads with a clip of 8 MB goes on."""
    tree = {"w": values("float32", (2_000_003,), seed=1)}
    expected, _ = clipped_by_core(tree, 1.0)
    grads = to_jax(tree)
    clip = jax.jit(lambda grads: gradclip.jax.clip(grads, 1.0)[0])
    multiply = jax.jit(lambda a: jnp.sum(a @ a))
    matrix = jnp.ones((400, 400))
    stop = threading.Event()

    def others() -> int:
        runs = 0
        while not stop.is_set():
            assert multiply(matrix) == 400.0**3
            runs += 1
        return runs

    with ThreadPoolExecutor(2) as pool:
        workers = [pool.submit(others) for _ in range(2)]
        try:
            for _ in range(10):
                assert bits(clip(grads)) == expected
        finally:
            stop.set()
        assert all(worker.result() > 0 for worker in workers)


def test_no_threads_of_our_own() -> None:
    """Clips inside of XLA work on its threads."""
    code = """
    import jax, jax.numpy as jnp, gradclip.jax
    from gradclip import _core
    grads = {"w": jnp.ones((1000, 2000)), "b": jnp.ones(500_000, jnp.bfloat16)}
    clip = jax.jit(lambda grads: gradclip.jax.clip(grads, 1.0))
    for _ in range(3):
        clipped, result = jax.block_until_ready(clip(grads))
        rows = jax.block_until_ready(gradclip.jax.clip(grads, 1.0, groups="row"))
    assert result.clipped
    print(_core.num_started_threads())
    """
    assert output_of(code, GRADCLIP_NUM_THREADS="4") == "0"
