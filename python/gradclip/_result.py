"""What a clip returns, and the error it raises."""

from __future__ import annotations

import sys
import warnings
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, overload

import numpy as np
import numpy.typing as npt

__all__ = ["ClipResult", "NonFiniteGradientError", "RowNames"]

_ROWS_IN_REPR = 5
_NOTHING = (
    "grads: expected gradients, got none, so nothing is clipped (an iterator that was used up? a clip before "
    "backward(), or after zero_grad()?)"
)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ClipResult:
    """What was measured and done by one clip.

    Attributes:
        total_norm: Norm over all gradients before clipping, divided by ``grad_scale``.
        norms: One norm per gradient, float64, shape ``(len(grads),)``, before clipping and divided by
            ``grad_scale``. ``None`` entries have norm 0.
        coefficient: What the gradients were multiplied by (before division by ``grad_scale``): exactly
            1 where nothing was clipped. A float for global clipping (``groups=None``), else a float64
            array with one entry per group.
        clipped: Whether any norm was above its threshold.
        skipped: Whether no step of the optimizer should follow: every gradient was set to zero
            (``nonfinite="zero"``, a policy that skips), or one is not finite and was left so (``"skip"``,
            ``"propagate"``).
        nonfinite: The gradients that hold an infinity or a NaN: their indices, or their names when the
            call was given a mapping.
        missing: The gradients that were ``None``, as in ``nonfinite``. Their norm is 0, as is that of a
            gradient that has vanished.
        names: The keys of the mapping that the call was given; ``None`` for a sequence.
        group_norms: One norm per group, float64, before clipping and divided by ``grad_scale``; over
            all processes when the call was given ``reduce``.
        group_names: What the groups are called, where the call named them; of rows :class:`RowNames`.
        penalty: ``l2 / 2 * sum(w**2) + l1 * sum(abs(w))`` over the parameters that the call was given as
            ``params``, of this process: what the gradients of the penalty were added for, to be added to the
            loss. 0 without.

    Example:
        >>> import numpy as np, gradclip
        >>> grads = {"w": np.array([3.0, 4.0]), "b": np.array([12.0])}
        >>> result = gradclip.clip_by_global_norm_(grads, max_norm=6.5)
        >>> result.total_norm, result.coefficient, result.clipped
        (13.0, 0.5, True)
        >>> result.named_norms()
        {'w': 5.0, 'b': 12.0}
    """

    total_norm: float
    norms: npt.NDArray[np.float64]
    coefficient: float | npt.NDArray[np.float64]
    clipped: bool
    nonfinite: tuple[int, ...] | tuple[str, ...]
    missing: tuple[int, ...] | tuple[str, ...]
    names: tuple[str, ...] | None
    _group_norms: npt.NDArray[np.float64] | None  # None where all gradients are one group
    group_names: Sequence[str] | None = None
    penalty: float = 0.0

    @property
    def group_norms(self) -> npt.NDArray[np.float64]:
        return np.array([self.total_norm]) if self._group_norms is None else self._group_norms

    @property
    def skipped(self) -> bool:
        coefficients = np.atleast_1d(self.coefficient)
        is_zero = coefficients.size > 0 and not coefficients.any()
        is_left = not np.isfinite(self.total_norm) and not self.clipped
        return bool(is_zero or is_left or np.isnan(coefficients).any())

    def named_norms(self) -> dict[str, float]:
        """The norm of every gradient by its name.

        Returns:
            Name to norm, in the order of the call. The gradients of a sequence are named by their
            position: ``"0"``, ``"1"``, ….
        """
        return by_name(self.norms, self.names)

    def named_group_norms(self) -> dict[str, float]:
        """The norm of every group by its name.

        Returns:
            Name to norm. Groups without names are called by their labels, ``"0"``, ``"1"``, ….
        """
        return by_name(self.group_norms, self.group_names)

    def as_dict(self) -> dict[str, float | int | bool]:
        """Everything as plain numbers under flat names, as loggers (TensorBoard, W&B, MLflow) take them.

        Returns:
            ``total_norm``; ``coefficient``, the lowest of all groups; ``clipped``; ``skipped``; the numbers
            of ``gradients``, of those ``missing`` and ``nonfinite``; of a regularised clip the ``penalty``; a
            ``norms/<name>`` for each gradient, and of several groups a ``group_norms/<name>`` and
            ``coefficients/<name>`` for each, unless they are rows.

        Example:
            >>> import numpy as np, gradclip
            >>> grads = {"w": np.array([3.0, 4.0]), "b": None}
            >>> numbers = gradclip.clip_by_global_norm_(grads, max_norm=2.5).as_dict()
            >>> numbers["coefficient"], numbers["missing"], numbers["norms/w"]
            (0.5, 1, 5.0)
        """
        coefficients = np.atleast_1d(self.coefficient)
        numbers: dict[str, float | int | bool] = {
            "total_norm": float(self.total_norm),
            "coefficient": float(coefficients.min(initial=1.0)),
            "clipped": bool(self.clipped),
            "skipped": self.skipped,
            "gradients": len(self.norms),
            "missing": len(self.missing),
            "nonfinite": len(self.nonfinite),
        }
        if self.penalty:
            numbers["penalty"] = float(self.penalty)
        numbers |= {f"norms/{name}": norm for name, norm in self.named_norms().items()}
        if isinstance(self.coefficient, np.ndarray) and not isinstance(self.group_names, RowNames):
            groups = self.named_group_norms()
            numbers |= {f"group_norms/{name}": norm for name, norm in groups.items()}
            numbers |= {
                f"coefficients/{name}": value
                for name, value in zip(groups, coefficients.tolist(), strict=True)
            }
        return numbers

    def to_host(self) -> ClipResult:
        """The same result as Python numbers and NumPy arrays: of a CPU, itself.

        That of a GPU, whose fields are arrays on the device, waits for the clip and is copied.
        """
        return self

    def __repr__(self) -> str:
        coefficient = self.coefficient
        if isinstance(coefficient, np.ndarray):
            low = f", lowest {coefficient.min():.6g}" if coefficient.size > 1 else ""
            coefficient_text = count_of(coefficient.size, "coefficient") + low
            if coefficient.size == 1:
                coefficient_text = f"coefficient {coefficient[0]:.6g}"
        else:
            coefficient_text = f"coefficient {coefficient:.6g}"
        state = "clipped" if self.clipped else "not clipped"
        missing = f", {len(self.missing)} missing" if self.missing else ""
        head = (
            f"ClipResult({state}: total norm {self.total_norm:.6g}, {coefficient_text}, "
            f"{count_of(len(self.norms), 'gradient')}{missing}"
        )
        return "\n".join([head, *norm_rows(self.norms, self.nonfinite, self.names)]) + ")"


