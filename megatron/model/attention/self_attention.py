"""Causal self-attention over PyTorch's SDPA, with grouped key/value heads, rotary positions and a key/value cache.

Shapes: B batch; S sequence; P positions attended to; H query heads; K key/value heads; d head dimension; D model width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron.model.attention.cache import LayerCache
from megatron.model.attention.rotary import HeadLayout, rotary_table, split_rotated
from megatron.model.initialization import Initializer
from megatron.model.mlp import build_linear

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig


class SelfAttention(nn.Module):
    """dense(softmax(q k^T / sqrt(d)) v), every position seeing itself and what is before it."""

    def __init__(self, model: ModelConfig, init: Initializer) -> None:
        super().__init__()
        self.layout = HeadLayout(model.num_attention_heads, model.kv_heads, model.head_dim)
        fused = (model.num_attention_heads + 2 * model.kv_heads) * model.head_dim
        bias = model.use_bias_in_attn_linear
        self.query_key_value = build_linear(model.hidden_size, fused, bias=bias, fill=init.into)
        self.dense = build_linear(model.hidden_size, model.hidden_size, bias=bias, fill=init.out)
        self.dropout = model.attention_dropout
        self.rotary = (model.max_position_embeddings, model.rotary_dim, model.rotary_emb_base) if model.pos_emb == "rotary" else None

    def forward(self, x_BSD: Tensor, cache: LayerCache | None = None) -> Tensor:
        """y_BSD. With a cache, `x_BSD` continues the tokens that the cache holds, and is added to them."""
        start = 0 if cache is None else cache.length
        query_BHSd, key_BKSd, value_BKSd = (part.transpose(1, 2) for part in self._split(widened(self.query_key_value(x_BSD)), start))
        key_BKPd, value_BKPd = (key_BKSd, value_BKSd) if cache is None else cache.append(key_BKSd, value_BKSd)
        context_BHSd = self._attend(query_BHSd, key_BKPd, value_BKPd)
        return self.dense(context_BHSd.transpose(1, 2).flatten(2).to(x_BSD.dtype))

    def _split(self, fused_BSW: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        if self.rotary is None:
            return self.layout.views(fused_BSW)
        cos_Pn, sin_Pn = rotary_table(*self.rotary, fused_BSW.device)
        end = start + fused_BSW.shape[1]
        return split_rotated(fused_BSW, self.layout, cos_Pn[start:end], sin_Pn[start:end])

    def _attend(self, query_BHSd: Tensor, key_BKPd: Tensor, value_BKPd: Tensor) -> Tensor:
        length, positions = query_BHSd.shape[2], key_BKPd.shape[2]
        mask_SP = None
        if 1 < length < positions:
            mask_SP = torch.ones(length, positions, dtype=torch.bool, device=query_BHSd.device).tril(positions - length)
        return nn.functional.scaled_dot_product_attention(
            query_BHSd,
            key_BKPd.to(query_BHSd.dtype),
            value_BKPd.to(query_BHSd.dtype),
            attn_mask=mask_SP,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=length == positions,
            enable_gqa=self.layout.heads != self.layout.kv_heads,
        )


def widened(fused_BSW: Tensor) -> Tensor:
    """In float32 where a CPU would attend in 16 bits: there the backward of PyTorch's SDPA is five times slower than in float32, cast included."""
    if fused_BSW.device.type == "cpu" and fused_BSW.dtype in (torch.bfloat16, torch.float16):
        return fused_BSW.float()
    return fused_BSW
