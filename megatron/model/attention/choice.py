"""Which implementation computes each layer's attention (`attention_config`): decided once, when the model is built."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from megatron.model.attention.flash import FlashAttention, reason_against_flash
from megatron.model.attention.sdpa import CausalSdpa
from megatron.model.attention.self_attention import SelfAttention

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig

LOGGER = logging.getLogger(__name__)


def choose_attention(model: ModelConfig, attentions: Sequence[SelfAttention], device: torch.device, dtype: torch.dtype) -> None:
    """`global` layers compute with PyTorch's SDPA; `flash` layers with flash_attn where it can, else with SDPA, and the log says why."""
    flash = [attention for attention, kind in zip(attentions, model.attention_types, strict=True) if kind == "flash"]
    reason = reason_against_flash(model, device, dtype) if flash else None
    if reason is not None:
        LOGGER.info("attention_config: flash in %d of %d layers, computed by PyTorch's SDPA: %s.", len(flash), len(attentions), reason)
        return
    for attention in flash:
        assert isinstance(attention.attend, CausalSdpa), attention.attend
        attention.attend = FlashAttention(attention.attend, attention.alibi_embed)
