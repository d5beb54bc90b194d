"""How the model is divided among processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from megatron.config.section import NaturalInt, PositiveInt, Problem, Section


class ParallelConfig(Section):
    pipe_parallel_size: NaturalInt = 0
    """Number of pipeline stages. 0 and 1 both mean no pipeline. 0: a checkpoint has one file for all layers. 1: it has one file for each layer,
    except under ZeRO 3."""
    model_parallel_size: PositiveInt = 1
    """Number of processes that share one layer (tensor parallelism). It must be 1 in this version."""
    distributed_backend: Literal["nccl", "gloo"] | None = None
    """Communication library. None: nccl with GPUs, gloo without GPUs. On a machine without GPUs, nccl is replaced by gloo."""

    def check(self) -> Iterator[Problem]:
        if self.pipe_parallel_size > 1:
            yield Problem(
                ("pipe_parallel_size",),
                "pipeline parallelism is not part of this version; use 0 or 1 (several processes train with data parallelism and ZeRO)",
            )
        if self.model_parallel_size > 1:
            yield Problem(
                ("model_parallel_size",),
                "tensor parallelism is not part of this version; use 1 (several processes train with data parallelism and ZeRO)",
            )
