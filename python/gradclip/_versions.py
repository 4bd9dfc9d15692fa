"""Versions of frameworks that gradclip was tried with."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from gradclip._result import warn_caller

__all__ = ["warn_if_untried"]

_warned: set[str] = set()


def warn_if_untried(package: str, tried: Sequence[str]) -> None:
    """Warn the caller of gradclip, once, of a version that the integration with a package was not tried with.

    Args:
        package: As it is installed: ``"keras"``.
        tried: The beginnings of versions: ``"3.15"`` is 3.15, 3.15.1 and so on, not 3.150.

    Warns:
        UserWarning: The installed version is none of them.
    """
    installed = version(package)
    if package in _warned or any(f"{installed}.".startswith(f"{each}.") for each in tried):
        return
    _warned.add(package)
    warn_caller(f"{package}: expected {' or '.join(tried)}, which gradclip was tried with, got {installed}")
