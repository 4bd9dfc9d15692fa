"""The lists of gradients that are measured: real models and synthetic axes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from bench.architectures import MODELS
from bench.errors import BenchError

__all__ = [
    "ALONE",
    "CASES",
    "DTYPES",
    "PAUSE",
    "PRODUCT",
    "Array",
    "Case",
    "Load",
    "choose",
    "dtype_of",
    "readable_bytes",
    "readable_count",
    "readable_power",
]

Array: TypeAlias = npt.NDArray[Any]
Shape: TypeAlias = tuple[int, ...]

DTYPES = ("float32", "bfloat16", "float16", "float64")

ALONE, PAUSE, PRODUCT = "alone", "pause", "product"

_MB = 2**20


@dataclass(frozen=True)
class Case:
    """A list of gradients, in any dtype.

    Attributes:
        key: Its name on the command line and in result files.
        title: Its name in tables.
        source: Where the shapes come from.
        shapes: One shape per gradient.
        cold: The caches are filled with other data before every call. Else it is measured again and
            again on the same memory, which comes from the caches as far as it fits.
        axis: The synthetic axis that it is a point of: "count" or "bytes".
        state: What the process does before every call: nothing, as in a loop of calls; a pause, after
            which helping threads sleep; a product of matrices, after which the threads of the library that
            made it (PyTorch, where it is installed) still look for work. A training step is like the last.
    """

    key: str
    title: str
    source: str
    shapes: tuple[Shape, ...]
    cold: bool = False
    axis: str = ""
    state: str = ALONE

    @property
    def num_elements(self) -> int:
        return sum(map(math.prod, self.shapes))


@dataclass(frozen=True)
class Load:
    """A case in one dtype: what a contender is given."""

    case: Case
    dtype: str = "float32"

    @property
    def key(self) -> str:
        return f"{self.case.key}/{self.dtype}"

    @property
    def nbytes(self) -> int:
        return self.case.num_elements * dtype_of(self.dtype).itemsize

    @property
    def title(self) -> str:
        count = f"{len(self.case.shapes):,}".replace(",", " ")
        noun = "tensor" if count == "1" else "tensors"
        return f"{self.case.title}, {self.dtype}: {count} {noun}, {readable_bytes(self.nbytes)}"


def readable_bytes(nbytes: float) -> str:
    """Such as "498 MB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes:.0f} B"


def dtype_of(name: str) -> np.dtype[Any]:
    """The NumPy dtype of this name; ``bfloat16`` comes from ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes  # noqa: PLC0415

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(name)


def _model(key: str) -> Case:
    model = MODELS[key]
    return Case(key, model.title, model.source, tuple(model.shapes.values()), cold=True)


def _count(count: int) -> Case:
    size = 8 * _MB // 4 // count
    key, title = f"count-{count}", f"{readable_count(count)} of {readable_count(size)}"
    return Case(key, title, "synthetic: 8 MB of float32 in so many tensors", ((size,),) * count, axis="count")


def _bytes(nbytes: int) -> Case:
    """Beyond the caches the data comes from memory anyway."""
    size = nbytes // 4 // 16
    source = "synthetic: so many bytes of float32 in 16 tensors"
    title = f"16 of {readable_count(size)}"
    return Case(
        f"bytes-{readable_power(nbytes)}", title, source, ((size,),) * 16, nbytes >= 64 * _MB, "bytes"
    )


def readable_power(nbytes: int) -> str:
    """Such as "64K", of 1024."""
    for unit, size in (("G", 2**30), ("M", 2**20), ("K", 2**10)):
        if nbytes >= size:
            return f"{nbytes // size}{unit}"
    return str(nbytes)


def readable_count(count: int) -> str:
    """With thin groups: 20 000."""
    return f"{count:,}".replace(",", " ")


_COUNTS = (1, 10, 100, 1000, 10_000, 20_000)
_BYTES = tuple(2**power for power in (12, 16, 20, 24, 28, 32))


def _states(case: Case) -> Iterable[Case]:
    yield case
    for state, after in ((PAUSE, "after a pause of 1 ms"), (PRODUCT, "after a product")):
        yield replace(case, key=f"{case.key}-{state}", title=f"{case.title}, {after}", state=state)


@cache
def _all() -> dict[str, Case]:
    huge: tuple[Shape, ...] = ((8192, 8192), *((64,),) * 900)
    cases = (
        *map(_model, MODELS),
        *_states(Case("mlp", "MLP", "weights and biases of 40 layers, width 183", ((183, 183), (183,)) * 40)),
        *_states(Case("tiny", "300 of 64", "synthetic", ((64,),) * 300)),
        Case("many", "20 000 of 100", "synthetic", ((100,),) * 20_000),
        Case("fewer", "2 000 of 100", "synthetic", ((100,),) * 2_000),
        Case("rows", "250 000 rows of 16", "synthetic", ((250_000, 16),), cold=True),
        Case("huge-and-tiny", "one of 8192 x 8192, 900 of 64", "synthetic", huge, cold=True),
        *map(_count, _COUNTS),
        *map(_bytes, _BYTES),
    )
    return {case.key: case for case in cases}


CASES: Mapping[str, Case] = _all()


def choose(what: str, names: Iterable[str], existing: Iterable[str]) -> list[str]:
    """The names, each of which exists; an error lists what does."""
    known = list(existing)
    chosen = list(dict.fromkeys(names))
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise BenchError(f"unknown {what} {', '.join(unknown)}; there are: {', '.join(known)}")
    return chosen
