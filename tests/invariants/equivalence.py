"""Whether a layout of processes computes what one process computes: the same model, the same data, a few steps, every number compared.

assert compare(tiny_values("structmoe"), LAYOUTS["TP2"]).problems() == []
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.config import NeoXConfig, config_from_dict
from megatron.config.training import resolve_batch
from megatron.data.sampler import MicroBatchSampler
from megatron.model.division import Cut, whole_cut
from megatron.testing.distributed import run_distributed
from megatron.testing.tiny import TINY_DENSE, TINY_MOE, TINY_STRUCTMOE

STEPS = 10
VOCABULARY = 128
LOSS, GRADIENT, AUXILIARY = 1e-5, 1e-4, 2e-6
"""Allowed differences: of losses; of gradients, relative to the largest number of a weight's gradient; of auxiliary losses, where `exact` means
that no more than the order of float32 sums differs."""

MODELS: Mapping[str, Mapping[str, Any]] = {
    "dense": TINY_DENSE,
    "mixtral": {**TINY_MOE, "activation": "swiglu", "num_kv_heads": 2, "norm": "rmsnorm"},
    "structmoe": {**TINY_STRUCTMOE, "moe_losses": {"load_balance": 0.01, "z_loss": 0.001, "lore_balance": 0.01}},
    "decomposed": {**TINY_MOE, "moe_expert_type": "decomposed", "moe_decomposition_rank": 8, "moe_num_shared_experts": 1},
}


class Variant(NamedTuple):
    """A layout: how many processes it takes, and its keys."""

    processes: int
    keys: Mapping[str, Any]
    experts_only: bool = False
    """Whether it makes sense only for a model with experts."""

    def suits(self, model: Mapping[str, Any]) -> bool:
        """Whether the layout makes sense for a model."""
        return not self.experts_only or "moe_num_experts" in model


def _tp(size: int, **keys: Any) -> dict[str, Any]:
    return {"model_parallel_size": size, **keys}


def _ep(size: int, **keys: Any) -> dict[str, Any]:
    return {"moe_expert_parallel_size": size, **keys}


def _zero(stage: int) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage}}


LAYOUTS: Mapping[str, Variant] = {
    "TP2": Variant(2, _tp(2)),
    "EP2": Variant(2, _ep(2), experts_only=True),
    "DP2": Variant(2, {}),
    "ZeRO 1": Variant(2, _zero(1)),
    "ZeRO 2": Variant(2, _zero(2)),
    "ZeRO 3": Variant(2, _zero(3)),
    "SP": Variant(2, _tp(2, sequence_parallel=True)),
    "TP2 x EP2": Variant(4, {**_tp(2), **_ep(2)}, experts_only=True),
    "EP4": Variant(4, _ep(4), experts_only=True),
    "TP4": Variant(4, _tp(4)),
    "TP2 x DP2 ZeRO 1": Variant(4, {**_tp(2), **_zero(1)}),
    "EP2 ZeRO 1": Variant(2, {**_ep(2), **_zero(1)}, experts_only=True),
    "EP2 ZeRO 2": Variant(2, {**_ep(2), **_zero(2)}, experts_only=True),
    "EP2 x DP2 ZeRO 1": Variant(4, {**_ep(2), **_zero(1)}, experts_only=True),
    "accumulation 4": Variant(2, _tp(2, gradient_accumulation_steps=4)),
    "recompute": Variant(2, _tp(2, checkpoint_activations=True)),
}


@dataclass(frozen=True)
class Measured:
    """What a run measured."""

    losses: list[float]
    auxiliary: list[tuple[float, ...]]
    norms: list[float]
    gradients: dict[str, Tensor]
    """Of the first step, of whole weights by name."""


@dataclass(frozen=True)
class Comparison:
    """A layout beside one process."""

    alone: Measured
    together: Measured

    @property
    def loss(self) -> float:
        """The largest difference of a loss, relative to it."""
        return max(abs(a - b) / abs(a) for a, b in zip(self.alone.losses, self.together.losses, strict=True))

    @property
    def auxiliary(self) -> float:
        """The largest difference of an auxiliary loss, relative to it."""
        pairs = [(a, b) for left, right in zip(self.alone.auxiliary, self.together.auxiliary, strict=True) for a, b in zip(left, right, strict=True)]
        return max((abs(a - b) / max(abs(a), 1e-12) for a, b in pairs), default=0.0)

    @property
    def norm(self) -> float:
        """The largest difference of a gradient's norm, relative to it."""
        return max(abs(a - b) / a for a, b in zip(self.alone.norms, self.together.norms, strict=True))

    @property
    def gradients(self) -> dict[str, float]:
        """Of each weight, the largest difference, relative to the largest number of its gradient."""
        return {name: _distance(own, self.together.gradients.get(name)) for name, own in self.alone.gradients.items()}

    @property
    def gradient(self) -> float:
        """The largest of `gradients`."""
        return max(self.gradients.values())

    def problems(self) -> list[str]:
        """What is further apart than allowed."""
        found = [f"{name}: {value:.2e}" for name, value in self.gradients.items() if not value <= GRADIENT]
        limits = (("loss", self.loss, LOSS), ("auxiliary losses", self.auxiliary, AUXILIARY), ("gradient norm", self.norm, GRADIENT))
        found += [f"{name}: {value:.2e}" for name, value, limit in limits if not value <= limit]
        found += [f"{name}: one process has no such weight" for name in self.together.gradients.keys() - self.alone.gradients.keys()]
        return found


