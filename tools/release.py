"""``python -m tools.release``: the checklist of a release, carried out; a line for what holds, or does not.

    python -m tools.release [--only CHECK ...] [--write-page]

It builds the source archive and from it wheels for the oldest and the newest Python at hand, repairs these
with auditwheel, tries them where there is nothing but NumPy (the oldest that is supported, and the newest),
and asks the tools that look at packages. These come by ``pip install --group release``, in an environment of
its own: some are at odds with what the tests need. ``--write-page`` writes docs/package.md, README.md as an
index of packages can show it. Nothing is uploaded and nothing is tagged: that is for the person who has read
this.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings there


ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build/release"
PAGE = ROOT / "docs/package.md"
NOT_ARCHIVED = ("docs/images/bench/", "docs/images/lab/")  # pictures, which no test reads
MOST_BYTES = 10 << 20  # of a wheel
# Python, and the NumPy that a wheel for it is tried with: the oldest that is supported, and the newest.
BARE = {"3.10": "numpy==1.24.*", "3.11": "numpy", "3.12": "numpy", "3.13": "numpy", "3.14": "numpy"}
# What pyroma asks for that only an address can answer: 8 of its 10 points.
PYROMA = "8"


class CheckFailed(Exception):
    """A line of the checklist that does not hold."""


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """What a command says; what it said is the error if it fails."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    if done.returncode != 0:
        raise CheckFailed(
            f"{' '.join(map(str, command))}: exit status {done.returncode}\n{said.strip()[-3000:]}"
        )
    return said


def project() -> dict[str, object]:
    """The table ``[project]``."""
    table: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def package_page(readme: str) -> str:
    """README.md without what leads nowhere outside of a repository: relative links and pictures."""
    page = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n*", "", readme)
    page = re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", page)
    return re.sub(r"<!--.*?-->\n*", "", page, flags=re.S)


def newest_heading() -> str:
    """The changelog's first heading of a version."""
    found = re.search(r"^## .*$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    if found is None:
        raise CheckFailed("CHANGELOG.md: expected a heading of a version")
    return found[0]


def check_versions() -> str:
    """One version everywhere, and the changelog begins with it."""
    version = project()["version"]
    places = {
        "python/gradclip/__init__.py": rf'^__version__ = "{version}"$',
        "CITATION.cff": rf"^version: {version}$",
    }
    for place, pattern in places.items():
        if not re.search(pattern, (ROOT / place).read_text(), re.M):
            raise CheckFailed(f"{place}: expected version {version} of pyproject.toml")
    if not newest_heading().startswith(f"## [{version}]"):
        raise CheckFailed(f"CHANGELOG.md: expected version {version} of pyproject.toml first")
    return str(version)


def check_page() -> str:
    """docs/package.md is README.md, and no link of it is dead."""
    if PAGE.read_text() != package_page((ROOT / "README.md").read_text()):
        raise CheckFailed("docs/package.md: expected README.md's text: python -m tools.release --write-page")
    return "no relative links"


def check_address() -> str:
    """The project says where it lives."""
    if "urls" not in project():
        raise CheckFailed("pyproject.toml: [project.urls] is to fill in")
    return "filled in"


def check_dated() -> str:
    """The changelog says when."""
    heading = newest_heading()
    if not re.search(r"- \d{4}-\d\d-\d\d$", heading):
        raise CheckFailed(f"CHANGELOG.md: expected a date, got {heading!r}")
    return heading


def check_tree() -> str:
    """What is released is what is committed."""
    if changed := run("git", "status", "--porcelain").strip():
        raise CheckFailed(f"uncommitted:\n{changed}")
    return run("git", "rev-parse", "--short", "HEAD").strip()


def check_metadata() -> str:
    """What tools say of the project's files."""
    run("validate-pyproject", "pyproject.toml")
    run("pyroma", "-n", PYROMA, ".")
    run("sp-repo-review", ".")
    return f"validate-pyproject, pyroma (at least {PYROMA}), sp-repo-review"


def check_archive() -> str:
    """The source archive has every file of the repository but pictures."""
    shutil.rmtree(OUT, ignore_errors=True)
    run("pyproject-build", "--sdist", "--outdir", OUT, ".")
    archive = _archive()
    run("twine", "check", "--strict", archive)
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
        tar.extractall(OUT, filter="data")
    wanted = [name for name in run("git", "ls-files").splitlines() if not name.startswith(NOT_ARCHIVED)]
    if lacking := [name for name in wanted if name not in names]:
        raise CheckFailed(f"{archive.name}: lacks {lacking}")
    return f"{archive.name}, {archive.stat().st_size >> 10} KB, {len(wanted)} files"


def check_wheels() -> str:
    """From the archive: wheels, repaired, installed where there is nothing else, and tried."""
    source = OUT / _archive().name.removesuffix(".tar.gz")
    tried = []
    for version, python in _pythons():
        built, wheels = OUT / f"built-{version}", OUT / "wheels"
        run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", built, source)
        run("auditwheel", "repair", "--wheel-dir", wheels, *built.glob("*.whl"))
        wheel = next(wheels.glob(f"*-cp{version.replace('.', '')}-*.whl"))
        run("twine", "check", "--strict", wheel)
        run("check-wheel-contents", wheel)
        if wheel.stat().st_size > MOST_BYTES:
            raise CheckFailed(
                f"{wheel.name}: expected at most {MOST_BYTES >> 20} MB, got {wheel.stat().st_size}"
            )
        bare = OUT / f"bare-{version}"
        run(python, "-m", "venv", bare)
        run(bare / "bin/pip", "install", "--quiet", "--only-binary", ":all:", wheel, BARE[version])
        said = run(bare / "bin/python", ROOT / ".ci/smoke.py", cwd=OUT).strip()
        tried.append(f"{wheel.name}, {wheel.stat().st_size >> 10} KB: {said}")
    if not tried:
        raise CheckFailed(f"expected a Python of {list(BARE)}")
    return "\n  ".join(tried)


def _archive() -> Path:
    found = list(OUT.glob("*.tar.gz"))
    if len(found) != 1:
        raise CheckFailed("expected the source archive in build/release: the check 'archive' makes it")
    return found[0]


def _pythons() -> Iterator[tuple[str, str]]:
    """The oldest and the newest at hand, with their versions."""
    found = []
    for version in BARE:
        inside = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
        python = str(inside[-1]) if inside else shutil.which(f"python{version}")
        if python:
            found.append((version, python))
    yield from dict.fromkeys((found[0], found[-1])) if found else ()


# In order. The first five are for every commit (CI makes them), the others for the one that is released.
CHECKS: dict[str, Callable[[], str]] = {
    "versions": check_versions,
    "page": check_page,
    "metadata": check_metadata,
    "archive": check_archive,
    "wheels": check_wheels,
    "tree": check_tree,
    "address": check_address,
    "dated": check_dated,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.release", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=CHECKS, help="the checks to make")
    parser.add_argument("--write-page", action="store_true", help="write docs/package.md")
    chosen = parser.parse_args(arguments)
    if chosen.write_page:
        PAGE.write_text(package_page((ROOT / "README.md").read_text()))
        return 0
    failed = 0
    for name in chosen.only:
        try:
            print(f"[x] {name}: {CHECKS[name]()}", flush=True)
        except CheckFailed as error:
            failed += 1
            print(f"[ ] {name}: {error}", flush=True)
    if failed == 0 and set(chosen.only) == set(CHECKS):
        print("Ready: tag it, and let the workflow of wheels build what is uploaded.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
