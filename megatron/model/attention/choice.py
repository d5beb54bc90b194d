"""Which implementation computes each layer's attention (`attention_config`, `kernel_backends`): decided once, when the model has its device and
number format."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from megatron.kernels.attention import OP
from megatron.model.attention.context import FusedContext, KernelAttend
from megatron.model.attention.flash import FlashAttention, reason_against_flash
from megatron.model.attention.sdpa import CausalSdpa
from megatron.model.attention.split import PlainSplit, RotarySplit

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig
    from megatron.model.attention.self_attention import SelfAttention
    from megatron.model.gpt import GPT

LOGGER = logging.getLogger(__name__)


def choose_attention(model: ModelConfig, gpt: GPT, backend: str = "auto") -> None:
    """`flash` layers use flash_attn if it can compute them; if not, the log says why. Other layers use the compiled op or PyTorch's SDPA.

    `backend`: the implementation of the op `attention` (`kernel_backends`). Call it when the model is on its final device. A second call changes
    nothing.
    """
    weight = next(gpt.parameters())
    flash = [layer.attention for layer, kind in zip(gpt.layers, model.attention_types, strict=True) if kind == "flash"]
    reason = reason_against_flash(model, weight.device, weight.dtype) if flash else None
    if reason is not None:
        LOGGER.info("attention_config: flash in %d of %d layers, computed as the others: %s.", len(flash), model.num_layers, reason)
    else:
        for attention in flash:
            if isinstance(attention.attend, CausalSdpa):
                attention.attend = FlashAttention(attention.attend, attention.alibi_embed)
    if weight.dtype in (torch.float32, torch.bfloat16) and OP.choose(backend, weight.device.type) == "compiled":
        for layer in gpt.layers:
            _use_kernel(layer.attention, backend)


def _use_kernel(attention: SelfAttention, backend: str) -> None:
    """Puts the op in place where it computes what the layer does: every query sees everything before it, and scores have no bias."""
    if type(attention.attend) is not CausalSdpa or attention.attend.window is not None:
        return
    if type(attention.split) is RotarySplit:
        attention.context = FusedContext(attention.split.rotary, backend)
    elif type(attention.split) is PlainSplit:
        attention.context = FusedContext(None, backend)
    else:
        attention.attend = KernelAttend(attention.attend, backend)
