"""One process of a layout of any size, in this process: its groups, its part of the model, and a step of it. Nothing is allocated or sent.

PyTorch's fake process group takes the part of the others. The model lies on the meta device, so its tensors have shapes and no values.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.analysis.plan.trace import Recorder, Trace, kept_bytes
from megatron.config.neox import NeoXConfig
from megatron.kernels.linear_cross_entropy.chunked import meta_stands_for
from megatron.kernels.permute import Order
from megatron.model.attention.choice import choose_attention
from megatron.model.attention.context import KernelAttend
from megatron.model.divide import Divider
from megatron.model.gpt import GPT, GPTOutput
from megatron.model.initialization import Initializer
from megatron.model.moe.dispatch.all_to_all import AllToAllDispatcher
from megatron.model.moe.dispatch.transport import Counts, ExchangeTransport, ExpertShare
from megatron.model.moe.layer import MoELayer
from megatron.model.pipeline import Stage, carriers, divide_layers
from megatron.model.recompute import AS_THEY_ARE, KeptInputs
from megatron.model.state import LayerState
from megatron.mpu.exchange import Splits
from megatron.mpu.groups import ALONE, Group, Groups, Process
from megatron.mpu.topology import Topology
from megatron.training.loss import poison_if_not_finite

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Step:
    """What a micro-batch of a process looks like. `skew`: rows of the process over the mean. `device`: for which kernels the model is prepared."""

    micro_batch: int
    skew: float = 1.0
    device: str = "cuda"


@contextmanager
def fake_process(topology: Topology) -> Iterator[Groups]:
    """Inside it, this process is the one that `topology` says, among others that do not exist. Raises RuntimeError inside a real process group."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if torch.distributed.is_initialized():
        raise RuntimeError("a plan is made in a process of its own: this one has joined a process group")
    before = Process.groups
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=topology.rank, world_size=topology.world_size)
    try:
        Process.groups = own_groups(topology, lambda ranks: torch.distributed.new_group(list(ranks)))
        yield Process.groups
    finally:
        Process.groups = before
        torch.distributed.destroy_process_group()


def own_groups(topology: Topology, make: Callable[[tuple[int, ...]], Any] = lambda ranks: None) -> Groups:
    """The groups of one process; those of the others are not made. `make` makes PyTorch's group; without it nothing can be sent, only built."""
    made: dict[tuple[int, ...], Any] = {}
    own = {}
    for kind in Groups._fields:
        ranks = next(tuple(ranks) for ranks in topology.group_ranks(kind) if topology.rank in ranks)
        if len(ranks) > 1 and ranks not in made:
            made[ranks] = make(ranks)
        own[kind] = Group(ranks, ranks.index(topology.rank), made.get(ranks))
    return Groups(**own)


def group_kinds(groups: Groups) -> dict[str, str]:
    """The name of each process group -> its kind. The same processes may be a group of several kinds: the first one counts."""
    kinds: dict[str, str] = {}
    for kind in ("tensor", "pipe", "expert", "expert_data", "data", "model"):
        handle = getattr(groups, kind).handle
        if handle is not None:
            kinds.setdefault(handle.group_name, kind)
    return kinds


def build_part(config: NeoXConfig, vocabulary: int, groups: Groups) -> GPT:
    """The part of the model that a process trains, on the meta device and in the model's format. Raises PartitionError."""
    parallel = config.parallel
    divider = Divider(groups, sequence=parallel.sequence_parallel, by_width=parallel.moe_tensor_parallel == "width")
    nothing = Initializer(_nothing, _nothing, _nothing, lambda std: _nothing)
    with torch.device("meta"):
        if groups.pipe.size == 1:
            model = GPT(config.model, config.moe, vocabulary, nothing, divider)
        else:
            spans = divide_layers(config.model, config.moe, vocabulary, method=parallel.pipe_partition_method, stages=groups.pipe.size)
            model = Stage(config.model, config.moe, vocabulary, nothing, spans=spans, divider=divider)
    return model.to(dtype=DTYPES[config.precision])


