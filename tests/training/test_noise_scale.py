"""The gradient noise scale against its definition, on gradients whose noise is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron.training.noise_scale import NoiseScale


def test_one_measurement_is_the_equation() -> None:
    batches = [[torch.tensor([3.0, 0.0]), torch.tensor([[1.0]])], [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])]]
    scale = NoiseScale(batch=4, n_batches=2)
    assert scale.add(batches[0]) is None
    small, big = (10 + 14) / 2, 4 + 1 + 4
    expected = ((small - big) / (1 / 4 - 1 / 8)) / ((8 * big - 4 * small) / (8 - 4))
    assert scale.add(batches[1]) == pytest.approx(expected)


def noisy(generator: torch.Generator, batch: int) -> list[Tensor]:
    """The mean gradient of `batch` samples: 1 everywhere, and noise of variance 9 a sample and element."""
    return [1 + 3 / math.sqrt(batch) * torch.randn(50, 20, generator=generator)]


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_known_noise_is_found(device: torch.device | None) -> None:
    """tr(covariance) / |G|^2 = 9 * 1000 / 1000."""
    generator = torch.Generator().manual_seed(0)
    scale = NoiseScale(batch=8, n_batches=5, device=device)
    found = [scale.add(noisy(generator, 8)) for _ in range(150)]
    assert [number for number, value in enumerate(found, 1) if value is not None] == list(range(5, 151, 5))
    assert found[-1] == pytest.approx(9.0, rel=0.05)


def test_gradients_that_are_not_finite_are_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    scale = NoiseScale(batch=8, n_batches=2)
    assert scale.add(noisy(generator, 8)) is None
    assert scale.add([torch.tensor([math.nan])]) is None
    assert scale.add(noisy(generator, 8)) is not None


def test_the_gradients_that_are_given_stay_as_they_are() -> None:
    gradients = [torch.ones(3)]
    scale = NoiseScale(batch=1, n_batches=3)
    for _ in range(3):
        scale.add(gradients)
    assert gradients[0].tolist() == [1.0, 1.0, 1.0]
