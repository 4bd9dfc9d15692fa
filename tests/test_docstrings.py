"""Every example in a docstring runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import inspect

import pytest

import gradclip

_FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
_PUBLIC = sorted(name for name in gradclip.__all__ if callable(getattr(gradclip, name)))


@pytest.mark.parametrize("module", ["gradclip", "gradclip._api", "gradclip._result"])
def test_examples(module: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(module), optionflags=_FLAGS)
    assert failed == 0


def test_examples_are_found() -> None:
    assert doctest.testmod(importlib.import_module("gradclip._api"), optionflags=_FLAGS).attempted > 20


@pytest.mark.parametrize("name", _PUBLIC)
def test_everything_public_has_a_docstring(name: str) -> None:
    thing = getattr(gradclip, name)
    text = inspect.getdoc(thing)
    assert text
    assert text[0].isupper()
    parameters = [] if inspect.isclass(thing) else list(inspect.signature(thing).parameters)
    for parameter in parameters:
        assert f"{parameter}:" in text, f"{name} does not describe {parameter}"
