"""What must hold on every rank under ``mpiexec``; ``test_distributed.py`` runs it."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

import gradclip
from gradclip.distributed import mpi

COMM = MPI.COMM_WORLD
ORDERS = (2.0, 1.0, math.inf, 3.0)


def _expect(kind: type[Exception], pattern: str, call: Any) -> None:
    try:
        call()
    except Exception as error:
        if not isinstance(error, kind) or not re.search(pattern, str(error)):
            raise
    else:
        raise AssertionError(f"expected a {kind.__name__}")


def sums_are_joined() -> None:
    rng = np.random.default_rng(0)
    wholes = [rng.standard_normal(shape).astype(np.float32) for shape in ((7, 3), (1, 5), (100,))]
    groupings: list[Any] = [None, "tensor", [0, 1, 0]]
    for order in ORDERS:
        for groups in groupings:
            alone = [whole.copy() for whole in wholes]
            expected = gradclip.clip_by_global_norm_(alone, 0.5, order, groups)
            pieces = [np.array_split(whole, COMM.size)[COMM.rank].copy() for whole in wholes]
            result = gradclip.clip_by_global_norm_(pieces, 0.5, order, groups, reduce=mpi(COMM, order))
            assert len(set(COMM.allgather(result.group_norms.tobytes()))) == 1
            np.testing.assert_allclose(result.group_norms, expected.group_norms, rtol=1e-6)
            for piece, whole in zip(pieces, alone, strict=True):
                np.testing.assert_allclose(
                    piece, np.array_split(whole, COMM.size)[COMM.rank], rtol=1e-6, atol=0
                )


def a_tensor_stays_one() -> None:
    """As sums of a GPU come; here on the CPU."""
    own = torch.tensor([float(COMM.rank), 1.0], dtype=torch.float64)
    total = mpi(COMM)(own)
    assert isinstance(total, torch.Tensor)
    assert total.tolist() == [sum(range(COMM.size)), COMM.size]
    assert own.tolist() == [COMM.rank, 1.0]


def no_nan_is_lost() -> None:
    for order in ORDERS:
        for who in range(COMM.size):
            total = mpi(COMM, order)(np.array([math.nan if who == COMM.rank else 1.0, 2.0]))
            assert math.isnan(total[0])
            assert math.isfinite(total[1])
            grads = [np.array([math.nan if who == COMM.rank else 1.0])]
            _expect(
                gradclip.NonFiniteGradientError,
                "grads",
                lambda: gradclip.clip_by_global_norm_(grads, 1.0, order, reduce=mpi(COMM, order)),  # noqa: B023
            )


def a_communicator_that_was_freed() -> None:
    comm = COMM.Dup()
    reduce = mpi(comm)
    assert reduce(np.ones(1)).tolist() == [COMM.size]
    comm.Free()
    grad = np.ones(2)
    _expect(
        ValueError,
        "^comm: expected an open communicator, got MPI.COMM_NULL",
        lambda: gradclip.clip_by_global_norm_([grad], 0.1, reduce=reduce),
    )
    assert grad.tolist() == [1.0, 1.0]
    _expect(ValueError, "^comm: expected an open communicator", lambda: mpi(comm))
    _expect(TypeError, r"^comm: expected an mpi4py.MPI.Intracomm, got a builtins.int", lambda: mpi(3))
    _expect(ValueError, "^ord: expected a positive number, got 0", lambda: mpi(COMM, 0))


if __name__ == "__main__":
    for check in (sums_are_joined, a_tensor_stays_one, no_nan_is_lost, a_communicator_that_was_freed):
        check()
        COMM.Barrier()
        print(f"rank {COMM.rank} of {COMM.size}: {check.__name__}", flush=True)
