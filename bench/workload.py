"""One load, ready to be timed: its gradients, the peers that share them, and the right answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import psutil

from bench import reference
from bench.cases import ALONE, PAUSE, PRODUCT, Array, Load
from bench.data import GradientBuffer
from bench.jobs import JOBS, NORMS, ROW_NORMS, Job, key
from bench.peers import CPU, PEERS, Peer
from bench.timing import Clock, Contender, Protocol, describe_error, host_clock, own_clock
from gradclip import _core

__all__ = ["READ", "READ_WRITE", "Location", "Workload", "bytes_needed"]

READ, READ_WRITE = "read", "read-write"  # the rooflines, in the place of a job
ROOFLINE = "roofline"

# Half of a unit in the last place of 1.
_UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
_SCRATCH_BYTES = 128 * 2**20  # several times the last cache


def roofline_of(place: str) -> str:
    """What stands for the contender in the keys of a place's roofline."""
    return ROOFLINE if place == CPU else f"{ROOFLINE}-{place}"


def _product() -> Callable[[], Any]:
    """Of two matrices of 400 x 400, by every thread that PyTorch has, or else NumPy."""
    try:
        import torch  # noqa: PLC0415
    except ImportError:
        matrix = np.ones((400, 400), np.float32)
        return lambda: matrix @ matrix
    tensor = torch.ones(400, 400)
    return lambda: tensor @ tensor


_STATES: Mapping[str, Callable[[], Callable[[], Any]]] = {
    ALONE: lambda: lambda: None,
    PAUSE: lambda: lambda: time.sleep(1e-3),
    PRODUCT: _product,
}


