"""What joins sums for ``reduce=``, on every rank."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import gradclip
import gradclip.distributed
from rank_support import (
    ORDERS,
    SHAPES,
    check,
    rank,
    same_bits,
    values,
)


@check(2, 4)
def the_hook_joins_sums() -> None:
    wholes = [values(*shape, seed=i).numpy() for i, shape in enumerate(SHAPES)]
    groupings: list[Any] = [None, "tensor", [0, 1, 0, 1]]
    for order in ORDERS:
        for groups in groupings:
            alone = [whole.copy() for whole in wholes]
            expected = gradclip.clip_by_global_norm_(alone, 0.5, order, groups)
            pieces = [np.array_split(whole, dist.get_world_size())[rank()].copy() for whole in wholes]
            result = gradclip.clip_by_global_norm_(
                pieces, 0.5, order, groups, reduce=gradclip.distributed.process_group(ord=order)
            )
            for found in (result.total_norm, *result.group_norms):
                same_bits(torch.tensor(found, dtype=torch.float64))
            np.testing.assert_allclose(result.group_norms, expected.group_norms, rtol=1e-6)
            for piece, whole in zip(pieces, alone, strict=True):
                np.testing.assert_allclose(
                    piece, np.array_split(whole, dist.get_world_size())[rank()], rtol=1e-6, atol=0
                )


@check(2, 4)
def the_hook_keeps_tensors_tensors() -> None:
    """As sums of a GPU come; here on the CPU."""
    for order, expected in ((2.0, sum(range(dist.get_world_size()))), (math.inf, dist.get_world_size() - 1)):
        own = torch.tensor([float(rank()), 1.0], dtype=torch.float64)
        total = gradclip.distributed.process_group(dist.group.WORLD, order)(own)
        assert isinstance(total, Tensor)
        assert total.tolist() == [expected, 1.0 if math.isinf(order) else dist.get_world_size()]
        assert own.tolist() == [rank(), 1.0]


@check(2, 4)
def the_hook_loses_no_nan() -> None:
    for order in ORDERS:
        for who in range(dist.get_world_size()):
            own = np.array([math.nan if who == rank() else 1.0, 2.0])
            total = gradclip.distributed.process_group(ord=order)(own)
            assert math.isnan(total[0])
            assert math.isfinite(total[1])
