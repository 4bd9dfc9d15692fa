"""What every contender answers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np

from bench.jobs import (
    CLIP,
    CLIP_ROWS,
    LOG,
    NO_CLIP,
    NORMS,
    REGULARISE,
    ROW_NORMS,
    UNSCALE,
    UPDATE,
    Job,
    Traffic,
)

__all__ = ["CPU", "GPU", "PAIRS", "ROWS", "Peer"]

CPU, GPU = "cpu", "gpu"
# What who has norms of rows moves, as `traffic`.
ROWS: Mapping[str, Traffic] = {ROW_NORMS: Traffic(1), CLIP_ROWS: Traffic(1, 1)}
# What who makes pairs in the passes that measure and write moves.
PAIRS: Mapping[str, Traffic] = {REGULARISE: Traffic(3, 1), UPDATE: Traffic(3, 1)}


class Peer:
    """One library, one way to write it, over the same gradients as the others.

    A peer answers one call per job. The rest is for the benchmark, outside of the timed region: what the
    answer says, what the gradients hold now, and how to make them as they were. Each peer undoes its clip
    with its own library: threads of another one would still be awake during the next call.

    Attributes:
        key: Its name on the command line and in result files.
        title: Its name in tables.
        place: Where its gradients live.
        needs: The modules that it cannot do without.
        tolerance: Largest relative error that is taken for an answer; each error is reported.
        rounding: Largest relative error of a clipped gradient, in halves of a unit in its last place.
        waits: Whether its calls wait for the GPU, or use streams of their own.
        copies: How many times the gradients' bytes it needs beside the gradients.
        traffic: What it moves in each job that it does, by the way that it is written: the report holds it
            against the time taken.
    """

    key: ClassVar[str]
    title: ClassVar[str]
    place: ClassVar[str] = CPU
    needs: ClassVar[tuple[str, ...]] = ()
    tolerance: ClassVar[float] = 1e-2
    rounding: ClassVar[float] = 4.0
    waits: ClassVar[bool] = False
    copies: ClassVar[float] = 0.0
    most_tensors: ClassVar[int | None] = None
    traffic: ClassVar[Mapping[str, Traffic]] = {}

    def __init__(self, grads: Sequence[Any]) -> None:
        self.grads = grads

    @classmethod
    def missing(cls) -> str | None:
        """Why it cannot take part here; None if it can."""
        absent = [name for name in cls.needs if not _is_installed(name)]
        return f"{', '.join(absent)} not installed" if absent else None

    @classmethod
    def takes(cls, tensors: int) -> bool:
        """Whether it takes part where there are so many."""
        return cls.most_tensors is None or tensors <= cls.most_tensors

    def call(self, job: Job, max_norm: Any, beside: Sequence[Any] = ()) -> Callable[[], Any]:
        """What is timed; whatever its user would do once, such as compile, is done here.

        ``beside``: the arrays beside the gradients, where the job has some.
        """
        calls: dict[str, Callable[[], Any]] = {
            NORMS: self.norms,
            CLIP: partial(self.clip, max_norm),
            NO_CLIP: partial(self.clip, max_norm),
            UNSCALE: partial(self.unscale_and_clip, max_norm, job.scale),
            LOG: partial(self.norms_and_clip, max_norm),
            ROW_NORMS: self.row_norms,
            CLIP_ROWS: partial(self.clip_rows, max_norm),
            REGULARISE: partial(self.regularise_and_clip, max_norm, beside),
            UPDATE: partial(self.clip_update, max_norm, beside),
        }
        return calls[job.key]

    def norms(self) -> Any:
        """Timed: the norms, or the global norm alone where that is all that the library offers."""
        raise NotImplementedError

    def clip(self, max_norm: float) -> Any:
        """Timed: measure and clip."""
        raise NotImplementedError

    def unscale_and_clip(self, max_norm: float, scale: float) -> Any:
        """Timed: divide by the loss scale, measure and clip."""
        raise NotImplementedError

    def norms_and_clip(self, max_norm: float) -> Any:
        """Timed: every norm, for the log, and clip."""
        raise NotImplementedError

    def row_norms(self) -> Any:
        """Timed: the norms of the rows of each gradient."""
        raise NotImplementedError

    def clip_rows(self, max_norm: Any) -> Any:
        """Timed: measure and clip each row; ``max_norm`` has thresholds for each gradient."""
        raise NotImplementedError

    def regularise_and_clip(self, max_norm: float, params: Sequence[Any]) -> Any:
        """Timed: add ``1.0 * params``, measure and clip."""
        raise NotImplementedError

    def clip_update(self, max_norm: float, base: Sequence[Any]) -> Any:
        """Timed: measure and clip what the gradients are more than ``base``."""
        raise NotImplementedError

    def norms_of_rows(self, answer: Any) -> Sequence[Any]:
        """What ``row_norms`` has answered, as arrays of the host."""
        return [np.asarray(norms) for norms in answer]

    def total(self, answer: Any) -> float | None:
        """The global norm that was answered; None if it is not in there."""
        raise NotImplementedError

    def layer_norms(self, answer: Any) -> Sequence[float] | None:
        """Every norm that was answered; None if they are not in there."""
        return None

    def confirm(self, answer: Any, max_norm: float, clipping: bool) -> None:
        """Assert that a call had to clip, or had not."""
        total = self.total(answer)
        assert total is None or (total > max_norm) == clipping, f"norm {total}, threshold {max_norm}"

    def undo(self, answer: Any, factor: float) -> None:
        """After a call that clipped: multiply the gradients by the factor."""
        raise NotImplementedError

    def restore(self) -> None:
        """Before a turn, when the gradients have been made as they were: the same for copies of them."""

    def settle(self) -> None:
        """After a call, outside of the timed region: what the library asks for between two steps."""

    def current(self, answer: Any) -> Sequence[Any]:
        """The gradients after a call that clips."""
        return self.grads


def traffic(
    norms: Traffic, clip: Traffic, no_clip: Traffic, unscale: Traffic, log: Traffic
) -> Mapping[str, Traffic]:
    """By job."""
    return {NORMS: norms, CLIP: clip, NO_CLIP: no_clip, UNSCALE: unscale, LOG: log}


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a part of a package that is not there
        return False
