"""Fixtures of the whole suite: every test leaves threads and instruction set as it found them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

import gradclip
from gradclip import _core

# The suite gives the same answer twice; `pytest --hypothesis-profile=explore` looks further.
settings.register_profile("suite", max_examples=150, deadline=None, derandomize=True, database=None)
settings.register_profile("explore", max_examples=3000, deadline=None, database=None, print_blob=True)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _settings_restored() -> Iterator[None]:
    threads, isa = gradclip.get_num_threads(), _core.get_isa()
    yield
    gradclip.set_num_threads(threads)
    _core.set_isa(isa)
