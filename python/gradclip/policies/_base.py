"""What policies share: arrays of whichever device norms are on, and a state."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from gradclip._measured import Measured
from gradclip._result import ClipResult

__all__ = ["StatefulPolicy", "limits_of", "norms_of", "operations_of"]


def operations_of(array: Any) -> Any:
    """The module whose functions work on an array: NumPy, CuPy or torch.

    ``where``, ``sqrt``, ``isfinite``, ``sort`` and ``stack`` are called alike there, and the arithmetic of float64 is
    IEEE's: the same bits on the host and on a device.
    """
    return sys.modules[type(array).__module__.partition(".")[0]]


def norms_of(found: Measured | ClipResult) -> Any:
    """One norm per group, of shape ``(groups,)``, where it was measured."""
    return found.group_norms


def limits_of(measured: Measured, limits: Any) -> Any:
    """Thresholds as a call wants them: a number where all gradients are one group."""
    return limits[0] if measured.is_global else limits


class StatefulPolicy:
    """A policy with a state: numbers, and arrays with one entry per group.

    Nothing is learnt from a clip that raises. On a GPU the state lies there, and nothing waits but
    ``state_dict()``.

    Attributes:
        groups: The ``groups`` of a call that gives none.
    """

    groups: ClassVar[str | None] = None
    # Attributes that make the state, and those that must be as they were when it was saved.
    _state: ClassVar[tuple[str, ...]] = ()
    _options: ClassVar[tuple[str, ...]] = ()

    def thresholds(self, measured: Measured) -> Any:
        """One for all groups, or one for each."""
        raise NotImplementedError

    def observe(self, result: ClipResult) -> None:
        """Learn from a clip by these thresholds."""

    def state_dict(self) -> dict[str, Any]:
        """The state as numbers and NumPy arrays, to be saved. Waits for a GPU."""
        state = {name: _to_host(getattr(self, name)) for name in self._state}
        return {"policy": type(self).__name__, "options": self._given(), "state": state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a policy of the same kind and options was saved.

        Raises:
            ValueError: The state is of another policy, or of other options; nothing is changed.
        """
        kind = type(self).__name__
        if not isinstance(state, Mapping) or state.get("policy") != kind:
            got = state.get("policy") if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"state: expected that of a {kind}, got that of {got}")
        given, options = self._given(), state.get("options")
        if options != given:
            raise ValueError(f"state: expected that of a {kind} with {given}, got one with {options}")
        values = state.get("state")
        if not isinstance(values, Mapping) or set(values) != set(self._state):
            raise ValueError(f"state: expected {', '.join(self._state)}, got {values!r}")
        for name in self._state:
            value = values[name]
            setattr(self, name, np.array(value) if isinstance(value, np.ndarray) else value)

    def _given(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._options}

    def _check_groups(self, held: Any, norms: Any) -> None:
        if held is not None and held.shape[-1] != norms.shape[0]:
            raise ValueError(
                f"max_norm: expected the {held.shape[-1]} groups that this {type(self).__name__} has seen before, "
                f"got {norms.shape[0]}"
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self._given().items())})"


def _to_host(value: Any) -> Any:
    if value is None or isinstance(value, int | float | np.ndarray):
        return value.copy() if isinstance(value, np.ndarray) else value
    return np.asarray(value.get() if hasattr(value, "get") else value.cpu().numpy())


def like(value: Any, norms: Any) -> Any:
    """A NumPy array, loaded perhaps, where these norms are."""
    if not isinstance(value, np.ndarray) or isinstance(norms, np.ndarray):
        return value
    operations = operations_of(norms)
    if operations.__name__ == "torch":
        return operations.asarray(value, device=norms.device)
    return operations.asarray(value)


def in_range(name: str, value: float, low: float, high: float, is_open: bool = False) -> float:
    """A number within bounds; ValueError if it is not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a real number, got {type(value).__name__}")
    inside = low < value < high if is_open else low <= value <= high
    if not inside:
        bounds = "between" if is_open else "from"
        joint = "and" if is_open else "to"
        raise ValueError(f"{name}: expected a number {bounds} {low} {joint} {high}, got {value!r}")
    return float(value)


def count(name: str, value: int, least: int) -> int:
    """An integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    return value
