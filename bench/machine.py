"""What a figure was measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import gradclip
from gradclip import _core
from gradclip._config import measured_bandwidth

__all__ = ["describe"]

_PACKAGES = ("numpy", "torch", "jax", "jaxlib", "optax", "numba", "ml_dtypes")
_ROOT = Path(__file__).resolve().parent.parent


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _cpu_model() -> str:
    """The model with its family and number, which virtual machines tell where they hide the name."""
    fields: dict[str, str] = {}
    for line in _read("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']}, model {fields.get('model', '?')})"
    return name


def _caches() -> list[str]:
    """Such as "L2 1024K, shared by processors 0"."""
    caches = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind = _read(f"{index}/type")
        if kind == "Instruction":
            continue
        letter = "d" if kind == "Data" else ""
        shared = _read(f"{index}/shared_cpu_list")
        caches.append(f"L{_read(f'{index}/level')}{letter} {_read(f'{index}/size')}, processors {shared}")
    return caches


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(_ROOT), *arguments]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def describe() -> dict[str, Any]:
    """Machine, versions, threads, date and commit. Measures the memory's bandwidth."""
    read, read_write = measured_bandwidth()
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "cpu": _cpu_model(),
        "processors": os.cpu_count(),
        "caches": _caches(),
        "memory_gb": round(_memory_bytes() / 1e9, 1),
        "isa": _core.get_isa(),
        "isas": list(_core.supported_isas()),
        "threads": gradclip.get_num_threads(),
        "read_gb_per_s": round(read / 1e9, 2),
        "read_write_gb_per_s": round(read_write / 1e9, 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {"gradclip": gradclip.__version__}
        | {package: _version(package) for package in _PACKAGES},
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
    }
