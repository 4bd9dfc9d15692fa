"""No temporaries of the size of a gradient, and no leak, also where a call ends in an error."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import gradclip
from matrices import NAMES, Array, values
from processes import output_of

_PEAK = """
import numpy as np
import gradclip

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key))

def growth(call):
    "KB by which the resident memory rises at its highest during a call."
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before = status("VmRSS")
    call()
    return status("VmHWM") - before

def warm_up(make):
    "Code is loaded and threads are started: what a process pays once."
    small = [make() for _ in range(4)]
    run(small)

def run(grads):
    for name, call in calls(grads).items():
        grown[name] = growth(call)

def calls(grads):
    plan = gradclip.Plan(grads)
    return {
        "tensor_norms": lambda: gradclip.tensor_norms(grads),
        "global_norm, ord 1": lambda: gradclip.global_norm(grads, 1),
        "global_norm, ord 3": lambda: gradclip.global_norm(grads[:1], 3),
        "not clipping": lambda: gradclip.clip_by_global_norm_(grads, 1e30),
        "clipping": lambda: gradclip.clip_by_global_norm_(grads, 1.0),
        "each": lambda: gradclip.clip_by_norm_(grads, 1e-3),
        "scale_": lambda: gradclip.scale_(grads, 1e3),
        "clip_by_value_": lambda: gradclip.clip_by_value_(grads, 1e-9),
        "Plan": lambda: plan.clip_by_global_norm_(1e-12),
    }

grown = {}
"""


@pytest.mark.parametrize("layout", ["dense", "strided"])
def test_peak_memory_over_500_mb(layout: str) -> None:
    make = {
        "dense": "lambda n=1_000_000: np.ones(n, np.float32)",
        "strided": "lambda n=2_000_000: np.ones((n // 1000, 1000), np.float32)[:, ::2]",
    }[layout]
    code = f"""
make = {make}
warm_up(make)
run([make(25_000_000) for _ in range(5)])
assert max(grown.values()) < 1024, grown
print("less than 1 MB")
"""
    assert output_of(_PEAK + code, GRADCLIP_NUM_THREADS="2") == "less than 1 MB"


def test_the_measurement_sees_a_temporary() -> None:
    code = "array = np.ones(10_000_000, np.float32)\nprint(growth(lambda: array * array) > 30_000)"
    assert output_of(_PEAK + code) == "True"


def test_a_long_run_does_not_grow() -> None:
    """Resident memory after 2000 rounds of every call, errors included, is what it was after 200."""
    code = (
        _PEAK
        + """
frozen = np.ones(3)
frozen.flags.writeable = False

def round_of_calls():
    grads = {f"layer.{i}": np.full(100 + i, 2.0, np.float32) for i in range(20)}
    for call in calls(list(grads.values())).values():
        call()
    gradclip.clip_by_global_norm_(grads, 1.0, groups=list(range(20)), reduce=lambda sums: sums + 0)
    for bad in ([*grads.values(), frozen], [frozen, "text"], [*grads.values(), np.array([np.nan], "f4")]):
        try:
            gradclip.clip_by_global_norm_(bad, 1.0)
        except (TypeError, ValueError, FloatingPointError):
            continue
        raise SystemExit("no error")

for i in range(2000):
    round_of_calls()
    if i == 200:
        early = status("VmRSS")
