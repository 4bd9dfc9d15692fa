"""Every example in a docstring runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import gradclip

_FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
# Where the code is; the compiled module and the command lines have no examples.
_MODULES = ["gradclip"] + [
    f"gradclip.{module.name}"
    for module in pkgutil.iter_modules(gradclip.__path__)
    if not module.ispkg and module.name not in ("_core", "__main__")
]
_PUBLIC = sorted(name for name in gradclip.__all__ if callable(getattr(gradclip, name)))


@pytest.mark.parametrize("module", _MODULES)
def test_examples(module: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(module), optionflags=_FLAGS)
    assert failed == 0


def test_examples_are_found() -> None:
    finder = doctest.DocTestFinder()
    found = [test for module in _MODULES for test in finder.find(importlib.import_module(module))]
    assert sum(len(test.examples) for test in found) > 30


@pytest.mark.parametrize("name", _PUBLIC)
def test_everything_public_has_a_docstring(name: str) -> None:
    thing = getattr(gradclip, name)
    text = inspect.getdoc(thing)
    assert text
    assert text[0].isupper()
    parameters = [] if inspect.isclass(thing) else list(inspect.signature(thing).parameters)
    for parameter in parameters:
        assert f"{parameter}:" in text, f"{name} does not describe {parameter}"
