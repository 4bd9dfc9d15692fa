"""What is public: names, signatures, as text. ``python tests/public_api.py`` writes public_api.txt anew."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODULES = (
    "gradclip",
    "gradclip.distributed",
    "gradclip.flower",
    "gradclip.flower.compat",
    "gradclip.jax",
    "gradclip.keras",
    "gradclip.monitor",
    "gradclip.policies",
    "gradclip.torch",
)
LIST = Path(__file__).with_suffix(".txt")


def lines() -> Iterator[str]:
    """A line for each public name and each public member of a class, in alphabetical order."""
    for name in MODULES:
        module = importlib.import_module(name)
        for public in sorted(module.__all__):
            thing = getattr(module, public)
            yield f"{name}.{public}{_parameters(thing)}"
            if inspect.isclass(thing):
                yield from (f"{name}.{public}.{member}" for member in _members(thing))


def _members(kind: type) -> list[str]:
    """Of the class and those that it has them from, as far as they are ours."""
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.startswith("gradclip"):
            found.update(vars(base))
            found.update(dict.fromkeys(vars(base).get("__annotations__", {}), None))
    return [
        name + (_parameters(member) if inspect.isroutine(member) else "")
        for name, member in sorted(found.items())
        if not name.startswith("_")
    ]


def _parameters(thing: Any) -> str:
    """Names, kinds and defaults; types are in the code alone, where they are checked."""
    if isinstance(thing, (staticmethod, classmethod)):
        thing = thing.__func__
    if not callable(thing) or (inspect.isclass(thing) and not _made_by_us(thing)):
        return ""
    try:
        signature = inspect.signature(thing)
    except (TypeError, ValueError):
        return "(...)"  # compiled
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def _made_by_us(kind: type) -> bool:
    """Whether the parameters that make one are ours, not those of a framework that may change them."""
    makers = [base for base in kind.__mro__ if {"__init__", "__new__"} & vars(base).keys()]
    return makers[0].__module__.startswith("gradclip")


if __name__ == "__main__":
    LIST.write_text("\n".join(lines()) + "\n")
