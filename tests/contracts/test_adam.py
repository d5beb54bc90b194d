"""Adam's update and the norm of gradients: every implementation against the formulas in float64, every edge, and PyTorch's own Adam."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.kernels.adam import OP, AdamSettings, AdamTensors, adam_update, gradient_norm
from megatron.testing.devices import DEVICES
from tests.contracts.comparing import check_that_threads_change_no_bit, skip_unless_it_runs

BACKENDS = [implementation.name for implementation in OP.implementations()]
SHAPES = [(3,), (0,), (), (5, 7), (1,), (2, 16384), (40001,)]  # blocks are of 16384 numbers
SETTINGS = AdamSettings(1e-2, (0.9, 0.95), 1e-8, 0.1, True, 3.0)


def draw(dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in SHAPES]


def tensors_of(gradients: torch.dtype, rounded: torch.dtype | None, device: str = "cpu") -> AdamTensors:
    weights, steps = draw(device=device, seed=1), [float(1 + place) for place in range(len(SHAPES))]
    squares = [t.square() for t in draw(device=device, seed=4)]
    narrow = None if rounded is None else draw(rounded, device, seed=5)
    return AdamTensors(weights, draw(gradients, device, seed=2), draw(device=device, seed=3), squares, steps, narrow)


def wanted(tensors: AdamTensors, settings: AdamSettings) -> list[tuple[Tensor, Tensor, Tensor]]:
    """New weight, average and square of each, in float64."""
    lr, (beta1, beta2), eps, decay, decoupled, divisor = settings
    results = []
    for weight, gradient, average, square, step in zip(*tensors[:5], strict=True):
        w, g, m, v = (t.double() for t in (weight, gradient, average, square))
        g = g / divisor + (0 if decoupled else decay) * w
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        step_size = lr * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
        results.append((w * (1 - lr * decay if decoupled else 1) - step_size, m, v))
    return results


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("rounded", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gradients", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_update(backend: str, gradients: torch.dtype, rounded: torch.dtype | None, decoupled: bool, device: str) -> None:
    skip_unless_it_runs(OP, backend, device)
    settings, tensors = SETTINGS._replace(decoupled_weight_decay=decoupled), tensors_of(gradients, rounded, device)
    given = [t.clone() for t in tensors.gradients]
    right = wanted(tensors, settings)
    adam_update(tensors, settings, backend=backend)
    for place, ours in enumerate(zip(tensors.weights, tensors.averages, tensors.squares, strict=True)):
        for got, exact in zip(ours, right[place], strict=True):
            torch.testing.assert_close(got.double(), exact, rtol=2e-6, atol=5e-7)
    for narrow, weight in zip(tensors.rounded or [], tensors.weights, strict=False):
        assert torch.equal(narrow, weight.to(narrow.dtype))
    assert all(torch.equal(one, two) for one, two in zip(tensors.gradients, given, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_sees_the_change(backend: str) -> None:
    """What saved a weight for its backward says that the weight has changed."""
    skip_unless_it_runs(OP, backend)
    tensors = tensors_of(torch.bfloat16, torch.bfloat16)
    assert tensors.rounded is not None
    changed = [*tensors.weights, *tensors.averages, *tensors.squares, *tensors.rounded]
    before = [t._version for t in changed]
    adam_update(tensors, SETTINGS, backend=backend)
    assert all(t._version > version for t, version in zip(changed, before, strict=True))
    assert all(t._version == 0 for t in tensors.gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend: str) -> None:
    skip_unless_it_runs(OP, backend)
    for strided in range(4):
        plain = [torch.randn(6, 4, generator=torch.Generator().manual_seed(n)).abs() for n in range(4)]
        turned = [t.t().contiguous().t() if place == strided else t.clone() for place, t in enumerate(plain)]
        for each in (plain, turned):
            adam_update(AdamTensors(*([t] for t in each), [2.0], None), SETTINGS, backend=backend)
        for one, two in zip(plain, turned, strict=True):
            torch.testing.assert_close(one, two)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rounding_is_pytorch_s(backend: str) -> None:
    """Ties, numbers that round up to infinity, and NaN. A rate of 0 keeps the weights."""
    skip_unless_it_runs(OP, backend)
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x00000001, -0x80000000] * 3, dtype=torch.int32)
    weight = bits.view(torch.float32).clone()
    zeros = [torch.zeros_like(weight) for _ in range(3)]
    narrow = torch.zeros(len(bits), dtype=torch.bfloat16)
    adam_update(AdamTensors([weight], *([t] for t in zeros), [1.0], [narrow]), SETTINGS._replace(lr=0.0), backend=backend)
    torch.testing.assert_close(narrow, weight.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_norm(backend: str, dtype: torch.dtype, device: str) -> None:
    skip_unless_it_runs(OP, backend, device)
    gradients = draw(dtype, device)
    exact = math.sqrt(sum(t.double().square().sum().item() for t in gradients))
    assert gradient_norm(gradients, backend=backend) == pytest.approx(exact, rel=1e-12)
    assert gradient_norm([t.expand(3, *t.shape) for t in gradients], backend=backend) == pytest.approx(exact * math.sqrt(3), rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_of_what_is_large_or_not_a_number(backend: str) -> None:
    """Squares that float32 cannot hold are summed; one number that is not finite shows, wherever it stands."""
    skip_unless_it_runs(OP, backend)
    assert gradient_norm([torch.full((100,), 1e30)], backend=backend) == pytest.approx(1e31)
    assert gradient_norm([torch.full((100,), 1e-30)], backend=backend) == pytest.approx(1e-29)
    for bad in (math.nan, math.inf, -math.inf):
        for dtype in (torch.float32, torch.bfloat16):
            for place in (0, 17, 16384, 20002):
                gradient = torch.ones(20003, dtype=dtype)
                gradient[place] = bad
                assert not math.isfinite(gradient_norm([torch.ones(3), gradient], backend=backend))
    assert gradient_norm([], backend=backend) == 0
    assert gradient_norm([torch.zeros(0)], backend=backend) == 0


def test_the_number_of_threads_changes_no_bit() -> None:
    skip_unless_it_runs(OP, "compiled")

    def compute() -> list[Tensor]:
        tensors = tensors_of(torch.bfloat16, torch.bfloat16)
        norm = gradient_norm(tensors.gradients, backend="compiled")
        adam_update(tensors, SETTINGS._replace(divisor=norm), backend="compiled")
        return [torch.tensor(norm, dtype=torch.float64), *tensors.weights]

    check_that_threads_change_no_bit(compute, (1, 2, 5))


def changed(**parts: Any) -> Callable[[], None]:
    return lambda: adam_update(tensors_of(torch.float32, torch.bfloat16)._replace(**parts), SETTINGS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (changed(weights=draw()[:2]), "lists of 2, 7, 7, 7, 7, 7 entries; there must be one entry for each weight"),
        (changed(steps=[1.0]), "lists of 7, 7, 7, 7, 1, 7 entries"),
        (changed(gradients=[torch.zeros(4), *draw()[1:]]), r"a tensor \(4,\) of torch.float32 on cpu for a weight \(3,\) on cpu"),
        (changed(gradients=[torch.zeros(3, dtype=torch.int32), *draw()[1:]]), "of torch.int32 on cpu"),
        (changed(averages=[torch.zeros(3, device="meta"), *draw()[1:]]), "on meta for a weight"),
        (changed(rounded=[torch.zeros(2, dtype=torch.bfloat16), *draw(torch.bfloat16)[1:]]), r"a tensor \(2,\) of torch.bfloat16"),
        (changed(steps=[0.0] * 7), "steps from 0.0; the first is above 0, steps from 1 on"),
        (lambda: adam_update(tensors_of(torch.float32, None), SETTINGS._replace(divisor=math.nan)), "divisor nan"),
        (lambda: gradient_norm([torch.zeros(2, dtype=torch.int64)]), "must be floating-point numbers"),
    ],
)
def test_what_does_not_fit_is_said(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
