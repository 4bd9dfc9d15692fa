"""The contenders: each library as its users would write it, over the same gradients."""

from __future__ import annotations

from collections.abc import Mapping

from bench.peers.base import CPU, GPU, Peer
from bench.peers.ours import (
    Gradclip,
    GradclipGpu,
    GradclipGpuPlan,
    GradclipMeasured,
    GradclipPlan,
    GradclipTorch,
    GradclipTorchCuda,
    GradclipUnbound,
)
from bench.peers.with_cupy import CupyNrm2, CupySquares
from bench.peers.with_jax import GradclipJax, Optax, OptaxCuda, OptaxDonated
from bench.peers.with_numpy import Numba, NumpyDot, NumpySquares
from bench.peers.with_torch import Apex, Torch, TorchCuda, TorchCudaLoop, TorchLoop, TransformerEngine
from bench.timing import describe_error

__all__ = ["CPU", "GPU", "OURS", "PEERS", "Peer", "missing", "present"]

PEERS: Mapping[str, type[Peer]] = {
    peer.key: peer
    for peer in (
        Gradclip, GradclipPlan, GradclipMeasured, GradclipUnbound, GradclipTorch, GradclipJax, NumpyDot,
        NumpySquares, Numba, Torch, TorchLoop, OptaxDonated, Optax, GradclipGpu, GradclipGpuPlan,
        GradclipTorchCuda, CupyNrm2, CupySquares, TorchCuda, TorchCudaLoop, OptaxCuda, Apex,
        TransformerEngine,
    )
}  # fmt: skip
# What the others are compared with, by place.
OURS = {CPU: Gradclip.key, GPU: GradclipGpu.key}


def missing() -> dict[str, str]:
    """Why a contender cannot take part here, by its key."""
    reasons = {key: _why_missing(peer) for key, peer in PEERS.items()}
    return {key: reason for key, reason in reasons.items() if reason}


def _why_missing(peer: type[Peer]) -> str | None:
    """Also of a library that is there but cannot be imported."""
    try:
        return peer.missing()
    except Exception as error:
        return describe_error(error)


def present() -> list[str]:
    """The contenders that can take part here."""
    absent = missing()
    return [key for key in PEERS if key not in absent]
