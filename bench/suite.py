"""Which loads are measured, by whom and how often: the quick suite, the full one, or what was named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.cases import CASES, DTYPES, PAUSE, PRODUCT, Load
from bench.jobs import CLIP, CLIP_ROWS, JOBS, NO_CLIP, NORMS, ROW_NORMS, STANDARD
from bench.training import MODELS

__all__ = ["Experiment", "Training", "named", "standard", "trainings"]

_THREE = (NORMS, CLIP, NO_CLIP)
_ROWS = (NORMS, CLIP, ROW_NORMS, CLIP_ROWS)


@dataclass(frozen=True)
class Experiment:
    """Loads that are measured by turns with each other, because they are compared with each other.

    Attributes:
        loads: One or more.
        jobs: What is done to the first one.
        other_jobs: What is done to the others.
        rounds: At most.
        seconds: After which no other round is begun.
    """

    loads: Sequence[Load]
    jobs: Sequence[str] = STANDARD
    other_jobs: Sequence[str] = _THREE
    rounds: int = 15
    seconds: float = 35.0

    def jobs_of(self, load: Load) -> Sequence[str]:
        """What is done to one of the loads."""
        return self.jobs if load == self.loads[0] else self.other_jobs

    @property
    def title(self) -> str:
        return ", ".join(load.key for load in self.loads)


@dataclass(frozen=True)
class Training:
    """A model that is trained for a few steps with each way to clip."""

    model: str
    rounds: int

    @property
    def title(self) -> str:
        return f"training {self.model}"


def trainings(quick: bool) -> list[Training]:
    """The models of ``bench.training``."""
    return [Training(model, 3 if quick else 20) for model in MODELS]


def _loads(*names: str, dtypes: Sequence[str] = DTYPES[:1]) -> tuple[Load, ...]:
    return tuple(Load(CASES[name], dtype) for name in names for dtype in dtypes)


def _axis(axis: str) -> list[str]:
    return [key for key, case in CASES.items() if case.axis == axis]


def standard(quick: bool, jobs: Sequence[str] = tuple(JOBS)) -> list[Experiment]:
    """What ``python -m bench`` measures; a quick run takes a look at every kind."""
    chosen = _quick() if quick else _full()
    narrowed = (
        replace(e, jobs=[j for j in e.jobs if j in jobs], other_jobs=[j for j in e.other_jobs if j in jobs])
        for e in chosen
    )
    return [experiment for experiment in narrowed if experiment.jobs]


def _quick() -> list[Experiment]:
    points = ("count-1", "count-100", "count-10000", "bytes-4K", "bytes-1M", "bytes-256M")
    return [
        Experiment(_loads("gpt2"), tuple(JOBS), rounds=3, seconds=12),
        Experiment(_loads("mlp"), rounds=3, seconds=5),
        Experiment(_loads("mlp", dtypes=("bfloat16",)), _THREE, rounds=3, seconds=5),
        Experiment(_loads("mlp-pause", "mlp-product"), _THREE, rounds=3, seconds=8),
        Experiment(_loads("tiny"), rounds=5, seconds=5),
        *(Experiment(_loads(point), _THREE, rounds=3, seconds=3) for point in points),
    ]


def _full() -> list[Experiment]:
    return [
        Experiment(_loads("gpt2", dtypes=DTYPES), tuple(JOBS), seconds=150),
        Experiment(_loads("rows"), _ROWS, seconds=60),
        Experiment(_loads("mlp", dtypes=DTYPES), seconds=60),
        *(Experiment(_loads(f"mlp-{state}"), _THREE, seconds=20) for state in (PAUSE, PRODUCT)),
        Experiment(_loads("tiny"), rounds=25, seconds=40),
        *(Experiment(_loads(f"tiny-{state}"), _THREE, seconds=15) for state in (PAUSE, PRODUCT)),
        Experiment(_loads("many", "fewer"), _THREE, rounds=15, seconds=50),
        *(Experiment(_loads(model)) for model in ("resnet50", "vit-b16", "bert-base", "lstm")),
        Experiment(_loads("mixtral-16th"), _THREE, seconds=50),
        Experiment(_loads("llama-3.2-1b", dtypes=("bfloat16",)), _THREE, seconds=60),
        Experiment(_loads("gpt2-xl"), _THREE, seconds=60),
        Experiment(_loads("huge-and-tiny"), _THREE, seconds=30),
        *(Experiment(_loads(point), _THREE, seconds=15) for point in _axis("count")),
        *(Experiment(_loads(point), _THREE, seconds=15) for point in _axis("bytes")),
    ]


def named(cases: Sequence[str], dtypes: Sequence[str], jobs: Sequence[str], quick: bool) -> list[Experiment]:
    """Every case in every dtype, each by itself."""
    rounds, seconds = (3, 10) if quick else (15, 45)
    loads = [_loads(case, dtypes=(dtype,)) for case in cases for dtype in dtypes]
    return [Experiment(load, jobs, rounds=rounds, seconds=seconds) for load in loads]
