"""``python -m gradclip``: what this installation is, and what clipping is good for."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import gradclip

# What the demo imports, and what pip calls it.
DEMO_PACKAGES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "info":
        gradclip.show_config()
    elif options.command == "demo":
        return _demo(options)
    else:
        parser.print_help()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gradclip", description="Measure and clip gradients.")
    parser.add_argument("--version", action="version", version=f"gradclip {gradclip.__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="")
    commands.add_parser("info", help="print version, instruction set, threads and memory bandwidth")
    about = "train a deep network that blows up, and the same one with its gradients clipped"
    demo = commands.add_parser(
        "demo", help=about, description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    demo.add_argument("--out", type=Path, default=Path("gradclip-demo.png"), help="where the picture goes")
    demo.add_argument("--steps", type=_at_least(1), default=600, help="training steps of each run")
    demo.add_argument("--layers", type=_at_least(2), default=40, help="layers of the network")
    demo.add_argument("--seed", type=_at_least(0), default=0, help="of weights, split and batches")
    return parser


def _at_least(low: int) -> Callable[[str], int]:
    """A type for argparse: an integer with a lower bound."""

    def integer(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"expected at least {low}, got {text}")
        return value

    return integer


def _demo(options: argparse.Namespace) -> int:
    missing = [package for module, package in DEMO_PACKAGES.items() if find_spec(module) is None]
    if missing:
        command = shlex.join([sys.executable, "-m", "pip", "install", *missing])
        print(f"gradclip demo needs more packages: {command}", file=sys.stderr)
        return 2
    out: Path = options.out
    if out.is_dir() or not out.resolve().parent.is_dir():
        print(f"gradclip demo: --out: expected a file in a folder that exists, got {out}", file=sys.stderr)
        return 2
    try:
        from gradclip._demo import Settings, run_demo  # noqa: PLC0415 (needs packages that may be missing)

        run_demo(Settings(layers=options.layers, steps=options.steps, seed=options.seed), out)
    except KeyboardInterrupt:
        return 130  # what shells report of a program ended by Ctrl-C
    return 0


if __name__ == "__main__":
    sys.exit(main())