class RowNames(Sequence[str]):
    """What groups are called that are the rows of gradients: ``"w[0]"``, ``"w[1]"``, …

    The rows of the first gradient come first. Names are made when they are asked for.

    Attributes:
        gradients: The names of the gradients; ``None`` where they are called by their positions.

    Example:
        >>> import numpy as np, gradclip
        >>> grads = {"w": np.array([[3.0, 4.0], [0.0, 1.0]]), "b": np.array([12.0])}
        >>> result = gradclip.clip_by_global_norm_(grads, max_norm=2.5, groups="row")
        >>> result.named_group_norms()
        {'w[0]': 5.0, 'w[1]': 1.0, 'b[0]': 12.0}
        >>> result.group_names.split(result.coefficient)
        [array([0.5, 1. ]), array([0.20833333])]
    """

    __slots__ = ("_first", "gradients")

    def __init__(self, gradients: tuple[str, ...] | None, first: tuple[int, ...]) -> None:
        self.gradients = gradients
        self._first = first  # the number of each gradient's first row, and of all rows

    def __len__(self) -> int:
        return self._first[-1]

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        numbers = range(len(self))[index]
        return self._name(numbers) if isinstance(numbers, int) else [self._name(i) for i in numbers]

    def __iter__(self) -> Iterator[str]:
        for gradient, (first, end) in enumerate(pairwise(self._first)):
            name = self._gradient(gradient)
            for row in range(end - first):
                yield f"{name}[{row}]"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.gradients, self._first)

    def __repr__(self) -> str:
        return f"RowNames({count_of(len(self), 'row')} of {count_of(len(self._first) - 1, 'gradient')})"

    def split(self, values: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """What there is of every row, as an array for each gradient.

        Args:
            values: Of shape ``(rows of all gradients, ...)``, as ``group_norms`` and ``coefficient``.

        Returns:
            Views, one for each gradient, of shape ``(rows of the gradient, ...)``.
        """
        return [values[first:end] for first, end in pairwise(self._first)]

    def _name(self, row: int) -> str:
        gradient = bisect_right(self._first, row) - 1
        return f"{self._gradient(gradient)}[{row - self._first[gradient]}]"

    def _gradient(self, gradient: int) -> str:
        return str(gradient) if self.gradients is None else self.gradients[gradient]


def count_of(number: int, what: str) -> str:
    """``"1 gradient"``, ``"2 gradients"``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def by_name(values: npt.NDArray[np.float64], names: Sequence[str] | None) -> dict[str, float]:
    """Numbers by their names; without names, by their positions: ``"0"``, ``"1"``, …."""
    keys = names if names is not None else map(str, range(len(values)))
    return dict(zip(keys, values.tolist(), strict=True))


def norm_rows(
    norms: npt.NDArray[np.float64],
    nonfinite: tuple[int, ...] | tuple[str, ...],
    names: tuple[str, ...] | None,
) -> list[str]:
    """What a person reads of norms: those that are not finite, and the largest."""
    rows = []
    if nonfinite:
        shown = ", ".join(map(repr, nonfinite[:_ROWS_IN_REPR]))
        more = ", ..." if len(nonfinite) > _ROWS_IN_REPR else ""
        rows.append(f"  not finite: {shown}{more}")
    rows += [
        f"  {norms[i]:12.6g}  {i if names is None else names[i]}" for i in _largest(norms, _ROWS_IN_REPR)
    ]
    if len(norms) > _ROWS_IN_REPR:
        rows.append(f"  {'...':>12}  {len(norms) - _ROWS_IN_REPR} more")
    return rows


def _largest(norms: npt.NDArray[np.float64], count: int) -> list[int]:
    """The positions of the largest norms. NaN come first, then infinities: what a reader is looking for."""
    ranks = np.where(np.isnan(norms), np.inf, norms)
    if len(norms) > count:
        candidates = np.flatnonzero(ranks >= np.partition(ranks, -count)[-count])
    else:
        candidates = np.arange(len(norms))
    order = np.lexsort((candidates, -ranks[candidates], ~np.isnan(norms[candidates])))
    return [int(i) for i in candidates[order[:count]]]


class NonFiniteGradientError(FloatingPointError):
    """A gradient holds an infinity or a NaN. Nothing has been written.

    Attributes:
        entries: One ``(index or name, NaN count, infinity count)`` per gradient that is not finite.
            Empty when every gradient of this process is finite and still a norm is not: ``reduce``
            brought it in from another process, or the true norm is beyond float64.
        norms: The norm of every gradient, float64, as in :class:`ClipResult`.

    Example:
        >>> import numpy as np, gradclip
        >>> grads = {"w": np.ones(3), "b": np.array([np.nan, np.inf, 1.0, np.nan])}
        >>> gradclip.clip_by_global_norm_(grads, max_norm=1.0)
        Traceback (most recent call last):
            ...
        gradclip.NonFiniteGradientError: grads['b']: expected finite elements, got 2 NaN and 1 inf; ...
    """

    def __init__(
        self,
        message: str,
        entries: list[tuple[int | str, int, int]],
        norms: npt.NDArray[np.float64],
    ) -> None:
        super().__init__(message)
        self.entries = entries
        self.norms = norms

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is made again of its args, and these are not all of them.
        return type(self), (*self.args, self.entries, self.norms), self.__dict__


# Where people find and import it; also what a traceback prints.


def warn_of_nothing(text: str = _NOTHING) -> None:
    """Warn the caller of gradclip that there was no gradient to write to."""
    warn_caller(text)


def warn_caller(text: str) -> None:
    """Warn the caller of gradclip (or of PyTorch, rerouted)."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_inside(name := frame.f_globals.get("__name__", "")):
        level += not name.startswith("importlib.")  # which warnings do not count
        frame = frame.f_back
    warnings.warn(text, stacklevel=level)


def _is_inside(module: str) -> bool:
    return module.partition(".")[0] in ("gradclip", "torch", "contextlib", "importlib")


def named(indices: tuple[int, ...], names: tuple[str, ...] | None) -> tuple[int, ...] | tuple[str, ...]:
    """Gradients by the names of the call, or by their positions if it had none."""
    return indices if names is None else tuple(names[i] for i in indices)


def nonfinite_error(
    counts: list[tuple[int, int, int]],
    names: tuple[str, ...] | None,
    norms: npt.NDArray[np.float64],
    argument: str = "grads",
) -> NonFiniteGradientError:
    entries: list[tuple[int | str, int, int]] = [
        (names[i] if names is not None else i, nan, inf) for i, nan, inf in counts
    ]
    shown = [
        f"{argument}[{entry!r}]: expected finite elements, got {nan} NaN and {inf} inf"
        for entry, nan, inf in entries[:_ROWS_IN_REPR]
    ]
    if len(entries) > _ROWS_IN_REPR:
        shown.append(f"and {count_of(len(entries) - _ROWS_IN_REPR, 'more gradient')}")
    if not entries:
        shown.append(
            f"{argument}: expected a finite norm, got an infinite one or NaN, though every gradient of this "
            "process is finite: it came through reduce, or the norm is beyond float64"
        )
    shown.append("nothing was written (choose nonfinite='skip', 'zero' or 'propagate' to go on)")
    return NonFiniteGradientError("; ".join(shown), entries, norms)
