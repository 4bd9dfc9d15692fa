"""What joining norms over many ranks costs, on paper: a model, a simulation, and rounding.

    python -m tools.scaling                    # prints the tables of docs/scaling.md
    python -m tools.scaling docs/scaling.md    # puts them there

Nothing is measured here. The latency and the bandwidth of a hop are assumptions; what is random has a
fixed seed, so that the tables are always the same.
"""

from __future__ import annotations

import argparse
import functools
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gradclip._report.tables import markdown_table

__all__ = ["ALPHA", "BETA", "doubling", "fill", "model", "ring", "tables", "tree"]

ALPHA = 5e-6  # seconds for a hop, however short the message
BETA = 1 / 25e9  # seconds for a byte more
MESSAGE = 32  # bytes: a sum, and three numbers that tell whether all is well
TORCH, WIDE = 4, 8  # bytes of a norm of one tensor: as PyTorch sends it, and in float64

_RANKS = (8, 64, 512, 4096, 10_000)
_TRIALS = 100
_MOST_RANKS_IN_A_RING = 512  # a ring of 10^4 takes 2 * 10^8 hops
_JITTER = 0.2  # mean of what a hop takes longer, as a part of ALPHA
_DELAY, _DELAYED = 1e-3, 1e-5  # seconds that this part of all hops is late: a page fault, a retransmission

_Floats = npt.NDArray[np.float64]
# Seconds of one hop each of many ranks.
_Hops = Callable[[int], _Floats]


# --- The model ----------------------------------------------------------------------------------------


def model(algorithm: str, ranks: int, nbytes: float) -> float:
    """Seconds of an all-reduce where every hop takes ALPHA and BETA for each byte."""
    rounds = math.ceil(math.log2(ranks))
    share = 2 * (ranks - 1) / ranks * nbytes * BETA
    return {
        "ring": 2 * (ranks - 1) * ALPHA + share,
        "tree": 2 * rounds * (ALPHA + nbytes * BETA),
        "doubling": rounds * (ALPHA + nbytes * BETA),
        "halving": 2 * rounds * ALPHA + share,
    }[algorithm]


# --- The simulation -----------------------------------------------------------------------------------


def doubling(arrivals: _Floats, hops: _Hops) -> _Floats:
    """When each rank is done with a recursive doubling: in round k it exchanges with rank xor 2^k.

    Ranks beyond a power of two hand in their number first, and are told the result last.
    """
    even = 1 << (len(arrivals).bit_length() - 1)
    extra = len(arrivals) - even
    at = arrivals[:even].copy()
    if extra:
        at[:extra] = np.maximum(at[:extra], arrivals[even:]) + hops(extra)
    partner = np.arange(even)
    for k in range(even.bit_length() - 1):
        at = np.maximum(at, at[partner ^ (1 << k)]) + hops(even)
    return np.concatenate([at, at[:extra] + hops(extra)])


def tree(arrivals: _Floats, hops: _Hops) -> _Floats:
    """When each rank is done with a binomial tree: sums go up to rank 0, and the total comes down."""
    ranks = len(arrivals)
    at = arrivals.copy()
    steps = [1 << k for k in range(math.ceil(math.log2(ranks)))]
    for step in steps:
        upper = np.arange(0, ranks - step, 2 * step)
        at[upper] = np.maximum(at[upper], at[upper + step]) + hops(len(upper))
    for step in reversed(steps):
        upper = np.arange(0, ranks - step, 2 * step)
        at[upper] += hops(len(upper))
        at[upper + step] = at[upper]
    return at


def ring(arrivals: _Floats, hops: _Hops) -> _Floats:
    """When each rank is done with a ring: every step waits for the neighbour's last one."""
    at = arrivals.copy()
    for _ in range(2 * (len(at) - 1)):
        at = np.maximum(at, np.roll(at, 1)) + hops(len(at))
    return at


def _hops(rng: np.random.Generator, jitter: bool, delays: bool) -> _Hops:
    def hops(count: int) -> _Floats:
        times = np.full(count, ALPHA + MESSAGE * BETA)
        if jitter:
            times += rng.exponential(_JITTER * ALPHA, count)
        if delays:
            times[rng.random(count) < _DELAYED] += _DELAY
        return times

    return hops


def _simulated(
    algorithm: Callable[[_Floats, _Hops], _Floats], ranks: int, jitter: bool, delays: bool
) -> _Floats:
    """Seconds until the last rank is done, in many trials."""
    rng = np.random.default_rng([ranks, jitter, delays])
    trials = _TRIALS if jitter else 1
    return np.array([algorithm(np.zeros(ranks), _hops(rng, jitter, delays)).max() for _ in range(trials)])


# --- Rounding -----------------------------------------------------------------------------------------


def _local_sums(ranks: int, seed: int) -> _Floats:
    """Sums of squares of ranks that hold very different layers."""
    return np.random.default_rng(seed).lognormal(0.0, 2.0, ranks)


def _in_order(sums: npt.NDArray[np.floating]) -> float:
    return float(np.add.accumulate(sums)[-1])


def _by_doubling(sums: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """The total on every rank, each having added in its own order."""
    even = 1 << (len(sums).bit_length() - 1)
    extra = len(sums) - even
    total = sums[:even].copy()
    total[:extra] += sums[even:]
    partner = np.arange(even)
    for k in range(even.bit_length() - 1):
        total = total + total[partner ^ (1 << k)]
    return np.concatenate([total, total[:extra]])


def _relative_error(total: float, sums: npt.NDArray[np.floating]) -> float:
    exact = math.fsum(sums.tolist())
    return abs(total - exact) / exact


# --- Tables -------------------------------------------------------------------------------------------


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.0f}"


