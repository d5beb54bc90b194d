"""One transformer layer: attention and a feed-forward part (dense or MoE) around the residual stream.

Shapes: B batch; S sequence; D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from megatron.model.attention import LayerCache, SelfAttention
from megatron.model.initialization import Initializer
from megatron.model.mlp import build_mlp
from megatron.model.moe.layer import MoELayer
from megatron.model.norms import build_norm
from megatron.model.positions import START, Places
from megatron.model.positions.rpe import RelativePositions
from megatron.model.state import LayerState
from megatron.mpu.random import SharedDropout

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig
    from megatron.config.moe import MoEConfig


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (sequential residual).

    Dropout follows both, except after experts and after an MLP without biases, as in GPT-NeoX.
    """

    def __init__(self, model: ModelConfig, moe: MoEConfig | None, index: int, init: Initializer, rpe: RelativePositions | None = None) -> None:
        super().__init__()
        self.input_layernorm = build_norm(model)
        self.attention = SelfAttention(model, init, index=index, rpe=rpe)
        self.post_attention_layernorm = build_norm(model)
        self.mlp: nn.Module = build_mlp(model, init) if moe is None else MoELayer(model, moe, init)
        self.dropout = SharedDropout(model.hidden_dropout)
        self.mlp_dropout = SharedDropout(model.hidden_dropout if moe is None and model.use_bias_in_mlp else 0.0)

    def forward(self, state: LayerState, places: Places = START, cache: LayerCache | None = None) -> LayerState:
        """The state after this layer. With a cache, the hidden states continue the tokens that the cache holds."""
        hidden_BSD = state.hidden_BSD
        hidden_BSD = hidden_BSD + self.dropout(self.attention(self.input_layernorm(hidden_BSD), places, cache))
        change_BSD, state = self._feed_forward(self.post_attention_layernorm(hidden_BSD), state, cache)
        return state._replace(hidden_BSD=hidden_BSD + self.mlp_dropout(change_BSD))

    def _feed_forward(self, x_BSD: Tensor, state: LayerState, cache: LayerCache | None) -> tuple[Tensor, LayerState]:
        """(what the feed-forward part gives, before dropout; the state with its report)."""
        return self.mlp(x_BSD), state


class ParallelResidualLayer(TransformerLayer):
    """x + attention(norm(x)) + mlp(norm'(x)) (`gpt_j_residual`)."""

    def forward(self, state: LayerState, places: Places = START, cache: LayerCache | None = None) -> LayerState:
        """The state after this layer."""
        attention_BSD, mlp_BSD = self._normed(state.hidden_BSD)
        attended_BSD = self.dropout(self.attention(attention_BSD, places, cache))
        change_BSD, state = self._feed_forward(mlp_BSD, state, cache)
        return state._replace(hidden_BSD=state.hidden_BSD + attended_BSD + self.mlp_dropout(change_BSD))

    def _normed(self, hidden_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """What attention and the feed-forward part read."""
        return self.input_layernorm(hidden_BSD), self.post_attention_layernorm(hidden_BSD)


class TiedParallelResidualLayer(ParallelResidualLayer):
    """x + attention(norm(x)) + mlp(norm(x)) (`gpt_j_tied`). The second norm exists because NeoX's checkpoints have it, but it is not used."""

    def _normed(self, hidden_BSD: Tensor) -> tuple[Tensor, Tensor]:
        x_BSD = self.input_layernorm(hidden_BSD)
        return x_BSD, x_BSD


class ReorderedNormLayer(TransformerLayer):
    """x + norm(attention(x)), then x + norm(mlp(x)) (`reordered_norm`; OLMo 2, 2025). The norms keep their names: `input_layernorm` is attention's,
    `post_attention_layernorm` the feed-forward part's.
    """

    def forward(self, state: LayerState, places: Places = START, cache: LayerCache | None = None) -> LayerState:
        """The state after this layer."""
        hidden_BSD = state.hidden_BSD
        hidden_BSD = hidden_BSD + self.dropout(self.input_layernorm(self.attention(hidden_BSD, places, cache)))
        change_BSD, state = self._feed_forward(hidden_BSD, state, cache)
        return state._replace(hidden_BSD=hidden_BSD + self.mlp_dropout(self.post_attention_layernorm(change_BSD)))


class _WithExperts(TransformerLayer):
    """The feed-forward part is a mixture of experts, which returns a report."""

    mlp: MoELayer

    def _feed_forward(self, x_BSD: Tensor, state: LayerState, cache: LayerCache | None) -> tuple[Tensor, LayerState]:
        y_BSD, *report, usage_2E, scores_C, decision = self.mlp(
            x_BSD, state.earlier_rows_E(self.mlp.context.num_experts), state.usage_2E, state.around(cache)
        )
        memory_TP = decision.routing.memory_TP
        decisions = None if state.decisions is None else (*state.decisions, decision)
        state = state._replace(report=state.report.then(*report), usage_2E=usage_2E, memory_TP=memory_TP, decisions=decisions)
        return y_BSD, state.scored(scores_C)


class MoETransformerLayer(_WithExperts, TransformerLayer):
    """Sequential residual with experts."""


class MoEReorderedNormLayer(_WithExperts, ReorderedNormLayer):
    """`reordered_norm` with experts."""


class MoEParallelResidualLayer(_WithExperts, ParallelResidualLayer):
    """`gpt_j_residual` with experts."""


class MoETiedParallelResidualLayer(_WithExperts, TiedParallelResidualLayer):
    """`gpt_j_tied` with experts."""


LAYERS: Mapping[str, tuple[type[TransformerLayer], type[TransformerLayer]]] = {
    "sequential": (TransformerLayer, MoETransformerLayer),
    "parallel": (ParallelResidualLayer, MoEParallelResidualLayer),
    "tied": (TiedParallelResidualLayer, MoETiedParallelResidualLayer),
    "reordered": (ReorderedNormLayer, MoEReorderedNormLayer),
}
"""`ModelConfig.residual` -> a layer with a dense MLP, one with experts."""


def build_layer(model: ModelConfig, moe: MoEConfig | None, index: int, init: Initializer, rpe: RelativePositions | None) -> TransformerLayer:
    """Transformer layer `index` (from 0). `moe`: the layer's own section; None for a dense one.

    `rpe`: the table of relative positions that all layers share; None where there is none.
    """
    dense, experts = LAYERS[model.residual]
    return (dense if moe is None else experts)(model, moe, index, init, rpe)
