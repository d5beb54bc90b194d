"""How the model is divided among processes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from megatron.config.model import ModelConfig
from megatron.config.moe import MoEConfig
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
    """Number of pipeline stages. Each holds some of the layers. 0 and 1 both mean no pipeline. 0: a checkpoint has one file for all layers. 1 and
    more: it has one file for each layer, except under ZeRO 3."""
    pipe_partition_method: str = "type:transformer|mlp"
    """How the layers are divided among the pipeline stages. `uniform`: as many layers on each. `parameters`: as many weights on each. `type:REGEX`:
    as many on each of the layers whose name in NeoX matches (such as ParallelTransformerLayerPipe); the others stay beside them."""
    model_parallel_size: PositiveInt = 1
    """Number of processes that share every layer (tensor parallelism). They divide the heads, the width of the MLPs, the experts and the
    vocabulary."""
    sequence_parallel: bool = False
    """With model_parallel_size of 2 or more: between the layers, each of these processes holds its part of every sequence (Korthikanti et al.,
    2022). It saves memory and changes no result."""
    moe_expert_parallel_size: PositiveInt = 1
    """Number of data-parallel processes that share the experts of a layer. Each token is sent to the process that holds its expert. It must divide
    the number of data-parallel processes and the number of experts."""
    moe_tensor_parallel: Literal["experts", "width"] = "experts"
    """With model_parallel_size of 2 or more: what its processes divide of a layer's experts. experts: each has some of them whole, as in GPT-NeoX.
    width: each has its part of every expert's hidden width, so that all have the same work whatever the routers choose; for moe_expert_type: grouped
    without biases. GPT-NeoX cannot read such a checkpoint; tools/ckpts/reshape.py writes one that it can."""
    distributed_backend: Literal["nccl", "gloo"] | None = None
    """Communication library. None: nccl with GPUs, gloo without GPUs. On a machine without GPUs, nccl is replaced by gloo."""

    @property
    def layout(self) -> Layout:
        """The sizes."""
        return Layout(self.model_parallel_size, max(1, self.pipe_parallel_size), self.moe_expert_parallel_size)

    def idle_keys(self) -> Iterator[tuple[str, str]]:
        """(key, what to say of it) for keys that were given and do nothing here."""
        if self.sequence_parallel and self.model_parallel_size == 1:
            yield "sequence_parallel", "has no effect: model_parallel_size is 1, so no process shares its layers"
        if self.moe_tensor_parallel != "experts" and self.model_parallel_size == 1:
            yield "moe_tensor_parallel", "has no effect: model_parallel_size is 1, so no process shares its experts"

    def check(self) -> Iterator[Problem]:
        method = self.pipe_partition_method
        if method not in ("uniform", "parameters") and not method.startswith("type:"):
            yield Problem(("pipe_partition_method",), "must be uniform, parameters, or type: and a regular expression")
        elif problem := _regex_problem(method.removeprefix("type:")):
            yield Problem(("pipe_partition_method",), problem)


def _regex_problem(pattern: str) -> str | None:
    """Why it is no regular expression. None: it is one."""
    try:
        re.compile(pattern)
    except re.error as error:
        return f"is no regular expression ({error})"
    return None


def division_problems(parallel: ParallelConfig, model: ModelConfig, moe: MoEConfig, zero_stage: int) -> Iterator[Problem]:
    """What of the model cannot be divided in this layout, and what would be the nearest layout that can. Uneven numbers are refused, not rounded."""
    layout = parallel.layout
    if layout.pipe > 1:
        yield from _pipeline_problems(parallel, model, zero_stage)
        if moe.has_experts and moe.moe_router_type == "recurrent":
            says = "must be 0 or 1 with moe_router_type recurrent: its GRU is one set of weights for all layers, and a stage has only some of them"
            yield Problem(("pipe_parallel_size", "moe_router_type"), says)
    if layout.tensor > 1:
        yield from _tensor_problems(layout.tensor, model, moe)
        if parallel.sequence_parallel and model.seq_length % layout.tensor:
            yield Problem(("sequence_parallel", "seq_length"), f"needs seq_length ({model.seq_length}) to be a multiple of {layout.tensor}")
        if layout.tensor > model.kv_heads and zero_stage > 0:
            yield Problem(
                ("model_parallel_size", "num_kv_heads", "zero_optimization.stage"),
                f"is more than num_kv_heads ({model.kv_heads}), so processes share key heads, and DeepSpeed's ZeRO would count these "
                f"twice in the norm of the gradients; use {model.kv_heads}, or zero_optimization.stage 0",
            )
    if layout.expert > 1 and not moe.has_experts:
        yield Problem(("moe_expert_parallel_size", "moe_num_experts"), "needs experts: give moe_num_experts, or use 1")
    elif layout.expert * layout.tensor > 1 and moe.has_experts:
        by_width = parallel.moe_tensor_parallel == "width" and layout.tensor > 1
        yield from _expert_problems(layout._replace(tensor=1) if by_width else layout, model, moe)
        if by_width:
            yield from _width_problems(layout.tensor, model, moe)
    if layout.expert > 1 and zero_stage == 3:
        yield Problem(
            ("moe_expert_parallel_size", "zero_optimization.stage"),
            "cannot be combined with zero_optimization.stage 3, whose processes all hold a part of every expert; use stage 0, 1 or 2",
        )


def _pipeline_problems(parallel: ParallelConfig, model: ModelConfig, zero_stage: int) -> Iterator[Problem]:
    stages, method = parallel.pipe_parallel_size, parallel.pipe_partition_method
    if zero_stage > 1:
        yield Problem(
            ("pipe_parallel_size", "zero_optimization.stage"),
            "a pipeline needs zero_optimization.stage 0 or 1, because the stages 2 and 3 give gradients and weights away before all "
            f"micro-batches are through; use zero_optimization.stage 1, or pipe_parallel_size: 0 with stage {zero_stage}",
        )
    if stages > model.num_layers:
        yield Problem(("pipe_parallel_size", "num_layers"), f"must be at most num_layers, because each stage needs a layer; use {model.num_layers}")
    names = part_names(model.num_layers, tied=not model.no_weight_tying)
    if method.startswith("type:") and not any(matches(method, name) for name in names):
        yield Problem(("pipe_partition_method",), f"matches none of the layers {', '.join(dict.fromkeys(names))}")


def part_names(num_layers: int, *, tied: bool) -> list[str]:
    """NeoX's names of all parts of the model by their number, which `type:` matches. Two of them are functions without weights."""
    layers = ["ParallelTransformerLayerPipe"] * num_layers
    head = "EmbeddingPipe" if tied else "ParallelLinearPipe"
    return ["EmbeddingPipe", "_pre_transformer_block", *layers, "_post_transformer_block", "NormPipe", head]


