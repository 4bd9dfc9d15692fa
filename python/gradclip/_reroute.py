"""Functions of a framework replaced by gradclip's, in this process, and counts of what went where."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

__all__ = ["Reroute", "Stats"]


@dataclass(frozen=True)
class Stats:
    """How many calls of a framework's functions went where, since the reroute was installed.

    Attributes:
        taken: Calls that gradclip did, by function (of Keras: by option).
        passed_on: Calls that the framework did itself, in the same way.
        reasons: What was in them that gradclip does not support, and how often.
    """

    taken: Counter[str] = field(default_factory=Counter)
    passed_on: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)


class Reroute:
    """Whether functions are replaced: for the process, or as long as ``with`` blocks of its threads last."""

    def __init__(self) -> None:
        self.stats = Stats()
        self._undo: list[Callable[[], None]] = []  # while ours are installed
        self._lock = threading.RLock()
        self._blocks: list[object] = []  # of patched(), that hold the reroute, of any thread

    @property
    def is_installed(self) -> bool:
        return bool(self._undo)

    def install(self, replace: Callable[[], list[Callable[[], None]]]) -> None:
        """Replace functions, unless they are. ``replace`` returns what undoes it, or raises first."""
        with self._lock:
            if self._undo:
                return
            for counter in (self.stats.taken, self.stats.passed_on, self.stats.reasons):
                counter.clear()
            self._undo.extend(replace())

    def uninstall(self) -> None:
        with self._lock:
            while self._undo:
                self._undo.pop()()

    @contextmanager
    def patched(self, replace: Callable[[], list[Callable[[], None]]]) -> Iterator[Stats]:
        block = object()
        with self._lock:
            if self._blocks or not self._undo:
                self.install(replace)
                self._blocks.append(block)
        try:
            yield self.stats
        finally:
            with self._lock:
                if block in self._blocks:
                    self._blocks.remove(block)
                    if not self._blocks:
                        self.uninstall()
