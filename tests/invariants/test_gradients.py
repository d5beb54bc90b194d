"""Every parameter of every combination of parts gets a finite gradient that is not zero."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from megatron.config.components import EXPERTS, ROUTERS
from tests.model.tiny_model import DENSE, model_section, moe_section, tiny_model, tokens

FEED_FORWARD = ["dense", *itertools.product(ROUTERS, EXPERTS, [1, 2])]


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize(("residual", "bias", "norm", "pos_emb"), [(False, True, "layernorm", "rotary"), (True, False, "rmsnorm", "learned")])
@pytest.mark.parametrize("feed_forward", FEED_FORWARD, ids=str)
def test_every_parameter_gets_a_gradient(feed_forward: Any, residual: bool, bias: bool, norm: str, pos_emb: str, activation: str) -> None:
    model = model_section(
        gpt_j_residual=residual,
        use_bias_in_mlp=bias,
        use_bias_in_attn_linear=bias,
        norm=norm,
        pos_emb=pos_emb,
        activation=activation,
        no_weight_tying=residual,
        num_kv_heads=2 if residual else None,
        max_position_embeddings=32,
        seq_length=32,
    )
    moe = DENSE
    if feed_forward != "dense":
        router, experts, choices = feed_forward
        moe = moe_section(moe_router_type=router, moe_expert_type=experts, moe_top_k=choices, moe_lore_top_k=choices, moe_num_lores=2)
    gpt, text = tiny_model(model, moe), tokens(8, 33)
    gpt(text[:, :-1], labels_BS=text[:, 1:]).loss.backward()
    for name, parameter in gpt.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name