class Location:
    """The host: where gradients lie, how its time is taken, how fast it can be."""

    name = CPU
    make: type[GradientBuffer] = GradientBuffer
    scratch: Callable[[], Any] = staticmethod(lambda: np.ones(_SCRATCH_BYTES // 8))

    def __init__(self, load: Load) -> None:
        self._scratch: Any = self.scratch() if load.case.cold else None
        self._enter_state = _STATES[load.case.state]()

    @staticmethod
    def clocks(waits: bool) -> Mapping[Clock, tuple[str, ...]]:
        """The clocks that a contender is timed by, and what follows its key in the samples of each.

        ``waits``: whether its calls wait for a device themselves.
        """
        return {host_clock: ("",)}

    @staticmethod
    def free_memory() -> int:
        """Bytes that could be taken now."""
        return int(psutil.virtual_memory().available)

    def prepare(self) -> None:
        """Fill the caches with other data, unless the case is about them; do what comes before a call."""
        if self._scratch is not None:
            self.fill_caches()
        self._enter_state()

    def fill_caches(self) -> None:
        """By NumPy, on one thread: none is left awake."""
        self._scratch.sum()

    def rooflines(self, grads: Sequence[Any]) -> dict[str, tuple[Callable[[], Any], Clock]]:
        """The machine's own speed over the same bytes, timed in C++, with the same threads."""
        return {
            READ: (_core.read(grads).probe_read, own_clock),
            READ_WRITE: (_core.read(grads).probe_read_write, own_clock),
        }


def bytes_needed(load: Load, peers: Iterable[str], jobs: Iterable[str] = ()) -> int:
    """Memory for the gradients and what these peers need beside them."""
    beside = {JOBS[job].beside for job in jobs} - {""}
    # Of each kind one for all, and whoever clips an update has a list of the differences for a while.
    copies = len(beside) + ("base" in beside) + sum(PEERS[peer].copies for peer in peers)
    return int(load.nbytes * (1 + copies)) + _SCRATCH_BYTES


class Workload:
    """What a load needs to be measured in one place.

    Attributes:
        errors: The relative error of every global norm, by the key of its contender.
        failures: What went wrong with a contender, by its key.
    """

    def __init__(self, load: Load, place: type[Location] = Location) -> None:
        self.load = load
        self.place = place(load)
        self.gradients = place.make(load)
        self.norms = reference.norms([self.gradients.to_host(g) for g in self.gradients.arrays])
        self.total = reference.total_of(self.norms)
        self.errors: dict[str, float] = {}
        self.failures: dict[str, str] = {}
        self._peers: dict[str, Peer] = {}
        self._beside: dict[str, list[Any]] = {}

    @cached_property
    def row_norms(self) -> list[Array]:
        """Of each gradient."""
        return [reference.row_norms(self.gradients.to_host(g)) for g in self.gradients.arrays]

    def beside(self, job: Job) -> Sequence[Any]:
        """The arrays beside the gradients, which are as they were made; the same for all peers."""
        if job.beside not in self._beside:
            arrays = [np.copy(g) for g in self.gradients.arrays] if job.beside else []
            if job.beside == "base":
                for array in arrays:
                    array[...] = 0
            self._beside[job.beside] = arrays
        return self._beside[job.beside]

    def protocol(self, rounds: int, seconds: float) -> Protocol:
        """Calls that take long need neither many repetitions nor a warm-up."""
        if self.load.case.cold:
            return Protocol(rounds, seconds, calls=1, warm_up=0, settle=0.01)
        # Warm until the turn is half over: after a pause the processor has to find its clock again.
        return Protocol(rounds, seconds, calls=30, warm_up=1000, turn_seconds=0.01)

    def rooflines(self) -> list[Contender]:
        """The machine's own speed over the same bytes."""
        return [
            Contender(
                key(self.load.key, name, roofline_of(self.place.name)),
                call,
                before=self.place.prepare,
                clock=clock,
            )
            for name, (call, clock) in self.place.rooflines(self.gradients.arrays).items()
        ]

    def contenders(
        self, pairs: Iterable[tuple[str, str]], tick: Callable[[str], None] = lambda _: None
    ) -> Iterator[Contender]:
        """Of these pairs of peer and job those that answer rightly, once for each clock of the place; the
        others are in ``failures``.

        ``tick`` is told who is next.
        """
        for peer, job in pairs:
            name = key(self.load.key, job, peer)
            tick(name)
            if job != NORMS and key(self.load.key, NORMS, peer) in self.failures:
                self.failures[name] = "not tried: see its norms"
                continue
            try:
                contender = self.contender(peer, JOBS[job])
            except Exception as error:
                self.failures[name] = describe_error(error)
                with suppress(Exception):  # arrays that it gave away are missed in its other jobs
                    self._peers[peer].restore()
                continue
            for clock, names in self.place.clocks(PEERS[peer].waits).items():
                yield replace(contender, clock=clock, clocks=names)

    def contender(self, peer_key: str, job: Job) -> Contender:
        """A contender that has answered rightly; raises if it has not."""
        name = key(self.load.key, job.key, peer_key)
        self.gradients.restore()
        if peer_key in self._peers:
            self._peers[peer_key].restore()
        else:
            self._peers[peer_key] = PEERS[peer_key](self.gradients.arrays)
        peer = self._peers[peer_key]
        # Half of the norm of each row, or what is said for all.
        max_norm: Any = [norms / 2 for norms in self.row_norms] if job.of_rows else job.threshold(self.total)
        call = peer.call(job, max_norm, self.beside(job))
        answer = call()
        self._check(name, peer, job, answer)
        writes = job.coefficient != 1 or bool(job.beside)

        def after(answer: Any) -> None:
            if job.key != NORMS and not job.of_rows:
                peer.confirm(answer, max_norm, job.clips)
            peer.settle()

        def undo(answer: Any) -> None:
            if job.coefficient != 1:
                peer.undo(answer, 1 / job.coefficient)

        def before_turn() -> None:
            if writes:
                self.gradients.restore()
                peer.restore()

        after(answer)
        return Contender(name, call, before_turn, self.place.prepare, after, undo)

    def _check(self, name: str, peer: Peer, job: Job, answer: Any) -> None:
        if job.of_rows:
            if job.key == ROW_NORMS:
                rows = np.concatenate(peer.norms_of_rows(answer))
                _close("norms of rows", rows, np.concatenate(self.row_norms), peer.tolerance)
                return
            total, norms = None, None
        else:
            total, norms = peer.total(answer), peer.layer_norms(answer)
        if total is not None:
            expected = job.norm(self.total)
            self.errors[name] = abs(total / expected - 1)
            _close("norm", np.array([total]), np.array([expected]), peer.tolerance)
        if norms is not None:
            _close("norms", np.array(norms), np.array(list(map(job.norm, self.norms))), peer.tolerance)
        if job.key == NORMS:
            return
        # Of float16 subnormals, which the smallest elements become; others are halved exactly.
        spacing = 2.0**-24 if self.load.dtype == "float16" else 0.0
        tolerance = max(peer.tolerance, peer.rounding * _UNIT[self.load.dtype])
        for i, grad in enumerate(peer.current(answer)):
            now = self.gradients.to_host(grad).reshape(-1)
            places, held = self.gradients.pattern.sample(i, now.size)
            got = now[places].astype(np.float64)
            _close(f"gradient {i}", got, job.coefficient * held, tolerance, spacing)


class WrongAnswerError(Exception):
    """A contender answered, but not rightly."""


def _close(what: str, got: Array, expected: Array, tolerance: float, spacing: float = 0.0) -> None:
    excess = np.maximum(np.abs(got - expected) - spacing, 0.0)
    relative = excess / np.where(expected == 0, 1, np.abs(expected))
    worst = int(np.argmax(np.where(np.isnan(relative), np.inf, relative)))
    if not relative[worst] <= tolerance:
        raise WrongAnswerError(f"{what}: expected {expected[worst]:.6g}, got {got[worst]:.6g}")
