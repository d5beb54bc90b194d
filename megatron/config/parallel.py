"""How the model is divided among processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from megatron.config.section import NaturalInt, PositiveInt, Problem, Section


class Layout(NamedTuple):
    """How many processes share the model, by kind of parallelism. What is left of the processes is data parallelism."""

    tensor: int = 1
    """Processes that share every layer."""
    pipe: int = 1
    """Pipeline stages."""
    expert: int = 1
    """Data-parallel processes that share the experts."""

    @property
    def model(self) -> int:
        """Processes that hold one copy of what is not an expert."""
        return self.tensor * self.pipe


ONE = Layout()
"""Every process holds the whole model."""


class ParallelConfig(Section):
    pipe_parallel_size: NaturalInt = 0
    """Number of pipeline stages. 0 and 1 both mean no pipeline. 0: a checkpoint has one file for all layers. 1: it has one file for each layer,
    except under ZeRO 3."""
    model_parallel_size: PositiveInt = 1
    """Number of processes that share every layer (tensor parallelism). They divide the heads, the width of the MLPs, the experts and the
    vocabulary."""
    sequence_parallel: bool = False
    """With model_parallel_size of 2 or more: between the layers, each of these processes holds its part of every sequence (Korthikanti et al.,
    2022). It saves memory and changes no result."""
    moe_expert_parallel_size: PositiveInt = 1
    """Number of data-parallel processes that share the experts of a layer. Each token is sent to the process that holds its expert. It must divide
    the number of data-parallel processes and the number of experts."""
    distributed_backend: Literal["nccl", "gloo"] | None = None
    """Communication library. None: nccl with GPUs, gloo without GPUs. On a machine without GPUs, nccl is replaced by gloo."""

    @property
    def layout(self) -> Layout:
        """The sizes."""
        return Layout(self.model_parallel_size, max(1, self.pipe_parallel_size), self.moe_expert_parallel_size)

    def check(self) -> Iterator[Problem]:
        if self.pipe_parallel_size > 1:
            yield Problem(
                ("pipe_parallel_size",),
                "pipeline parallelism is not part of this version; use 0 or 1 (several processes train with data parallelism and ZeRO)",
            )


def layout_problem(layout: Layout, world_size: int) -> str | None:
    """Why so many processes cannot have this layout, with the nearest numbers that could. None: they can."""
    for key, value in zip(("model_parallel_size", "pipe_parallel_size", "moe_expert_parallel_size"), layout, strict=True):
        if value < 1:
            return f"'{key}' = {value}: must be at least 1"
    product = f"model_parallel_size ({layout.tensor}) x pipe_parallel_size ({layout.pipe}) = {layout.model}"
    if world_size % layout.model:
        below, above = world_size // layout.model * layout.model, -(-world_size // layout.model) * layout.model
        start = f"{below} or {above}" if below else f"{above}"
        return f"{product} processes hold the model once, and {world_size} process(es) cannot be divided by that; start {start} processes"
    data = world_size // layout.model
    if data % layout.expert:
        fitting = max(size for size in range(1, min(layout.expert, data) + 1) if data % size == 0)
        unit = layout.model * layout.expert
        return (
            f"'moe_expert_parallel_size' = {layout.expert}: must divide the data-parallel processes, and there are {data} of them "
            f"({world_size} process(es), {product}); use {fitting}, or start {-(-world_size // unit) * unit} processes"
        )
    return None
