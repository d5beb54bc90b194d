"""Norms, positions and attention of `StructMoEForCausalLM`, put together when a layer is built. Written into exports beside it.

Shapes: B batch; S tokens of this call; P positions attended to; H query heads; K key/value heads; d head dimension; n/2 angles of rotary positions;
D model width.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_structmoe import StructMoEConfig

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
    plain, scaling = inverse_frequencies(int(config.head_width * config.rotary_pct), config.rotary_emb_base), config.rotary_scaling
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
        self.max_distance, self.scale = config.rpe_max_distance, math.sqrt(config.head_width)

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
        heads, kv_heads, d, bias = config.num_attention_heads, config.kv_heads, config.head_width, config.attention_bias or config.qkv_bias
        self.config, self.layer_idx, self.head_dim, self.is_causal = config, layer_idx, d, True
        self.num_key_value_groups = heads // kv_heads
        self.q_proj = nn.Linear(config.hidden_size, heads * d, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * d, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * d, bias=bias)
        self.o_proj = nn.Linear(heads * d, config.hidden_size, bias=config.attention_bias)

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
        self.qk_norm = build_norm(config, config.num_attention_heads, config.head_width)
        self.times, self.num_key_value_groups = self.num_key_value_groups, 1

    def normed(self, query_BSHd: Tensor, key_BSKd: Tensor, value_BSKd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As many keys and values as queries; queries and keys normalised."""
        key_BSHd, value_BSHd = (part.repeat_interleave(self.times, dim=2) for part in (key_BSKd, value_BSKd))
        return self.qk_norm(query_BSHd), self.qk_norm(key_BSHd), value_BSHd


class PerHeadNormedAttention(StructMoEAttention):
    """With a norm over each head's dimensions for queries, and another for keys."""

    def __init__(self, config: StructMoEConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.q_norm, self.k_norm = build_norm(config, config.head_width), build_norm(config, config.head_width)

    def normed(self, query_BSHd: Tensor, key_BSKd: Tensor, value_BSKd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys normalised."""
        return self.q_norm(query_BSHd), self.k_norm(key_BSKd), value_BSKd


class JointlyNormedAttention(StructMoEAttention):
    """With a norm over the dimensions of all query heads together, and another over those of the key heads."""

    def __init__(self, config: StructMoEConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        d = config.head_width
        self.q_norm, self.k_norm = build_norm(config, config.num_attention_heads * d), build_norm(config, config.kv_heads * d)

    def normed(self, query_BSHd: Tensor, key_BSKd: Tensor, value_BSKd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys normalised."""
        return self.q_norm(query_BSHd.flatten(-2)).view_as(query_BSHd), self.k_norm(key_BSKd.flatten(-2)).view_as(key_BSKd), value_BSKd


ATTENTION = {
    "none": StructMoEAttention,
    "all_heads": AllHeadsNormedAttention,
    "per_head": PerHeadNormedAttention,
    "jointly": JointlyNormedAttention,
}
