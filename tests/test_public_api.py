"""What is public is listed in public_api.txt: nothing is renamed, lost or added without a line there."""

from __future__ import annotations

import importlib
import inspect

import pytest

import public_api


def test_names_and_signatures_are_those_of_the_list() -> None:
    listed = public_api.LIST.read_text().splitlines()
    found = list(public_api.lines())
    assert [line for line in listed if line not in found] == []
    assert [line for line in found if line not in listed] == []


@pytest.mark.parametrize("module", public_api.MODULES)
def test_no_class_shows_a_private_module(module: str) -> None:
    package = importlib.import_module(module)
    classes = [getattr(package, name) for name in package.__all__]
    assert [kind for kind in classes if inspect.isclass(kind) and "._" in kind.__module__] == []
