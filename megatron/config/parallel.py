"""How the model is spread over processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from megatron.config.section import NaturalInt, PositiveInt, Problem, Section


class ParallelConfig(Section):
    pipe_parallel_size: NaturalInt = 0
    """Pipeline stages; 0 and 1 both mean no pipeline. With 1 checkpoints hold a file for each layer (except under ZeRO 3), with 0 one for all."""
    model_parallel_size: PositiveInt = 1
    """Processes that share one layer (tensor parallelism); 1 for now."""
    distributed_backend: Literal["nccl", "gloo"] | None = None
    """Communication library. None: nccl with GPUs, gloo without; nccl on a machine without GPUs means gloo."""

    def check(self) -> Iterator[Problem]:
        if self.pipe_parallel_size > 1:
            yield Problem(
                ("pipe_parallel_size",), "pipeline parallelism is not part of this version; use 0 or 1 (data parallelism and ZeRO are there)"
            )
        if self.model_parallel_size > 1:
            yield Problem(("model_parallel_size",), "tensor parallelism is not part of this version; use 1 (data parallelism and ZeRO are there)")
