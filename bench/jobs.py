"""What is done to the gradients, and what each job asks of memory at least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "CLIP",
    "CLIP_ROWS",
    "JOBS",
    "LOG",
    "LOSS_SCALE",
    "NORMS",
    "NO_CLIP",
    "REGULARISE",
    "ROW_NORMS",
    "STANDARD",
    "UNSCALE",
    "UPDATE",
    "Job",
    "Traffic",
    "key",
]

LOSS_SCALE = 8.0  # small, so that float16 gradients are normal numbers after it is undone


@dataclass(frozen=True)
class Traffic:
    """Passes over the bytes of all gradients: those that read, and those that read and write."""

    reads: int
    read_writes: int = 0

    @property
    def passes(self) -> int:
        """In N, the bytes of all gradients."""
        return self.reads + 2 * self.read_writes


@dataclass(frozen=True)
class Job:
    """One thing that users do.

    Attributes:
        key: Its name on the command line and in result files.
        title: Its name in tables.
        floor: What has to be moved by whoever wastes nothing.
        coefficient: What the gradients are multiplied by, 1 if nothing is written; powers of two, so that
            undoing is exact.
        scale: The gradients hold so many times themselves.
        of_rows: Each row of each gradient has a norm, and a threshold, of its own.
        beside: What lies beside each gradient. "params": a copy of it, of which L2 regularisation adds one
            more, so that half of the norm gives back what was there. "base": zeros, of which the gradients
            are the update.
    """

    key: str
    title: str
    floor: Traffic
    coefficient: float = 1.0
    scale: float = 1.0
    of_rows: bool = False
    beside: str = ""

    @property
    def clips(self) -> bool:
        """Whether the norm is above the threshold."""
        return self.coefficient < 1 or self.beside == "params"

    def norm(self, total: float) -> float:
        """What is measured where the gradients in memory have this norm."""
        return total * (2 if self.beside == "params" else 1) / self.scale

    def threshold(self, total: float) -> float:
        """Twice the norm, so that there is nothing to clip, or half of it."""
        return self.norm(total) * (0.5 if self.clips else 2.0)


NORMS, CLIP, NO_CLIP, UNSCALE, LOG = "norms", "clip", "no-clip", "unscale-clip", "norms-clip"
ROW_NORMS, CLIP_ROWS = "row-norms", "clip-rows"
REGULARISE, UPDATE = "regularise-clip", "clip-update"

JOBS: Mapping[str, Job] = {
    job.key: job
    for job in (
        Job(NORMS, "norms", Traffic(1)),
        Job(CLIP, "clip, clipping", Traffic(1, 1), 0.5),
        Job(NO_CLIP, "clip, nothing to clip", Traffic(1)),
        Job(UNSCALE, "unscale and clip", Traffic(1, 1), 0.5 / LOSS_SCALE, LOSS_SCALE),
        Job(LOG, "all norms and clip", Traffic(1, 1), 0.5),
        Job(ROW_NORMS, "norms of rows", Traffic(1), of_rows=True),
        Job(CLIP_ROWS, "clip each row, clipping", Traffic(1, 1), 0.5, of_rows=True),
        Job(REGULARISE, "add L2 and clip", Traffic(3, 1), beside="params"),
        Job(UPDATE, "clip an update", Traffic(3, 1), 0.5, beside="base"),
    )
}

STANDARD = tuple(job.key for job in JOBS.values() if not job.of_rows and not job.beside)


def key(load: str, job: str, contender: str) -> str:
    """The name of a contender's samples, such as ``gpt2/float32/norms/torch``."""
    return f"{load}/{job}/{contender}"
