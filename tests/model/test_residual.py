"""What a layer adds to the residual stream: sequential, parallel and tied, with and without biases, dense and with experts; and dropout."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from megatron.model.layer import TransformerLayer
from megatron.model.moe import MoELayer
from megatron.model.state import LayerState
from tests.model.tiny_model import DENSE, model_section, moe_section, tiny_model, tokens

RESIDUALS = {"sequential": {}, "parallel": {"gpt_j_residual": True}, "tied": {"gpt_j_residual": True, "gpt_j_tied": True}}
RESIDUALS["reordered"] = {"reordered_norm": True}
BIASES = list(itertools.product([False, True], repeat=2))


def feed_forward(layer: TransformerLayer, x: Tensor) -> Tensor:
    return layer.mlp(x).y_BSD if isinstance(layer.mlp, MoELayer) else layer.mlp(x)


def state(hidden_BSD: Tensor) -> LayerState:
    return LayerState.start(hidden_BSD, widths=(2, 3, 0, 3))


def by_hand(kind: str, layer: TransformerLayer, x: Tensor) -> Tensor:
    first, second, attention = layer.input_layernorm, layer.post_attention_layernorm, layer.attention
    if kind == "tied":
        return x + attention(first(x)) + feed_forward(layer, first(x))
    if kind == "parallel":
        return x + attention(first(x)) + feed_forward(layer, second(x))
    if kind == "reordered":
        x = x + first(attention(x))
        return x + second(feed_forward(layer, x))
    x = x + attention(first(x))
    return x + feed_forward(layer, second(x))


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize(("attention_bias", "mlp_bias"), BIASES)
@pytest.mark.parametrize("kind", RESIDUALS)
def test_a_layer_is_its_formula(kind: str, attention_bias: bool, mlp_bias: bool, experts: bool) -> None:
    section = model_section(num_layers=1, use_bias_in_attn_linear=attention_bias, use_bias_in_mlp=mlp_bias, **RESIDUALS[kind])
    model = tiny_model(section, moe_section(moe_expert_type="grouped") if experts else DENSE).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    final = model.sequential["4"](by_hand(kind, model.layers[0], model.sequential["0"](tokens())))
    torch.testing.assert_close(model(tokens()).logits_BSV, final @ model.sequential["0"].word_embeddings.weight.T)
    names = {name.split(".", 2)[2] for name, _ in model.named_parameters() if name.startswith("sequential.2.")}
    assert {"input_layernorm.weight", "post_attention_layernorm.weight"} <= names, "GPT-NeoX keeps both norms, tied or not"
    assert ("attention.query_key_value.bias" in names) == ("attention.dense.bias" in names) == attention_bias
    assert ("mlp.linear1.bias" in names) == ("mlp.linear2.bias" in names) == (mlp_bias and not experts)


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", RESIDUALS)
def test_dropout_follows_attention_and_mlps_with_biases(kind: str, bias: bool, experts: bool) -> None:
    """Everything dropped: the branch adds nothing. GPT-NeoX has no dropout after experts and after MLPs without biases."""
    section = model_section(num_layers=1, use_bias_in_mlp=bias, use_bias_in_attn_linear=bias, hidden_dropout=1.0, **RESIDUALS[kind])
    layer = tiny_model(section, moe_section(moe_expert_type="grouped") if experts else DENSE).layers[0]
    x_BSD = torch.randn(1, 4, 16)
    norm = layer.input_layernorm if kind == "tied" else layer.post_attention_layernorm
    change_BSD = norm(feed_forward(layer, x_BSD)) if kind == "reordered" else feed_forward(layer, norm(x_BSD))
    wanted = x_BSD if bias and not experts else x_BSD + change_BSD
    torch.testing.assert_close(layer(state(x_BSD)).hidden_BSD, wanted)
    assert not torch.allclose(layer.eval()(state(x_BSD)).hidden_BSD, wanted)
