"""Fixtures of the whole suite: every test leaves threads and instruction set as it found them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

import gradclip
from gradclip import _core
from gradclip._dispatch import why_no_gpu

if TYPE_CHECKING:
    from device import Device

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network; read when transformers is imported
os.environ["KERAS_BACKEND"] = "torch"  # in the tests' own process; read when keras is imported
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # nor tells it anything; read when flwr is imported

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped where there is none, and say what is missing."""
    missing = why_no_gpu()
    for item in items:
        if missing and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"no GPU: {missing}"))


@pytest.fixture
def x64() -> Iterator[None]:
    """JAX with its 64-bit types."""
    import jax  # noqa: PLC0415 (only here)

    with jax.enable_x64(True):
        yield


@pytest.fixture(params=["emulated", pytest.param("real", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """A GPU: the emulator, and the machine's own where it has one."""
    from device import emulated_device, real_device  # noqa: PLC0415 (needs CuPy, which others do not)

    if request.param == "real":
        with real_device() as real:
            yield real
    else:
        with emulated_device() as emulated:
            yield emulated
