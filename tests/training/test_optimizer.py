"""SkippingAdamW against torch's AdamW with torch's clipping, and what happens when the gradients are not finite."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from megatron.training.optimizer import SkippingAdamW, parameter_groups, set_learning_rate


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))


def loss_of(model: nn.Module, scale: float) -> torch.Tensor:
    return scale * model(torch.linspace(-1, 1, 20).view(4, 5)).square().sum()


@pytest.mark.parametrize(("max_norm", "scale"), [(1.0, 100.0), (1.0, 1e-3), (0.0, 100.0)], ids=["clipped", "small enough", "clipping off"])
def test_same_as_clipping_then_adamw(max_norm: float, scale: float) -> None:
    ours, theirs = network(), network()
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    mine = SkippingAdamW(parameter_groups(ours, 0.1), max_norm=max_norm, **settings)
    reference = torch.optim.AdamW(parameter_groups(theirs, 0.1), **settings)
    for _ in range(5):
        for model in (ours, theirs):
            model.zero_grad()
            loss_of(model, scale).backward()
        expected_norm = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm or float("inf"))
        mine.step()
        reference.step()
        assert mine._global_grad_norm == pytest.approx(expected_norm.item(), rel=1e-6)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_changes_nothing(bad: float) -> None:
    model = network()
    optimizer = SkippingAdamW(parameter_groups(model, 0.1), max_norm=1.0, lr=1e-2)
    loss_of(model, 1.0).backward()
    optimizer.step()
    before, state_before = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    first = next(model.parameters())
    assert first.grad is not None
    first.grad[0, 0] = bad
    optimizer.step()
    assert optimizer.overflow
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict(), state_before, rtol=0, atol=0)
    first.grad[0, 0] = 0.0
    optimizer.step()
    assert not optimizer.overflow


def test_biases_and_norms_do_not_decay() -> None:
    decayed, exempt = parameter_groups(network(), 0.1)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in exempt["params"]} == {1}


def test_learning_rate_reaches_every_group() -> None:
    optimizer = SkippingAdamW(parameter_groups(network(), 0.1), max_norm=1.0, lr=1e-2)
    set_learning_rate(optimizer, 3e-4)
    assert [group["lr"] for group in optimizer.param_groups] == [3e-4, 3e-4]
