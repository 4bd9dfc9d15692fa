"""What policies share: arrays of whichever device norms are on, and a state."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Findings", "StatefulPolicy", "operations_of"]


class Findings(Protocol):
    """What a :class:`gradclip.Measured` and a :class:`gradclip.ClipResult` have in common."""

    @property
    def total_norm(self) -> Any: ...
    @property
    def group_norms(self) -> Any: ...


class MeasuredGroups(Findings, Protocol):
    """What policies look at of a :class:`gradclip.Measured`."""

    @property
    def is_global(self) -> bool: ...
    @property
    def group_sizes(self) -> npt.NDArray[np.int64]: ...
    @property
    def names(self) -> tuple[str, ...] | None: ...
    @property
    def missing(self) -> tuple[int, ...] | tuple[str, ...]: ...
    @property
    def norms(self) -> Any: ...


class ClippedGroups(Findings, Protocol):
    """What policies learn from of a :class:`gradclip.ClipResult`."""

    @property
    def coefficient(self) -> Any: ...
    @property
    def names(self) -> tuple[str, ...] | None: ...


def operations_of(array: Any) -> Any:
    """The module whose functions work on an array: NumPy, CuPy, torch, or JAX's NumPy.

    Only those are used that all have alike, work element by element and are IEEE's: so a policy has the same
    bits on the host and on a device, and nothing waits.
    """
    package = type(array).__module__.partition(".")[0]
    return sys.modules["jax.numpy" if package in ("jax", "jaxlib") else package]


def clipped_norms(result: ClippedGroups) -> Any:
    """The norm of each group after clipping; NaN of one that teaches nothing.

    That is one whose norm is 0 (it has no gradient), one that was set to 0 (a step that was skipped), and
    every one where some gradient was not finite.
    """
    norms = result.group_norms
    operations = operations_of(norms)
    clipped = norms * result.coefficient
    teaches = (clipped > 0) & (clipped < math.inf) & (result.total_norm < math.inf)
    return operations.where(teaches, clipped, math.nan)


def tree_sum(rows: Any) -> Any:
    """The sum over the first axis, a power of two long: in the same order on every device."""
    while rows.shape[0] > 1:
        half = rows.shape[0] // 2
        rows = rows[:half] + rows[half:]
    return rows[0]


def full(norms: Any, shape: tuple[int, ...], value: float) -> Any:
    """An array where these norms are, of their dtype."""
    operations = operations_of(norms)
    device = {"device": norms.device} if operations.__name__ == "torch" else {}
    return operations.full(shape, value, dtype=norms.dtype, **device)


def with_row(rows: Any, index: Any, value: Any) -> Any:
    """The rows with another one in this place: the same memory, where that can be written."""
    if operations_of(rows).__name__ == "jax.numpy":
        return rows.at[index].set(value)
    rows[index] = value
    return rows


def either(condition: Any, one: Any, other: Any) -> Any:
    """One of two by a condition on calls: they are counted on the host, or by JAX in its program."""
    if isinstance(condition, bool):
        return one if condition else other
    return sys.modules["jax.numpy"].where(condition, one, other)


def beside(value: npt.NDArray[np.float64], norms: Any) -> Any:
    """A copy of a NumPy array where these norms are."""
    operations = operations_of(norms)
    if operations.__name__ == "torch":
        return operations.tensor(value, device=norms.device)
    return operations.array(value)


class StatefulPolicy:
    """What the policies of this module have in common: options, and a state of one row of numbers per group.

    Learns from clips that did not raise. On a GPU the state lies there, and nothing waits but
    ``state_dict()``. The arithmetic is that of IEEE, element by element: on the CPU, on a GPU and on all
    ranks of a job (whose norms ``reduce`` makes equal) thresholds have the same bits. It counts calls on the
    host: not for CUDA graphs.

    Attributes:
        groups: The ``groups`` of a call that gives none.
    """

    groups: Any = None
    # Whether one threshold is for all groups, whatever these are.
    _fits_any_groups = False
    # Attributes that make the state: numbers, and arrays, whose last axis is that of the groups.
    _state: ClassVar[tuple[str, ...]] = ()
    # Those that must be as they were when it was saved: arguments of the class.
    _options: ClassVar[tuple[str, ...]] = ()

    def thresholds(self, measured: Any) -> Any:
        """One for all groups, or one for each."""
        with np.errstate(all="ignore"):  # norms may be infinite or NaN
            limits = self._limits(measured)
        return limits[0] if measured.is_global else limits

    def observe(self, result: Any) -> None:
        """Learn from a clip by these thresholds."""
        with np.errstate(all="ignore"):
            self._learn(result)

    def _limits(self, measured: MeasuredGroups) -> Any:
        """The threshold of each group."""
        raise NotImplementedError

    def _learn(self, result: ClippedGroups) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        """The state as numbers and NumPy arrays, to be saved. Waits for a GPU."""
        state = {name: _to_host(getattr(self, name)) for name in self._state}
        return {"policy": type(self).__name__, "options": self._given(), "state": state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a policy of the same class and options was saved: bit for bit.

        Raises:
            TypeError: It is no mapping.
            ValueError: It is the state of another policy, or of other options; nothing is changed.
        """
        kind = type(self).__name__
        values = values_of(state, kind)
        if state.get("options") != self._given():
            raise ValueError(
                f"state: expected that of {self!r}, got one of {_text_of(kind, state.get('options'))}"
            )
        if set(values) != set(self._state):
            raise ValueError(
                f"state: expected {', '.join(self._state) or 'nothing'} of a {kind}, got "
                f"{', '.join(map(str, values)) or 'nothing'}"
            )
        for name in self._state:
            value = values[name]
            setattr(self, name, value.copy() if isinstance(value, np.ndarray) else value)

    def _initial(self, norms: Any) -> dict[str, Any]:
        """The state before the first call, as arrays where these norms are."""
        return {name: full(norms, tuple(norms.shape), 0.0) for name in self._state}

    def _given(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._options}

    def _held(self, norms: Any, *names: str) -> list[Any]:
        """Arrays of the state, where the norms of these groups are; zeros before the first call."""
        found = []
        for name in names:
            held = getattr(self, name)
            if held is None:
                held = full(norms, tuple(norms.shape), 0.0)
            elif held.shape[-1] != norms.shape[0]:
                raise ValueError(
                    f"max_norm: expected the {held.shape[-1]} groups that this {type(self).__name__} has "
                    f"seen before, got {norms.shape[0]}"
                )
            elif isinstance(held, np.ndarray) and not isinstance(norms, np.ndarray):
                held = beside(held, norms)  # it was loaded
            found.append(held)
        return found

    def __repr__(self) -> str:
        return _text_of(type(self).__name__, self._given())


