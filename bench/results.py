"""One run of the suite, and its file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from bench.cases import Load
from bench.errors import BenchError
from bench.peers import PEERS
from bench.schema import SchemaError, checked
from bench.targets import Verdict
from bench.timing import Rounds

__all__ = ["LoadFacts", "Results", "check_writable", "load", "save"]

_FORMAT = 2


@dataclass(frozen=True)
class LoadFacts:
    """What a result file says about a load, so that it can be read when the suite has changed."""

    case: str
    dtype: str
    title: str
    source: str
    tensors: int
    nbytes: int
    cold: bool
    axis: str

    @classmethod
    def of(cls, load: Load) -> LoadFacts:
        case = load.case
        return cls(
            case.key, load.dtype, load.title, case.source, len(case.shapes), load.nbytes, case.cold, case.axis
        )


@dataclass
class Results:
    """One run.

    Attributes:
        machine: What it ran on, and how long it took.
        loads: What was measured, by key.
        samples: Seconds of every timed call, by the key of the contender, a list for each turn.
        errors: Relative error of the global norm that a contender answered.
        failures: What went wrong with a contender.
        left_out: Who or what did not take part, and why.
        verdicts: The promises, in order.
        training: Seconds of training steps and of the clip in them, by model and way to clip.
    """

    machine: dict[str, Any]
    loads: dict[str, LoadFacts] = field(default_factory=dict)
    samples: dict[str, Rounds] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)


def _lines(mapping: Mapping[str, Any]) -> str:
    lines = (f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in mapping.items())
    return "{\n" + ",\n".join(lines) + "\n}"


def save(results: Results, path: Path) -> None:
    """Write a run as JSON, a line for each contender: samples in nanoseconds, a list for each turn."""
    samples = {
        name: [[round(seconds * 1e9) for seconds in turn] for turn in rounds]
        for name, rounds in results.samples.items()
    }
    sections = {
        "format": str(_FORMAT),
        "machine": json.dumps(results.machine, indent=1),
        "loads": _lines({name: asdict(facts) for name, facts in results.loads.items()}),
        "contenders": _lines({name: peer.title for name, peer in PEERS.items()}),
        "left_out": json.dumps(results.left_out, indent=1),
        "failures": _lines(results.failures),
        "promises": "[\n" + ",\n".join(json.dumps(asdict(v)) for v in results.verdicts) + "\n]",
        "training": _lines(results.training),
        "relative_errors": _lines(results.errors),
        "samples_ns": _lines(samples),
    }
    text = ",\n".join(f'"{name}": {section}' for name, section in sections.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + text + "\n}\n", encoding="utf-8")


def check_writable(path: Path) -> None:
    """To be told before a run, and not after it."""
    existed = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        why = f"--out: expected a file that can be written, got {path}: {error.strerror}"
        raise BenchError(why) from None
    if not existed:
        path.unlink()


@dataclass(frozen=True)
class _Machine:
    """What tables and pages say of the machine; there may be more."""

    cpu: str
    threads: int
    isa: str
    caches: list[str]
    memory_gb: float
    read_gb_per_s: float
    read_write_gb_per_s: float
    system: str
    python: str
    versions: dict[str, str | None]
    date: str
    commit: str | None
    uncommitted_changes: bool
    seconds: float
    gpu: str | None = None


@dataclass(frozen=True)
class _File:
    format: int
    machine: dict[str, Any]
    loads: dict[str, LoadFacts]
    contenders: dict[str, str]
    left_out: list[str]
    failures: dict[str, str]
    promises: list[Verdict]
    training: dict[str, dict[str, list[tuple[float, float]]]]
    relative_errors: dict[str, float]
    samples_ns: dict[str, list[list[float]]]


_MACHINE_FIELDS = {each.name for each in fields(_Machine)}


def load(path: Path) -> Results:
    """Read what ``save`` wrote; an error lists the result files that there are, or names the field."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict) and data.get("format", _FORMAT) != _FORMAT:
            raise SchemaError(f"format: expected {_FORMAT}, got {data['format']!r}")
        found: _File = checked(_File, data, "the file")
        known = {name: value for name, value in found.machine.items() if name in _MACHINE_FIELDS}
        checked(_Machine, known, "machine")
        for name, rounds in found.samples_ns.items():
            if not rounds or not all(turn and 0 < min(turn) <= max(turn) < math.inf for turn in rounds):
                raise SchemaError(f"samples_ns[{name!r}]: expected finite times above 0 in every turn")
        for model, ways in found.training.items():
            for way, steps in ways.items():
                if not steps or not all(0 < step < math.inf and clip < math.inf for step, clip in steps):
                    raise SchemaError(f"training[{model!r}][{way!r}]: expected finite times of steps")
    except (OSError, ValueError, RecursionError) as error:
        exist = ", ".join(sorted(p.name for p in path.parent.glob("*.json"))) or "no .json file"
        why = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise BenchError(
            f"{path}: expected a result file of python -m bench, but {why}; in that directory: {exist}"
        ) from None
    return Results(
        machine=found.machine,
        loads=found.loads,
        samples={k: [[ns / 1e9 for ns in turn] for turn in v] for k, v in found.samples_ns.items()},
        errors=found.relative_errors,
        failures=found.failures,
        left_out=found.left_out,
        verdicts=found.promises,
        training=found.training,
    )
