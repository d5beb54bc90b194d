"""The devices that a test is run on: `@pytest.mark.parametrize("device", DEVICES)`. Needs pytest."""

from __future__ import annotations

import pytest

# The CUDA half carries the `gpu` marker: left out by default, chosen by `pytest -m gpu`, skipped where there is no such device.
DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]