def prepare(config: NeoXConfig, model: GPT, groups: Groups, step: Step) -> None:
    """What the engine sets on a model before training: recomputation and implementations; and transports that need no values."""
    training, equal = config.training, ALONE if config.parallel.sequence_parallel else groups.tensor
    if training.checkpoint_activations:
        on_cpu = training.keeps_inputs_on_cpu and step.device != "cpu"
        kept = KeptInputs(group=equal if training.divides_kept_inputs else ALONE, on_cpu=on_cpu)
        model.enable_activation_checkpointing(training.checkpoint_num_layers, AS_THEY_ARE if on_cpu else kept)
    model.recompute_modules(training.recompute_modules)
    model.loss_backend = "auto"
    meta_stands_for("cuda" if step.device == "cuda" else "cpu")
    if step.device == "cpu":
        quiet(choose_attention, config.model, model, config.moe.kernel_backends.get("attention", "auto"), torch.device("cpu"))
    for layer in model.layers:
        layer.attention.dropout = 0.0  # on a GPU it is a part of the attention's kernel and keeps nothing
        if step.device != "cpu":
            layer.attention.attend = KernelAttend(layer.attention.attend, "auto")  # what flash attention keeps
        if isinstance(layer.mlp, MoELayer) and isinstance(layer.mlp.dispatcher, AllToAllDispatcher):
            layer.mlp.dispatcher.use(PlannedTransport(layer.mlp.dispatcher.share, layer.mlp.dispatcher.backend, step.skew))


def quiet(function: Any, *given: Any) -> None:
    """Calls it without its log lines."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        function(*given)
    finally:
        logging.disable(before)


class PlannedTransport(ExchangeTransport):
    """Rows that come in equal numbers from all processes, `skew` times as many as on the mean process."""

    def __init__(self, share: ExpertShare, backend: str, skew: float) -> None:
        super().__init__(share, backend)
        self.skew = skew

    def route(self, order: Order, counts: Counts) -> tuple[Splits, Tensor, Tensor]:
        """As the exchange's own, without looking at values."""
        processes, rows = self.share.expert.size, order.order_R.shape[0]
        sent = _even(rows, processes)
        received = _even(round(rows * (self.skew if processes > 1 else 1.0)), processes)
        order_Q = order.order_R.new_empty(sum(received))
        return Splits(sent, received), order_Q, torch.empty_like(order_Q)


def trace_step(config: NeoXConfig, model: GPT, groups: Groups, step: Step) -> Trace:
    """Forward and backward of one micro-batch. `prepare` has been called."""
    model.train()
    moe, tensor = config.moe, groups.tensor.size
    by_number = tensor > 1 and config.parallel.moe_tensor_parallel == "experts"
    real = (step.skew / tensor if by_number else 1.0) * (1 / moe.num_choices if moe.has_experts and moe.moe_router_type == "top_p" else 1.0)
    recorder = Recorder(group_kinds(groups), real=min(1.0, real))
    tokens_BS = torch.empty(step.micro_batch, config.model.seq_length, dtype=torch.int64, device="meta")
    recorder.leave_out(iter([*model.parameters(), *model.buffers()]))
    received = _received(model, tokens_BS)
    with recorder, kept_bytes(iter([*model.parameters(), *model.buffers()])) as kept:
        output = _forward(model, tokens_BS, received)
        recorder.trace.kept = kept()
        values = [poison_if_not_finite(output.loss)] if isinstance(output, GPTOutput) and output.loss is not None else carriers(output)  # type: ignore[arg-type]
        for weight in model.parameters():
            weight.register_post_accumulate_grad_hook(_forget)
        torch.autograd.backward([value for value in values if value.requires_grad], [torch.empty_like(v) for v in values if v.requires_grad])
    return recorder.trace


def _forget(weight: Tensor) -> None:
    """Gradients of weights are counted from the weights, not from the trace."""
    weight.grad = None


def _received(model: GPT, tokens_BS: Tensor) -> LayerState | None:
    """What the stage before would send. None: there is none."""
    return None if model.is_first or not isinstance(model, Stage) else model.receive(tuple(tokens_BS.shape))


def _forward(model: GPT, tokens_BS: Tensor, received: LayerState | None) -> GPTOutput | LayerState:
    if isinstance(model, Stage):
        return model.run(tokens_BS, received, labels_BS=tokens_BS)
    output: GPTOutput = model(tokens_BS, labels_BS=tokens_BS)
    return output


def _even(rows: int, processes: int) -> list[int]:
    return [(place + 1) * rows // processes - place * rows // processes for place in range(processes)]


def _nothing(matrix: Tensor) -> None:
    """Draws nothing."""