def values_of(state: Any, kind: str) -> Mapping[str, Any]:
    """What a state holds; ValueError if it is of another policy."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state: expected a mapping, that of a {kind}, got {type(state).__name__}")
    if state.get("policy") != kind:
        raise ValueError(f"state: expected that of a {kind}, got that of {state.get('policy')}")
    values = state.get("state")
    if not isinstance(values, Mapping):
        raise ValueError(f"state: expected that of a {kind}, got one without values")
    return values


def _text_of(kind: str, options: Any) -> str:
    if not isinstance(options, Mapping):
        return kind
    return f"{kind}({', '.join(f'{name}={value!r}' for name, value in options.items())})"


def _to_host(value: Any) -> Any:
    if value is None or isinstance(value, int | float):
        return value
    if isinstance(value, np.ndarray):
        return value.copy()
    return np.asarray(value.get() if hasattr(value, "get") else value.cpu().numpy())


def in_range(name: str, value: float, low: float, high: float, *, is_open: bool = False) -> float:
    """A number from ``low`` to ``high``; ``is_open``: between them."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(f"{name}: expected a real number, got {type(value).__name__}")
    if not (low < value < high if is_open else low <= value <= high):
        between = f"between {low} and {high}" if is_open else f"from {low} to {high}"
        raise ValueError(f"{name}: expected a number {between}, got {value!r}")
    return float(value)


def positive(name: str, value: float) -> float:
    """A number above 0, and finite."""
    return in_range(name, value, 0, math.inf, is_open=True)


def at_least(name: str, value: int, least: int) -> int:
    """An integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    return int(value)
