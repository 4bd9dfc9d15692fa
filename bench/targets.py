"""The speed that gradclip promises: one row per promise, each a ratio or a time out of one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bench.cases import CASES, Load
from bench.jobs import CLIP, CLIP_ROWS, JOBS, NO_CLIP, NORMS, REGULARISE, ROW_NORMS, UNSCALE, UPDATE, key
from bench.peers import PEERS
from bench.timing import Rounds, Spread, spread_of_ratio
from bench.workload import READ, READ_WRITE, ROOFLINE

__all__ = ["TARGETS", "Target", "Verdict", "judge"]

_LIST, _PLAN, _DROP_IN = "gradclip", "gradclip-plan", "gradclip-torch"
_TORCH, _DOT = "torch", "numpy-dot"


@dataclass(frozen=True)
class Target:
    """``scale`` x ``above`` / sum of ``below``, and its bound."""

    load: str
    job: str
    what: str
    above: str
    below: tuple[str, ...]
    bound: float
    at_least: bool = False
    unit: str = "x"
    scale: float = 1.0


@dataclass(frozen=True)
class Verdict:
    """A row of the table. ``value`` is None where something was not measured."""

    load: str
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


def _float32(case: str) -> str:
    return Load(CASES[case]).key


def _roofline(case: str, job: str, probes: tuple[str, ...], bound: float) -> Target:
    load = _float32(case)
    what = "time / (read + read-write)" if len(probes) > 1 else "time / read"
    below = tuple(key(load, probe, ROOFLINE) for probe in probes)
    return Target(load, job, what, key(load, job, _LIST), below, bound)


def _against(case: str, job: str, peer: str, label: str, bound: float, ours: str = _LIST) -> Target:
    load = _float32(case)
    above, below = key(load, job, peer), (key(load, job, ours),)
    title = PEERS[ours].title
    return Target(load, job, f"{label} / {title}", above, below, bound, at_least=True)


def _absolute(case: str, peer: str, bound: float, unit: str, scale: float) -> Target:
    what = "time of a Plan" if peer == _PLAN else "time of a list"
    load = _float32(case)
    return Target(load, NORMS, what, key(load, NORMS, peer), (), bound, unit=unit, scale=scale)


def _linear(job: str) -> Target:
    many, fewer = _float32("many"), _float32("fewer")
    scale = len(CASES["fewer"].shapes) / len(CASES["many"].shapes)
    what = "time per array / that of 2 000"
    # Ten times the arrays leave the second cache: some growth is memory's. A quadratic step has 10.
    return Target(many, job, what, key(many, job, _LIST), (key(fewer, job, _LIST),), 2.0, scale=scale)


def _dtype(dtype: str, job: str) -> Target:
    single, other = Load(CASES["gpt2"]), Load(CASES["gpt2"], dtype)
    above, below = key(single.key, job, _LIST), (key(other.key, job, _LIST),)
    scale = other.nbytes / single.nbytes
    what = "bytes/s / that of float32"
    return Target(other.key, job, what, above, below, 0.9, at_least=True, scale=scale)


def _drop_in(case: str, job: str, bound: float) -> Target:
    return _against(case, job, _TORCH, "PyTorch", bound, _DROP_IN)


def _of_rows(job: str, whole: str, what: str, bound: float) -> Target:
    load = _float32("gpt2")
    return Target(load, job, what, key(load, job, _LIST), (key(load, whole, _LIST),), bound)


_CLIPS = (CLIP, NO_CLIP)

TARGETS: tuple[Target, ...] = (
    _roofline("gpt2", NORMS, (READ,), 1.08),
    _roofline("gpt2", CLIP, (READ, READ_WRITE), 1.08),
    _against("gpt2", CLIP, _TORCH, "PyTorch clip", 1.0),
    _roofline("gpt2", NO_CLIP, (READ,), 1.08),
    _against("gpt2", NO_CLIP, _TORCH, "PyTorch clip", 2.0),
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
    _drop_in("gpt2", CLIP, 1.0),
    _drop_in("gpt2", NO_CLIP, 2.0),
    _drop_in("gpt2", UNSCALE, 1.5),
    *(_drop_in("mlp", job, 5.0) for job in _CLIPS),
    *(_drop_in("mlp-product", job, 5.0) for job in _CLIPS),
    *(_drop_in("tiny", job, 8.0) for job in _CLIPS),
    _of_rows(ROW_NORMS, NORMS, "time / norms of tensors", 1.5),
    _of_rows(CLIP_ROWS, CLIP, "time / clip of all", 1.3),
    _against("gpt2", ROW_NORMS, "gradclip-unbound", "rows in a list", 10.0),
    _against("gpt2", CLIP_ROWS, "torch-loop", "PyTorch loop", 5.0),
    *(_against("gpt2", job, "numba", "numba", 3.0) for job in (ROW_NORMS, CLIP_ROWS)),
    Target(
        _float32("rows"),
        ROW_NORMS,
        "time of a list",
        key(_float32("rows"), ROW_NORMS, _LIST),
        (),
        12.0,
        unit="ns a row",
        scale=1e9 / CASES["rows"].shapes[0][0],
    ),
    *(
        _against("gpt2", job, peer, label, 2.0)
        for job in (REGULARISE, UPDATE)
        for peer, label in ((_DOT, "NumPy"), (_TORCH, "PyTorch"))
    ),
    *(_dtype(dtype, job) for dtype in ("bfloat16", "float16") for job in (NORMS, *_CLIPS)),
)


def judge(target: Target, samples: Mapping[str, Rounds]) -> Verdict:
    """What was measured of a target."""
    value = None
    if all(name in samples for name in (target.above, *target.below)):
        below = [samples[name] for name in target.below]
        value = spread_of_ratio(samples[target.above], below, target.scale)
    title = JOBS[target.job].title
    return Verdict(target.load, title, target.what, value, target.bound, target.at_least, target.unit)