def _traffic() -> str:
    rows = []
    for parameters, tensors, ranks in ((1e9, 300, 8), (1e11, 1e3, 1000), (1e12, 1e5, 10_000)):
        rows.append(
            (
                f"{parameters:.0e}".replace("e+", "e"),
                f"{tensors:,.0f}",
                f"{ranks:,}",
                _bytes(2 * parameters / ranks),
                _bytes(MESSAGE),
                _bytes(TORCH * tensors),
                _bytes(WIDE * tensors),
            )
        )
    header = ("parameters", "tensors", "ranks", "bf16 gradients a rank reads", "gradclip sends")
    return markdown_table((*header, "PyTorch sends", "every tensor's norm, float64"), rows)


def _latency() -> str:
    rows = [
        [f"{ranks:,}", *(_us(model(a, ranks, MESSAGE)) for a in ("doubling", "tree", "ring"))]
        for ranks in _RANKS
    ]
    return markdown_table(("ranks", "recursive doubling", "tree", "ring"), rows)


def _many_norms() -> str:
    names = ("doubling", "tree", "halving", "ring")
    rows = []
    for text, nbytes in (("one sum", MESSAGE), ("PyTorch, 10^5", TORCH * 1e5), ("float64, 10^5", WIDE * 1e5)):
        rows.append([text, _bytes(nbytes), *(_us(model(name, 10_000, nbytes)) for name in names)])
    return markdown_table(("norms", "message", "doubling", "tree", "halving and doubling", "ring"), rows)


def _simulation() -> str:
    rows = []
    for ranks in _RANKS:
        for name, algorithm in (("doubling", doubling), ("tree", tree), ("ring", ring)):
            if algorithm is ring and ranks > _MOST_RANKS_IN_A_RING:
                continue
            even = _simulated(algorithm, ranks, False, False)
            jitter = _simulated(algorithm, ranks, True, False)
            delays = _simulated(algorithm, ranks, True, True)
            spread = [f"{_us(float(np.median(times)))} / {_us(times.max())}" for times in (jitter, delays)]
            late = f"{np.mean(delays > _DELAY):.0%}"
            rows.append((f"{ranks:,}", name, _us(even[0]), *spread, late))
    return markdown_table(
        ("ranks", "algorithm", "even hops", "jitter", "jitter and delays", "hit by a delay"), rows
    )


def _rounding() -> str:
    rows = []
    for ranks in _RANKS:
        row = [f"{ranks:,}"]
        kinds: list[tuple[type[np.floating], float]] = [(np.float64, 2.0**-53), (np.float32, 2.0**-24)]
        for dtype, unit in kinds:
            trials: list[npt.NDArray[np.floating]] = [
                _local_sums(ranks, seed).astype(dtype) for seed in range(_TRIALS)
            ]
            in_order = max(_relative_error(_in_order(sums), sums) for sums in trials)
            doubled = max(_relative_error(float(_by_doubling(sums)[0]), sums) for sums in trials)
            row += [f"{in_order:.1e} ({(ranks - 1) * unit:.1e})"]
            row += [f"{doubled:.1e} ({math.ceil(math.log2(ranks)) * unit:.1e})"]
        rows.append(row)
    return markdown_table(
        ("ranks", "float64, in order", "float64, doubling", "float32, in order", "float32, doubling"), rows
    )


def _same_bits() -> str:
    def distinct(totals: Iterable[float]) -> str:
        return str(len({np.float64(total).tobytes() for total in totals}))

    sums = _local_sums(10_000, 0)
    shards = _local_sums(100, 0)
    replicas = [_in_order(np.roll(shards, start)) for start in range(100)]
    rows = [
        (
            "recursive doubling over 10,000 ranks: every rank adds in another order",
            distinct(_by_doubling(sums)),
        ),
        ("100 replicas of 100 shards: each group's ring starts elsewhere", distinct(replicas)),
        ("the same, after the greatest was taken", distinct([max(replicas)] * len(replicas))),
    ]
    return markdown_table(("what", "different results"), rows)


@functools.cache
def tables() -> dict[str, str]:
    """All of them, by name."""
    return {
        "traffic": _traffic(),
        "latency": _latency(),
        "many norms": _many_norms(),
        "simulation": _simulation(),
        "rounding": _rounding(),
        "same bits": _same_bits(),
    }


def fill(text: str) -> str:
    """A document with the tables in their places: after ``<!-- table: NAME -->`` and a blank line."""
    for name, table in tables().items():
        place = re.compile(rf"(<!-- table: {re.escape(name)} -->\n\n)(?:(?:\|.*\n)+\n)?")
        text, found = place.subn(lambda match, table=table: f"{match[1]}{table}\n\n", text)  # type: ignore[misc]
        if found != 1:
            raise ValueError(f"expected one place for the table {name!r}, got {found}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.scaling", description=__doc__)
    parser.add_argument("document", nargs="?", type=Path, help="where to put the tables; else print them")
    document = parser.parse_args().document
    if document is None:
        print("\n\n".join(f"**{name}**\n\n{table}" for name, table in tables().items()))
    else:
        document.write_text(fill(document.read_text()))


if __name__ == "__main__":
    main()
