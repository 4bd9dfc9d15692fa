"""What is said of gradients that are not finite."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gradclip._result import NonFiniteGradientError
from gradclip.torch._arguments import Names, Tensors, name_of

__all__ = ["NonFiniteNormError", "count_nonfinite", "describe", "nonfinite_error"]

_Counts = Sequence[tuple[int | str, int, int]]


class NonFiniteNormError(NonFiniteGradientError, RuntimeError):
    """A :class:`gradclip.NonFiniteGradientError` that is a ``RuntimeError`` too, as PyTorch raises."""


def count_nonfinite(grads: Tensors) -> _Counts:
    """Position, NaNs and infinities of those that have any."""
    counts = [(i, int(g.isnan().sum()), int(g.isinf().sum())) for i, g in enumerate(grads) if g is not None]
    return [(i, nan, inf) for i, nan, inf in counts if nan or inf]


def describe(entries: _Counts, names: Names) -> list[str]:
    """What errors say of them."""
    found = [
        f"{name_of(names, int(i))}: expected finite elements, got {nan} NaN and {inf} inf"
        for i, nan, inf in entries[:5]
    ]
    if len(entries) > len(found):
        found.append(f"and {len(entries) - len(found)} more")
    return found


def nonfinite_error(
    order: float,
    entries: _Counts,
    norms: npt.NDArray[np.float64],
    names: Names,
    found: Sequence[str] | None = None,
) -> NonFiniteNormError:
    """The error for them; ``found`` is what it says, if not what :func:`describe` does."""
    found = describe(entries, names) if found is None else found
    if not found:
        found = ["expected a finite norm, got one that is not, of gradients that are"]
    named: list[tuple[int | str, int, int]] = [(name_of(names, int(i)), a, b) for i, a, b in entries]
    # PyTorch's words first: there are scripts that look for them.
    start = f"The total norm of order {order} for gradients from `parameters` is non-finite"
    return NonFiniteNormError("; ".join([start, *found, "nothing was written"]), named, norms)
