"""Which implementation computes each layer's attention (`attention_config`, `kernel_backends`): decided once, when the model has its device and
number format."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from megatron.kernels.attention import OP
from megatron.kernels.backends import Choice, choose
from megatron.kernels.compiled import WIDENED
from megatron.model.attention.context import FusedContext, KernelAttend
from megatron.model.attention.flash import FlashAttention, reason_against_flash
from megatron.model.attention.sdpa import CausalSdpa
from megatron.model.attention.split import PlainSplit, RotarySplit

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig
    from megatron.model.attention.self_attention import SelfAttention
    from megatron.model.gpt import GPT

LOGGER = logging.getLogger(__name__)
SDPA = "PyTorch's SDPA"


def choose_attention(model: ModelConfig, gpt: GPT, backend: str = "auto", device: torch.device | None = None) -> None:
    """`flash` layers use flash_attn if it can compute them; if not, the log says why. Other layers use the compiled op or PyTorch's SDPA.

    `backend`: the implementation of the op `attention` (`kernel_backends`). `device`: where the model will run; None: where its weights are. Call it
    when that is settled. A second call changes nothing.
    """
    weight = next(gpt.parameters())
    device = weight.device if device is None else device
    flash = [layer.attention for layer, i in zip(gpt.layers, gpt.layer_numbers, strict=True) if model.attention_types[i] == "flash"]
    reason = reason_against_flash(model, device, weight.dtype) if flash else None
    if reason is not None:
        LOGGER.info("attention_config: flash in %d of %d layers, computed as the others: %s.", len(flash), model.num_layers, reason)
    else:
        for attention in flash:
            if isinstance(attention.attend, CausalSdpa):
                attention.attend = FlashAttention(attention.attend, attention.alibi_embed)
    if reason_against_kernel(model, device.type, weight.dtype, backend) is None:
        for layer in gpt.layers:
            _use_kernel(layer.attention, backend)


def reason_against_kernel(model: ModelConfig, device_type: str, dtype: torch.dtype, backend: str) -> str | None:
    """Why the compiled op computes no layer; empty where there is nothing to say of it. None: it computes all layers but those of flash_attn.

    Raises KernelUnavailable where `backend` cannot run.
    """
    chosen = choose(OP, backend, device_type)
    if chosen.runs != "compiled":
        return chosen.because
    if dtype not in WIDENED:
        return f"compiled: computes in float32 and bfloat16 only, and this model is in {str(dtype).removeprefix('torch.')}"
    if model.sliding_window_width is not None:
        return "compiled: has no sliding windows (sliding_window_width)"
    return f"compiled: adds no biases to scores (pos_emb: {model.pos_emb})" if model.pos_emb in ("alibi", "rpe") else None


def attention_choice(model: ModelConfig, device: torch.device, dtype: torch.dtype, backend: str, *, apart: bool) -> Choice:
    """What computes attention in training. `apart`: documents do not see each other. Raises KernelUnavailable."""
    if apart:
        return Choice("attention", SDPA, "only it keeps documents apart (reset_attention_mask: true)")
    kinds, against_kernel = set(model.attention_types), reason_against_kernel(model, device.type, dtype, backend)
    if against_kernel is None and model.attention_dropout:
        against_kernel = "compiled: has no dropout (attention_dropout), so it only evaluates"
    others = "compiled" if against_kernel is None else SDPA
    against_flash = reason_against_flash(model, device, dtype) if "flash" in kinds else None
    reasons = [against_flash or "", against_kernel or ""]
    if "flash" in kinds and against_flash is None:
        others = f"flash_attn and {others}" if len(kinds) > 1 else "flash_attn"
        reasons = reasons if len(kinds) > 1 else []
    return Choice("attention", others, "; ".join(filter(None, reasons)))


def _use_kernel(attention: SelfAttention, backend: str) -> None:
    """Puts the op in place of PyTorch's SDPA. Layers of flash_attn stay."""
    if type(attention.attend) is not CausalSdpa:
        return
    if type(attention.split) is RotarySplit:
        attention.context = FusedContext(attention.split.rotary, backend)
    elif type(attention.split) is PlainSplit:
        attention.context = FusedContext(None, backend)
    else:
        attention.attend = KernelAttend(attention.attend, backend)