grown = status("VmRSS") - early
assert grown < 512, f"{grown} KB in 1800 rounds"
print("steady")
"""
    )
    assert output_of(code) == "steady"


def _attempt(call: Callable[[], object]) -> None:
    try:
        call()
    except (TypeError, ValueError, FloatingPointError):
        return
    raise AssertionError("no error")


def _calls(grads: list[Any]) -> list[Callable[[], object]]:
    frozen = np.ones(2)
    frozen.flags.writeable = False
    named = {f"layer.{i}": grad for i, grad in enumerate(grads)}
    broken = [*grads, np.array([np.nan])]
    bad_key: Any = 3
    real = [grad for grad in grads if "complex" not in str(grad.dtype)]
    return [
        lambda: gradclip.tensor_norms(grads),
        lambda: gradclip.global_norm(named, 3),
        lambda: gradclip.clip_by_global_norm_(grads, 1e3),
        lambda: gradclip.clip_by_global_norm_(named, 1.0, groups=[0] * len(grads), reduce=lambda s: s.copy()),
        lambda: gradclip.clip_by_norm_(iter(grads), 1.0),
        lambda: gradclip.clip_by_value_(real, 1e-3),
        lambda: gradclip.scale_(grads, 1.0),
        lambda: gradclip.Plan(named).clip_by_norm_(1.0),
        lambda: gradclip.clip_by_global_norm_(broken, 1.0, nonfinite="skip"),
        lambda: _attempt(lambda: gradclip.clip_by_global_norm_(broken, 1.0)),
        lambda: _attempt(lambda: gradclip.clip_by_global_norm_([*grads, frozen], 1.0)),
        lambda: _attempt(lambda: gradclip.clip_by_global_norm_([*grads, grads[0]], 1.0)),
        lambda: _attempt(lambda: gradclip.tensor_norms([*grads, "text"])),
        lambda: _attempt(lambda: gradclip.tensor_norms({**named, bad_key: grads[0]})),
        lambda: _attempt(lambda: gradclip.clip_by_global_norm_(grads, -1.0)),
        lambda: _attempt(lambda: gradclip.clip_by_global_norm_(grads, 1.0, groups=[0])),
        lambda: _attempt(lambda: gradclip.clip_by_global_norm_(grads, 1.0, reduce=lambda s: [])),
        lambda: _attempt(lambda: gradclip.Plan([*grads, 1.0])),
    ]


def _numpy_grads() -> list[Any]:
    arrays: list[Array] = [values(name, 20, seed=1) for name in NAMES]
    return [*arrays, values("float32", (4, 5, 6), seed=2).T[::-1]]


def _torch_grads() -> list[Any]:
    return [torch.ones(20), torch.ones(4, 5).T, torch.ones(7, dtype=torch.bfloat16)]


def check_references_and_blocks(grads: list[Any]) -> None:
    for call in _calls(grads):
        for _ in range(20):  # caches fill
            call()
    gc.collect()
    gc.disable()  # what it collects, and the free lists that it empties, are not what a call leaves
    for number, call in enumerate(_calls(grads)):
        references = [sys.getrefcount(grad) for grad in grads]
        grown = []
        for _ in range(4):  # free lists fill once, a leak comes every time
            blocks = sys.getallocatedblocks()
            for _ in range(100):
                call()
            grown.append(sys.getallocatedblocks() - blocks)
        assert [sys.getrefcount(grad) for grad in grads] == references, f"call {number}"
        assert min(grown) < 50, f"call {number} leaves {grown} blocks in 100 rounds each"
        assert gc.collect() == 0, f"call {number} leaves cycles"


@pytest.mark.parametrize("make", [_numpy_grads, _torch_grads])
def test_reference_counts_and_objects(make: Callable[[], list[Any]]) -> None:
    """In a process of its own: the threads that other tests have left allocate as well."""
    code = f"""
    import test_memory
    test_memory.check_references_and_blocks(test_memory.{make.__name__}())
    print("nothing left")
    """
    assert output_of(code, PYTHONPATH=str(Path(__file__).parent)) == "nothing left"


def test_jax_arrays_are_let_go() -> None:
    arrays = [jnp.ones(20), jnp.ones((4, 5), jnp.bfloat16)]
    references = [sys.getrefcount(array) for array in arrays]
    for _ in range(300):
        gradclip.tensor_norms(arrays)
        _attempt(lambda: gradclip.scale_(arrays, 2.0))
        gradclip.Plan(arrays)
    assert [sys.getrefcount(array) for array in arrays] == references
