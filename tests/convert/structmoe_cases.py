"""Models that StructMoEForCausalLM has to compute: one change at a time, and mixtures of them."""

from __future__ import annotations

from typing import Any

Changes = dict[str, Any]

MOE: Changes = {"moe_num_experts": 4, "moe_top_k": 2, "moe_router_type": "topk", "intermediate_size": 64}
GATED_MOE: Changes = {**MOE, "activation": "swiglu", "norm": "rmsnorm"}
STRUCTMOE: Changes = {**MOE, "moe_expert_type": "structmoe", "moe_num_lores": 4, "moe_lore_top_k": 2, "moe_lore_rank": 8}
GATED_STRUCTMOE: Changes = {**STRUCTMOE, "activation": "swiglu", "norm": "rmsnorm"}
SIGMOID: Changes = {**GATED_MOE, "moe_num_experts": 8, "moe_router_type": "sigmoid"}

NORMS: dict[str, Changes] = {
    "layernorm": {},
    "layernorm without biases": {"use_bias_in_norms": False},
    "layernorm epsilon": {"layernorm_epsilon": 0.1},
    "rmsnorm": {"norm": "rmsnorm", "rms_norm_epsilon": 0.1},
    "scalenorm": {"norm": "scalenorm"},
    "norms without weights": {"norm": "non_parametric_layernorm", "layernorm_epsilon": 0.01},
    **{f"qk all heads {norm}": {"norm": norm, "use_qk_layernorm": True} for norm in ("layernorm", "rmsnorm", "scalenorm")},
    **{f"qk all heads {norm} gqa": {"norm": norm, "use_qk_layernorm": True, "num_kv_heads": 2} for norm in ("layernorm", "rmsnorm", "scalenorm")},
    "qk all heads without biases": {"use_qk_layernorm": True, "use_bias_in_norms": False},
    **{f"qk per head {norm}": {"norm": norm, "qk_norm_per_head": True, "num_kv_heads": 2} for norm in ("layernorm", "rmsnorm")},
    **{f"qk jointly {norm}": {"norm": norm, "qk_norm_all_heads": True, "num_kv_heads": 2} for norm in ("layernorm", "rmsnorm")},
    "qk without weights": {"norm": "non_parametric_layernorm", "qk_norm_per_head": True},
}
POSITIONS: dict[str, Changes] = {
    "rotary half": {"rotary_pct": 0.5, "rotary_emb_base": 500},
    "rotary odd share": {"hidden_size": 40, "num_attention_heads": 2, "rotary_pct": 0.3},
    "rotary linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "rotary llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "learned": {"pos_emb": "learned"},
    "learned offset": {"pos_emb": "learned", "opt_pos_emb_offset": 2},
    "sinusoidal": {"pos_emb": "sinusoidal"},
    "alibi": {"pos_emb": "alibi"},
    "alibi six heads": {"pos_emb": "alibi", "hidden_size": 48, "num_attention_heads": 6, "num_kv_heads": 3},
    "alibi scaled": {"pos_emb": "alibi", "apply_query_key_layer_scaling": True, "num_layers": 4},
    "rpe": {"pos_emb": "rpe", "rpe_num_buckets": 8, "rpe_max_distance": 24},
    "rpe scaled in some layers": {
        "pos_emb": "rpe",
        "apply_query_key_layer_scaling": True,
        "num_layers": 4,
        "attention_config": ["global", "global", "flash", "global"],
    },
    "no positions": {"pos_emb": "none"},
}
ATTENTION: dict[str, Changes] = {
    "gqa": {"num_kv_heads": 2},
    "one key head": {"num_kv_heads": 1, "use_bias_in_attn_linear": False},
    "window": {"sliding_window_width": 5},
    "window alibi": {"sliding_window_width": 5, "pos_emb": "alibi"},
    "window rpe gqa": {"sliding_window_width": 9, "pos_emb": "rpe", "num_kv_heads": 2},
    "no attention biases": {"use_bias_in_attn_linear": False},
    "biases on queries, keys and values": {"use_bias_in_attn_linear": False, "add_qkv_bias": True, "num_kv_heads": 2},
    "wide heads": {"head_dim": 32},
    "narrow heads gqa": {"head_dim": 6, "num_kv_heads": 2, "use_bias_in_attn_linear": False, "add_qkv_bias": True},
    "heads that do not divide": {"hidden_size": 40, "num_attention_heads": 6, "num_kv_heads": 2, "head_dim": 8},
    "wide heads rotary half": {"head_dim": 40, "rotary_pct": 0.3, "num_kv_heads": 1},
    "wide heads alibi": {"head_dim": 32, "pos_emb": "alibi", "num_kv_heads": 2},
    "wide heads rpe": {"head_dim": 32, "pos_emb": "rpe"},
    "wide heads qk all heads gqa": {"head_dim": 32, "use_qk_layernorm": True, "num_kv_heads": 2},
    "wide heads qk per head": {"head_dim": 32, "qk_norm_per_head": True, "norm": "rmsnorm", "num_kv_heads": 2},
    "narrow heads qk jointly": {"head_dim": 6, "qk_norm_all_heads": True, "num_kv_heads": 2},
}
BLOCKS: dict[str, Changes] = {
    "tied head": {"no_weight_tying": False},
    "parallel": {"gpt_j_residual": True},
    "tied residual": {"gpt_j_residual": True, "gpt_j_tied": True},
    "reordered norms": {"reordered_norm": True, "norm": "rmsnorm"},
    "reordered norms experts": {**MOE, "reordered_norm": True},
    "parallel experts": {**MOE, "gpt_j_residual": True},
    "tied residual experts": {**MOE, "gpt_j_residual": True, "gpt_j_tied": True},
    "no mlp biases": {"use_bias_in_mlp": False, "activation": "geglu"},
    "tanh gelu": {"bias_gelu_fusion": True},
    **{f"mlp {name}": {"activation": name} for name in ("relu", "softsign", "swish", "mish", "silu", "geglu", "reglu", "swiglu", "glu", "bilinear")},
}
ROUTERS: dict[str, Changes] = {
    "topk": MOE,
    "topk normalized and scaled": {**MOE, "moe_normalize_top_k": True, "moe_router_topk_scaling_factor": 2.5},
    "topk softmax after": {**MOE, "moe_router_pre_softmax": False},
    "switch": {**MOE, "moe_top_k": 1},
    "sinkhorn 1": {**MOE, "moe_router_type": "sinkhorn", "moe_top_k": 1},
    "sinkhorn 2": {**MOE, "moe_router_type": "sinkhorn"},
    "sigmoid": SIGMOID,
    "sigmoid normalized and scaled": {**SIGMOID, "moe_normalize_top_k": True, "moe_router_topk_scaling_factor": 2.5},
    "sigmoid groups": {**SIGMOID, "moe_router_num_groups": 4, "moe_router_group_topk": 2},
    "top_p": {**MOE, "moe_router_type": "top_p", "moe_router_top_p": 0.6},
    "top_p normalized": {**MOE, "moe_router_type": "top_p", "moe_normalize_top_k": True},
    "expert choice": {**MOE, "moe_router_type": "expert_choice"},
    "quantile balancing": {**MOE, "moe_router_type": "quantile_balancing"},
    "quantile balancing normalized": {**GATED_MOE, "moe_router_type": "quantile_balancing", "moe_normalize_top_k": True},
    "expert threshold": {**MOE, "moe_router_type": "expert_threshold"},
    "document pool": {**MOE, "moe_router_type": "document_pool", "moe_router_topk_scaling_factor": 2.5},
    "recurrent": {**MOE, "moe_router_type": "recurrent", "moe_router_rnn_hidden_size": 24, "num_layers": 3},
    "recurrent behind a dense layer": {
        **GATED_MOE,
        "moe_router_type": "recurrent",
        "moe_router_rnn_hidden_size": 40,
        "num_layers": 4,
        "moe_layers": [1, 3],
        "reordered_norm": True,
    },
    "smoe_dropout": {**MOE, "moe_router_type": "smoe_dropout", "moe_top_k": 3, "moe_router_start_k": 2},
    "smoe_dropout of another number": {**MOE, "moe_router_type": "smoe_dropout", "moe_top_k": 4, "moe_router_eval_k": 3},
}
ZERO_COMPUTATION: Changes = {"moe_zero_experts": 1, "moe_copy_experts": 1, "moe_constant_experts": 2}
AROUND: dict[str, Changes] = {
    "latent": {**MOE, "moe_latent_size": 12},
    "latent structmoe": {**GATED_STRUCTMOE, "moe_latent_size": 24, "moe_lore_projection": "both", "moe_num_shared_experts": 1},
    "latent decomposed": {**MOE, "moe_expert_type": "decomposed", "moe_latent_size": 16, "moe_expert_bias": True},
    "latent standalone": {**STRUCTMOE, "moe_lore_interaction": "standalone", "moe_latent_size": 16},
    "zero computation": {**MOE, **ZERO_COMPUTATION, "moe_losses": {"heterogeneous_load_balance": 0.01}, "moe_zero_computation_balance": 0.5},
    "zero computation structmoe": {**STRUCTMOE, **ZERO_COMPUTATION, "moe_normalize_top_k": True},
    "copy experts": {**SIGMOID, "moe_copy_experts": 2},
    "zero experts, top_p": {**MOE, "moe_router_type": "top_p", "moe_zero_experts": 2},
    "smoe_dropout, constant experts and latent": {
        **MOE,
        "moe_router_type": "smoe_dropout",
        "moe_router_start_k": 2,
        "moe_constant_experts": 2,
        "moe_latent_size": 16,
    },
    "constant experts and latent": {**GATED_MOE, "moe_constant_experts": 1, "moe_latent_size": 16, "moe_use_residual": True},
}
EXPERTS: dict[str, Changes] = {
    **{f"experts {name}": {**MOE, "activation": name} for name in ("relu", "mish", "geglu", "glu", "bilinear")},
    "segments": {**MOE, "moe_expert_segments": 2},
    "decomposed": {**MOE, "moe_expert_type": "decomposed"},
    "decomposed gated": {**GATED_MOE, "moe_expert_type": "decomposed", "moe_decomposition_rank": 8},
    **{
        f"biases {name}": {**keys, "moe_expert_bias": True}
        for name, keys in {
            "plain": MOE,
            "gated": GATED_MOE,
            "decomposed": {**MOE, "moe_expert_type": "decomposed"},
            "decomposed gated": {**GATED_MOE, "moe_expert_type": "decomposed", "moe_decomposition_rank": 8},
            "structmoe": STRUCTMOE,
            "structmoe standalone": {**STRUCTMOE, "moe_lore_interaction": "standalone"},
            "structmoe gated": {**STRUCTMOE, "moe_lore_interaction": "gated"},
            **{f"structmoe swiglu {which}": {**GATED_STRUCTMOE, "moe_lore_projection": which} for which in ("up", "gate", "both")},
        }.items()
    },
    "structmoe": STRUCTMOE,
    "structmoe one lore": {**STRUCTMOE, "moe_lore_top_k": 1},
    "structmoe normalized": {**STRUCTMOE, "moe_lore_normalize": True},
    "structmoe unrouted": {**STRUCTMOE, "moe_lore_routed": False},
    "structmoe standalone": {**STRUCTMOE, "moe_lore_interaction": "standalone"},
    "structmoe gated": {**STRUCTMOE, "moe_lore_interaction": "gated"},
    "structmoe gated unrouted": {**STRUCTMOE, "moe_lore_interaction": "gated", "moe_lore_routed": False},
    **{f"structmoe swiglu {which}": {**GATED_STRUCTMOE, "moe_lore_projection": which} for which in ("up", "gate", "both")},
    "structmoe swiglu both unrouted": {**GATED_STRUCTMOE, "moe_lore_projection": "both", "moe_lore_routed": False},
    "structmoe swiglu standalone": {**GATED_STRUCTMOE, "moe_lore_interaction": "standalone"},
    "structmoe top_p": {**STRUCTMOE, "moe_router_type": "top_p"},
}
PLACES: dict[str, Changes] = {
    "every other layer": {**MOE, "num_layers": 4, "moe_expert_interval": 2},
    "first dense": {**GATED_MOE, "num_layers": 3, "moe_first_k_dense_layers": 1},
    "named layers": {**STRUCTMOE, "num_layers": 4, "moe_layers": [1, 2]},
    "experts by layer": {**MOE, "num_layers": 3, "moe_num_experts": None, "moe_num_experts_by_layer": [2, 4, 6]},
    "shared": {**MOE, "moe_num_shared_experts": 2},
    "shared without biases": {**GATED_MOE, "moe_num_shared_experts": 1, "use_bias_in_mlp": False},
    "shared gated": {**GATED_MOE, "moe_shared_expert_intermediate_size": 24, "moe_shared_expert_gate": True},
    "residual": {**MOE, "moe_use_residual": True},
    "residual and shared": {**GATED_STRUCTMOE, "moe_use_residual": True, "moe_num_shared_experts": 1, "moe_shared_expert_gate": True},
}
ODD: dict[str, Changes] = {
    # Sizes that PyTorch's grouped product does not take.
    "odd experts": {**STRUCTMOE, "intermediate_size": 54, "moe_lore_rank": 3, "moe_num_lores": 3},
    "odd decomposed": {**MOE, "moe_expert_type": "decomposed", "moe_decomposition_rank": 5},
}
GROUPS: dict[str, dict[str, Changes]] = {
    "norms": NORMS,
    "positions": POSITIONS,
    "attention": ATTENTION,
    "blocks": BLOCKS,
    "routers": ROUTERS,
    "experts": EXPERTS,
    "around": AROUND,
    "places": PLACES,
    "odd sizes": ODD,
}
CASES: dict[str, Changes] = {name: changes for group in GROUPS.values() for name, changes in group.items()}