def matches(method: str, name: str) -> bool:
    """Whether the expression of `type:REGEX` matches a part's name."""
    return re.search(method.removeprefix("type:"), name, re.IGNORECASE) is not None


def _tensor_problems(size: int, model: ModelConfig, moe: MoEConfig) -> Iterator[Problem]:
    key = "model_parallel_size"
    if model.num_attention_heads % size:
        yield Problem(
            (key, "num_attention_heads"), f"must divide num_attention_heads ({model.num_attention_heads}); use {_divisor(model, moe, size)}"
        )
    elif model.kv_heads % size and size % model.kv_heads:
        yield Problem((key, "num_kv_heads"), f"must divide num_kv_heads ({model.kv_heads}), or be a multiple of it; use {_divisor(model, moe, size)}")


def _divisor(model: ModelConfig, moe: MoEConfig, size: int) -> int:
    """The largest number of processes up to `size` that heads and experts can be divided among."""
    numbers = [model.num_attention_heads, *(moe.expert_counts if moe.has_experts else ())]
    fitting = (n for n in range(size, 0, -1) if not any(number % n for number in numbers) and not (model.kv_heads % n and n % model.kv_heads))
    return next(fitting, 1)


def _expert_problems(layout: Layout, model: ModelConfig, moe: MoEConfig) -> Iterator[Problem]:
    for count in sorted(set(moe.expert_counts)):
        if count % layout.tensor:
            yield Problem(
                ("model_parallel_size", "moe_num_experts"),
                f"must divide the experts of a layer ({count}), because experts are shared out whole; use {_divisor(model, moe, layout.tensor)}",
            )
        elif count // layout.tensor % layout.expert:
            each = f"{count} experts / model_parallel_size ({layout.tensor}) = {count // layout.tensor}"
            fitting = max(n for n in range(1, layout.expert + 1) if count // layout.tensor % n == 0)
            yield Problem(("moe_expert_parallel_size", "moe_num_experts"), f"must divide the experts of a layer, and {each}; use {fitting}")


def _width_problems(size: int, model: ModelConfig, moe: MoEConfig) -> Iterator[Problem]:
    """What cannot be divided by width."""
    if moe.dispatcher == "library":
        says = f"{moe.kernel_backends['experts']} computes whole experts here; write moe_tensor_parallel: experts"
        yield Problem(("moe_tensor_parallel", "kernel_backends.experts"), says)
    if moe.moe_expert_type != "grouped":
        keys = ("moe_tensor_parallel", "moe_expert_type")
        yield Problem(keys, f"width divides experts of moe_expert_type: grouped, not {moe.moe_expert_type}; write moe_tensor_parallel: experts")
    if moe.moe_expert_bias:
        yield Problem(("moe_tensor_parallel", "moe_expert_bias"), "width divides experts without biases; write moe_tensor_parallel: experts")
    if (width := moe.expert_width(model)) % size:
        yield Problem(("model_parallel_size", "moe_tensor_parallel"), f"must divide the width of an expert ({width}) with moe_tensor_parallel: width")


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
