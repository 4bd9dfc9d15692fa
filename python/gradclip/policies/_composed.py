"""Policies made of policies, and of numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from gradclip._measured import Policy, is_policy
from gradclip.policies._base import (
    ClippedGroups,
    MeasuredGroups,
    StatefulPolicy,
    at_least,
    either,
    full,
    in_range,
    operations_of,
    values_of,
    with_row,
)

__all__ = ["FirstMatch", "Lowest", "WarmUp"]


class _Composed(StatefulPolicy):
    """All parts learn from every clip, by what was done in the end."""

    _parts: dict[str, Any]  # policies and numbers

    def observe(self, result: ClippedGroups) -> None:
        for _, part in self._policies():
            if hasattr(part, "observe"):
                part.observe(result)

    def state_dict(self) -> dict[str, Any]:
        states = {name: part.state_dict() for name, part in self._policies() if hasattr(part, "state_dict")}
        return {"policy": type(self).__name__, "options": self._given(), "state": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        kind = type(self).__name__
        values = values_of(state, kind)
        parts = {name: part for name, part in self._policies() if hasattr(part, "state_dict")}
        if set(values) != set(parts) or state.get("options") != self._given():
            raise ValueError(f"state: expected that of {self!r}, got one of {', '.join(map(repr, values))}")
        before = {name: part.state_dict() for name, part in parts.items()}
        try:
            for name, part in parts.items():
                part.load_state_dict(values[name])
        except (TypeError, ValueError):
            for name, part in parts.items():
                part.load_state_dict(before[name])
            raise

    def view_of(self, name: str, whole: Any) -> Any:
        """What a part sees of what was measured, or done; None: nothing, it is left out."""
        return whole

    def _policies(self) -> Iterator[tuple[str, Any]]:
        return ((name, part) for name, part in self._parts.items() if is_policy(part))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self._parts.values()))})"


def _checked(name: str, part: Any) -> Any:
    """A policy that gives thresholds, or a threshold."""
    if hasattr(part, "coefficients"):
        raise TypeError(
            f"{name}: expected a policy that gives thresholds, got {part!r}, which gives coefficients"
        )
    return part if is_policy(part) else in_range(name, part, 0, np.inf)


def _limits_of(part: Any, measured: MeasuredGroups) -> Any:
    return part.thresholds(measured) if is_policy(part) else part


def _common_groups(parts: Sequence[Any]) -> Any:
    kinds = [
        getattr(part, "groups", None)
        for part in parts
        if is_policy(part) and not getattr(part, "_fits_any_groups", False)
    ]
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError(
            f"policies: expected ones for the same groups, got ones for {', '.join(map(repr, kinds))}"
        )
    return kinds[0] if kinds else None


class Lowest(_Composed):
    """The lowest of the thresholds that several policies, or numbers, give.

    Args:
        policies: Such as ``Lowest(ZClip(), 10.0)``; at least one.

    Example:
        >>> import numpy as np, gradclip
        >>> from gradclip.policies import Lowest, Percentile
        >>> policy = Lowest(Percentile(50), 10.0)
        >>> for norm in (40.0, 4.0, 8.0):
        ...     gradclip.clip_by_global_norm_([np.array([norm])], policy).coefficient
        0.25
        1.0
        1.0
    """

    def __init__(self, *policies: Policy | float) -> None:
        if not policies:
            raise ValueError("policies: expected at least one, got none")
        self._parts = {str(i): _checked(f"policies[{i}]", part) for i, part in enumerate(policies)}
        self.groups = _common_groups(policies)

    def thresholds(self, measured: MeasuredGroups) -> Any:
        lowest: Any = None
        # Numbers are compared with arrays where these are.
        for part in sorted(self._parts.values(), key=is_policy):
            limits = _limits_of(part, measured)
            if lowest is None or (isinstance(limits, float) and isinstance(lowest, float)):
                lowest = limits if lowest is None else min(limits, lowest)
            else:
                lowest = operations_of(limits).where(limits < lowest, limits, lowest)
        return lowest


class WarmUp(_Composed):
    """One policy, or number, in the first calls; then another one, which has watched all the while.

    Args:
        first: What decides first.
        calls: In how many calls.
        then: What decides afterwards.

    Example:
        >>> import numpy as np, gradclip
        >>> from gradclip.policies import AutoClip, WarmUp
        >>> policy = WarmUp(1.0, 2, AutoClip(50))
        >>> for norm in (4.0, 8.0, 16.0):
        ...     gradclip.clip_by_global_norm_([np.array([norm])], policy).coefficient
        0.25
        0.125
        0.5
    """

    _options = ("calls",)

    def __init__(self, first: Policy | float, calls: int, then: Policy | float) -> None:
        self.calls = at_least("calls", calls, 0)
        self._parts = {"first": _checked("first", first), "then": _checked("then", then)}
        self.groups = _common_groups([first, then])
        self._seen = 0

    def __repr__(self) -> str:
        return f"WarmUp({self._parts['first']!r}, {self.calls}, {self._parts['then']!r})"

    def thresholds(self, measured: MeasuredGroups) -> Any:
        is_first = self._seen < self.calls
        if isinstance(is_first, bool):  # the other one is not asked
            return _limits_of(self._parts["first" if is_first else "then"], measured)
        return either(is_first, *(_limits_of(part, measured) for part in self._parts.values()))

    def observe(self, result: ClippedGroups) -> None:
        super().observe(result)
        self._seen += 1

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"seen": self._seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._seen = state["seen"]


class FirstMatch(_Composed):
    """A policy, a number or ``None`` (not clipped) for each gradient, by the first pattern that matches.

    A policy for all gradients, and a number, looks at the norm of those of its pattern together; one for
    tensors (:class:`AdaGC`) at each of them. Every gradient must match some pattern.

    Args:
        policies: By patterns as of the shell, such as ``{"*.bias": None, "h.*": AdaGC(), "*": 1.0}``; the
            first comes first. Gradients come in a mapping, or from a module.

    Example:
        >>> import numpy as np, gradclip
        >>> from gradclip.policies import FirstMatch
        >>> grads = {"embed.w": np.array([8.0]), "head.w": np.array([4.0]), "head.b": np.array([2.0])}
        >>> policy = FirstMatch({"embed.*": None, "*.b": 1.0, "*": 2.0})
        >>> gradclip.clip_by_global_norm_(grads, policy).named_group_norms()
        {'embed.*': 8.0, '*.b': 2.0, '*': 4.0}
        >>> {name: float(grad[0]) for name, grad in grads.items()}
        {'embed.w': 8.0, 'head.w': 2.0, 'head.b': 1.0}
    """

    def __init__(self, policies: Mapping[str, Policy | float | None]) -> None:
        if not isinstance(policies, Mapping):
            raise TypeError(
                f"policies: expected a mapping of patterns to policies, got {type(policies).__name__}"
            )
        if not policies:
            raise ValueError("policies: expected at least one pattern, got none")
        self._parts = {
            pattern: np.inf if part is None else _checked(f"policies[{pattern!r}]", part)
            for pattern, part in policies.items()
        }
        for pattern, part in self._policies():
            if getattr(part, "groups", None) not in (None, "tensor"):
                raise ValueError(
                    f"policies[{pattern!r}]: expected a policy for all gradients or for tensors, got one for "
                    f"groups={part.groups!r}"
                )
        self._made: tuple[Any, _Labels] | None = None

    def groups(self, names: tuple[str, ...] | None) -> Any:
        """The group of each gradient, and what they are called."""
        if names is None:
            raise TypeError("grads: expected names for a FirstMatch (a mapping of arrays), got a sequence")
        if self._made is None or self._made[0] != names:
            self._made = (names, _Labels(names, self._parts))
        return self._made[1]

    def thresholds(self, measured: MeasuredGroups) -> Any:
        labels, norms = self.groups(measured.names), measured.group_norms
        if len(norms) != len(labels.group_names):
            raise ValueError(
                f"groups: expected none with a FirstMatch, which makes its own {len(labels.group_names)}, "
                f"got {len(norms)}"
            )
        limits = full(norms, tuple(norms.shape), np.inf)
        for pattern, place in labels.places.items():
            limits = with_row(
                limits, place, _limits_of(self._parts[pattern], self.view_of(pattern, measured))
            )
        return limits

    def observe(self, result: ClippedGroups) -> None:
        for pattern, part in self._policies():
            view = self.view_of(pattern, result)
            if view is not None and hasattr(part, "observe"):
                part.observe(view)

    def view_of(self, name: str, whole: Any) -> Any:
        labels = self.groups(whole.names)
        if name not in labels.places:
            return None
        return _Part(whole, labels.places[name], name in labels.shared)

    def __repr__(self) -> str:
        return f"FirstMatch({self._parts!r})"


class _Labels(list[int]):
    """The number of each gradient's group, as :func:`gradclip.clip_by_global_norm_` takes them."""

    def __init__(self, names: tuple[str, ...], parts: Mapping[str, Any]) -> None:
        members: dict[str, list[str]] = {pattern: [] for pattern in parts}
        for name in names:
            pattern = next((pattern for pattern in parts if fnmatchcase(name, pattern)), None)
            if pattern is None:
                raise ValueError(
                    "policies: expected a pattern for every gradient (such as '*': None), got none for "
                    f"{name!r}"
                )
            members[pattern].append(name)
        self.places: dict[str, slice] = {}  # of the groups of each pattern that has some
        self.shared: set[str] = set()  # patterns whose gradients are one group
        number_of: dict[str, int] = {}
        self.group_names: list[str] = []
        for pattern, its in members.items():
            if not its:
                continue
            first = len(self.group_names)
            if getattr(parts[pattern], "groups", None) == "tensor":
                number_of |= {name: first + i for i, name in enumerate(its)}
                self.group_names += its
            else:
                number_of |= dict.fromkeys(its, first)
                self.group_names.append(pattern)
                self.shared.add(pattern)
            self.places[pattern] = slice(first, len(self.group_names))
        super().__init__(number_of[name] for name in names)


class _Part:
    """What one pattern's policy sees: its groups of what was measured, or done."""

    def __init__(self, whole: Any, place: slice, is_global: bool) -> None:
        self._whole, self._place = whole, place
        self.is_global = is_global

    @property
    def group_norms(self) -> Any:
        return self._whole.group_norms[self._place]

    @property
    def group_sizes(self) -> Any:
        return self._whole.group_sizes[self._place]

    @property
    def coefficient(self) -> Any:
        coefficients = self._whole.coefficient[self._place]
        return coefficients[0] if self.is_global else coefficients

    @property
    def total_norm(self) -> Any:
        return self.group_norms[0] if self.is_global else self._whole.total_norm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)
