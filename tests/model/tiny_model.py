"""The smallest models that have every part: what the model's tests start from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.config.model import ModelConfig
from megatron.config.moe import MoEConfig
from megatron.model import GPT, build_model

VOCAB = 48
LOSSES = {"load_balance": 0.01, "z_loss": 0.001}


def model_section(**changes: Any) -> ModelConfig:
    """Two layers of width 16 with two heads."""
    values: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "seq_length": 12,
        "max_position_embeddings": 16,
        "pos_emb": "rotary",
        "intermediate_size": 24,
        "init_method_std": 0.2,
    }
    return ModelConfig(**values | changes)


def moe_section(**changes: Any) -> MoEConfig:
    """Three StructMoE experts with four LoREs each, unless told otherwise."""
    values: dict[str, Any] = {
        "moe_num_experts": 3,
        "moe_router_type": "topk",
        "moe_expert_type": "structmoe",
        "moe_num_lores": 4,
        "moe_lore_rank": 3,
        "moe_losses": LOSSES,
    }
    return MoEConfig(**values | changes)


DENSE = MoEConfig()


def tokens(batch: int = 2, length: int = 9, seed: int = 0) -> Tensor:
    """Random tokens, one more than a sequence so that inputs and labels come from it."""
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def tiny_model(model: ModelConfig | None = None, moe: MoEConfig | None = None, *, seed: int = 1, dtype: torch.dtype = torch.float32) -> GPT:
    """A model of the two sections (defaults as above)."""
    return build_model(model or model_section(), moe or moe_section(), VOCAB, seed=seed, dtype=dtype)
