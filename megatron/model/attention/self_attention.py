"""Causal self-attention. Its two parts are chosen when it is built: the one that makes queries, keys and values (`split.py`), and the one that
computes
the attention (`sdpa.py`). `context.py` calls them, or one op that does both.

Shapes: B batch; S sequence; P positions attended to; H query heads; K key/value heads; d head dimension; D model width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from megatron.kernels.attention import HeadLayout
from megatron.model.attention.cache import LayerCache
from megatron.model.attention.context import Context, split_and_attend
from megatron.model.attention.sdpa import AlibiSdpa, Attend, CausalSdpa, RelativeSdpa
from megatron.model.attention.split import (
    Norm,
    NormedRotarySplit,
    NormedSplit,
    PlainSplit,
    RepeatedRotarySplit,
    RepeatedSplit,
    Rotary,
    RotarySplit,
    Split,
    over_all_heads,
    shared_norm,
)
from megatron.model.initialization import Initializer
from megatron.model.mlp import build_linear
from megatron.model.norms import build_norm
from megatron.model.positions import START, Places
from megatron.model.positions.alibi import AlibiSlopes
from megatron.model.positions.derived import DerivedBuffer
from megatron.model.positions.rope_scaling import rotary_frequencies
from megatron.model.positions.rpe import RelativePositions
from megatron.mpu.random import own_stream
from megatron.mpu.regions import WHOLE, Region

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig


class SelfAttention(nn.Module):
    """dense(softmax(q k^T / sqrt(d)) v). Every position sees itself and the positions before it. `rpe` is the table that all layers share, if any.

    The names of its modules are GPT-NeoX's, except `q_norm` and `k_norm`, which are Hugging Face's.
    """

    def __init__(self, model: ModelConfig, init: Initializer, *, index: int = 0, rpe: RelativePositions | None = None) -> None:
        super().__init__()
        heads, d = model.num_attention_heads, model.head_width
        self.layout = HeadLayout(heads, model.kv_heads, d)
        self.query_key_value = build_linear(model.hidden_size, (heads + 2 * model.kv_heads) * d, bias=model.has_qkv_bias, fill=init.into)
        self.dense = build_linear(heads * d, model.hidden_size, bias=model.use_bias_in_attn_linear, fill=init.out)
        self.qk_layernorm = build_norm(model, heads, d) if model.use_qk_layernorm else None
        widths = model.qk_norm_widths
        self.q_norm = None if widths is None else build_norm(model, widths[0])
        self.k_norm = None if widths is None else build_norm(model, widths[1])
        self.alibi_embed = AlibiSlopes(heads) if model.pos_emb == "alibi" else None
        self.rpe = rpe
        if model.rotary_save_freqs_buffer and model.pos_emb == "rotary":
            self.rotary_emb = DerivedBuffer("inv_freq", rotary_frequencies(model))
        self.dropout, self.index, self.region = model.attention_dropout, index, WHOLE
        self.split = self._build_split(model)
        self.attend = self._build_attend(model)
        self.context: Context = split_and_attend

    def forward(self, x_BSD: Tensor, places: Places = START, cache: LayerCache | None = None) -> Tensor:
        """y_BSD. With a cache, `x_BSD` continues the tokens that the cache holds. Its keys and values are added to the cache."""
        fused_BSW = self.query_key_value(self.region.enter(x_BSD))
        with own_stream(self.region.group, needed=self.training and self.dropout > 0):
            context_BHSd = self.context(self, fused_BSW, places, cache)
        return self.region.row(self.dense, context_BHSd.transpose(1, 2).flatten(2).to(x_BSD.dtype))

    def share(self, model: ModelConfig, region: Region, layout: HeadLayout, own: range) -> None:
        """From now on this process has the heads `own`, and `layout` says how its part of the fused projection is divided."""
        self.region, self.layout = region, layout
        if self.alibi_embed is not None:
            self.alibi_embed = AlibiSlopes(model.num_attention_heads, own)
        self.split, self.attend = self._build_split(model), self._build_attend(model)

    def _build_split(self, model: ModelConfig) -> Split:
        rotary = Rotary(model.max_position_embeddings, rotary_frequencies(model)) if model.pos_emb == "rotary" else None
        query_norm, key_norm = (self.qk_layernorm, self.qk_layernorm) if model.use_qk_layernorm else (self.q_norm, self.k_norm)
        if query_norm is None or key_norm is None:
            return PlainSplit(self.layout) if rotary is None else RotarySplit(self.layout, rotary)
        norms: tuple[Norm, Norm] = (over_all_heads(query_norm), over_all_heads(key_norm)) if model.qk_norm_all_heads else (query_norm, key_norm)
        if self.region.group.size > 1 and (model.qk_norm_all_heads or model.use_qk_layernorm):
            counts = (model.num_attention_heads, model.attended_kv_heads)
            norms = (shared_norm(norms[0], self.region.group, counts[0]), shared_norm(norms[1], self.region.group, counts[1]))
        plain, turning = (RepeatedSplit, RepeatedRotarySplit) if self.layout.kv_heads < model.attended_kv_heads else (NormedSplit, NormedRotarySplit)
        return plain(self.layout, *norms) if rotary is None else turning(self.layout, *norms, rotary)

    def _build_attend(self, model: ModelConfig) -> Attend:
        coefficient = model.position_bias_coefficient(self.index)
        if self.rpe is not None:
            return RelativeSdpa(model.sliding_window_width, self.rpe, coefficient)
        if self.alibi_embed is not None:
            return AlibiSdpa(model.sliding_window_width, self.alibi_embed.values, coefficient)
        return CausalSdpa(model.sliding_window_width)
