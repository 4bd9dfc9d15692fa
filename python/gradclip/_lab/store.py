"""The rows of a laboratory on disk: one JSON object a line, and beside them what they were made with."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info  # type: ignore[import-untyped]

from gradclip._lab.data import fingerprint
from gradclip._lab.experiment import Settings

__all__ = ["LabError", "Store"]

FORMAT = 1
ROOM = 50e6  # bytes: ten times what all runs need


class LabError(Exception):
    """Something that the user has to know and can change; its text is all there is to say."""


class Store:
    """A folder with ``rows.jsonl`` and ``about.json``. Opening it checks both and changes nothing.

    Args:
        folder: It need not exist.

    Attributes:
        rows: What is there.
        cut_off: Whether the last line is half-written, by a run that was killed; :meth:`begin` removes it.

    Raises:
        LabError: The rows are of another version or of other data, or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path, self._about = folder / "rows.jsonl", folder / "about.json"
        self.rows: list[dict[str, Any]] = []
        self._in_detail: dict[Settings, bool] = {}
        self.about = {
            "format": FORMAT,
            "data": fingerprint(),
            "gradclip": version("gradclip"),
            "numpy": np.__version__,
            "blas": _blas(),
        }
        if not self._path.exists():
            self.cut_off = False
            return
        self._check_about()
        text = self._path.read_bytes()
        self.cut_off = not text.endswith(b"\n") and bool(text)
        lines = text.split(b"\n")
        self._whole = len(text) - len(lines[-1])
        self.rows = [self._row(i, line) for i, line in enumerate(lines[:-1], start=1)]

    def _check_about(self) -> None:
        try:
            found = json.loads(self._about.read_text(encoding="utf-8"))
            kind, data = found["format"], found["data"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LabError(
                f"{self._about}: expected what {self._path.name} was made with, got {error!r}"
            ) from None
        for what, expected, got in (("format", FORMAT, kind), ("data", self.about["data"], data)):
            if got != expected:
                raise LabError(
                    f"{self._about}: expected rows of {what} {expected}, got {got}, of gradclip "
                    f"{found.get('gradclip')}: choose another folder by --out; nothing was changed"
                )
        self.about = found

    def _row(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            row: dict[str, Any] = json.loads(line)
            self._remember(row)
        except (ValueError, KeyError, TypeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else error
            raise LabError(
                f"{self._path}, line {number}: expected the row of a run, got {what}: the file is damaged; "
                "remove the line, or choose another folder by --out; nothing was changed"
            ) from None
        return row

    def has(self, settings: Settings) -> bool:
        """Whether there is a row of these settings, in as much detail."""
        known = self._in_detail.get(settings)
        return known is not None and (known or not settings.in_detail)

    def begin(self) -> None:
        """Make the folder ready for new rows.

        Raises:
            LabError: It cannot be written, or the disk is nearly full.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
            if free < ROOM:
                raise LabError(
                    f"{self.folder}: expected {ROOM / 1e6:.0f} MB of free space, got {free / 1e6:.0f} MB"
                )
            with self._path.open("r+b" if self._path.exists() else "wb") as file:
                if self.cut_off:
                    file.truncate(self._whole)
            if not self.rows:
                self._about.write_text(json.dumps(self.about, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise LabError(
                f"{self.folder}: expected a folder that can be written, got {error.strerror}"
            ) from None

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; it is on the disk when this returns.

        Raises:
            LabError: It cannot be written; what was there before is still there.
        """
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        try:
            with self._path.open("ab", buffering=0) as file:
                end = file.tell()
                try:
                    while line:
                        line = line[file.write(line) :]
                except OSError:
                    with suppress(OSError):  # or half a row would stand before the next
                        os.truncate(self._path, end)
                    raise
        except OSError as error:
            raise LabError(
                f"{self._path}: {error.strerror}; the {len(self.rows)} rows before are kept"
            ) from None
        self.rows.append(row)
        self._remember(row)

    def _remember(self, row: dict[str, Any]) -> None:
        self._in_detail[Settings(**{name: row[name] for name in Settings.names()})] = "losses" in row


def _blas() -> str:
    """Whose products of matrices these are: where they round otherwise, so do the figures."""
    pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    return ", ".join(
        sorted({f"{pool['internal_api']} {pool.get('architecture', '')}".strip() for pool in pools})
    )
