"""Run the tests of gradclip.torch under a version of PyTorch, in a fresh virtual environment.

    python tools/try_torch.py 2.11.0                      # or 2.15, or: newest
    python tools/try_torch.py 2.11.0 -- -x -k install     # what follows goes to pytest

Installs what the tests need but PyTorch (``gradclip[test]`` holds that to one version), which may take
gigabytes of CUDA packages. The environment lies in ``build/`` and is removed afterwards, unless ``--keep``.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parent.parent


def requirements() -> list[str]:
    """What the tests need beside gradclip and PyTorch."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = [*extras["test"], *extras["bench"], *extras["demo"]]
    return [line for line in wanted if not line.startswith(("gradclip", "torch="))]


def tests() -> list[str]:
    return [str(path) for path in sorted(ROOT.glob("tests/test_torch_*.py"))] + ["tests/test_field_torch.py"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("version", help='of PyTorch; "newest" is what pip would take')
    parser.add_argument("--keep", action="store_true", help="leave the environment in build/")
    parser.add_argument("arguments", nargs="*", metavar="pytest argument")
    arguments = parser.parse_args()
    environment = ROOT / "build" / f"torch-{arguments.version}"
    torch = "torch" if arguments.version == "newest" else f"torch=={arguments.version}"
    python = str(environment / "bin" / "python")
    emulated = "--config-settings=cmake.define.GRADCLIP_EMULATED=ON"
    try:
        venv.create(environment, clear=True, with_pip=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, emulated, ".", torch, *requirements()], cwd=ROOT, check=True)
        subprocess.run([python, "-c", "import torch; print('PyTorch', torch.__version__)"], check=True)
        pytest = [python, "-m", "pytest", "-q", *tests(), *arguments.arguments]
        return subprocess.run(pytest, cwd=ROOT, check=False).returncode
    finally:
        if not arguments.keep:
            shutil.rmtree(environment, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
