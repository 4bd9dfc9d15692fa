"""Policies made of policies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradclip._measured import Measured
from gradclip._result import ClipResult
from gradclip.policies._base import StatefulPolicy, count, operations_of

__all__ = ["Lowest", "WarmUp"]


class _Composed(StatefulPolicy):
    """All parts learn from every clip."""

    _parts: tuple[StatefulPolicy, ...]

    def observe(self, result: ClipResult) -> None:
        for part in self._parts:
            part.observe(result)

    def state_dict(self) -> dict[str, Any]:
        return {"policy": type(self).__name__, "parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        kind, parts = type(self).__name__, state.get("parts") if isinstance(state, Mapping) else None
        if not isinstance(parts, list) or len(parts) != len(self._parts) or state.get("policy") != kind:
            raise ValueError(f"state: expected that of a {kind} of {len(self._parts)} policies, got {state!r}")
        before = [part.state_dict() for part in self._parts]
        try:
            for part, saved in zip(self._parts, parts, strict=True):
                part.load_state_dict(saved)
        except ValueError:
            for part, saved in zip(self._parts, before, strict=True):
                part.load_state_dict(saved)
            raise


class Lowest(_Composed):
    """The lowest of what several policies, or numbers, say.

    Args:
        policies: Policies and numbers, such as ``Lowest(ZClip(), 10.0)``.
    """

    def __init__(self, *policies: StatefulPolicy | float) -> None:
        if not policies:
            raise ValueError("policies: expected at least one, got none")
        self._parts = tuple(p for p in policies if isinstance(p, StatefulPolicy))
        self._numbers = [float(p) for p in policies if not isinstance(p, StatefulPolicy)]
        kinds = {part.groups for part in self._parts}
        if len(kinds) > 1:
            raise ValueError(f"policies: expected ones with the same groups, got {sorted(map(str, kinds))}")
        self.groups = kinds.pop() if kinds else None  # type: ignore[misc]

    def thresholds(self, measured: Measured) -> Any:
        lowest: Any = min(self._numbers, default=None)
        for part in self._parts:
            limits = part.thresholds(measured)
            if lowest is None:
                lowest = limits
                continue
            lowest = operations_of(limits).where(limits < lowest, limits, lowest)
        return lowest


class WarmUp(_Composed):
    """One policy, or a number, for the first calls; another one afterwards, which has watched all the while.

    Args:
        first: What decides first.
        calls: For how many calls.
        then: What decides afterwards.
    """

    _steps = 0

    def __init__(self, first: StatefulPolicy | float, calls: int, then: StatefulPolicy) -> None:
        self.calls = count("calls", calls, 0)
        self._first, self._then = first, then
        self._parts = (first, then) if isinstance(first, StatefulPolicy) else (then,)
        self.groups = then.groups  # type: ignore[misc]

    def thresholds(self, measured: Measured) -> Any:
        if self._steps >= self.calls:
            return self._then.thresholds(measured)
        return self._first.thresholds(measured) if isinstance(self._first, StatefulPolicy) else self._first

    def observe(self, result: ClipResult) -> None:
        super().observe(result)
        self._steps += 1

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._steps = state["steps"]
