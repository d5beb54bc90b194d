"""Small models of every shape that an architecture of Hugging Face's can hold, with weights of which none is like another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.save import resolved_config_document
from megatron.checkpoint.save_weights import Division, save_weights
from megatron.config.neox import NeoXConfig
from megatron.convert.architecture import Source
from megatron.model.gpt import GPT, build_model
from megatron.testing.tiny import tiny_config
from megatron.training.setup import checkpoint_args

VOCABULARY = 96
BASE: Mapping[str, Any] = {
    "num_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 80,
    "max_position_embeddings": 80,
    "pos_emb": "rotary",
    "init_method_std": 0.25,
    "output_layer_init_method": "normal",
    "tokenizer_type": "CharLevelTokenizer",
}
DECODER = {**BASE, "norm": "rmsnorm", "activation": "swiglu", "use_bias_in_attn_linear": False, "use_bias_in_mlp": False, "ffn_hidden_size": 48}
EXPERTS = {**DECODER, "moe_num_experts": 4, "moe_top_k": 2, "moe_router_type": "topk", "moe_ffn_hidden_size": 24}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 40}
SIGMOID = {**EXPERTS, "moe_router_type": "sigmoid", "moe_normalize_top_k": True, "moe_num_shared_experts": 2}

CASES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "pythia": ("neox", {**BASE, "gpt_j_residual": True, "rotary_pct": 0.25}),
    "neox-sequential-tied-head": ("neox", {**BASE, "no_weight_tying": False}),
    "neox-tanh-gelu": ("neox", {**BASE, "bias_gelu_fusion": True}),
    "neox-no-mlp-bias": ("neox", {**BASE, "use_bias_in_mlp": False, "use_bias_in_attn_linear": False, "activation": "mish"}),
    "neox-one-norm": ("neox", {**BASE, "gpt_j_residual": True, "gpt_j_tied": True}),
    "neox-no-norm-bias": ("neox", {**BASE, "use_bias_in_norms": False, "gpt_j_residual": True, "gpt_j_tied": True}),
    "llama": ("llama", {**DECODER}),
    "llama-grouped-tied": ("llama", {**DECODER, "num_kv_heads": 2, "no_weight_tying": False, "rotary_emb_base": 500000}),
    "llama-biases": ("llama", {**DECODER, "num_kv_heads": 1, "use_bias_in_attn_linear": True, "use_bias_in_mlp": True, "activation": "geglu"}),
    "mistral-window": ("mistral", {**DECODER, "num_kv_heads": 2, "sliding_window_width": 15}),
    "olmo": ("olmo", {**DECODER, "norm": "non_parametric_layernorm"}),
    "olmo2": ("olmo2", {**DECODER, "reordered_norm": True, "qk_norm_all_heads": True, "num_kv_heads": 2, "rms_norm_epsilon": 1e-6}),
    "qwen3": ("qwen3", {**DECODER, "num_kv_heads": 2, "qk_norm_per_head": True}),
    "mixtral": ("mixtral", {**EXPERTS, "num_kv_heads": 2, "moe_router_pre_softmax": False}),
    "mixtral-top-3-window": ("mixtral", {**EXPERTS, "moe_top_k": 3, "moe_normalize_top_k": True, "sliding_window_width": 20}),
    "mixtral-one-of-four": ("mixtral", {**EXPERTS, "moe_top_k": 1, "moe_normalize_top_k": True}),
    "qwen3-moe": ("qwen3-moe", {**EXPERTS, "qk_norm_per_head": True, "moe_first_k_dense_layers": 1}),
    "qwen3-moe-normalized": ("qwen3-moe", {**EXPERTS, "qk_norm_per_head": True, "moe_normalize_top_k": True, "moe_layers": [0, 2]}),
    "qwen2-moe": (
        "qwen2-moe",
        {**EXPERTS, "moe_shared_expert_gate": True, "moe_shared_expert_intermediate_size": 40, "moe_expert_interval": 2},
    ),
    "qwen2-moe-sinkhorn": ("qwen2-moe", {**EXPERTS, "moe_router_type": "sinkhorn", "moe_num_shared_experts": 1, "moe_shared_expert_gate": True}),
    "olmoe": ("olmoe", {**EXPERTS, "qk_norm_all_heads": True}),
    "olmoe-grouped": ("olmoe", {**EXPERTS, "qk_norm_all_heads": True, "num_kv_heads": 2, "moe_normalize_top_k": True}),
    "llama-3.1": ("llama", {**DECODER, "rope_scaling": LLAMA3, "rotary_emb_base": 500}),
    "neox-linear-scaling": ("neox", {**BASE, "rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rotary_pct": 0.5}),
    "glm4-moe": ("glm4-moe", {**SIGMOID, "moe_first_k_dense_layers": 1, "rotary_pct": 0.5, "num_kv_heads": 2}),
    "glm4-moe-groups": (
        "glm4-moe",
        {**SIGMOID, "moe_num_experts": 8, "moe_router_num_groups": 4, "moe_router_group_topk": 2, "moe_router_topk_scaling_factor": 2.5}
        | {"qk_norm_per_head": True, "moe_expert_segments": 2, "moe_ffn_hidden_size": 48, "moe_top_k": 1},
    ),
}
"""Name -> (architecture, our keys)."""


def source_of(keys: Mapping[str, Any]) -> Source:
    """The model of these keys."""
    return Source(config_of(keys), VOCABULARY)


def config_of(keys: Mapping[str, Any]) -> NeoXConfig:
    return tiny_config(**keys)


def lively_model(config: NeoXConfig, *, seed: int = 5, dtype: torch.dtype = torch.float32) -> GPT:
    """Biases, norms and the routers' biases are drawn too: what starts at 0 or 1 would hide mistakes."""
    gpt = build_model(config.model, config.moe, VOCABULARY, seed=seed, dtype=dtype).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in gpt.state_dict().items():
        if tensor.ndim == 1 or name.endswith(".bias"):
            noise = 0.3 * torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise if name.endswith("bias") else 1 + noise)
    return gpt


def logits_of(gpt: GPT, tokens_BS: Tensor) -> Tensor:
    """logits_BSV."""
    with torch.no_grad():
        logits_BSV = gpt(tokens_BS).logits_BSV
    assert logits_BSV is not None
    return logits_BSV


def save_model(directory: Path, config: NeoXConfig, gpt: GPT, *, division: Division | None = None, iteration: int = 3) -> Path:
    """The model as a checkpoint of ours, without an optimizer."""
    args = {**checkpoint_args(config, VOCABULARY), "model_parallel_size": (division or Division()).tensor_parallel}
    return save_weights(
        directory,
        gpt.state_dict().items(),
        client_state={"iteration": iteration, "args": args, "training_state": {"consumed_tokens": 4096}},
        documents=resolved_config_document(config.flat()),
        division=division or Division(),
    )


def save_stage(directory: str, keys: Mapping[str, Any], stage: int) -> str:
    """The model of `lively_model`, saved by an engine at a ZeRO stage. For run_distributed."""
    from megatron.checkpoint.save import save_checkpoint
    from megatron.training.engine import build_engine
    from megatron.training.process import start_process

    start_process(backend="gloo", threads=1)
    config = tiny_config(**{**keys, "zero_optimization": {"stage": stage}})
    gpt = lively_model(config).requires_grad_(True)
    engine = build_engine(config, gpt, world_size=torch.distributed.get_world_size())
    state = {"args": checkpoint_args(config, VOCABULARY)}
    return str(save_checkpoint(engine, directory, 3, client_state=state, documents=resolved_config_document(config.flat())))
