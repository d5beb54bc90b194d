"""The language model: a list of layers under NeoX's names, so that its state dictionary is NeoX's on-disk layout without pipelining.

Shapes: B batch; S sequence; D model width; V padded vocabulary; A auxiliary losses; X MoE layers; E experts;
C counts of scores.

    sequential.0            embedding            sequential.{L+3}    final norm
    sequential.2 to L+1     transformer layers   sequential.{L+4}    head, where it is not tied to the embedding
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from megatron.kernels.backends import check_names
from megatron.model.attention import LayerCache
from megatron.model.divide import Divider
from megatron.model.embedding import Embedding, FinalLinear, LossMask, Targets, build_embedding, project
from megatron.model.initialization import Initializer, build_initializer
from megatron.model.layer import TransformerLayer, build_layer
from megatron.model.moe.layer import STATISTICS, MoELayer
from megatron.model.moe.routing import Decision
from megatron.model.moe.surroundings import Documents, documents_of
from megatron.model.norms import build_norm
from megatron.model.positions import Places, positions_in_documents
from megatron.model.positions.rpe import RelativePositions
from megatron.model.recompute import AS_THEY_ARE, KeptInputs, recompute_modules, run_layers
from megatron.model.state import LayerState, RouterReport
from megatron.mpu.groups import Groups

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig
    from megatron.config.moe import MoEConfig

FIRST_LAYER = 2


class InputError(ValueError):
    """Tokens, labels, mask or cache do not fit the model or each other."""


class GPTOutput(NamedTuple):
    """What one forward gives."""

    loss: Tensor | None
    """lm_loss plus the auxiliary losses times their coefficients; None without labels."""
    lm_loss: Tensor | None
    """Mean cross entropy, weighted by the loss mask (see LossMask for what it is divided by); None without labels."""
    logits_BSV: Tensor | None
    """None with labels: the loss is computed without holding them."""
    report: RouterReport
    """Auxiliary losses, loads and statistics of each MoE layer."""
    token_loss_BS: Tensor | None
    """Cross entropy of each token, without mask and gradient; None without labels."""
    scores_XC: Tensor | None = None
    """int64: what `GPT.update_balance` needs beside the load. None: no router of this model counts scores."""

    @property
    def aux_losses_A(self) -> Tensor:
        """float32, unweighted, summed over the MoE layers, in the order of `moe_losses`."""
        return self.report.aux_losses_XA.sum(0)


class FinalNorm(nn.Module):
    """The norm before the head, under NeoX's name."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.norm = build_norm(model)

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        """Same shape."""
        return self.norm(hidden_BSD)


