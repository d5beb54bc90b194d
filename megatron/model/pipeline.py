"""A pipeline stage: some of the model's layers on one process. It receives the state after the layers before it and sends on what it makes of it.

Shapes: B batch; S sequence; D model width; V padded vocabulary; X MoE layers before a stage; A auxiliary losses; E experts; G LoREs; I statistics;
C counts of scores.

What travels between two stages is a `LayerState`: forward the hidden states in one message and everything else in a second one, backward their
gradients in the same way. Losses and counts are values of the state here too, so the last stage has the report of the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from megatron.config.parallel import matches, part_names
from megatron.kernels.backends import check_names
from megatron.model.attention import LayerCache
from megatron.model.divide import Divider
from megatron.model.division import disowned
from megatron.model.embedding import Embedding, LossMask
from megatron.model.gpt import FIRST_LAYER, GPT, GPTOutput, InputError, draw_parts
from megatron.model.initialization import Initializer, build_initializer
from megatron.model.moe.routing import Decision
from megatron.model.positions import Places
from megatron.model.state import LayerState, RouterReport

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig
    from megatron.config.moe import MoEConfig


class Stage(GPT):
    """This process's parts of the model. `spans`: the numbers of the parts of every stage. `divider`: this process's part of each layer, and the
    processes of the pipeline.

    Weights have the names that they have in the whole model. If the head is tied to the embedding, the last stage has the word embeddings as well.
    """

    def __init__(
        self, model: ModelConfig, moe: MoEConfig, padded_vocab_size: int, init: Initializer, *, spans: Sequence[range], divider: Divider
    ) -> None:
        self.group = divider.groups.pipe
        super().__init__(model, moe, padded_vocab_size, init, divider, spans[self.group.rank])
        self.spans, self.tied = spans, not model.no_weight_tying
        self.hidden_size = model.hidden_size
        self.wants_usage = "joint_load_balance" in moe.moe_losses
        copies = [weight for weight, places in self.shared() if self.group.rank != places[0]]
        for name, weight in self.named_parameters(remove_duplicate=False):
            if any(weight is copy for copy in copies):
                weight.ds_pipe_replicated = True  # type: ignore[attr-defined]  # DeepSpeed's mark: another stage counts it in the norm of the gradients
                self.cuts[name] = disowned(self.cuts[name])

    def forward(
        self,
        tokens_BS: Tensor,
        *,
        labels_BS: Tensor | None = None,
        loss_mask: LossMask | None = None,
        document_BS: Tensor | None = None,
        cache: Sequence[LayerCache] | None = None,
        earlier_load_XE: Tensor | None = None,
    ) -> GPTOutput:
        """As the whole model's `forward`, for evaluation: there is no backward pass through it. Every process of the pipeline calls it with the same.

        Without labels every stage gets the logits. With labels the last stage gets the losses and the report, and the others get zeros. The cache
        has an entry for each layer of the model.
        """
        with torch.no_grad():
            received = None if self.is_first else self.receive(tuple(tokens_BS.shape))
            inputs: dict[str, Any] = {"labels_BS": labels_BS, "loss_mask": loss_mask, "document_BS": document_BS}
            output = self.run(tokens_BS, received, cache=cache, earlier_load_XE=earlier_load_XE, **inputs)
            if isinstance(output, LayerState):
                self.send(output)
        if labels_BS is None:
            logits_BSV = output.logits_BSV if isinstance(output, GPTOutput) else None
            return self.nothing(tokens_BS)._replace(logits_BSV=self._everywhere(logits_BSV, tokens_BS), loss=None, lm_loss=None, token_loss_BS=None)
        return output if isinstance(output, GPTOutput) else self.nothing(tokens_BS)

    def run(
        self,
        tokens_BS: Tensor,
        received: LayerState | None,
        *,
        cache: Sequence[LayerCache] | None = None,
        earlier_load_XE: Tensor | None = None,
        **beside: Any,
    ) -> LayerState | GPTOutput:
        """What this stage alone makes of `received` (None: it is the first): the state to send on, or the output of the model at the last stage.

        `beside`: labels_BS, loss_mask and document_BS, as `forward` takes them.
        """
        labels_BS, loss_mask, document_BS = (beside.get(name) for name in ("labels_BS", "loss_mask", "document_BS"))
        self._check(tokens_BS, {"labels": labels_BS, "loss mask": None if loss_mask is None else loss_mask.mask_BS, "documents": document_BS}, cache)
        places = self._places(document_BS, cache)
        if received is None:
            state = self._begin(tokens_BS, places, earlier_load_XE)
        else:
            state = received._replace(earlier_load_XE=earlier_load_XE)
        state = state._replace(documents=self._documents(tokens_BS, document_BS))
        state = self._advance(state, places, cache, tokens_BS.shape[1])
        return self._end(state, labels_BS, loss_mask) if self.is_last else state

    def last_logits(self, tokens_BS: Tensor, *, cache: Sequence[LayerCache]) -> Tensor:
        """As the whole model's, on every stage. Every process of the pipeline calls it with the same tokens."""
        with torch.no_grad():
            self._check(tokens_BS, {}, cache)
            places = self._places(None, cache)
            state = self._begin(tokens_BS, places, None) if self.is_first else self.receive(tuple(tokens_BS.shape))
            state = state._replace(documents=self._documents(tokens_BS, None))
            state = self._advance(state, places, cache, tokens_BS.shape[1])
            if not self.is_last:
                self.send(state)
            logits_BSV = self._head(state.hidden_BSD[:, -1:], None)[0] if self.is_last else None
        return self._everywhere(logits_BSV, tokens_BS[:, -1:])[:, 0]

    def chosen_logits(self, tokens_BS: Tensor, chosen_BS: Tensor, *, cache: Sequence[LayerCache] | None = None) -> Tensor:
        """As the whole model's, on every stage. Every process of the pipeline calls it with the same."""
        with torch.no_grad():
            self._check(tokens_BS, {"choice": chosen_BS}, cache)
            places = self._places(None, cache)
            state = self._begin(tokens_BS, places, None) if self.is_first else self.receive(tuple(tokens_BS.shape))
            state = self._advance(state, places, cache, tokens_BS.shape[1])
            if not self.is_last:
                self.send(state)
            logits_1NV = self._logits_at(state.hidden_BSD, chosen_BS)[None] if self.is_last else None
        return self._everywhere(logits_1NV, tokens_BS[chosen_BS][None])[0]

    def traced_logits(self, tokens_BS: Tensor, *, cache: Sequence[LayerCache]) -> tuple[Tensor, tuple[Decision, ...]]:
        """Raises InputError."""
        raise InputError(
            "what the routers decided was asked for, but a stage of a pipeline has some of the layers only; run the model on one process"
        )

    def _advance(self, state: LayerState, places: Places, cache: Sequence[LayerCache] | None, length: int) -> LayerState:
        """The state after this stage's layers for `length` tokens."""
        state = self._run_layers(state, places, cache)
        for entry in cache or ():
            entry.length = places.start + length  # also those of other stages, so that every stage knows the position
        return state

    def nothing(self, tokens_BS: Tensor) -> GPTOutput:
        """The output where another stage has the losses: zeros."""
        zero = torch.zeros((), device=tokens_BS.device)
        report = RouterReport(*(part.to(tokens_BS.device) for part in self.empty_report()))
        return GPTOutput(zero, zero, None, report, torch.zeros(tokens_BS.shape, device=tokens_BS.device))

    def _everywhere(self, logits_BSV: Tensor | None, tokens_BS: Tensor) -> Tensor:
        if logits_BSV is None:
            logits_BSV = torch.empty(*tokens_BS.shape, self.vocab_size, dtype=self.dtype, device=tokens_BS.device)
        logits_BSV = logits_BSV.detach().contiguous()
        torch.distributed.broadcast(logits_BSV, self.group.ranks[-1], group=self.group.handle)
        return logits_BSV

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the hidden states."""
        return next(self.parameters()).dtype

    def receive(self, tokens_shape: tuple[int, ...]) -> LayerState:
        """The state of the stage before for a micro-batch of this shape. Gradients are kept for it if they are enabled."""
        if len(tokens_shape) != 2:
            raise InputError(f"tokens of shape {tokens_shape}: must be [batch, sequence]")
        device, rows = next(self.parameters()).device, self.moe_rows_before
        batch, length = tokens_shape
        own = length // self.region.group.size if self.region.sequence else length
        hidden_BSD = torch.empty(batch, own, self.hidden_size, dtype=self.dtype, device=device)
        self._receive(hidden_BSD, self.group.rank - 1)
        shapes = [(rows, width) for width in self.report_widths]
        sizes = [(shapes[1], torch.int64), (shapes[2], torch.int64), (shapes[0], torch.float32), (shapes[3], torch.float32)]
        sizes += [((2, self.report_widths[1]), torch.float32)] if self.wants_usage and rows else []
        scored = [((rows, self.scores_width), torch.int64)] if self.scores_width and rows else []
        received = self._receive_packed(scored + sizes, device)
        loads, lores, losses, statistics, *usage = received[len(scored) :]
        state = LayerState(
            hidden_BSD,
            RouterReport(losses, loads, lores, statistics),
            usage_2E=usage[0] if usage else None,
            scores_XC=received[0] if scored else None,
        )
        for tensor in carriers(state) if torch.is_grad_enabled() else ():
            tensor.requires_grad_()
        return state

    def send(self, state: LayerState) -> None:
        """Sends the state to the next stage."""
        report = state.report
        self._send(state.hidden_BSD.detach(), self.group.rank + 1)
        packed = [report.expert_load_XE, report.lore_load_XG, report.aux_losses_XA, report.statistics_XI]
        packed += [] if state.usage_2E is None else [state.usage_2E]
        if state.scores_XC is not None:
            packed = [pad(state.scores_XC, (0, self.scores_width - state.scores_XC.shape[1])), *packed]
        self._send_packed(packed, self.group.rank + 1)

    def send_gradients(self, received: LayerState) -> None:
        """Sends the gradients of a received state to the stage that sent it. A value that nothing depends on has the gradient 0."""
        first, *others = (torch.zeros_like(value) if value.grad is None else value.grad for value in carriers(received))
        self._send(first, self.group.rank - 1)
        self._send_packed(others, self.group.rank - 1)

    def receive_gradients(self, sent: LayerState) -> list[Tensor]:
        """The gradients of the `carriers` of a state that this stage sent."""
        hidden_BSD, *others = carriers(sent)
        gradient_BSD = torch.empty_like(hidden_BSD, memory_format=torch.contiguous_format)
        self._receive(gradient_BSD, self.group.rank + 1)
        sizes = [(tuple(value.shape), value.dtype) for value in others]
        return [gradient_BSD, *self._receive_packed(sizes, hidden_BSD.device, self.group.rank + 1)]

    def shared(self) -> list[tuple[nn.Parameter, list[int]]]:
        """The weights that other stages have as well, in the same order on all of them, each with the stages that have it (from 0)."""
        found: list[tuple[nn.Parameter, list[int]]] = []
        if "0" in self.sequential and self.tied:
            words = cast(Embedding, self.sequential["0"]).word_embeddings
            found.append((cast(nn.Parameter, words.weight), [0, len(self.spans) - 1]))
        tables = [layer.attention.rpe for layer in self.layers[:1]]
        if tables and tables[0] is not None:
            layers = range(FIRST_LAYER, FIRST_LAYER + self.num_layers)
            found.append((tables[0].weight, [place for place, span in enumerate(self.spans) if set(span) & set(layers)]))
        return [(weight, places) for weight, places in found if len(places) > 1]

    def add_up(self, tensor: Tensor, places: Sequence[int]) -> None:
        """Puts the sum over some stages in place of `tensor`, the same bits on each of them. All of these stages call it."""
        first, *others = places
        if self.group.rank != first:
            self._send(tensor, first)
            self._receive(tensor, first)
            return
        part = torch.empty_like(tensor)
        for place in others:
            self._receive(part, place)
            tensor.add_(part)
        for place in others:
            self._send(tensor, place)

    def _send(self, tensor: Tensor, place: int) -> None:
        if tensor.numel():
            torch.distributed.send(tensor.contiguous(), self.group.ranks[place], group=self.group.handle)

    def _receive(self, tensor: Tensor, place: int) -> None:
        if tensor.numel():
            torch.distributed.recv(tensor, self.group.ranks[place], group=self.group.handle)

    def _send_packed(self, tensors: Sequence[Tensor], place: int) -> None:
        """One message of bytes for all of them, those of 8-byte numbers first."""
        if tensors:
            self._send(torch.cat([tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in tensors]), place)

    def _receive_packed(self, sizes: Sequence[tuple[tuple[int, ...], torch.dtype]], device: torch.device, place: int | None = None) -> list[Tensor]:
        """As they were packed. `place` None: from the stage before."""
        lengths = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in sizes]
        packed = torch.empty(sum(lengths), dtype=torch.uint8, device=device)
        self._receive(packed, self.group.rank - 1 if place is None else place)
        parts = packed.split(lengths) if lengths else ()
        return [part.view(dtype).view(shape).clone() for part, (shape, dtype) in zip(parts, sizes, strict=True)]


def carriers(state: LayerState) -> list[Tensor]:
    """The values of a state through which gradients go: hidden states, auxiliary losses (if there are any), usage (if a loss needs it)."""
    losses_XA = state.report.aux_losses_XA
    return [state.hidden_BSD, *([losses_XA] if losses_XA.numel() else []), *([] if state.usage_2E is None else [state.usage_2E])]


def build_stage(
    model: ModelConfig,
    moe: MoEConfig,
    padded_vocab_size: int,
    *,
    seed: int,
    method: str,
    divider: Divider,
) -> Stage:
    """This process's stage, with the weights that the whole model of `build_model` has. All layers are drawn, one at a time.

    Raises KernelUnavailable, and PartitionError if the layers cannot be divided so.
    """
    check_names(moe.kernel_backends)
    spans = divide_layers(model, moe, padded_vocab_size, method=method, stages=divider.groups.pipe.size)
    return Stage(model, moe, padded_vocab_size, build_initializer(model, seed), spans=spans, divider=divider)


class PartitionError(ValueError):
    """The layers cannot be divided among the stages as the configuration asks."""


def divide_layers(model: ModelConfig, moe: MoEConfig, padded_vocab_size: int, *, method: str, stages: int) -> list[range]:
    """The numbers of the parts on each stage, as DeepSpeed's PipelineModule and NeoX divide them. Raises PartitionError.

    `method`: `uniform` (as many parts on each), `parameters` (as many weights), or `type:REGEX` (as many parts whose name in NeoX matches).
    """
    from deepspeed.runtime.utils import partition_balanced, partition_uniform

    names = part_names(model.num_layers, tied=not model.no_weight_tying)
    if method == "uniform":
        bounds = partition_uniform(len(names), stages)
    elif method == "parameters":
        bounds = partition_balanced(parameter_counts(model, moe, padded_vocab_size), stages)
    else:
        bounds = partition_balanced([int(matches(method, name)) for name in names], stages)
    spans = [range(begin, end) for begin, end in pairwise(bounds)]
    empty = [str(stage) for stage, span in enumerate(spans) if not set(span) - {1, model.num_layers + 2}]
    if empty:
        raise PartitionError(
            f"'pipe_partition_method' = {method}: leaves stage {', '.join(empty)} of {stages} without layers; use another method or fewer stages"
        )
    return spans


def parameter_counts(model: ModelConfig, moe: MoEConfig, padded_vocab_size: int) -> list[int]:
    """Number of weights of all parts by their number, counted on a model without memory."""

    def nothing(matrix: Tensor) -> None:
        """Draws nothing."""

    counts = [0] * (model.num_layers + 5)
    with torch.device("meta"):
        for number, part in draw_parts(model, moe, padded_vocab_size, Initializer(nothing, nothing, nothing, lambda std: nothing)):
            counts[number] = sum(parameter.numel() for parameter in part.parameters())
    if not model.no_weight_tying:
        counts[-1] = counts[0]
    return counts
