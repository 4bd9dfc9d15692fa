"""How the monitor does: warnings before explosions, and false alarms in quiet trainings.

    python -m tools.monitor docs/monitor.md    # puts the tables there, and the picture beside them

The trainings are those of tests/blow_ups.py, with other seeds than its limits were chosen by.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from statistics import median

import matplotlib as mpl

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from blow_ups import BLOW_UPS, QUIET, judge, transformer
from gradclip._report.style import STYLE
from gradclip._report.tables import markdown_table
from gradclip.monitor import GradientMonitor

__all__ = ["PICTURE", "main", "tables"]

PICTURE = "images/monitor.png"
SEEDS = range(100, 110)
QUIET_STEPS = 1000
_BEGIN, _END = "<!-- run: python -m tools.monitor -->\n", "<!-- end of run -->\n"


def tables() -> str:
    """Both, in Markdown."""
    rows = []
    for name, training in BLOW_UPS.items():
        verdicts = [judge(training(seed), 600) for seed in SEEDS]
        broken = [verdict for verdict in verdicts if verdict.broke]
        ahead = [verdict.ahead for verdict in broken if verdict.ahead]
        rows.append([
            name, f"{len(broken)} of {len(verdicts)}", f"{median(v.steps for v in broken):g}",
            f"{len(ahead)} of {len(broken)}", f"{min(ahead)} / {median(ahead):g}",
        ])  # fmt: skip
    head = ["", "broke", "at step", "warned before", "steps ahead, least / median"]
    quiet_rows, steps, alarms = [], 0, 0
    for name, training in QUIET.items():
        verdicts = [judge(training(seed), QUIET_STEPS) for seed in SEEDS[:3]]
        false = [alert.kind for verdict in verdicts for alert in verdict.warnings]
        steps, alarms = steps + sum(v.steps for v in verdicts), alarms + len(false)
        quiet_rows.append([name, str(sum(v.steps for v in verdicts)), ", ".join(false) or "none"])
    quiet_rows.append(["together", str(steps), f"{alarms}: {1000 * alarms / steps:.2g} in 1000 steps"])
    quiet = markdown_table(["quiet trainings", "steps", "false alarms"], quiet_rows)
    return f"{markdown_table(head, rows)}\n\n{quiet}\n"


def save_picture(path: Path) -> None:
    """Of a transformer that breaks."""
    monitor = GradientMonitor(clips=False)
    for loss, result in transformer(SEEDS[0], 1.0, math.inf):
        monitor.update(result, loss)
        if not math.isfinite(loss):
            break
    with mpl.rc_context(STYLE):
        monitor.plot().savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", type=Path, help="the page that gets the tables, between its markers")
    page: Path = parser.parse_args(arguments).page
    save_picture(page.parent / PICTURE)
    before, rest = page.read_text().split(_BEGIN)
    page.write_text(before + _BEGIN + tables() + _END + rest.split(_END)[1])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
