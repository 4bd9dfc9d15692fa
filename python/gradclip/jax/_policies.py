"""The policies of ``gradclip.policies`` in a compiled program: their state goes in and comes out as a
pytree."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from gradclip._measured import is_policy
from gradclip.policies._base import StatefulPolicy
from gradclip.policies._composed import WarmUp, _Composed
from gradclip.policies._scaled import AGC

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["check", "initial_state", "is_policy", "learn", "with_state"]


def check(policy: Any, rounding: str) -> None:
    """Refuse one whose state nobody sees, with parameters elsewhere, or that cannot be rounded down."""
    if hasattr(policy, "coefficients") and rounding == "down":
        raise ValueError(
            f"rounding: expected 'nearest' with a {type(policy).__name__}, which gives coefficients, got "
            f"'down'"
        )
    for _, part in _parts(policy):
        if isinstance(part, AGC):
            raise TypeError(
                f"max_norm: expected a policy of norms alone, got {part!r} (gradclip.jax.adaptive_grad_clip "
                f"takes the parameters of each update)"
            )
        if not isinstance(part, StatefulPolicy) and hasattr(part, "observe"):
            raise TypeError(
                f"max_norm: expected a policy of gradclip.policies, or one without a state, got {part!r}"
            )


def _parts(policy: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All policies that one is made of, by their places."""
    yield path, policy
    if isinstance(policy, _Composed):
        for name, part in policy._policies():
            yield from _parts(part, f"{path}/{name}")


def initial_state(policy: Any, measured: Any) -> dict[str, dict[str, Any]]:
    """The state before the first call, by the place of each policy."""
    states = {}
    for path, part, view in _with_views(policy, measured):
        if isinstance(part, WarmUp):
            states[path] = {"_seen": 0}
        elif isinstance(part, StatefulPolicy) and not isinstance(part, _Composed):
            states[path] = part._initial(view.group_norms)
    return {
        path: {name: jnp.asarray(value) for name, value in state.items()} for path, state in states.items()
    }


def _with_views(policy: Any, measured: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """As ``_parts``, with what each policy sees of what was measured."""
    yield path, policy, measured
    if isinstance(policy, _Composed):
        for name, part in policy._policies():
            view = policy.view_of(name, measured)
            if view is not None:
                yield from _with_views(part, view, f"{path}/{name}")


def with_state(policy: Any, state: Mapping[str, Mapping[str, Any]]) -> Any:
    """A copy of the policy that goes on from a state."""
    policy = copy.deepcopy(policy)
    for path, part in _parts(policy):
        for name, value in state.get(path, {}).items():
            setattr(part, name, value)
    return policy


def learn(
    policy: Any, result: SimpleNamespace, state: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The state after a clip, of the structure and types of the one before."""
    if hasattr(policy, "observe"):
        policy.observe(result)
    parts = dict(_parts(policy))
    return {
        path: {name: jnp.asarray(getattr(parts[path], name), value.dtype) for name, value in before.items()}
        for path, before in state.items()
    }
