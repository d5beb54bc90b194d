"""Whether a layout of processes computes what one process computes: the same model, the same data, a few steps, every number compared.

assert compare(tiny_values("structmoe"), LAYOUTS["TP2"]).problems() == []
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.config import NeoXConfig, config_from_dict
from megatron.config.training import Batch, resolve_batch
from megatron.data.sampler import MicroBatchSampler
from megatron.model.division import Cut, whole_cut
from megatron.testing.distributed import run_distributed
from megatron.testing.tiny import TINY_DENSE, TINY_MOE, TINY_STRUCTMOE

STEPS = 10
LEARNING_RATE = 1e-3
"""Small enough that Adam makes no step of its own size out of the rounding of a gradient that is 0 in exact arithmetic (of the keys' biases)."""
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
    grouped_only: bool = False
    """Whether it is for plain experts alone."""

    def suits(self, model: Mapping[str, Any]) -> bool:
        """Whether the layout makes sense for a model."""
        return ("moe_num_experts" in model or not self.experts_only) and ("moe_expert_type" not in model or not self.grouped_only)


def _tp(size: int, **keys: Any) -> dict[str, Any]:
    return {"model_parallel_size": size, **keys}


def _pp(size: int, **keys: Any) -> dict[str, Any]:
    return {"pipe_parallel_size": size, "num_layers": 4, "gradient_accumulation_steps": 2, **keys}


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
    "PP2": Variant(2, _pp(2)),
    "PP2 accumulation 4": Variant(2, _pp(2, gradient_accumulation_steps=4)),
    "PP2 recompute": Variant(2, _pp(2, checkpoint_activations=True)),
    "PP2 x DP2": Variant(4, _pp(2)),
    "PP2 x DP2 ZeRO 1": Variant(4, _pp(2, **_zero(1))),
    "PP4": Variant(4, _pp(4)),
    "TP2 x PP2": Variant(4, _pp(2, **_tp(2))),
    "TP2 x PP2 SP": Variant(4, _pp(2, **_tp(2, sequence_parallel=True))),
    "PP2 x EP2": Variant(4, _pp(2, **_ep(2)), experts_only=True),
    "TP2 x EP2 by width": Variant(4, {**_tp(2, moe_tensor_parallel="width"), **_ep(2)}, experts_only=True, grouped_only=True),
    "TP2 by width": Variant(2, _tp(2, moe_tensor_parallel="width"), experts_only=True, grouped_only=True),
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
    loads: list[list[int]]
    """Tokens sent to each expert of each layer, one after the other, at each step."""
    applied: list[bool]
    gradients: dict[str, Tensor]
    """Of the first step, of whole weights by name."""
    logits: Tensor
    """Of one text, after the last step."""


@dataclass(frozen=True)
class Comparison:
    """A layout beside one process."""

    alone: Measured
    together: Measured

    @property
    def loss(self) -> float:
        """The largest difference of a loss, relative to it."""
        return max(_apart(a, b) for a, b in zip(self.alone.losses, self.together.losses, strict=True))

    @property
    def auxiliary(self) -> float:
        """The largest difference of an auxiliary loss, relative to it."""
        pairs = [(a, b) for left, right in zip(self.alone.auxiliary, self.together.auxiliary, strict=True) for a, b in zip(left, right, strict=True)]
        return max((_apart(a, b) for a, b in pairs), default=0.0)

    @property
    def norm(self) -> float:
        """The largest difference of a gradient's norm, relative to it."""
        return max(_apart(a, b) for a, b in zip(self.alone.norms, self.together.norms, strict=True))

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
        if self.alone.applied != self.together.applied:
            found.append(f"steps taken: {self.together.applied}, and {self.alone.applied} by one process")
        if self.alone.loads[0] != self.together.loads[0]:
            found.append(f"loads of the first step: {self.together.loads[0]}, and {self.alone.loads[0]} in one process")
        limits = (("loss", self.loss, LOSS), ("auxiliary losses", self.auxiliary, AUXILIARY), ("gradient norm", self.norm, GRADIENT))
        found += [f"{name}: {value:.2e}" for name, value, limit in limits if not value <= limit]
        found += [f"{name}: one process has no such weight" for name in self.together.gradients.keys() - self.alone.gradients.keys()]
        return found


def compare(values: Mapping[str, Any], variant: Variant, *, steps: int = STEPS, masked: bool = False, spoiled: int | None = None) -> Comparison:
    """Trains with the layout and with one process that takes the same samples in micro-batches of the same samples.

    `masked`: some labels do not count. `spoiled`: the step in which the model gives infinite numbers.
    """
    config = config_from_dict({**values, **variant.keys})
    replicas = variant.processes // config.parallel.layout.model
    batch = resolve_batch(config.training, replicas)
    together = run_distributed(measure, variant.processes, {**values, **variant.keys}, steps, masked, spoiled, backend=None, timeout=300.0)
    (alone,) = run_distributed(measure, 1, {**values, **lone_keys(variant.keys, batch, replicas)}, steps, masked, spoiled, backend=None)
    return Comparison(joined([alone]), joined(together))


def lone_keys(keys: Mapping[str, Any], batch: Batch, replicas: int) -> dict[str, Any]:
    """The keys with which one process takes the same samples: those that are not of the layout, and more accumulation."""
    of_layout = ("zero_optimization", "sequence_parallel", "checkpoint_activations", "pipe_partition_method")
    own = {key: value for key, value in keys.items() if key not in of_layout and not key.endswith("parallel_size")}
    return {**own, "gradient_accumulation_steps": batch.accumulation * replicas, "train_micro_batch_size_per_gpu": batch.micro}


@dataclass(frozen=True)
class Piece:
    """One process's measurements: the gradients of what it holds, with their places."""

    losses: list[float]
    auxiliary: list[tuple[float, ...]]
    norms: list[float]
    loads: list[list[int]]
    applied: list[bool]
    gradients: dict[str, tuple[Cut, Tensor]]
    logits: list[Tensor]


def measure(values: Mapping[str, Any], steps: int, masked: bool = False, spoiled: int | None = None) -> Piece:
    """On each process: builds the model, takes the steps, keeps the numbers."""
    from megatron.training.engine import build_engine
    from megatron.training.evaluate import evaluation_logits
    from megatron.training.gradients import whole_gradients
    from megatron.training.process import start_process
    from megatron.training.setup import model_of_process, seed_random
    from megatron.training.step import take_step

    config = config_from_dict(dict(values))
    topology = start_process(backend="gloo", threads=1, layout=config.parallel.layout)
    engine = build_engine(config, model_of_process(config, VOCABULARY), world_size=topology.data_parallel_size)
    seed_random(1)
    piece = Piece([], [], [], [], [], {}, [])

    def keep() -> None:
        if not piece.losses:
            cuts = engine.module.cuts
            for name, gradient in whole_gradients(engine):
                piece.gradients[in_one_process(name)] = (cuts.get(name, whole_cut(gradient.shape)), gradient.detach().float().clone())

    data = samples(config, topology.data_parallel_size, topology.data_parallel_rank, masked=masked)
    for step in range(steps):
        if step == spoiled:
            spoil(engine)
        metrics = take_step(engine, data, learning_rate=LEARNING_RATE, masked_token=None, before_update=keep)
        piece.losses.append(metrics.lm_loss)
        piece.auxiliary.append(metrics.aux_losses)
        piece.norms.append(metrics.grad_norm)
        piece.loads.append(metrics.router.expert_load_XE.flatten().tolist())
        piece.applied.append(metrics.applied)
    piece.logits.append(evaluation_logits(engine, next(samples(config, 1, 0))["text"][:1, :-1]).float())
    return piece


def in_one_process(name: str) -> str:
    """The name that one process gives the gradient of a weight: that of the first layer, for the positions that all layers share."""
    return re.sub(r"^sequential\.\d+(\.attention\.rpe\.)", r"sequential.2\1", name)


def spoil(engine: Any) -> None:
    """Makes the hidden states before the head infinite in the next forward pass, on the processes that have the head."""
    if engine.module.is_last:
        norm = engine.module.sequential[str(engine.module.num_layers + 3)]

        def infinite(module: Any, inputs: Any, hidden_BSD: Tensor) -> Tensor:
            handle.remove()
            return hidden_BSD * torch.inf

        handle = norm.register_forward_hook(infinite)


def samples(config: NeoXConfig, replicas: int, rank: int, *, masked: bool = False) -> Iterator[dict[str, Tensor]]:
    """The micro-batches of a replica: sample i is the same tokens whoever reads it. `masked`: some of its labels do not count."""
    batch = resolve_batch(config.training, replicas)
    for indices in MicroBatchSampler(10_000, micro_batch=batch.micro, rank=rank, world_size=replicas):
        drawn = [_sample(config, index, masked=masked) for index in indices]
        yield {key: torch.stack([sample[key] for sample in drawn]) for key in drawn[0]}


def _sample(config: NeoXConfig, index: int, *, masked: bool) -> dict[str, Tensor]:
    generator, length = torch.Generator().manual_seed(index), config.model.seq_length + 1
    sample = {"text": torch.randint(VOCABULARY, (length,), generator=generator)}
    if masked:
        counts = torch.rand(length, generator=generator) < 0.1 + 0.2 * (index % 5)
        sample["label"] = torch.where(counts, sample["text"], -100)
    if config.data.reset_attention_mask or config.data.reset_position_ids:
        sample["document"] = (torch.rand(length, generator=generator) < 0.2).cumsum(0)
    return sample


def joined(pieces: list[Piece]) -> Measured:
    """The whole gradients. Numbers that all processes should agree on are compared. Raises AssertionError if they do not."""
    first = pieces[0]
    for other in pieces[1:]:
        for what in ("losses", "auxiliary", "norms", "loads", "applied"):
            assert str(getattr(other, what)) == str(getattr(first, what)), f"the processes do not report the same {what}"
        torch.testing.assert_close(other.logits, first.logits, msg=lambda why: f"the processes do not have the same logits: {why}")
    gradients: dict[str, Tensor] = {}
    for piece in pieces:
        for name, (cut, own) in piece.gradients.items():
            whole = gradients.setdefault(name, torch.full(cut.shape, torch.nan))
            for box in cut.boxes():
                known = whole[box.whole].isfinite()
                difference = (whole[box.whole] - own[box.local])[known].abs().max().item() if known.any() else 0.0
                assert difference <= 1e-6 * own.abs().max(), f"two processes have different gradients of {name}"
                whole[box.whole] = own[box.local]
    return Measured(first.losses, first.auxiliary, first.norms, first.loads, first.applied, gradients, first.logits[0])


def _apart(own: float, other: float) -> float:
    """The difference, relative to the first number. Numbers that are not finite are so in both."""
    if not (math.isfinite(own) and math.isfinite(other)):
        return 0.0 if math.isfinite(own) == math.isfinite(other) else math.inf
    return abs(own - other) / max(abs(own), 1e-12)


def _distance(own: Tensor, other: Tensor | None) -> float:
    if other is None or own.shape != other.shape:
        return float("inf")
    return float((own - other).abs().max() / own.abs().max().clamp(min=1e-12))
