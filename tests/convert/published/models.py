"""Published models by their own config.json: true numbers of heads, experts, biases and ends; fewer layers, a small vocabulary, small widths.

Widths are a 16th, of Code Llama a 32nd.

Each names the versions of transformers to write it with: the first one that knows the class, and the newest of the 4 line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

VOCABULARY = 256
FIRST, LAST = "4.24.0", "4.57.6"


class Published(NamedTuple):
    """`settings` as published, scaled; `versions` of transformers 4 that stored files were made with."""

    class_name: str
    settings: Mapping[str, Any]
    versions: tuple[str, ...]


BASE: Mapping[str, Any] = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "initializer_range": 0.02}

MODELS: Mapping[str, Published] = {
    "pythia-1.4b": Published(
        "GPTNeoXForCausalLM",
        {**BASE, "hidden_size": 128, "num_attention_heads": 16, "intermediate_size": 512, "rotary_pct": 0.25, "rotary_emb_base": 10000}
        | {"max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "use_parallel_residual": True, "hidden_act": "gelu"}
        | {"tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0},
        ("4.24.0", LAST),
    ),
    "llama-3.2-1b": Published(
        "LlamaForCausalLM",
        {**BASE, "hidden_size": 128, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 4, "intermediate_size": 512}
        | {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True}
        | {
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            }
        }
        | {"bos_token_id": 128, "eos_token_id": 129, "attention_bias": False, "mlp_bias": False},
        ("4.45.2", LAST),
    ),
    "codellama-34b": Published(
        "LlamaForCausalLM",
        {**BASE, "hidden_size": 256, "num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 688}
        | {"max_position_embeddings": 16384, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "tie_word_embeddings": False}
        | {"bos_token_id": 1, "eos_token_id": 2},
        ("4.33.3", LAST),
    ),
    "mistral-nemo": Published(
        "MistralForCausalLM",
        {**BASE, "hidden_size": 320, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 8, "intermediate_size": 896}
        | {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None}
        | {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False},
        ("4.45.2", LAST),
    ),
    "mixtral-8x7b": Published(
        "MixtralForCausalLM",
        {**BASE, "hidden_size": 256, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 896, "num_local_experts": 8}
        | {"num_experts_per_tok": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None}
        | {"router_aux_loss_coef": 0.02, "output_router_logits": False, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2},
        ("4.36.2", LAST),
    ),
    "qwen2-0.5b": Published(
        "Qwen2ForCausalLM",
        {**BASE, "hidden_size": 112, "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 608, "tie_word_embeddings": True}
        | {"max_position_embeddings": 131072, "max_window_layers": 24, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "sliding_window": 131072}
        | {"use_sliding_window": False, "bos_token_id": 130, "eos_token_id": 130},
        ("4.40.2", LAST),
    ),
    "qwen1.5-moe-a2.7b": Published(
        "Qwen2MoeForCausalLM",
        {**BASE, "hidden_size": 128, "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 352, "num_experts": 60}
        | {"moe_intermediate_size": 88, "shared_expert_intermediate_size": 352, "num_experts_per_tok": 4, "norm_topk_prob": False}
        | {"decoder_sparse_step": 1, "max_position_embeddings": 8192, "max_window_layers": 21, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0}
        | {"sliding_window": 32768, "use_sliding_window": False, "router_aux_loss_coef": 0.001, "output_router_logits": False}
        | {"tie_word_embeddings": False, "bos_token_id": 130, "eos_token_id": 130},
        ("4.40.2", LAST),
    ),
    "qwen3-0.6b": Published(
        "Qwen3ForCausalLM",
        {**BASE, "hidden_size": 64, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 8, "intermediate_size": 192}
        | {"max_position_embeddings": 40960, "max_window_layers": 28, "rms_norm_eps": 1e-6, "rope_theta": 1000000, "rope_scaling": None}
        | {"sliding_window": None, "use_sliding_window": False, "tie_word_embeddings": True, "attention_bias": False}
        | {"bos_token_id": 130, "eos_token_id": 131},
        ("4.51.3", LAST),
    ),
    "qwen3-30b-a3b": Published(
        "Qwen3MoeForCausalLM",
        {**BASE, "hidden_size": 128, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 384}
        | {"moe_intermediate_size": 48, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1}
        | {"mlp_only_layers": [], "max_position_embeddings": 40960, "max_window_layers": 48, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0}
        | {"rope_scaling": None, "sliding_window": None, "use_sliding_window": False, "router_aux_loss_coef": 0.001}
        | {"output_router_logits": False, "attention_bias": False, "tie_word_embeddings": False, "bos_token_id": 130, "eos_token_id": 131},
        ("4.51.3", LAST),
    ),
    "olmo-2-7b": Published(
        "Olmo2ForCausalLM",
        {**BASE, "hidden_size": 256, "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 688, "pad_token_id": 131}
        | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 500000, "rope_scaling": None, "attention_bias": False}
        | {"tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 130},
        ("4.47.1", LAST),
    ),
    "olmoe-1b-7b": Published(
        "OlmoeForCausalLM",
        {**BASE, "hidden_size": 128, "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 64, "num_experts": 64}
        | {"num_experts_per_tok": 8, "norm_topk_prob": False, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
        | {"rope_scaling": None, "clip_qkv": None, "attention_bias": False, "router_aux_loss_coef": 0.01, "output_router_logits": False}
        | {"tie_word_embeddings": False, "pad_token_id": 1, "eos_token_id": 130},
        ("4.45.2", LAST),
    ),
    "glm-4.5": Published(
        "Glm4MoeForCausalLM",
        {**BASE, "hidden_size": 320, "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 8, "intermediate_size": 768}
        | {"moe_intermediate_size": 96, "n_routed_experts": 160, "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 1}
        | {"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "partial_rotary_factor": 0.5}
        | {"attention_bias": True, "use_qk_norm": True, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1000000}
        | {"rope_scaling": None, "tie_word_embeddings": False, "num_nextn_predict_layers": 1, "pad_token_id": 130, "eos_token_id": [130, 131, 132]},
        ("4.54.1", LAST),
    ),
    "glm-4.5-air": Published(
        "Glm4MoeForCausalLM",
        {**BASE, "hidden_size": 256, "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 8, "intermediate_size": 684}
        | {"moe_intermediate_size": 88, "n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 1}
        | {"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0, "partial_rotary_factor": 0.5}
        | {"attention_bias": True, "use_qk_norm": False, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1000000}
        | {"rope_scaling": None, "tie_word_embeddings": False, "num_nextn_predict_layers": 1, "pad_token_id": 130, "eos_token_id": [130, 131, 132]},
        ("4.54.1", LAST),
    ),
}
