"""`StructMoEForCausalLM`: every model that StructMoE-NeoX trains, for transformers. Written into exports; needs torch and transformers, nothing else.

Shapes: B batch; S tokens of this call; P positions attended to; H query heads; K key/value heads; d head dimension; n/2 angles of rotary positions;
D model width; V vocabulary; T = B*S; E experts.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .configuration_structmoe import StructMoEConfig
from .experts_structmoe import StructMoEMLP, build_mlp
from .moe_structmoe import StructMoERouter, StructMoESparseMoeBlock, auxiliary_loss

# ---------------------------------------------------------------- norms


class StructMoERMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + epsilon) over the last dimension, the division in float32 at least."""

    def __init__(self, shape: tuple[int, ...], epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)).to(x.dtype)


class StructMoEScaleNorm(nn.Module):
    """weight * x / max(|x|, epsilon) with a single weight (Nguyen and Salazar, 2019)."""

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * (wide / wide.norm(dim=-1, keepdim=True).clamp(min=self.epsilon)).to(x.dtype)


def build_norm(config: StructMoEConfig, *shape: int) -> nn.Module:
    """The config's norm over the last dimensions (of several, rmsnorm and scalenorm take the last)."""
    if config.norm_type == "rmsnorm":
        return StructMoERMSNorm(shape, config.norm_eps)
    if config.norm_type == "scalenorm":
        return StructMoEScaleNorm(config.norm_eps)
    affine = config.norm_type == "layernorm"
    return nn.LayerNorm(shape, eps=config.norm_eps, elementwise_affine=affine, bias=affine and config.norm_bias)


# ---------------------------------------------------------------- positions


class Angles(NamedTuple):
    """Rotary positions of the tokens, [B or 1, S, n/2]."""

    cos: Tensor
    sin: Tensor


