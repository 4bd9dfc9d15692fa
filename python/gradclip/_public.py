"""What is public says so: ``gradclip.policies.AGC``, in tracebacks and pickles, wherever its code lies."""

from __future__ import annotations

import inspect
import sys


def claim(package: str) -> None:
    """Make the classes that a package exports its own, unless another public module has them."""
    names = vars(sys.modules[package])
    loaded = [names[name] for name in names["__all__"] if name in names]
    for thing in loaded:
        if inspect.isclass(thing) and thing.__module__.startswith("gradclip.") and "._" in thing.__module__:
            thing.__module__ = package
