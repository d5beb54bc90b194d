"""Each optimizer against a plain definition with PyTorch's clipping, what happens when the gradients are not finite, and which parameters decay."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
from torch import nn

from megatron.config.optimizer import OptimizerConfig, OptimizerParams, OptimizerSpec
from megatron.model.norms import RMSNorm
from megatron.testing.devices import DEVICES
from megatron.training.lion import Lion
from megatron.training.optimizer import (
    OptimizerUnavailable,
    build_optimizer,
    choose_optimizer,
    parameter_groups,
    set_learning_rate,
    skipping,
)
from megatron.training.skipping import Skipping

LR, DECAY = 1e-2, 0.1
NEEDS_BITSANDBYTES = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="the package bitsandbytes is not installed")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))


def loss_of(model: nn.Module, scale: float) -> torch.Tensor:
    return scale * model(torch.linspace(-1, 1, 20, device=next(model.parameters()).device).view(4, 5)).square().sum()


def config_of(kind: str, max_norm: float = 1.0, **params: Any) -> OptimizerConfig:
    spec = OptimizerSpec.model_validate({"type": kind, "params": OptimizerParams(lr=LR, **params)})
    return OptimizerConfig(optimizer=spec, weight_decay=DECAY, gradient_clipping=max_norm)


class PlainLion(torch.optim.Optimizer):
    """The paper's lines, one weight at a time."""

    def __init__(self, groups: Any, *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for w in group["params"]:
                m = self.state[w].setdefault("m", torch.zeros_like(w))
                update = torch.sign(beta1 * m + (1 - beta1) * w.grad) + group["weight_decay"] * w
                w -= group["lr"] * update
                m.copy_(beta2 * m + (1 - beta2) * w.grad)


REFERENCES: dict[str, tuple[dict[str, Any], Any]] = {
    "Adam": ({"betas": (0.9, 0.95), "eps": 1e-8}, torch.optim.AdamW),
    "AdamW": ({"betas": (0.9, 0.95)}, torch.optim.AdamW),
    "coupled Adam": ({"betas": (0.9, 0.95), "adam_w_mode": False}, torch.optim.Adam),
    "SGD": ({}, torch.optim.SGD),
    "SGD with momentum": ({"momentum": 0.9, "nesterov": True}, torch.optim.SGD),
    "Lion": ({"betas": (0.9, 0.98)}, PlainLion),
}


@pytest.mark.parametrize(("max_norm", "scale"), [(1.0, 100.0), (1.0, 1e-3), (0.0, 0.5)], ids=["clipped", "small enough", "clipping off"])
@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("device", DEVICES)
def test_same_as_clipping_and_then_the_plain_one(device: str, name: str, max_norm: float, scale: float) -> None:
    params, plain = REFERENCES[name]
    ours, theirs = network().to(device), network().to(device)
    kind = name.split()[-1] if name.endswith("Adam") else name.split()[0]
    mine = build_optimizer(config_of(kind, max_norm, **params), ours, device)
    assert isinstance(mine, Skipping)
    reference = plain(parameter_groups(theirs, DECAY), lr=LR, **{key: value for key, value in params.items() if key != "adam_w_mode"})
    for _ in range(5):
        for model in (ours, theirs):
            model.zero_grad()
            loss_of(model, scale).backward()
        expected_norm = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm or float("inf"))
        mine.step()
        reference.step()
        assert mine._global_grad_norm == pytest.approx(expected_norm.item(), rel=1e-5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["Adam", "SGD", "Lion", pytest.param("Adam8bit", marks=NEEDS_BITSANDBYTES)])
def test_not_finite_changes_nothing(kind: str, bad: float) -> None:
    model = network()
    optimizer = build_optimizer(config_of(kind, **({"momentum": 0.9} if kind == "SGD" else {})), model, "cpu")
    assert isinstance(optimizer, Skipping)
    loss_of(model, 1.0).backward()
    optimizer.step()
    before, state_before = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    first = next(model.parameters())
    assert first.grad is not None
    first.grad[0, 0] = bad
    optimizer.step()
    assert optimizer.overflow
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict()["state"], state_before["state"], rtol=0, atol=0)
    first.grad[0, 0] = 0.0
    optimizer.step()
    assert not optimizer.overflow


