"""A model of a few hundred parameters in a DeepSpeed engine: sizes that no number of processes divides, a tied, a frozen and a buffer tensor."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch
from torch import nn

from megatron.training.process import decline_compiled_collectives, import_muon_without_compiling

WIDTH = 7


class ToyModel(nn.Module):
    """Two towers that share a weight, with dropout, so that a resumed run needs its random state."""

    def __init__(self, width: int = WIDTH, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.head = nn.Linear(width, width, bias=False)
        self.head.weight = self.layers[0].weight
        self.scale = nn.Parameter(torch.full((width,), 0.5), requires_grad=False)
        self.register_buffer("offset", torch.arange(width, dtype=torch.float32) / 10)

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x_BD = torch.nn.functional.dropout(torch.tanh(layer(x_BD)), 0.2, self.training)
        return (self.head(x_BD * self.scale.to(x_BD.dtype)) + self.offset.to(x_BD.dtype)).square().mean()


def quick_deepspeed() -> Any:
    """DeepSpeed without what a run of ours would not load either: a compiled collective and torch's compiler."""
    import deepspeed

    decline_compiled_collectives()
    import_muon_without_compiling()
    return deepspeed


def build_engine(stage: int, dtype: str = "fp32", seed: int = 1, width: int = WIDTH, depth: int = 2) -> Any:
    """A DeepSpeed engine around a ToyModel with torch's fused AdamW and two parameter groups."""
    deepspeed = quick_deepspeed()
    deepspeed.init_distributed(dist_backend="gloo")
    torch.manual_seed(seed)
    model = ToyModel(width, depth)
    decayed = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.ndim > 1]
    plain = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 10},
        "bf16": {"enabled": dtype == "bf16"},
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=0.05, fused=True), config=config)
    return engine


def seed_ranks(seed: int) -> None:
    """Another random state on every rank, as training has it."""
    offset = torch.distributed.get_rank()
    random.seed(seed + offset)
    np.random.seed(seed + offset)
    torch.manual_seed(seed + offset)


def train(engine: Any, steps: int) -> list[float]:
    """Takes steps on inputs drawn from all three generators; returns the losses of this rank."""
    losses = []
    for _ in range(steps):
        width = engine.module.offset.numel()
        x_BD = torch.randn(4, width) + random.random() + torch.from_numpy(np.random.rand(4, width)).float()
        loss = engine(x_BD.to(engine.module.head.weight.dtype))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def content(state: dict[str, torch.Tensor]) -> str:
    """One hash of names, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().contiguous().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.ndim else tensor.numpy().tobytes())
    return digest.hexdigest()
