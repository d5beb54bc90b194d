"""What one process keeps in memory: weights, gradients and the optimizer's state to the byte, from the weights that it was built with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from megatron.analysis.plan.efficiency import FRAGMENTATION, RESERVED_GIB
from megatron.config.neox import NeoXConfig
from megatron.config.size import training_memory
from megatron.mpu.gradients import marks_of
from megatron.mpu.groups import Groups
from megatron.training.optimizer import parameter_groups

ALIGNMENT = 2
"""DeepSpeed pads each group of weights to a multiple of this times the processes that divide it (`nccl_start_alignment_factor`, 0.19.8)."""
FALLBACK_BUCKET = 500_000_000
"""Numbers that DeepSpeed copies together to sum gradients over processes where ZeRO does not (its `allreduce` bucket)."""


@dataclass(frozen=True)
class Held:
    """Numbers of one group of weights. own: that this process holds. updated: that it updates, padding included. copies: processes that hold or
    divide the same. expert: whether they are of experts."""

    own: int
    updated: int
    copies: int
    expert: bool


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one process at the fullest moment of a step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Kept for the backward, of all micro-batches that are on their way."""
    working: int
    """Of the kernels that run, on top of that."""
    buffers: int
    """In which messages are put together."""

    @property
    def used(self) -> int:
        """All of the above."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.working + self.buffers

    @property
    def reserved(self) -> int:
        """What CUDA, NCCL and the allocator take besides."""
        return self.total - self.used

    @property
    def total(self) -> int:
        """`used` and `reserved`."""
        return int(self.used * FRAGMENTATION + RESERVED_GIB * 2**30)


def held(model: nn.Module, config: NeoXConfig, groups: Groups) -> list[Held]:
    """The groups of weights as DeepSpeed is given them. ZeRO 3 pads every weight, ZeRO 1 and 2 the whole group."""
    stage, found = config.optimizer.zero_optimization.stage, []
    for group in parameter_groups(model, config.optimizer.weight_decay):
        sizes = [weight.numel() for weight in group["params"]]
        expert = not marks_of(group["params"][0]).allreduce
        copies = groups.expert_data.size if expert else groups.data.size
        own = sum(sizes)
        updated = own
        if stage == 3:
            updated = sum(-(-size // copies) for size in sizes)
        elif stage > 0:
            updated = -(-own // (ALIGNMENT * copies)) * ALIGNMENT
        found.append(Held(own, updated, copies, expert))
    return found


def weight_bytes(parts: Sequence[Held], config: NeoXConfig) -> int:
    """Of the weights in the model's format."""
    size = 4 if config.precision == "fp32" else 2
    return size * sum(part.updated if config.optimizer.zero_optimization.stage == 3 else part.own for part in parts)


def optimizer_bytes(parts: Sequence[Held], config: NeoXConfig) -> int:
    """Of float32 copies of the weights and of the optimizer's averages."""
    count, size = config.optimizer.averages
    copies = 0 if config.precision == "fp32" and config.optimizer.zero_optimization.stage == 0 else 4
    return (copies + count * size) * sum(part.updated for part in parts)


def gradient_bytes(parts: Sequence[Held], config: NeoXConfig) -> int:
    """Of the gradients when the last backward is done."""
    stage = config.optimizer.zero_optimization.stage
    sums = config.sums_in_fp32 if config.optimizer.data_types else None
    return sum(
        training_memory(part.own, config.precision, zero_stage=stage, data_parallel_size=part.copies, sums_in_fp32=sums).gradients for part in parts
    )


def buffer_bytes(parts: Sequence[Held], config: NeoXConfig) -> int:
    """Of what DeepSpeed copies together before it is sent: at ZeRO 0 and 1 a bucket of sums, at 2 and 3 two buckets of gradients."""
    zero = config.optimizer.zero_optimization
    given = zero.model_dump()
    if all(part.copies == 1 for part in parts):
        return 0
    most = max(part.own for part in parts)
    if zero.stage >= 2:
        return 2 * int(min(given.get("reduce_bucket_size", FALLBACK_BUCKET), most)) * (4 if config.precision == "fp32" else 2)
    return min(FALLBACK_BUCKET, most) * gradient_size(config)


def gradient_size(config: NeoXConfig) -> int:
    """Bytes of a number in the messages that sum gradients."""
    return 4 if config.precision == "fp32" or config.optimizer.fp32_allreduce or config.sums_in_fp32 else 2
