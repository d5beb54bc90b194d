"""`StructMoEForCausalLM`: every model that StructMoE-NeoX trains, for transformers. Written into exports; needs torch and transformers, nothing else.

Shapes: B batch; S tokens of this call; P positions attended to; H query heads; K key/value heads; d head dimension; n/2 angles of rotary positions;
D model width; V vocabulary; T = B*S; E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .attention_structmoe import (
    ATTENTION,
    StructMoEAlibi,
    StructMoELearnedPositions,
    StructMoERelativePositions,
    StructMoEScaleNorm,
    StructMoESinusoidalPositions,
    build_norm,
    rotary_angles,
)
from .configuration_structmoe import StructMoEConfig
from .experts_structmoe import EXPERT_BIASES, StructMoEMLP, build_mlp
from .losses_structmoe import auxiliary_loss
from .moe_structmoe import CELL_BIASES, RecurrentRouter, StructMoERouter, StructMoESparseMoeBlock

# ---------------------------------------------------------------- layers


class StructMoEDecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: StructMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = build_norm(config, config.hidden_size)
        self.self_attn = ATTENTION[config.qk_norm](config, layer_idx)
        self.post_attention_layernorm = build_norm(config, config.hidden_size)
        experts = config.num_experts_by_layer[layer_idx]
        self.mlp = StructMoESparseMoeBlock(config, experts) if experts else build_mlp(config, config.intermediate_size)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.mlp_dropout = nn.Dropout(0.0 if experts or not config.mlp_bias else config.hidden_dropout)

    def forward(self, hidden_BSD: Tensor, memory_TP: Tensor | None, *attention_inputs: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        """(hidden_BSD, attention weights or None), and of a layer with experts logit_TE and its router's memory (or None) behind them.

        `memory_TP`: what the router of the last layer with experts remembers. None: it remembers nothing.
        """
        attended_BSD, weights = self.self_attn(self.input_layernorm(hidden_BSD), *attention_inputs, **kwargs)
        hidden_BSD = hidden_BSD + self.dropout(attended_BSD)
        change_BSD, *routed = self.feed_forward(self.post_attention_layernorm(hidden_BSD), memory_TP)
        return hidden_BSD + self.mlp_dropout(change_BSD), weights, *routed

    def feed_forward(self, x_BSD: Tensor, memory_TP: Tensor | None) -> tuple[Any, ...]:
        """(what the MLP or the experts give, before dropout), and logit_TE and memory of experts."""
        return self.mlp(x_BSD, memory_TP) if isinstance(self.mlp, StructMoESparseMoeBlock) else (self.mlp(x_BSD),)


class StructMoEParallelLayer(StructMoEDecoderLayer):
    """x + attention(norm(x)) + mlp(norm'(x))."""

    def forward(self, hidden_BSD: Tensor, memory_TP: Tensor | None, *attention_inputs: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        """As the sequential layer."""
        attention_BSD, mlp_BSD = self.normed(hidden_BSD)
        attended_BSD, weights = self.self_attn(attention_BSD, *attention_inputs, **kwargs)
        change_BSD, *routed = self.feed_forward(mlp_BSD, memory_TP)
        return hidden_BSD + self.dropout(attended_BSD) + self.mlp_dropout(change_BSD), weights, *routed

    def normed(self, hidden_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """What attention and the feed-forward part read."""
        return self.input_layernorm(hidden_BSD), self.post_attention_layernorm(hidden_BSD)


class StructMoETiedLayer(StructMoEParallelLayer):
    """x + attention(norm(x)) + mlp(norm(x)). The second norm is there, as in pre-training, and takes no part."""

    def normed(self, hidden_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """The same for both."""
        x_BSD = self.input_layernorm(hidden_BSD)
        return x_BSD, x_BSD


class StructMoEReorderedLayer(StructMoEDecoderLayer):
    """x + norm(attention(x)), then x + norm(mlp(x))."""

    def forward(self, hidden_BSD: Tensor, memory_TP: Tensor | None, *attention_inputs: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        """As the sequential layer."""
        attended_BSD, weights = self.self_attn(hidden_BSD, *attention_inputs, **kwargs)
        hidden_BSD = hidden_BSD + self.dropout(self.input_layernorm(attended_BSD))
        change_BSD, *routed = self.feed_forward(hidden_BSD, memory_TP)
        return hidden_BSD + self.mlp_dropout(self.post_attention_layernorm(change_BSD)), weights, *routed


LAYERS = {
    "sequential": StructMoEDecoderLayer,
    "parallel": StructMoEParallelLayer,
    "tied": StructMoETiedLayer,
    "reordered": StructMoEReorderedLayer,
}


# ---------------------------------------------------------------- models


class StructMoEPreTrainedModel(PreTrainedModel):
    """What transformers asks of its models."""

    config: StructMoEConfig
    config_class = StructMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = [layer.__name__ for layer in LAYERS.values()]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["e_score_correction_bias", "e_score_threshold", "threshold_steps"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, StructMoEScaleNorm):
            init.ones_(module.weight)
        elif type(module).__module__ in (StructMoEMLP.__module__, StructMoERouter.__module__):
            for name, weight in module.named_parameters(recurse=False):
                if name in EXPERT_BIASES + CELL_BIASES:
                    init.zeros_(weight)
                else:
                    init.normal_(weight, mean=0.0, std=self.config.initializer_range)
            for name, buffer in module.named_buffers(recurse=False):
                if name == "experts_per_token":
                    init.constant_(buffer, self.config.num_experts_per_tok)
                elif name == "weight":
                    init.normal_(buffer, mean=0.0, std=self.config.initializer_range)
                else:
                    init.zeros_(buffer)


class StructMoEModel(StructMoEPreTrainedModel):
    """Embedding, layers, norm."""

    def __init__(self, config: StructMoEConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        added = {"learned": StructMoELearnedPositions, "sinusoidal": StructMoESinusoidalPositions}
        biases = {"alibi": StructMoEAlibi, "rpe": StructMoERelativePositions}
        self.embed_positions = added[config.position_type](config) if config.position_type in added else None
        self.position_bias = biases[config.position_type](config) if config.position_type in biases else None
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(LAYERS[config.residual_type](config, layer) for layer in range(config.num_hidden_layers))
        share_router_cell([layer.mlp.gate for layer in self.layers if isinstance(layer.mlp, StructMoESparseMoeBlock)])
        self.norm = build_norm(config, config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """The last hidden states, and `router_logits` of the layers with experts.

        The mask is 0 for padding. Positions count on from the cache where they are not given. Raises ValueError without inputs, or with both kinds.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, not both")
        hidden_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            start = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(hidden_BSD.shape[1], device=hidden_BSD.device)[None] + start
        masks = self.masks(hidden_BSD, attention_mask, position_ids, past_key_values)
        angles = rotary_angles(self.config, position_ids) if self.config.position_type == "rotary" else None
        if self.embed_positions is not None:
            hidden_BSD = hidden_BSD + self.embed_positions(position_ids).to(hidden_BSD.dtype)
        states, weights, router_logits = [self.dropout(hidden_BSD)], [], []
        wanted = {name: kwargs.pop(name, getattr(self.config, name)) for name in ("output_hidden_states", "output_attentions")}
        memory_TP = None
        for layer, scale in zip(self.layers, self.config.position_bias_scale, strict=True):
            hidden_BSD, weight, *routed = layer(
                states[-1], memory_TP, masks[scale], angles, past_key_values=past_key_values, position_ids=position_ids, **kwargs
            )
            states = [*states, hidden_BSD] if wanted["output_hidden_states"] else [hidden_BSD]
            weights.append(weight)
            router_logits += routed[:1]
            memory_TP = routed[1] if routed else memory_TP
        states[-1] = self.norm(states[-1])
        return MoeModelOutputWithPast(
            last_hidden_state=states[-1],
            past_key_values=past_key_values,
            hidden_states=tuple(states) if wanted["output_hidden_states"] else None,
            attentions=tuple(weights) if wanted["output_attentions"] else None,
            router_logits=tuple(router_logits),
        )

    def masks(self, hidden_BSD: Tensor, attention_mask: Tensor | None, position_ids: Tensor, past_key_values: Cache | None) -> dict[float, Any]:
        """What is added to scores, in the form that the attention implementation takes, for each scale of `position_bias_scale`.

        Raises ValueError where that implementation cannot add biases.
        """
        create = create_causal_mask if self.config.sliding_window is None else create_sliding_window_causal_mask
        mask: Any = create(self.config, hidden_BSD, attention_mask, past_key_values, position_ids)
        scales = set(self.config.position_bias_scale)
        if self.position_bias is None:
            return dict.fromkeys(scales, mask)
        if self.config._attn_implementation not in ("eager", "sdpa"):
            kind = f"attn_implementation = '{self.config._attn_implementation}'"
            raise ValueError(f"{kind} cannot add the position biases of position_type '{self.config.position_type}'; use 'sdpa' or 'eager'")
        queries = hidden_BSD.shape[1]
        start, keys, first_key = 0, queries, 0
        if past_key_values is not None:
            start = past_key_values.get_seq_length()
            keys, first_key = past_key_values.get_mask_sizes(queries, 0)
        query_S, key_P = torch.arange(queries, device=hidden_BSD.device) + start, torch.arange(keys, device=hidden_BSD.device) + first_key
        distance_SP = query_S[:, None] - key_P
        bias_1HSP = self.position_bias(distance_SP)[None]
        mask = distance_SP >= 0 if mask is None else mask
        return {scale: with_bias(mask, (scale * bias_1HSP).to(hidden_BSD.dtype)) for scale in scales}


def share_router_cell(routers: list[StructMoERouter]) -> None:
    """Lets recurrent routers use the GRU of the first one."""
    for router in routers[1:]:
        if isinstance(router, RecurrentRouter) and isinstance(routers[0], RecurrentRouter):
            router.follow(routers[0])


def with_bias(mask: Tensor, bias_1HSP: Tensor) -> Tensor:
    """The biases, and on what a mask (bool, or added to scores) hides a number that leaves it no weight; finite, for tokens that see nothing."""
    if mask.dtype == torch.bool:
        return torch.where(mask, bias_1HSP, torch.finfo(bias_1HSP.dtype).min)
    return mask + bias_1HSP


def share_of_labels(labels: Tensor | None, num_items_in_batch: Tensor | int | None) -> Tensor | float:
    """How many of a batch's labels these are, of `num_items_in_batch` in all; 1 where either is not given."""
    if labels is None or num_items_in_batch is None:
        return 1.0
    return (labels[:, 1:] != -100).sum() / torch.as_tensor(num_items_in_batch, device=labels.device)


class StructMoEForCausalLM(StructMoEPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: StructMoEConfig) -> None:
        super().__init__(config)
        self.model = StructMoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits, and with labels (-100: not counted) the mean cross entropy of each next token.

        With `num_items_in_batch`, which transformers' Trainer gives when it accumulates gradients, it is the sum divided by that number, so that all
        micro-batches together give the mean over all their labels.

        `aux_loss` is the sum of `config.moe_losses` times their coefficients over the layers, divided by `config.loss_unit`. It is computed when
        `output_router_logits` asks for it, and in training with labels; with labels it is added to the loss, times `config.router_aux_loss_coef`, and
        with `num_items_in_batch` times this micro-batch's share of the labels.
        """
        outputs = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BSV = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None if labels is None else self.loss_function(logits_BSV, labels, self.config.vocab_size, **kwargs)
        with_logits = self.config.output_router_logits if output_router_logits is None else output_router_logits
        aux_loss = None
        if with_logits or (self.training and labels is not None and self.config.moe_losses):
            aux_loss = self.auxiliary_loss(outputs.router_logits, outputs.last_hidden_state.shape[:2], attention_mask)
            if loss is not None:
                share = share_of_labels(labels, kwargs.get("num_items_in_batch"))
                loss = loss + (self.config.router_aux_loss_coef or 0.0) * share * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits_BSV,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if with_logits else None,
        )

    def auxiliary_loss(self, router_logits: tuple[Tensor, ...], shape: tuple[int, int], attention_mask: Tensor | None) -> Tensor:
        """The weighted sum over the layers with experts, without padding; `shape` is (B, S)."""
        counts_BS = torch.ones(shape, device=self.lm_head.weight.device)
        if attention_mask is not None and attention_mask.dim() == 2:
            counts_BS = attention_mask[:, -shape[1] :].to(counts_BS)
        routers = [layer.mlp.gate for layer in self.model.layers if isinstance(layer.mlp, StructMoESparseMoeBlock)]
        return auxiliary_loss(routers, router_logits, counts_BS, self.config.moe_losses) / self.config.loss_unit
