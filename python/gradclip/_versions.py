"""Which versions of a framework were tried."""

from __future__ import annotations

import importlib.metadata
import sys
import warnings
from collections.abc import Sequence

__all__ = ["warn_if_untried"]

_warned: set[str] = set()


def warn_if_untried(package: str, tried: Sequence[str]) -> None:
    """Warn, once for a package, that its installed version is none of those that gradclip was tried with.

    Args:
        package: As its index has it: ``"flwr"``.
        tried: Beginnings of versions: ``"1.42"`` stands for 1.42.0 and 1.42.1, not for 1.420.

    Warns:
        UserWarning: The version is another one.
    """
    version = importlib.metadata.version(package)
    if package in _warned or any(version == known or version.startswith(f"{known}.") for known in tried):
        return
    _warned.add(package)
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_inside(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(
        f"{package} {version}: gradclip was tried with {', '.join(tried)}; what it uses may have changed in "
        "another version",
        stacklevel=level,
    )


def _is_inside(module: str) -> bool:
    # An integration warns when it is imported.
    return module.partition(".")[0] in ("gradclip", "importlib")
