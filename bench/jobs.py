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
    "ROW_NORMS",
    "STANDARD",
    "UNSCALE",
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
    """

    key: str
    title: str
    floor: Traffic
    coefficient: float = 1.0
    scale: float = 1.0
    of_rows: bool = False

    def threshold(self, total: float) -> float:
        """Twice the norm, so that there is nothing to clip, or half of it."""
        return total / self.scale * (0.5 if self.coefficient < 1 else 2.0)


NORMS, CLIP, NO_CLIP, UNSCALE, LOG = "norms", "clip", "no-clip", "unscale-clip", "norms-clip"
ROW_NORMS, CLIP_ROWS = "row-norms", "clip-rows"

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
    )
}

STANDARD = tuple(job.key for job in JOBS.values() if not job.of_rows)


def key(load: str, job: str, contender: str) -> str:
    """The name of a contender's samples, such as ``gpt2/float32/norms/torch``."""
    return f"{load}/{job}/{contender}"
