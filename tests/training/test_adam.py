"""Adam by the compiled op in a run: PyTorch's losses, and PyTorch's saved state both ways."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from megatron.kernels.adam import OP
from megatron.model.gpt import build_model
from megatron.testing.tiny import TINY_MOE, tiny_config
from megatron.training.adam import KernelAdam
from megatron.training.engine import build_engine
from megatron.training.process import start_process
from megatron.training.skipping import SkippingAdam
from megatron.training.step import take_step

pytestmark = pytest.mark.skipif(OP.status("cpu")["compiled"] is not None, reason=f"compiled Adam: {OP.status('cpu')['compiled']}")

GROUP: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "fused": True, "decoupled_weight_decay": True}


def losses(implementation: str, steps: int = 20) -> list[tuple[float, float]]:
    """Loss and norm of the gradients of each step, with clipping."""
    optimizer = {"type": "Adam", "params": {"lr": 1e-3}, "implementation": implementation}
    config = tiny_config(TINY_MOE, optimizer=optimizer, weight_decay=0.1, gradient_clipping=0.5)
    start_process(backend="gloo", threads=None)
    engine = build_engine(config, build_model(config.model, config.moe, 128, seed=1), world_size=1)
    assert isinstance(engine.optimizer, KernelAdam) == (implementation == "auto")
    generator, found = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        batch = {"text": torch.randint(128, (2, 17), generator=generator)}
        metrics = take_step(engine, iter([batch]), learning_rate=1e-3, masked_token=None, before_update=lambda: None)
        found.append((metrics.lm_loss, metrics.grad_norm))
    return found


def test_twenty_steps_have_pytorch_s_losses() -> None:
    for ours, theirs in zip(losses("auto"), losses("torch"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


def optimizers() -> list[SkippingAdam]:
    """Ours and PyTorch's, over equal weights of which the last has no gradient."""
    made = []
    for kind in (KernelAdam, SkippingAdam):
        generator = torch.Generator().manual_seed(0)
        weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (5,), (2,))]
        made.append(kind([{"params": weights[:1]}, {"params": weights[1:], "weight_decay": 0.0}], max_norm=1.0, **GROUP))
    return made


def step(optimizer: SkippingAdam, seed: int, factor: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in weights_of(optimizer)[:2]:
        weight.grad = torch.randn(weight.shape, generator=generator) * factor
    optimizer.step()


def weights_of(optimizer: SkippingAdam) -> list[nn.Parameter]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def test_either_goes_on_from_the_other_s_state() -> None:
    ours, theirs = optimizers()
    for optimizer in (ours, theirs):
        step(optimizer, 1)
    mine, plain = ours.state_dict(), theirs.state_dict()
    assert mine["param_groups"] == plain["param_groups"]
    assert mine["state"].keys() == plain["state"].keys() == {0, 1}, "a weight without a gradient has no state"
    for one, other in zip(mine["state"].values(), plain["state"].values(), strict=True):
        assert list(one) == list(other)
        for key in one:
            assert (one[key].dtype, one[key].shape) == (other[key].dtype, other[key].shape)
            torch.testing.assert_close(one[key], other[key], rtol=1e-6, atol=1e-8)
    ours.load_state_dict(copy.deepcopy(plain))
    theirs.load_state_dict(copy.deepcopy(mine))
    for optimizer in (ours, theirs):
        step(optimizer, 2)
    for one, other in zip(weights_of(ours), weights_of(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_a_resumed_optimizer_goes_on_bit_for_bit() -> None:
    straight, resumed = optimizers()[0], optimizers()[0]
    for seed in range(3):
        step(straight, seed)
    state, weights = copy.deepcopy(straight.state_dict()), [weight.detach().clone() for weight in weights_of(straight)]
    resumed.load_state_dict(state)
    with torch.no_grad():
        for weight, saved in zip(weights_of(resumed), weights, strict=True):
            weight.copy_(saved)
    for optimizer in (straight, resumed):
        step(optimizer, 7)
    assert all(torch.equal(one, two) for one, two in zip(weights_of(straight), weights_of(resumed), strict=True))


def test_a_loss_scale_is_divided_out_and_an_overflow_changes_nothing() -> None:
    plain, scaled = optimizers()[0], optimizers()[0]
    scaled.loss_scale = 1024.0
    step(plain, 1)
    step(scaled, 1, 1024.0)
    assert scaled._global_grad_norm == pytest.approx(plain._global_grad_norm)
    for one, two in zip(weights_of(plain), weights_of(scaled), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)
    before = copy.deepcopy(scaled.state_dict()), [weight.detach().clone() for weight in weights_of(scaled)]
    step(scaled, 2, torch.inf)
    assert scaled.overflow
    assert all(torch.equal(one, two) for one, two in zip(before[1], weights_of(scaled), strict=True))
    torch.testing.assert_close(scaled.state_dict(), before[0], rtol=0, atol=0)