class GPT(nn.Module):
    """Embedding, layers, norm, head. `span`: the numbers of those that this process keeps; the others are drawn as well, and dropped. None: all."""

    def __init__(
        self,
        model: ModelConfig,
        moe: MoEConfig,
        padded_vocab_size: int,
        init: Initializer,
        divider: Divider | None = None,
        span: range | None = None,
    ) -> None:
        super().__init__()
        divider = divider or Divider(Groups())
        self.num_layers, self.max_positions, self.vocab_size = model.num_layers, model.max_positions, padded_vocab_size
        self.coefficients = tuple(moe.moe_losses.values())
        sections = moe.for_layers(model.num_layers)
        self.is_first, self.is_last = span is None or 0 in span, span is None or model.num_layers + 4 in span
        parts: dict[str, nn.Module] = {}
        num_lores = self.scores_width = 0
        for number, part in draw_parts(model, moe, padded_vocab_size, init):
            if isinstance(part, TransformerLayer) and isinstance(part.mlp, MoELayer):
                num_lores = max(num_lores, getattr(part.mlp.experts, "num_lores", 0))
                self.scores_width = max(self.scores_width, part.mlp.scores_width)
            if span is None or number in span or (number == 0 and self.is_last and not model.no_weight_tying):
                if span is not None and number not in span and hasattr(part, "position_embeddings"):
                    del part.position_embeddings  # the head is tied to the words alone
                divider.part(part, f"sequential.{number}", model, sections.get(number - FIRST_LAYER))
                parts[str(number)] = part
        self.sequential = nn.ModuleDict(parts)
        self.cuts, self.region = divider.cuts, divider.region
        """What this process holds of every weight, and how it shares the layers with others."""
        self.moe_rows = len(sections)
        """MoE layers of the whole model."""
        self.moe_rows_before = 0 if span is None else sum(FIRST_LAYER + i < span.start for i in sections)
        """MoE layers before those that this process keeps."""
        num_experts = max((section.num_choices for section in sections.values()), default=0)
        self.wants_earlier_load = "global_load_balance" in moe.moe_losses
        """Whether a loss looks at the step's earlier micro-batches."""
        self.report_widths = (len(self.coefficients), num_experts, num_lores, len(STATISTICS))
        self.loss_backend = moe.kernel_backends.get("linear_cross_entropy", "auto")
        self.recompute_layers, self.kept_inputs = 0, AS_THEY_ARE
        self.separate_attention = self.separate_positions = False
        self.wants_documents = any(getattr(module, "wants_documents", False) for module in self.modules())
        """Whether a router looks at the documents of the tokens."""

    @property
    def layers(self) -> list[TransformerLayer]:
        """The transformer layers that this process has, in order."""
        return [self.sequential[str(FIRST_LAYER + i)] for i in self.layer_numbers]  # type: ignore[misc]

    @property
    def layer_numbers(self) -> list[int]:
        """Which of the model's transformer layers they are, from 0."""
        return [i for i in range(self.num_layers) if str(FIRST_LAYER + i) in self.sequential]

    def empty_report(self) -> RouterReport:
        """The report of the whole model's MoE layers for no tokens, on the CPU."""
        return LayerState.start(torch.empty(0), widths=self.report_widths, rows=self.moe_rows).report

    def update_balance(self, expert_load_XE: Tensor, scores_XC: Tensor | None = None) -> None:
        """After a step, changes the biases and thresholds that balance the load of the routers.

        `expert_load_XE`, `scores_XC`: those of the whole step, over all processes. None: no router counts its scores.
        """
        moe_layers = [layer.mlp for layer in self.layers if isinstance(layer.mlp, MoELayer)]
        for row, moe in enumerate(moe_layers, self.moe_rows_before):
            balance: Any = getattr(moe.router, "balance", None)
            if moe.scores_width and scores_XC is not None:
                balance.update_from_scores(scores_XC[row, : moe.scores_width])
            elif balance is not None and not moe.scores_width:
                balance.update(expert_load_XE[row, : moe.context.num_experts])

    def grow(self, done: float) -> None:
        """Sets what grows in training for the forwards that follow: the number of experts per token. `done`: the part of the steps that is done."""
        for layer in self.layers:
            if (growth := getattr(getattr(layer.mlp, "router", None), "growth", None)) is not None:
                growth.update(done)

    def weigh_losses(self, coefficients: Sequence[float]) -> None:
        """Sets the coefficients of the auxiliary losses, in the order of `moe_losses`, for the forwards that follow."""
        self.coefficients = tuple(coefficients)

    def enable_activation_checkpointing(self, num_layers: int = 1, kept: KeptInputs = AS_THEY_ARE) -> None:
        """In training, keeps only the inputs of each group of `num_layers` layers, as `kept` says. The backward computes the other values again."""
        if num_layers < 1:
            raise InputError(f"checkpoint_num_layers = {num_layers}: must be at least 1")
        self.recompute_layers, self.kept_inputs = num_layers, kept

    def recompute_modules(self, names: Sequence[str]) -> None:
        """In training, keeps only the inputs of these modules of every layer (names of `recompute.MODULES`). Call it once."""
        recompute_modules(self.layers, names)

    def separate_documents(self, *, attention: bool, positions: bool) -> None:
        """Sets the use of `document_BS` in a forward: a token attends to its own document only; positions start again at every document."""
        self.separate_attention, self.separate_positions = attention, positions

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
        """Losses with labels, logits without. With a cache (one entry for each layer), the tokens continue those that it holds, and are added to it.

        `document_BS` numbers the tokens' documents, for what `separate_documents` asked for; None: they are of one. `earlier_load_XE` is the expert
        load of the step's earlier micro-batches over all processes, for losses over the global batch; None in the first.
        """
        self._check(tokens_BS, {"labels": labels_BS, "loss mask": None if loss_mask is None else loss_mask.mask_BS, "documents": document_BS}, cache)
        places = self._places(document_BS, cache)
        state = self._begin(tokens_BS, places, earlier_load_XE)._replace(documents=self._documents(tokens_BS, document_BS))
        return self._end(self._run_layers(state, places, cache), labels_BS, loss_mask)

    def last_logits(self, tokens_BS: Tensor, *, cache: Sequence[LayerCache]) -> Tensor:
        """logits_BV of the position after the tokens, which continue those in the cache and are added to it. No other position's logits are computed,
        so a long prompt needs no memory for them.
        """
        return self._after_last(tokens_BS, cache, None)[0]

    def chosen_logits(self, tokens_BS: Tensor, chosen_BS: Tensor, *, cache: Sequence[LayerCache] | None = None) -> Tensor:
        """logits_NV of the N positions where `chosen_BS` is True, in the order of the rows. No other position's logits are computed.

        With a cache the tokens continue those that it holds, and are added to it.
        """
        self._check(tokens_BS, {"choice": chosen_BS}, cache)
        places = self._places(None, cache)
        state = self._run_layers(self._begin(tokens_BS, places, None), places, cache)
        return self._logits_at(state.hidden_BSD, chosen_BS)

    def _logits_at(self, hidden_BSD: Tensor, chosen_BS: Tensor) -> Tensor:
        if self.region.sequence:  # this process has the hidden states of some positions only
            return self._head(hidden_BSD, None)[0][chosen_BS]
        return self._head(hidden_BSD[chosen_BS][None], None)[0][0]

    def traced_logits(self, tokens_BS: Tensor, *, cache: Sequence[LayerCache]) -> tuple[Tensor, tuple[Decision, ...]]:
        """`last_logits`, and what the routers of each MoE layer decided about the tokens. Raises InputError on a stage of a pipeline."""
        logits_BV, decisions = self._after_last(tokens_BS, cache, ())
        assert decisions is not None
        return logits_BV, decisions

    def _after_last(
        self, tokens_BS: Tensor, cache: Sequence[LayerCache], decisions: tuple[Decision, ...] | None
    ) -> tuple[Tensor, tuple[Decision, ...] | None]:
        self._check(tokens_BS, {}, cache)
        places = self._places(None, cache)
        state = self._begin(tokens_BS, places, None)._replace(decisions=decisions, documents=self._documents(tokens_BS, None))
        state = self._run_layers(state, places, cache)
        return self._head(state.hidden_BSD[:, -1:], None)[0][:, 0], state.decisions

    def _begin(self, tokens_BS: Tensor, places: Places, earlier_load_XE: Tensor | None) -> LayerState:
        return LayerState.start(self.sequential["0"](tokens_BS, places), widths=self.report_widths, earlier_load_XE=earlier_load_XE)

    def _end(self, state: LayerState, labels_BS: Tensor | None, loss_mask: LossMask | None) -> GPTOutput:
        if labels_BS is None:
            return GPTOutput(None, None, self._head(state.hidden_BSD, None)[0], state.report, None)
        lm_loss, token_loss_BS = self._head(state.hidden_BSD, Targets(labels_BS, loss_mask, self.loss_backend))
        loss = lm_loss
        for coefficient, aux_loss in zip(self.coefficients, state.report.aux_losses_XA.sum(0).unbind(), strict=True):
            loss = loss + coefficient * aux_loss
        return GPTOutput(loss, lm_loss, None, state.report, token_loss_BS, state.scores_XC)

    def _head(self, hidden_BSD: Tensor, targets: Targets | None) -> tuple[Tensor, ...]:
        key = str(self.num_layers + 4)
        if key in self.sequential:
            return self.sequential[key](hidden_BSD, targets)
        embedding = cast(Embedding, self.sequential["0"])
        return project(hidden_BSD, embedding.word_embeddings.weight, targets, embedding.share)

    def _documents(self, tokens_BS: Tensor, document_BS: Tensor | None) -> Documents | None:
        return documents_of(tokens_BS, document_BS) if self.wants_documents else None

    def _places(self, document_BS: Tensor | None, cache: Sequence[LayerCache] | None) -> Places:
        if document_BS is None:
            return Places(0 if not cache else cache[0].length)
        if cache is not None or not (self.separate_attention or self.separate_positions or self.wants_documents):
            reason = "a cache holds one text" if cache is not None else "this model does not separate them (reset_attention_mask, reset_position_ids)"
            raise InputError(f"documents were given, but {reason}")
        position_BS = positions_in_documents(document_BS) if self.separate_positions else None
        return Places(position_BS=position_BS, document_BS=document_BS if self.separate_attention else None)

    def _run_layers(self, state: LayerState, places: Places, cache: Sequence[LayerCache] | None) -> LayerState:
        """The state after the layers and the final norm."""
        layers = self.layers
        if self.recompute_layers and self.training and cache is None and torch.is_grad_enabled():
            state = run_layers(layers, state, places, together=self.recompute_layers, kept=self.kept_inputs)
        else:
            caches = [None] * len(layers) if cache is None else [cache[i] for i in self.layer_numbers]
            for layer, own_cache in zip(layers, caches, strict=True):
                state = layer(state, places, own_cache)
        norm = str(self.num_layers + 3)
        return state._replace(hidden_BSD=self.sequential[norm](state.hidden_BSD)) if norm in self.sequential else state

    def _check(self, tokens_BS: Tensor, beside: Mapping[str, Tensor | None], cache: Sequence[LayerCache] | None) -> None:
        shape, position = tuple(tokens_BS.shape), cache[0].length if cache else 0
        if len(shape) != 2 or 0 in shape or tokens_BS.is_floating_point():
            raise InputError(f"tokens of shape {shape} and dtype {tokens_BS.dtype}: must be integers [batch, sequence], neither empty")
        if position + shape[1] > self.max_positions:
            raise InputError(f"{position} + {shape[1]} tokens: the model has positions for {self.max_positions} (max_position_embeddings)")
        if self.region.sequence and (cache is not None or shape[1] % self.region.group.size):
            raise InputError(
                f"{shape[1]} tokens: with sequence_parallel their number must be a multiple of model_parallel_size ({self.region.group.size}), "
                "and there is no cache"
            )
        for name, given in beside.items():
            if given is not None and tuple(given.shape) != shape:
                raise InputError(f"{name} of shape {tuple(given.shape)}: must have the tokens' shape {shape}")
        if cache is not None and len(cache) != self.num_layers:
            raise InputError(f"a cache of {len(cache)} layers: the model has {self.num_layers}; make it with build_cache")


