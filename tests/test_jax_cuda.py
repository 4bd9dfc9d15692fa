"""gradclip.jax on NVIDIA GPUs: what is lowered for them, the handlers over emulated kernels, a real GPU."""

from __future__ import annotations

import importlib
import itertools
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import gradclip.jax
from gradclip.jax import _kernels
from matrices import NAMES, values
from processes import output_of

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # others test here, too

TARGETS = ("measure", "combine", "decide", "scale")
GRADS = {"w": np.ones((4, 3), np.float32), "b": np.ones(4, jnp.bfloat16)}


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """gradclip with kernels for CUDA: those of the emulator, where there are no others."""
    if "cuda" not in _kernels._NATIVE:
        emulated = importlib.import_module("gradclip._cuda_emulated")
        monkeypatch.setattr(_kernels, "cuda_module", lambda: emulated)
        monkeypatch.setattr(_kernels, "_NATIVE", _kernels._register_all())
    jax.clear_caches()  # of programs for a gradclip without
    yield
    jax.clear_caches()


def _calls(function: Any, *arguments: Any) -> list[str]:
    """The targets that a program for CUDA calls, in order."""
    allowed = [jax.export.DisabledSafetyCheck.custom_call(f"gradclip_{name}") for name in TARGETS]
    exported = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=allowed)(*arguments)
    return re.findall(r"custom_call @gradclip_(\w+)\(", exported.mlir_module())


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("groups", [None, "tensor", "row", "sample", "unit_last"])
def test_a_clip_calls_the_kernels(groups: Any) -> None:
    assert _calls(lambda grads: gradclip.jax.clip(grads, 1.0, groups=groups)[0], GRADS) == [
        "measure",
        "decide",
        "scale",
    ]


@pytest.mark.usefixtures("cuda")
def test_shards_call_combine() -> None:
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))

    @jax.shard_map(mesh=mesh, in_specs=P("x"), out_specs=P())
    def norm(grads: Any) -> Any:
        return gradclip.jax.global_norm(grads, axis_name="x")

    assert _calls(norm, GRADS) == ["measure", "combine", "decide"]


def test_without_kernels_plain_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a gradclip that was built without CUDA, or whose module does not load."""
    for error in (None, ImportError("libcuda")):

        def cuda_module(error: Exception | None = error) -> None:
            if error:
                raise error

        monkeypatch.setattr(_kernels, "cuda_module", cuda_module)
        monkeypatch.setattr(_kernels, "_NATIVE", _kernels._register_all())
        jax.clear_caches()
        assert _calls(lambda grads: gradclip.jax.clip(grads, 1.0)[0], GRADS) == []
    jax.clear_caches()


def test_emulated_handlers_have_the_bits_of_the_core() -> None:
    """All groups, orders, dtypes, policies, batches and shards (tests/jax_emulated.py)."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    code = f"import runpy; runpy.run_path({str(here / 'jax_emulated.py')!r}, run_name='__main__')"
    launches = output_of(code, JAX_PLATFORMS="cpu", PYTHONPATH=path)
    assert int(launches) > 100


@pytest.mark.gpu
def test_bits_of_the_cpu_on_a_gpu() -> None:
    assert "cuda" in _kernels._NATIVE
    try:
        gpu = jax.devices("cuda")[0]
    except RuntimeError as error:  # no skip: nobody would see that nothing was compared
        pytest.fail(f"expected a JAX with CUDA, since there is a GPU (pip install 'jax[cuda13]'): {error}")
    cpu = jax.devices("cpu")[0]
    with jax.enable_x64(True):
        tree = {name: values(name, (6, 5000), seed=i) for i, name in enumerate(NAMES)}
        tree |= {"small": values("float32", (6,), seed=9), "none": np.zeros((6, 0), np.float32)}
        for groups, ord in itertools.product((None, "tensor", "row", "sample"), (2, 1, math.inf, 3)):
            for max_norm in (1.5, 1e9):
                found = [
                    jax.tree.map(np.asarray, gradclip.jax.clip(grads, max_norm, groups=groups, ord=ord))
                    for grads in (jax.device_put(tree, gpu), jax.device_put(tree, cpu))
                ]
                jax.tree.map(np.testing.assert_array_equal, *found)
