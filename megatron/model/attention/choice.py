"""Which implementation computes each layer's attention (`attention_config`): decided once, when the model has its device and number format."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from megatron.model.attention.flash import FlashAttention, reason_against_flash
from megatron.model.attention.sdpa import CausalSdpa

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig
    from megatron.model.gpt import GPT

LOGGER = logging.getLogger(__name__)


def choose_attention(model: ModelConfig, gpt: GPT) -> None:
    """`flash` layers use flash_attn if it can compute them; if not, the log says why. All other layers keep PyTorch's SDPA.

    Call it when the model is on its final device. A second call changes nothing.
    """
    flash = [layer.attention for layer, kind in zip(gpt.layers, model.attention_types, strict=True) if kind == "flash"]
    weight = next(gpt.parameters())
    reason = reason_against_flash(model, weight.device, weight.dtype) if flash else None
    if reason is not None:
        LOGGER.info("attention_config: flash in %d of %d layers, computed by PyTorch's SDPA: %s.", len(flash), model.num_layers, reason)
        return
    for attention in flash:
        if isinstance(attention.attend, CausalSdpa):
            attention.attend = FlashAttention(attention.attend, attention.alibi_embed)
