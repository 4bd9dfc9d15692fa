"""Every example in a docstring runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from pathlib import Path
from typing import Any

import pytest

import gradclip
import gradclip.flower
import gradclip.flower.compat
import gradclip.jax
import gradclip.keras
import gradclip.monitor
import gradclip.policies
import gradclip.torch

_PACKAGES = (
    gradclip, gradclip.flower, gradclip.jax, gradclip.keras, gradclip.monitor, gradclip.policies,
    gradclip.torch,
)  # fmt: skip
_FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
_DOCS = Path(__file__).resolve().parent.parent / "docs"
# Where the code is; the compiled module and the command lines have no examples.
_MODULES = [
    package.__name__ + "." + module.name
    for package in _PACKAGES
    for module in pkgutil.iter_modules(package.__path__)
    if not module.ispkg and not module.name.startswith(("_core", "_cuda", "__main__"))
] + ["gradclip.flower", "gradclip.monitor", "gradclip.policies"]
_PUBLIC = [
    pytest.param(getattr(package, name), id=f"{package.__name__}.{name}")
    for package in (*_PACKAGES, gradclip.flower.compat)
    for name in sorted(package.__all__)
    if callable(getattr(package, name))
]


@pytest.mark.parametrize("module", _MODULES)
def test_examples(module: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(module), optionflags=_FLAGS)
    assert failed == 0


@pytest.mark.parametrize("thing", [param for param in _PUBLIC if inspect.isclass(param.values[0])])
def test_examples_of_classes(thing: type) -> None:
    """Which are not those of the modules that hold their code (gradclip/_public.py)."""
    runner = doctest.DocTestRunner(optionflags=_FLAGS)
    for test in doctest.DocTestFinder().find(thing, thing.__name__, module=False, globs={}):
        assert runner.run(test).failed == 0


@pytest.mark.parametrize(
    "page", ["start.md", "cookbook.md", "jax.md", "torch.md", "policies.md", "monitor.md"]
)
def test_examples_of_the_documentation(page: str) -> None:
    failed, attempted = doctest.testfile(str(_DOCS / page), module_relative=False, optionflags=_FLAGS)
    assert failed == 0
    assert attempted > 0


def test_examples_are_found() -> None:
    finder = doctest.DocTestFinder()
    found = [test for module in _MODULES for test in finder.find(importlib.import_module(module))]
    assert sum(len(test.examples) for test in found) > 30


@pytest.mark.parametrize("thing", _PUBLIC)
def test_everything_public_has_a_docstring(thing: Any) -> None:
    text = inspect.getdoc(thing)
    assert text
    assert text[0].isupper()
    parameters = [] if inspect.isclass(thing) else list(inspect.signature(thing).parameters)
    for parameter in parameters:
        assert f"{parameter}:" in text, f"{thing.__name__} does not describe {parameter}"
