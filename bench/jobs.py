"""What is done to a case: contenders that are ready to be timed, their answers checked."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from bench import reference
from bench.baselines import Peer, peers_for
from bench.cases import Array, Case
from bench.timing import Contender, Protocol
from gradclip import _core

__all__ = ["CLIPPING", "NORMS", "NOT_CLIPPING", "READ", "READ_WRITE", "Workload", "key"]

NORMS, CLIPPING, NOT_CLIPPING = "norms", "clipping", "not clipping"
READ, READ_WRITE = "read", "read-write"  # the rooflines
_ROOFLINE = "roofline"

_SCRATCH_BYTES = 128 * 2**20  # several times the last cache
_SAMPLE = 100_000


def key(case: str, job: str, contender: str = _ROOFLINE) -> str:
    """The name of a contender's samples."""
    return f"{case}/{job}/{contender}"


class Workload:
    """One case: its gradients, the peers that share them, and the right answers.

    Attributes:
        errors: The relative error of every answer, by the key of its contender.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.grads = case.make()
        self.norms = reference.norms(self.grads)
        self.total = reference.total_of(self.norms)
        self.peers = [kind(self.grads) for kind in peers_for(case)]
        self.errors: dict[str, float] = {}
        self._pristine = [g.copy() for g in self.grads]
        self._scratch = None if case.in_cache else np.ones(_SCRATCH_BYTES // 8)

    def peer(self, kind: type[Peer]) -> Peer:
        """The peer of this kind."""
        return next(peer for peer in self.peers if type(peer) is kind)

    def protocol(self, rounds: int) -> Protocol:
        """Calls that take long need neither many repetitions nor a warm-up."""
        if self.case.in_cache:
            # Warm until the turn is half over: after a pause the processor has to find its clock again.
            return Protocol(rounds, calls=1000, warm_up=1000, turn_seconds=0.02)
        return Protocol(rounds, calls=1, warm_up=0)

    def threshold(self, clipping: bool) -> float:
        """Half the norm, so that undoing a clip is exact; or twice the norm."""
        return self.total * (0.5 if clipping else 2.0)

    def prepare_caches(self) -> None:
        """Fill the caches with other data, unless the case is about the caches."""
        if self._scratch is not None:
            self._scratch.sum()  # NumPy: on one thread, none is left awake

    def contenders(self) -> list[Contender]:
        """Every contender of every job; each has answered rightly."""
        return [
            *self.rooflines(),
            *map(self.norms_of, self.peers),
            *(self.clip_of(peer, clipping) for clipping in (True, False) for peer in self.peers),
        ]

    def rooflines(self) -> list[Contender]:
        """The machine's own speed over the same bytes, timed in C++, with the same threads."""
        probes = {READ: _core.probe_read, READ_WRITE: _core.probe_read_write}
        return [
            Contender(
                key(self.case.key, job), partial(probe, self.grads), self.prepare_caches, returns_seconds=True
            )
            for job, probe in probes.items()
        ]

    def norms_of(self, peer: Peer) -> Contender:
        name = key(self.case.key, NORMS, peer.name)
        self._renew()
        answer = peer.norms()
        self._check_total(name, peer, answer)
        if np.size(answer) == len(self.norms):
            _check(name, np.asarray(answer), np.array(self.norms), peer.tolerance)
        return Contender(name, peer.norms, self.prepare_caches)

    def clip_of(self, peer: Peer, clipping: bool) -> Contender:
        name = key(self.case.key, CLIPPING if clipping else NOT_CLIPPING, peer.name)
        max_norm = self.threshold(clipping)

        def after(answer: Any) -> None:
            peer.confirm(answer, max_norm, clipping)
            if clipping:
                peer.undo(answer, max_norm)

        self._renew()
        answer = peer.clip(max_norm)
        self._check_total(name, peer, answer)
        coefficient = 0.5 if clipping else 1.0
        # Of float16 subnormals, which the smallest elements become; others are halved exactly.
        spacing = 2.0**-24 if self.case.dtype == "float16" else 0.0
        for now, pristine in zip(peer.current(answer), self._pristine, strict=True):
            _check(name, _sample(now), coefficient * _sample(pristine), peer.tolerance, spacing)
        after(answer)
        return Contender(name, partial(peer.clip, max_norm), self.prepare_caches, after)

    def _renew(self) -> None:
        """Some peers undo a clip with a relative error of 1e-7: too much to check the next one."""
        for grad, pristine in zip(self.grads, self._pristine, strict=True):
            np.copyto(grad, pristine)

    def _check_total(self, name: str, peer: Peer, answer: Any) -> None:
        total = peer.total(answer)
        if total is not None:
            self.errors[name] = abs(total / self.total - 1)
            _check(name, np.array(total), np.array(self.total), peer.tolerance)


def _sample(grad: Array) -> Array:
    """All elements of a small gradient; enough of a large one to see a kilobyte that was left out."""
    flat = grad.reshape(-1)
    step = 1 if flat.size < _SAMPLE else 97
    return np.append(flat[::step], flat[-step:]).astype(np.float64)


def _check(name: str, got: Array, expected: Array, tolerance: float, spacing: float = 0.0) -> None:
    excess = np.maximum(np.abs(got - expected) - spacing, 0.0)
    error = float(np.max(excess / np.where(expected == 0, 1, np.abs(expected))))
    if not error <= tolerance:
        raise AssertionError(f"{name}: wrong answer, relative error {error:.2e} (at most {tolerance:.0e})")