def inverse_frequencies(dimensions: int, base: int) -> list[float]:
    """base^(-2j/n) for the n/2 pairs j of dimensions."""
    return [base ** (-2 * pair / dimensions) for pair in range(dimensions // 2)]


def rotary_frequencies(config: StructMoEConfig) -> list[float]:
    """Radians from one position to the next, scaled where the config says so.

    llama3: s f + (1 - s) f / factor, where s rises from 0 to 1 between the two bounds on how often f turns in the original context.
    """
    plain, scaling = inverse_frequencies(int(config.head_dim * config.rotary_pct), config.rotary_emb_base), config.rotary_scaling
    if not scaling:
        return plain
    shares = [0.0] * len(plain)
    if scaling["rope_type"] == "llama3":
        low, high, context = (scaling[name] for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
        shares = [min(1.0, max(0.0, (context * f / (2 * math.pi) - low) / (high - low))) for f in plain]
    return [share * f + (1 - share) * f / scaling["factor"] for share, f in zip(shares, plain, strict=True)]


def rotary_angles(config: StructMoEConfig, position_BS: Tensor) -> Angles:
    """Computed in float64 where the device has it, so that they are the same in every number format."""
    dtype = torch.float32 if position_BS.device.type == "mps" else torch.float64
    angle = position_BS[..., None].to(dtype) * torch.tensor(rotary_frequencies(config), dtype=dtype, device=position_BS.device)
    return Angles(angle.cos().float(), angle.sin().float())


def rotated(x_BHSd: Tensor, angles: Angles) -> Tensor:
    """The first n dimensions turned: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) for their halves x1 and x2."""
    cos, sin = (part[:, None].to(x_BHSd.dtype) for part in angles)
    first, second, rest = x_BHSd.tensor_split((cos.shape[-1], 2 * cos.shape[-1]), dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


class StructMoELearnedPositions(nn.Embedding):
    """Position p is row p + offset."""

    def __init__(self, config: StructMoEConfig) -> None:
        super().__init__(config.max_position_embeddings, config.hidden_size)
        self.offset = config.position_offset

    def forward(self, position_BS: Tensor) -> Tensor:
        """[B or 1, S, D]."""
        return super().forward(position_BS + self.offset)


class StructMoESinusoidalPositions(nn.Module):
    """[sin(p f), cos(p f)] for the D/2 frequencies f = 10000^(-2j/D)."""

    def __init__(self, config: StructMoEConfig) -> None:
        super().__init__()
        self.frequencies = inverse_frequencies(config.hidden_size, 10000)

    def forward(self, position_BS: Tensor) -> Tensor:
        """float32 [B or 1, S, D]."""
        angle = position_BS[..., None] * torch.tensor(self.frequencies, dtype=torch.float32, device=position_BS.device)
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8/n), 2^(-16/n), ... for a power of two n; for other numbers those of the power below, then every second one of the power above."""
    power = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    return slopes + alibi_slopes(2 * power)[::2][: heads - power] if power < heads else slopes


class StructMoEAlibi(nn.Module):
    """-slope * distance (Press et al., 2022)."""

    def __init__(self, config: StructMoEConfig) -> None:
        super().__init__()
        self.slopes = alibi_slopes(config.num_attention_heads)

    def forward(self, distance_SP: Tensor) -> Tensor:
        """bias_HSP."""
        return -torch.tensor(self.slopes, dtype=torch.float32, device=distance_SP.device)[:, None, None] * distance_SP


class StructMoERelativePositions(nn.Embedding):
    """A learned number for each bucket of distances and each head, the same in all layers (T5), times the square root of the head dimension."""

    def __init__(self, config: StructMoEConfig) -> None:
        super().__init__(config.rpe_num_buckets, config.num_attention_heads)
        self.max_distance, self.scale = config.rpe_max_distance, math.sqrt(config.head_dim)

    def forward(self, distance_SP: Tensor) -> Tensor:
        """bias_HSP. Half of the buckets hold one distance each, the others widen up to the largest distance."""
        distance_SP, exact = distance_SP.clamp(min=0), self.num_embeddings // 2
        ratio = torch.log(distance_SP.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        wide = (exact + (ratio * (self.num_embeddings - exact)).long()).clamp(max=self.num_embeddings - 1)
        return super().forward(torch.where(distance_SP < exact, distance_SP, wide)).movedim(-1, 0) * self.scale


# ---------------------------------------------------------------- attention


def eager_attention(
    module: StructMoEAttention, query_BHSd: Tensor, key_BKPd: Tensor, value_BKPd: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """(context BSHd, weights BHSP): softmax(q k^T * scaling + mask) v, written out."""
    key_BHPd, value_BHPd = (part.repeat_interleave(module.num_key_value_groups, dim=1) for part in (key_BKPd, value_BKPd))
    score_BHSP = query_BHSd @ key_BHPd.mT * options["scaling"]
    if attention_mask is not None:
        score_BHSP = score_BHSP + attention_mask
    weight_BHSP = score_BHSP.softmax(-1, dtype=torch.promote_types(query_BHSd.dtype, torch.float32)).to(query_BHSd.dtype)
    weight_BHSP = nn.functional.dropout(weight_BHSP, p=options["dropout"], training=module.training)
    return (weight_BHSP @ value_BHPd).transpose(1, 2).contiguous(), weight_BHSP


class StructMoEAttention(nn.Module):
    """o(softmax(q k^T / sqrt(d) + bias) v), every token seeing itself and what is before it."""

    def __init__(self, config: StructMoEConfig, layer_idx: int) -> None:
        super().__init__()
        heads, kv_heads, d, bias = config.num_attention_heads, config.kv_heads, config.head_dim, config.attention_bias
        self.config, self.layer_idx, self.head_dim, self.is_causal = config, layer_idx, d, True
        self.num_key_value_groups = heads // kv_heads
        self.q_proj = nn.Linear(config.hidden_size, heads * d, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * d, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * d, bias=bias)
        self.o_proj = nn.Linear(heads * d, config.hidden_size, bias=bias)

    def forward(
        self, x_BSD: Tensor, attention_mask: Tensor | None, angles: Angles | None, past_key_values: Cache | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(y_BSD, attention weights where the implementation gives them). `angles`: None without rotary positions."""
        query_BSHd, key_BSKd, value_BSKd = (part(x_BSD).unflatten(-1, (-1, self.head_dim)) for part in (self.q_proj, self.k_proj, self.v_proj))
        query_BSHd, key_BSKd, value_BSKd = self.normed(query_BSHd, key_BSKd, value_BSKd)
        query_BHSd, key_BKPd, value_BKPd = (part.transpose(1, 2) for part in (query_BSHd, key_BSKd, value_BSKd))
        if angles is not None:
            query_BHSd, key_BKPd = rotated(query_BHSd, angles), rotated(key_BKPd, angles)
        if past_key_values is not None:
            key_BKPd, value_BKPd = past_key_values.update(key_BKPd, value_BKPd, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        options = {"scaling": self.head_dim**-0.5, "dropout": self.config.attention_dropout if self.training else 0.0}
        context_BSHd, weights = attend(
            self, query_BHSd, key_BKPd, value_BKPd, attention_mask, sliding_window=self.config.sliding_window, **options, **kwargs
        )
        return self.o_proj(context_BSHd.flatten(2)), weights

    def normed(self, query_BSHd: Tensor, key_BSKd: Tensor, value_BSKd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values before positions are added: as they are."""
        return query_BSHd, key_BSKd, value_BSKd


class AllHeadsNormedAttention(StructMoEAttention):
    """With one norm for queries and keys, with weights for every query head and dimension: grouped key/value heads are repeated for it."""

    def __init__(self, config: StructMoEConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.qk_norm = build_norm(config, config.num_attention_heads, config.head_dim)
        self.times, self.num_key_value_groups = self.num_key_value_groups, 1

    def normed(self, query_BSHd: Tensor, key_BSKd: Tensor, value_BSKd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As many keys and values as queries; queries and keys normalised."""
        key_BSHd, value_BSHd = (part.repeat_interleave(self.times, dim=2) for part in (key_BSKd, value_BSKd))
        return self.qk_norm(query_BSHd), self.qk_norm(key_BSHd), value_BSHd


class PerHeadNormedAttention(StructMoEAttention):
    """With a norm over each head's dimensions for queries, and another for keys."""

    def __init__(self, config: StructMoEConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.q_norm, self.k_norm = build_norm(config, config.head_dim), build_norm(config, config.head_dim)

    def normed(self, query_BSHd: Tensor, key_BSKd: Tensor, value_BSKd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys normalised."""
        return self.q_norm(query_BSHd), self.k_norm(key_BSKd), value_BSKd


ATTENTION = {"none": StructMoEAttention, "all_heads": AllHeadsNormedAttention, "per_head": PerHeadNormedAttention}


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

    def forward(self, hidden_BSD: Tensor, *attention_inputs: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        """(hidden_BSD, attention weights or None), and of a layer with experts logit_TE behind them."""
        attended_BSD, weights = self.self_attn(self.input_layernorm(hidden_BSD), *attention_inputs, **kwargs)
        hidden_BSD = hidden_BSD + self.dropout(attended_BSD)
        change_BSD, *logits = self.feed_forward(self.post_attention_layernorm(hidden_BSD))
        return hidden_BSD + change_BSD, weights, *logits

    def feed_forward(self, x_BSD: Tensor) -> tuple[Tensor, ...]:
        """(what the MLP or the experts add), and logit_TE of experts."""
        y, *logits = self.mlp(x_BSD) if isinstance(self.mlp, StructMoESparseMoeBlock) else (self.mlp(x_BSD),)
        return self.mlp_dropout(y), *logits


class StructMoEParallelLayer(StructMoEDecoderLayer):
    """x + attention(norm(x)) + mlp(norm'(x))."""

    def forward(self, hidden_BSD: Tensor, *attention_inputs: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        """As the sequential layer."""
        attention_BSD, mlp_BSD = self.normed(hidden_BSD)
        attended_BSD, weights = self.self_attn(attention_BSD, *attention_inputs, **kwargs)
        change_BSD, *logits = self.feed_forward(mlp_BSD)
        return hidden_BSD + self.dropout(attended_BSD) + change_BSD, weights, *logits

    def normed(self, hidden_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """What attention and the feed-forward part read."""
        return self.input_layernorm(hidden_BSD), self.post_attention_layernorm(hidden_BSD)


class StructMoETiedLayer(StructMoEParallelLayer):
    """x + attention(norm(x)) + mlp(norm(x)). The second norm is there, as in pre-training, and takes no part."""

    def normed(self, hidden_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """The same for both."""
        x_BSD = self.input_layernorm(hidden_BSD)
        return x_BSD, x_BSD


LAYERS = {"sequential": StructMoEDecoderLayer, "parallel": StructMoEParallelLayer, "tied": StructMoETiedLayer}


# ---------------------------------------------------------------- models


class StructMoEPreTrainedModel(PreTrainedModel):
    """What transformers asks of its models."""

    config: StructMoEConfig
    config_class = StructMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = [layer.__name__ for layer in LAYERS.values()]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, StructMoEScaleNorm):
            init.ones_(module.weight)
        elif type(module).__module__ in (StructMoEMLP.__module__, StructMoERouter.__module__):
            for weight in module.parameters(recurse=False):
                init.normal_(weight, mean=0.0, std=self.config.initializer_range)
            for bias in module.buffers(recurse=False):
                init.zeros_(bias)


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
            raise ValueError("give either input_ids or inputs_embeds, and not both")
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
        for layer, scale in zip(self.layers, self.config.position_bias_scale, strict=True):
            hidden_BSD, weight, *logits = layer(
                states[-1], masks[scale], angles, past_key_values=past_key_values, position_ids=position_ids, **kwargs
            )
            states = [*states, hidden_BSD] if wanted["output_hidden_states"] else [hidden_BSD]
            weights.append(weight)
            router_logits += logits
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
            raise ValueError(f"{kind} cannot add the biases of position_type '{self.config.position_type}': use 'sdpa' or 'eager'")
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


def with_bias(mask: Tensor, bias_1HSP: Tensor) -> Tensor:
    """The biases, and on what a mask (bool, or added to scores) hides a number that leaves it no weight; finite, for tokens that see nothing."""
    if mask.dtype == torch.bool:
        return torch.where(mask, bias_1HSP, torch.finfo(bias_1HSP.dtype).min)
    return mask + bias_1HSP


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

        `aux_loss` is the sum of `config.moe_losses` times their coefficients over the layers. It is computed when `output_router_logits` asks for
        it, and in training with labels; where there are labels it is added to the loss, times `config.router_aux_loss_coef`.
        """
        outputs = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BSV = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None if labels is None else self.loss_function(logits_BSV, labels, self.config.vocab_size, **kwargs)
        with_logits = self.config.output_router_logits if output_router_logits is None else output_router_logits
        aux_loss = None
        if with_logits or (self.training and labels is not None and self.config.moe_losses):
            aux_loss = self.auxiliary_loss(outputs.router_logits, outputs.last_hidden_state.shape[:2], attention_mask)
            loss = None if loss is None else loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
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
        return auxiliary_loss(routers, router_logits, counts_BS, self.config.moe_losses)
