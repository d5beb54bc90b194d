"""Models of every class that is read and written here: the heads, experts and biases of published ones, scaled down, in config.json's words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

ROWS = 512
"""Of the vocabulary: what CharLevelTokenizer fills."""
ENDS = {"vocab_size": ROWS, "max_position_embeddings": 64, "num_hidden_layers": 2}
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 32}
QWEN2_MOE = {"num_experts": 6, "num_experts_per_tok": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 64, "norm_topk_prob": False}
QWEN3_MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
GLM = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
}
PYTHIA = {"hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 256}


def _heads(hidden_size: int, heads: int, kv_heads: int, head_dim: int | None = None) -> dict[str, Any]:
    sizes = {"hidden_size": hidden_size, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": 2 * hidden_size}
    return sizes if head_dim is None else {**sizes, "head_dim": head_dim}


CLASS_MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "Pythia": ("gpt_neox", {**PYTHIA, "rotary_pct": 0.25}),
    "GPT-NeoX without attention biases": ("gpt_neox", {**PYTHIA, "attention_bias": False, "use_parallel_residual": False}),
    "Llama 3.2": ("llama", {**_heads(64, 8, 2, 8), "rope_scaling": LLAMA3, "rope_theta": 500000.0, "tie_word_embeddings": True}),
    "Code Llama": ("llama", {**_heads(64, 8, 8), "rope_theta": 1000000}),
    "Llama Minitron, heads of their own width": ("llama", _heads(48, 8, 2, 8)),
    "Llama with all biases": ("llama", {**_heads(64, 4, 2), "attention_bias": True, "mlp_bias": True, "attention_dropout": 0.1}),
    "Mistral 7B": ("mistral", {**_heads(64, 8, 2), "sliding_window": 32}),
    "Mistral-Nemo": ("mistral", {**_heads(80, 8, 2, 8), "sliding_window": None, "rope_theta": 1000000.0}),
    "Mistral, hidden_size not divisible by its heads": ("mistral", {**_heads(70, 8, 2, 8), "sliding_window": None}),
    "OLMo": ("olmo", _heads(64, 8, 8)),
    "OLMo with biases": ("olmo", {**_heads(64, 8, 8), "attention_bias": True}),
    "OLMo, heads of their own width": ("olmo", _heads(64, 4, 2, 8)),
    "OLMo 2": ("olmo2", _heads(64, 8, 8)),
    "OLMo 2 with biases, heads of their own width": ("olmo2", {**_heads(64, 4, 2, 8), "attention_bias": True}),
    "Qwen2": ("qwen2", {**_heads(56, 14, 2), "tie_word_embeddings": True}),
    "Qwen2, heads of their own width": ("qwen2", _heads(48, 4, 2, 8)),
    "Qwen3 0.6B": ("qwen3", {**_heads(32, 4, 2, 16), "tie_word_embeddings": True}),
    "Qwen3 4B": ("qwen3", {**_heads(40, 8, 2, 8), "tie_word_embeddings": True}),
    "Qwen3 32B": ("qwen3", _heads(40, 16, 2, 4)),
    "Qwen3 with biases": ("qwen3", {**_heads(32, 4, 2, 16), "attention_bias": True}),
    "Mixtral": ("mixtral", {**_heads(64, 8, 2), "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "Mixtral, heads of their own width": ("mixtral", {**_heads(64, 8, 2, 16), "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2-MoE": ("qwen2_moe", {**_heads(64, 8, 8), **QWEN2_MOE}),
    "Qwen2-MoE without biases": ("qwen2_moe", {**_heads(64, 8, 8), **QWEN2_MOE, "qkv_bias": False}),
    "Qwen2-MoE, dense layers, heads of their own width": ("qwen2_moe", {**_heads(64, 4, 2, 8), **QWEN2_MOE, "mlp_only_layers": [0]}),
    "Qwen3-30B-A3B": ("qwen3_moe", {**_heads(32, 8, 2, 8), **QWEN3_MOE}),
    "Qwen3-MoE with biases": ("qwen3_moe", {**_heads(32, 8, 2, 8), **QWEN3_MOE, "attention_bias": True, "mlp_only_layers": [1]}),
    "OLMoE": ("olmoe", {**_heads(64, 8, 8), "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": False}),
    "OLMoE with biases, grouped heads": ("olmoe", {**_heads(64, 4, 2), "num_experts": 8, "attention_bias": True}),
    "GLM-4.5": ("glm4_moe", {**_heads(40, 12, 2, 8), **GLM, "use_qk_norm": True}),
    "GLM-4.5 Air": ("glm4_moe", {**_heads(32, 12, 2, 8), **GLM}),
    "GLM without biases": ("glm4_moe", {**_heads(64, 8, 2), **GLM, "attention_bias": False}),
}
"""Name -> (model_type, settings)."""


def write_class_model(directory: Path, name: str, *, fused: bool = False) -> Any:
    """Saves the random model and returns it. `fused`: experts as one tensor for each matrix, as transformers 5 can write them."""
    model_type, settings = CLASS_MODELS[name]
    settings = {**ENDS, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **settings}
    torch.manual_seed(2)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(model_type, **settings)).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter_name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator) + float("norm" in parameter_name))
    model.save_pretrained(directory, save_original_format=not fused)
    return model