def build_model(
    model: ModelConfig,
    moe: MoEConfig,
    padded_vocab_size: int,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    divider: Divider | None = None,
) -> GPT:
    """A model with new weights. They are drawn in float32 from `seed` alone, on the CPU, where the model stays. So they are the same on every device.

    `divider`: this process keeps its part of each layer. None: all of them, whole.
    Raises KernelUnavailable for a name in `kernel_backends` that does not exist. Whether it can run is known when the model has its final device:
    `choose_implementations`.
    """
    check_names(moe.kernel_backends)
    return GPT(model, moe, padded_vocab_size, build_initializer(model, seed), divider).to(dtype=dtype)


def draw_parts(model: ModelConfig, moe: MoEConfig, padded_vocab_size: int, init: Initializer) -> Iterator[tuple[int, nn.Module]]:
    """NeoX's number and module of every part, drawn one after the other, so that a caller need not hold all of them."""
    sections = moe.for_layers(model.num_layers)
    yield 0, build_embedding(model, padded_vocab_size, init)
    rpe = _build_relative_positions(model, init)
    first: Any = None
    for i in range(model.num_layers):
        layer = build_layer(model, sections.get(i), i, init, rpe)
        router: Any = getattr(layer.mlp, "router", None)
        if first is not None and router is not None:
            router.follow(first)
        elif hasattr(router, "follow"):
            first = router
        yield FIRST_LAYER + i, layer
    yield model.num_layers + 3, FinalNorm(model)
    if model.no_weight_tying:
        yield model.num_layers + 4, FinalLinear(model, padded_vocab_size, init)


def _build_relative_positions(model: ModelConfig, init: Initializer) -> RelativePositions | None:
    if model.pos_emb != "rpe":
        return None
    heads = (model.num_attention_heads, model.head_width)
    return RelativePositions(*heads, model.rpe_num_buckets, model.rpe_max_distance, init.xavier_normal)
