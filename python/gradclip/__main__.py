"""``python -m gradclip``: what this installation is, and what clipping is good for."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import gradclip

# What the commands import, and what pip calls it.
DEMO_PACKAGES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}
LAB_PACKAGES = DEMO_PACKAGES | {"jinja2": "jinja2", "pandas": "pandas"}
# What Matplotlib writes without help from other programs, and that opens in a viewer.
PICTURES = ("png", "pdf", "svg", "eps", "jpg", "jpeg", "tif", "tiff", "webp")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "info":
        gradclip.show_config(measure=options.measure)
    elif options.command == "demo":
        return _demo(options)
    elif options.command == "lab":
        return _lab(options)
    else:
        parser.print_help()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gradclip", description="Measure and clip gradients.")
    parser.add_argument("--version", action="version", version=f"gradclip {gradclip.__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="command")
    about = "print versions, instruction set, threads and GPUs"
    info = commands.add_parser("info", help=about, description=about)
    info.add_argument("--measure", action="store_true", help="also this machine's memory bandwidth")
    about = "train a deep network that blows up, and the same one with its gradients clipped"
    demo = commands.add_parser(
        "demo", help=about, description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("gradclip-demo.png"),
        help=f"where the picture goes; its suffix is the format, one of {', '.join(PICTURES)}",
    )
    demo.add_argument("--steps", type=_at_least(1), default=600, help="training steps of each run")
    demo.add_argument("--layers", type=_at_least(2), default=40, help="layers of the network")
    demo.add_argument("--seed", type=_at_least(0), default=0, help="of weights, split and batches")
    about = "put every remedy for exploding gradients to the test, and write a report"
    lab = commands.add_parser(
        "lab", help=about, description=f"{about}. The same command goes on where it was interrupted."
    )
    lab.add_argument(
        "--quick", action="store_true", help="one seed and fewer points: two minutes, not twenty"
    )
    lab.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="QUESTION",
        help="a question of the report; can be repeated",
    )
    lab.add_argument(
        "--where", action="append", default=[], metavar="AXIS=VALUE", type=_axis_and_value,
        help="only runs that have this value, such as activation=tanh; repeated: one of these",
    )  # fmt: skip
    lab.add_argument(
        "--out", type=Path, default=Path("gradclip-lab"), help="folder of rows and report (%(default)s)"
    )
    lab.add_argument(
        "--report", action="store_true", help="run nothing: the report of the rows that are there"
    )
    return parser


def _by_axis(pairs: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """The values that were given for each axis."""
    found: dict[str, list[str]] = {}
    for axis, value in pairs:
        found.setdefault(axis, []).append(value)
    return found


def _axis_and_value(text: str) -> tuple[str, str]:
    """A type for argparse."""
    axis, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected AXIS=VALUE, got {text!r}")
    return axis, value


def _at_least(low: int) -> Callable[[str], int]:
    """A type for argparse: an integer with a lower bound."""

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {low}, got {text!r}")
        return value

    return integer


def _demo(options: argparse.Namespace) -> int:
    complaint = _missing(DEMO_PACKAGES) or _unwritable(options.out)
    if complaint:
        print(f"gradclip demo {complaint}", file=sys.stderr)
        return 2
    try:
        # Importing them takes seconds where their files are not in memory yet.
        print(f"Loading {', '.join(DEMO_PACKAGES.values())} ...", flush=True)
        from gradclip._lab.demo import DemoSettings, run_demo  # noqa: PLC0415 (may be missing)

        run_demo(DemoSettings(layers=options.layers, steps=options.steps, seed=options.seed), options.out)
    except KeyboardInterrupt:
        return 130  # what shells report of a program ended by Ctrl-C
    except OSError as error:
        print(f"gradclip demo: {error}", file=sys.stderr)
        return 1
    return 0


def _lab(options: argparse.Namespace) -> int:
    complaint = _missing(LAB_PACKAGES)
    if complaint:
        print(f"gradclip lab {complaint}", file=sys.stderr)
        return 2
    try:
        print(f"Loading {', '.join(LAB_PACKAGES.values())} ...", flush=True)
        from gradclip._lab.command import LabError, run_lab  # noqa: PLC0415 (may be missing)
    except KeyboardInterrupt:
        return 130
    try:
        run_lab(
            options.out,
            only=options.only,
            where=_by_axis(options.where),
            quick=options.quick,
            report_only=options.report,
        )
    except LabError as error:
        print(f"gradclip lab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _missing(packages: dict[str, str]) -> str:
    """What to say of packages that are not installed, with the command that installs them.

    Args:
        packages: By the module that is imported, what pip calls it.

    Returns:
        Nothing, if all are there.
    """
    missing = [package for module, package in packages.items() if find_spec(module) is None]
    if not missing:
        return ""
    return f"needs more packages: {shlex.join([sys.executable, '-m', 'pip', 'install', *missing])}"


def _unwritable(out: Path) -> str:
    """Why no picture can be written there; nothing, if one can. Leaves no file behind."""
    if out.suffix[1:].lower() not in PICTURES:
        return f"--out: expected a name with one of the suffixes {', '.join(PICTURES)}, got {out}"
    try:
        if out.is_dir() or not out.resolve().parent.is_dir():
            return f"--out: expected a file in a folder that exists, got {out}"
        existed = out.exists()
        out.open("ab").close()
        if not existed:
            out.resolve().unlink()
    except OSError as error:
        return f"--out: expected a file that can be written, got {out} ({error.strerror})"
    return ""


if __name__ == "__main__":
    sys.exit(main())
