"""Measure all integrations, or print what was measured into the page.

    python -m tools.integrations                 # measures, writes docs/frameworks.json and the page's table
    python -m tools.integrations --only offload  # one of them; the others' rows stay
    python -m tools.integrations --table         # measures nothing

A ratio compares two ways within one process, in turns, so that it means the same on any machine.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import gradclip
from gradclip._report.tables import markdown_table, number, readable_time
from tools.docs import replaced
from tools.integrations.timing import Comparison

__all__ = ["FILE", "MARKS", "PAGE", "main", "table"]

ROOT = Path(__file__).resolve().parents[2]
FILE, PAGE = ROOT / "docs/frameworks.json", ROOT / "docs/frameworks.md"
MARKS = ("<!-- ratios: python -m tools.integrations -->\n", "<!-- end of ratios -->\n")
# Each a module here with measure() -> Iterator[Comparison]; each runs in a process of its own, since Keras
# settles its backend when it is imported. Environment variables by name.
PARTS: dict[str, tuple[str, dict[str, str]]] = {
    "keras-torch": ("keras", {"KERAS_BACKEND": "torch"}),
    "keras-jax": ("keras", {"KERAS_BACKEND": "jax"}),
    "flower": ("flower", {"FLWR_TELEMETRY_ENABLED": "0"}),
    "offload": ("offload", {}),
}


def table(kept: dict[str, dict[str, object]]) -> str:
    """The table of the page, of what the file holds."""
    lines, machines = [], []
    for part in kept.values():
        machines.append(str(part["machine"]))
        for fields in part["rows"]:  # type: ignore[attr-defined]
            row = Comparison(**fields)
            times = (readable_time(statistics.median(samples)) for samples in (row.theirs, row.ours))
            lines.append([row.where, row.what, row.load, *times, f"{number(row.ratio)} x", row.note])
    header = ["in", "what", "of", "its own", "with gradclip", "ratio", "also"]
    machine = "; ".join(dict.fromkeys(machines))
    return f"\n{markdown_table(header, lines)}\n\nMedians, taken in turns; {machine}.\n\n"


def _measure(part: str) -> dict[str, object]:
    """In this process."""
    module = importlib.import_module(f"tools.integrations.{PARTS[part][0]}")
    rows = [comparison.as_dict() for comparison in module.measure()]
    from bench.machine import describe  # noqa: PLC0415

    machine = describe()
    text = f"{machine['cpu']}, {gradclip.get_num_threads()} threads"
    return {"machine": text, "rows": rows}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=list(PARTS), help="measure this one")
    parser.add_argument("--table", action="store_true", help="measure nothing: the table of what was")
    parser.add_argument("--here", choices=list(PARTS), help=argparse.SUPPRESS)  # the process of one
    options = parser.parse_args(arguments)
    if options.here:
        json.dump(_measure(options.here), sys.stdout)
        return 0
    kept = json.loads(FILE.read_text()) if FILE.exists() else {}
    parts = [] if options.table else [options.only] if options.only else PARTS
    for part in parts:
        command = [sys.executable, "-m", "tools.integrations", "--here", part]
        run = subprocess.run(
            command, env=os.environ | PARTS[part][1], cwd=ROOT, check=True, stdout=subprocess.PIPE
        )
        kept[part] = json.loads(run.stdout)
    kept = {part: kept[part] for part in PARTS if part in kept}
    FILE.write_text(json.dumps(kept, indent=1) + "\n")
    PAGE.write_text(replaced(PAGE.read_text(), MARKS, table(kept)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
