"""The device list has the CPU unmarked and CUDA behind the `gpu` marker."""

from __future__ import annotations

import pytest
import torch

from megatron.testing.devices import DEVICES


@pytest.mark.parametrize("device", DEVICES)
def test_a_tensor_lands_on_the_device(device: str) -> None:
    assert torch.ones(2, device=device).device.type == device


def test_only_cuda_is_marked() -> None:
    marks = {str(parameter.id): [mark.name for mark in parameter.marks] for parameter in DEVICES}
    assert marks == {"cpu": [], "cuda": ["gpu"]}
