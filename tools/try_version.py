"""Run the tests of gradclip.torch or gradclip.jax under a version of the framework, in a fresh virtual
environment.

    python tools/try_version.py torch 2.11.0                      # or 2.15, or: newest
    python tools/try_version.py jax 0.9.0 -- -x -k shard          # what follows goes to pytest

Installs what the tests need but the framework (``gradclip[test]`` holds that to one version); PyTorch may
take gigabytes of CUDA packages. The environment lies in ``build/`` and is removed afterwards, unless
``--keep``.
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


# By the name of its package: the patterns of its tests.
FRAMEWORKS = {
    "torch": ["tests/test_torch_*.py", "tests/test_field_torch.py"],
    "jax": ["tests/test_jax*.py"],
}


def requirements(framework: str) -> list[str]:
    """What the tests need beside gradclip and the framework."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = [*extras["test"], *extras["bench"], *extras["demo"]]
    names = ("gradclip", f"{framework}=", f"{framework}>")
    return [line for line in wanted if not line.startswith(names)]


def tests(framework: str) -> list[str]:
    return [str(path) for pattern in FRAMEWORKS[framework] for path in sorted(ROOT.glob(pattern))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("framework", choices=FRAMEWORKS)
    parser.add_argument("version", help='of the framework; "newest" is what pip would take')
    parser.add_argument("--keep", action="store_true", help="leave the environment in build/")
    parser.add_argument("arguments", nargs="*", metavar="pytest argument")
    arguments = parser.parse_args()
    framework = arguments.framework
    environment = ROOT / "build" / f"{framework}-{arguments.version}"
    version = "" if arguments.version == "newest" else f"=={arguments.version}"
    python = str(environment / "bin" / "python")
    emulated = "--config-settings=cmake.define.GRADCLIP_EMULATED=ON"
    try:
        venv.create(environment, clear=True, with_pip=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run(
            [*install, emulated, ".", framework + version, *requirements(framework)], cwd=ROOT, check=True
        )
        print_version = f"import {framework}; print({framework}.__version__)"
        subprocess.run([python, "-c", print_version], check=True)
        pytest = [python, "-m", "pytest", "-q", *tests(framework), *arguments.arguments]
        return subprocess.run(pytest, cwd=ROOT, check=False).returncode
    finally:
        if not arguments.keep:
            shutil.rmtree(environment, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