@NEEDS_BITSANDBYTES
def test_8_bit_averages_follow_adamw() -> None:
    """On a matrix large enough to be kept in 8 bits; the steps agree to the few per cent that 8 bits leave."""
    torch.manual_seed(0)
    start = torch.randn(96, 96)
    ours, theirs = nn.Linear(96, 96, bias=False), nn.Linear(96, 96, bias=False)
    for model in (ours, theirs):
        model.weight.data.copy_(start)
    mine = build_optimizer(OptimizerConfig(optimizer=OptimizerSpec(params=OptimizerParams(lr=LR)), use_bnb_optimizer=True), ours, "cpu")
    reference = torch.optim.AdamW(parameter_groups(theirs, 0.1), lr=LR)
    for seed in range(4):
        gradient = torch.randn(96, 96, generator=torch.Generator().manual_seed(seed)) * 1e-3
        ours.weight.grad, theirs.weight.grad = gradient.clone(), gradient.clone()
        mine.step()
        reference.step()
    assert mine.state[ours.weight]["state1"].dtype == torch.uint8
    step = theirs.weight.data - start
    assert (ours.weight.data - start - step).norm() < 0.05 * step.norm()


def test_the_paths_that_divide_by_themselves_and_first_agree() -> None:
    """What apex's FusedAdam and bitsandbytes get: gradients that are clipped before the step."""

    class OtherLion(Lion):
        pass

    models = [network(), network()]
    optimizers = [skipping(kind)(parameter_groups(model, DECAY), max_norm=1.0, lr=LR) for kind, model in zip((Lion, OtherLion), models, strict=True)]
    for model, optimizer in zip(models, optimizers, strict=True):
        loss_of(model, 100.0).backward()
        optimizer.step()
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict())


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.zeros(2, 3, 4))
        self.w1_bias = nn.Parameter(torch.zeros(2, 3))
        self.temperature = nn.Parameter(torch.zeros(1))


def test_biases_and_norms_do_not_decay_whatever_their_shape() -> None:
    model = nn.ModuleDict({"linear": nn.Linear(4, 4), "norm": nn.LayerNorm((2, 4)), "rms": RMSNorm((2, 4), 1e-6), "expert": Expert()})
    model["linear"].extra = model["linear"].weight  # type: ignore[assignment]  # a parameter that is there twice
    model["expert"].w1.requires_grad = False  # type: ignore[union-attr]
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, exempt = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)
    assert [names[p] for p in decayed["params"]] == ["linear.weight", "expert.temperature"]
    assert [names[p] for p in exempt["params"]] == ["linear.bias", "norm.weight", "norm.bias", "rms.scale", "expert.w1_bias"]


def test_a_group_without_parameters_is_left_out() -> None:
    (group,) = parameter_groups(nn.Linear(2, 2, bias=False), 0.1)
    assert group["weight_decay"] == 0.1


def test_learning_rate_reaches_every_group() -> None:
    optimizer = build_optimizer(config_of("Adam"), network(), "cpu")
    set_learning_rate(optimizer, 3e-4)
    assert [group["lr"] for group in optimizer.param_groups] == [3e-4, 3e-4]


@pytest.mark.parametrize(
    ("spec", "device_type", "sentence"),
    [
        ({"implementation": "apex"}, "cpu", "optimizer.implementation: apex runs on CUDA only, and this device is cpu: leave the key out"),
        (
            {"implementation": "apex"},
            "cuda",
            "optimizer.implementation: apex needs apex's FusedAdam, which is not installed (No module named 'apex')",
        ),
        (
            {"implementation": "deepspeed"},
            "cuda",
            "optimizer.implementation: deepspeed needs DeepSpeed installed with DS_BUILD_FUSED_ADAM=1. The installed DeepSpeed was built without it",
        ),
    ],
)
def test_a_kernel_that_is_not_there_is_a_sentence(spec: dict[str, str], device_type: str, sentence: str) -> None:
    if importlib.util.find_spec("apex") is not None:
        pytest.skip("apex is installed here")
    with pytest.raises(OptimizerUnavailable) as raised:
        choose_optimizer(OptimizerConfig(optimizer=OptimizerSpec.model_validate(spec)), device_type)
    assert str(raised.value) == sentence


def test_a_missing_bitsandbytes_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptimizerUnavailable, match=r"needs the package 'bitsandbytes': pip install bitsandbytes, or use Adam"):
        choose_optimizer(OptimizerConfig(use_bnb_optimizer=True), "cpu")
