"""Every layout of processes computes what one process computes: losses, gradients of every weight, auxiliary losses, the gradients' norm."""

from __future__ import annotations

import pytest

from megatron.testing.tiny import TINY_DENSE, TINY_MOE
from tests.invariants.equivalence import LAYOUTS, MODELS, compare

QUICK = [("structmoe", "TP2 x EP2"), ("mixtral", "SP"), ("decomposed", "EP2 ZeRO 1"), ("dense", "TP2 x DP2 ZeRO 1")]
"""One of each model in the default run; all of them in the slow one."""
EVERY = [(model, layout) for model in MODELS for layout, variant in LAYOUTS.items() if variant.suits(MODELS[model])]


@pytest.mark.parametrize(("model", "layout"), QUICK)
def test_a_layout_computes_what_one_process_computes(model: str, layout: str) -> None:
    assert compare(MODELS[model], LAYOUTS[layout], steps=4).problems() == []


@pytest.mark.slow
@pytest.mark.parametrize(("model", "layout"), [pair for pair in EVERY if pair not in QUICK])
def test_every_layout_computes_what_one_process_computes(model: str, layout: str) -> None:
    assert compare(MODELS[model], LAYOUTS[layout]).problems() == []


KINDS = {
    "learned positions, biases, tied": {"pos_emb": "learned", "no_weight_tying": False, "hidden_size": 64},
    "ALiBi, parallel residual": {"pos_emb": "alibi", "gpt_j_residual": True, "gpt_j_tied": True},
    "T5 positions": {"pos_emb": "rpe", "rpe_max_distance": 32, "rpe_num_buckets": 16},
    "gated, layernorm over all heads of q and k": {"activation": "swiglu", "use_qk_layernorm": True},
    "sinusoidal, uneven vocabulary": {"pos_emb": "sinusoidal", "make_vocab_size_divisible_by": 1},
    "reordered norm": {"reordered_norm": True, "norm": "rmsnorm"},
}


@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_dense_models(kind: str, sequence_parallel: bool) -> None:
    variant = LAYOUTS["SP" if sequence_parallel else "TP2"]
    assert compare({**TINY_DENSE, **KINDS[kind]}, variant, steps=3).problems() == []


ZERO_COMPUTATION = {
    "moe_zero_experts": 1,
    "moe_copy_experts": 1,
    "moe_constant_experts": 2,
    "moe_losses": {"heterogeneous_load_balance": 0.01},
}
BESIDE = {
    "shared expert with a gate": {"moe_num_shared_experts": 1, "moe_shared_expert_gate": True},
    "residual": {"moe_use_residual": True, "moe_expert_bias": True},
    "sigmoid router": {"moe_router_type": "sigmoid"},
    "top-p router": {"moe_router_type": "top_p", "moe_losses": {"entropy": 0.01}},
    "expert choice": {"moe_router_type": "expert_choice", "moe_losses": {}},
    "quantile balancing": {"moe_router_type": "quantile_balancing", "moe_losses": {}},
    "expert threshold": {"moe_router_type": "expert_threshold", "moe_losses": {}},
    "document pools": {"moe_router_type": "document_pool", "moe_losses": {}},
    "recurrent router": {"moe_router_type": "recurrent", "moe_router_rnn_hidden_size": 24},
    "latent": {"moe_latent_size": 16, "moe_num_shared_experts": 1},
    "zero computation": ZERO_COMPUTATION,
    "zero computation, latent StructMoE": {
        **ZERO_COMPUTATION,
        "moe_expert_type": "structmoe",
        "moe_num_lores": 4,
        "moe_lore_rank": 8,
        "moe_latent_size": 16,
    },
    "smoe_dropout": {"moe_router_type": "smoe_dropout", "moe_top_k": 3, "moe_router_start_k": 2},
}
OF_ALL_LAYOUTS = ("latent", "zero computation", "smoe_dropout")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["SP", "TP2 x EP2"])
@pytest.mark.parametrize("kind", BESIDE)
def test_kinds_of_experts(kind: str, layout: str) -> None:
    assert compare({**TINY_MOE, **BESIDE[kind]}, LAYOUTS[layout], steps=3).problems() == []


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["PP2", "EP2 ZeRO 1", "TP2 by width", "accumulation 4", "recompute", "PP2 x EP2"])
@pytest.mark.parametrize("kind", OF_ALL_LAYOUTS)
def test_kinds_of_experts_in_other_layouts(kind: str, layout: str) -> None:
    assert compare({**TINY_MOE, **BESIDE[kind]}, LAYOUTS[layout], steps=3).problems() == []


def test_latent_experts_and_experts_without_a_product_on_four_processes() -> None:
    assert compare({**TINY_MOE, **BESIDE["zero computation, latent StructMoE"]}, LAYOUTS["TP2 x EP2"], steps=2).problems() == []
