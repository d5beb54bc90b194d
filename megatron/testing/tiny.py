"""Configurations small enough for a test: two layers, 32 wide, a step takes milliseconds on one core."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from megatron.config import NeoXConfig, config_from_dict

# A dense model with rotary attention, and everything that a training run needs except data.
TINY_DENSE: Mapping[str, Any] = MappingProxyType(
    {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "seq_length": 16,
        "max_position_embeddings": 16,
        "pos_emb": "rotary",
        "no_weight_tying": True,
        "make_vocab_size_divisible_by": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-8}},
        "lr_decay_style": "cosine",
        "min_lr": 1e-3,
        "train_iters": 8,
        "train_micro_batch_size_per_gpu": 2,
        "log_interval": 1,
        "eval_interval": 4,
        "eval_iters": 2,
        "num_workers": 0,
    }
)

# Four experts, two per token, with both auxiliary losses.
TINY_MOE: Mapping[str, Any] = MappingProxyType(
    {
        **TINY_DENSE,
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "moe_router_type": "topk",
        "intermediate_size": 64,
        "moe_losses": {"load_balance": 0.01, "z_loss": 0.001},
    }
)

# The same with four LoREs in each expert, two of them per token.
TINY_STRUCTMOE: Mapping[str, Any] = MappingProxyType(
    {**TINY_MOE, "moe_expert_type": "structmoe", "moe_num_lores": 4, "moe_lore_top_k": 2, "moe_lore_rank": 8}
)


def tiny_config(base: Mapping[str, Any] = TINY_DENSE, **overrides: Any) -> NeoXConfig:
    """The validated configuration of `base` with `overrides` (NeoX's key names) put over it; an override of None takes the key away.

    Raises ConfigError as the loader does.
    """
    values = {**base, **overrides}
    return config_from_dict({key: value for key, value in values.items() if value is not None})
