"""The speed that gradclip promises: one row per promise, each a ratio or a time out of one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bench.cases import CASES
from bench.jobs import CLIPPING, NORMS, NOT_CLIPPING, READ, READ_WRITE, key
from bench.timing import Rounds, Spread, spread_of_ratio

__all__ = ["TARGETS", "Outcome", "Target", "judge"]

_LIST, _PLAN = "gradclip", "gradclip, Plan"
_TORCH, _DOT = "PyTorch", "NumPy dot"


@dataclass(frozen=True)
class Target:
    """``scale`` x median(``above``) / sum of the medians of ``below``, and its bound."""

    case: str
    job: str
    what: str
    above: str
    below: tuple[str, ...]
    bound: float
    at_least: bool = False
    unit: str = "x"
    scale: float = 1.0


@dataclass(frozen=True)
class Outcome:
    """A row of the table. ``value`` is None where something was not measured."""

    case: str
    job: str
    what: str
    value: Spread | None
    bound: float
    at_least: bool
    unit: str

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value.median >= self.bound if self.at_least else self.value.median <= self.bound


def _roofline(case: str, job: str, probes: tuple[str, ...], bound: float) -> Target:
    what = "time / (read + read-write)" if len(probes) > 1 else "time / read"
    return Target(case, job, what, key(case, job, _LIST), tuple(key(case, p) for p in probes), bound)


def _against(case: str, job: str, peer: str, label: str, bound: float) -> Target:
    above, below = key(case, job, peer), (key(case, job, _LIST),)
    return Target(case, job, f"{label} / gradclip", above, below, bound, at_least=True)


def _absolute(case: str, peer: str, bound: float, unit: str, scale: float) -> Target:
    what = "time of a Plan" if peer == _PLAN else "time of a list"
    return Target(case, NORMS, what, key(case, NORMS, peer), (), bound, unit=unit, scale=scale)


def _linear(job: str) -> Target:
    above, below = key("many", job, _LIST), (key("fewer", job, _LIST),)
    scale = len(CASES["fewer"].shapes) / len(CASES["many"].shapes)
    # Ten times the arrays leave the second cache: some growth is memory's. A quadratic step has 10.
    return Target("many", job, "time per array / that of 2 000", above, below, 2.0, scale=scale)


def _dtype(dtype: str, job: str) -> Target:
    above, below = key("float32", job, _LIST), (key(dtype, job, _LIST),)
    scale = CASES[dtype].nbytes / CASES["float32"].nbytes
    return Target(dtype, job, "bytes/s / that of float32", above, below, 0.9, at_least=True, scale=scale)


_CLIPS = (CLIPPING, NOT_CLIPPING)

TARGETS: tuple[Target, ...] = (
    _roofline("gpt2", NORMS, (READ,), 1.08),
    _roofline("gpt2", CLIPPING, (READ, READ_WRITE), 1.08),
    _against("gpt2", CLIPPING, _TORCH, "PyTorch clip", 1.0),
    _roofline("gpt2", NOT_CLIPPING, (READ,), 1.08),
    _against("gpt2", NOT_CLIPPING, _TORCH, "PyTorch clip", 2.0),
    _roofline("mlp", NORMS, (READ,), 1.25),
    _against("mlp", NORMS, _DOT, "NumPy dot per array", 2.0),
    _against("mlp", NORMS, _TORCH, "PyTorch get_total_norm", 4.0),
    *(_against("mlp", job, _TORCH, "PyTorch clip", 5.0) for job in _CLIPS),
    _absolute("tiny", _LIST, 20.0, "µs", 1e6),
    _absolute("tiny", _PLAN, 6.0, "µs", 1e6),
    *(_against("tiny", job, _TORCH, "PyTorch clip", 40.0) for job in _CLIPS),
    *(_against("tiny", job, _DOT, "NumPy dot loop", 10.0) for job in _CLIPS),
    _absolute("many", _LIST, 60.0, "ns an array", 1e9 / len(CASES["many"].shapes)),
    *(_linear(job) for job in _CLIPS),
    *(_dtype(dtype, job) for dtype in ("bfloat16", "float16") for job in (NORMS, *_CLIPS)),
)


def judge(target: Target, samples: Mapping[str, Rounds]) -> Outcome:
    """What was measured of a target."""
    value = None
    if all(name in samples for name in (target.above, *target.below)):
        below = [samples[name] for name in target.below]
        value = spread_of_ratio(samples[target.above], below, target.scale)
    title = CASES[target.case].title
    return Outcome(title, target.job, target.what, value, target.bound, target.at_least, target.unit)