def compare(values: Mapping[str, Any], variant: Variant, *, steps: int = STEPS) -> Comparison:
    """Trains with the layout and with one process that takes the same samples in micro-batches of the same samples."""
    config = config_from_dict({**values, **variant.keys})
    replicas = variant.processes // config.parallel.layout.model
    batch = resolve_batch(config.training, replicas)
    together = run_distributed(measure, variant.processes, {**values, **variant.keys}, steps, timeout=300.0)
    lone = {"gradient_accumulation_steps": batch.accumulation * replicas, "train_micro_batch_size_per_gpu": batch.micro}
    (alone,) = run_distributed(measure, 1, {**values, **lone}, steps)
    return Comparison(joined([alone]), joined(together))


@dataclass(frozen=True)
class Piece:
    """One process's measurements: the gradients of what it holds, with their places."""

    losses: list[float]
    auxiliary: list[tuple[float, ...]]
    norms: list[float]
    gradients: dict[str, tuple[Cut, Tensor]]


def measure(values: Mapping[str, Any], steps: int) -> Piece:
    """On each process: builds the model, takes the steps, keeps the numbers."""
    from megatron.model.divide import Divider
    from megatron.model.gpt import build_model
    from megatron.mpu.groups import current_groups
    from megatron.training.engine import build_engine
    from megatron.training.gradients import whole_gradients
    from megatron.training.process import start_process
    from megatron.training.setup import seed_random
    from megatron.training.step import take_step

    config = config_from_dict(dict(values))
    topology = start_process(backend="gloo", threads=1, layout=config.parallel.layout)
    divider = Divider(current_groups(), sequence=config.parallel.sequence_parallel)
    model = build_model(config.model, config.moe, VOCABULARY, seed=1, divider=divider)
    engine = build_engine(config, model, world_size=topology.data_parallel_size)
    seed_random(1)
    piece = Piece([], [], [], {})

    def keep() -> None:
        if not piece.losses:
            cuts = engine.module.cuts
            for name, gradient in whole_gradients(engine):
                piece.gradients[name] = (cuts.get(name, whole_cut(gradient.shape)), gradient.detach().float().clone())

    data = samples(config, topology.data_parallel_size, topology.data_parallel_rank)
    for _ in range(steps):
        metrics = take_step(engine, data, learning_rate=1e-2, masked_token=None, before_update=keep)
        piece.losses.append(metrics.lm_loss)
        piece.auxiliary.append(metrics.aux_losses)
        piece.norms.append(metrics.grad_norm)
    return piece


def samples(config: NeoXConfig, replicas: int, rank: int) -> Iterator[dict[str, Tensor]]:
    """The micro-batches of a replica: sample i is the same tokens whoever reads it."""
    batch = resolve_batch(config.training, replicas)
    for indices in MicroBatchSampler(10_000, micro_batch=batch.micro, rank=rank, world_size=replicas):
        drawn = [torch.randint(VOCABULARY, (config.model.seq_length + 1,), generator=torch.Generator().manual_seed(index)) for index in indices]
        yield {"text": torch.stack(drawn)}


def joined(pieces: list[Piece]) -> Measured:
    """The whole gradients. Numbers that all processes should agree on are compared. Raises AssertionError if they do not."""
    first = pieces[0]
    for other in pieces[1:]:
        assert (other.losses, other.auxiliary) == (first.losses, first.auxiliary), "the processes do not report the same losses"
    gradients: dict[str, Tensor] = {}
    for piece in pieces:
        for name, (cut, own) in piece.gradients.items():
            whole = gradients.setdefault(name, torch.full(cut.shape, torch.nan))
            for box in cut.boxes():
                whole[box.whole] = own[box.local]
    return Measured(first.losses, first.auxiliary, first.norms, gradients)


def _distance(own: Tensor, other: Tensor | None) -> float:
    if other is None or own.shape != other.shape:
        return float("inf")
    return float((own - other).abs().max() / own.abs().max().clamp(min=1e-12))
