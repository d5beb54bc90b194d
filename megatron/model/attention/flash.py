"""FlashAttention-2 (Dao, 2023) where the package `flash_attn` is installed: NeoX's `flash` layers on CUDA devices.

Shapes: B batch; H query heads; K key/value heads; S queries, the last of P positions; d head dimension.
"""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron.model.attention.sdpa import CausalSdpa
from megatron.model.positions.alibi import AlibiSlopes

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig

OLDEST = (2, 4)
"""The first version with sliding windows, ALiBi and masks aligned to the last key."""
MAX_HEAD_DIM = 256


class FlashAttention:
    """Computes the same as `plain` with flash_attn. If documents are kept apart, it calls `plain`."""

    def __init__(self, plain: CausalSdpa, alibi: AlibiSlopes | None) -> None:
        from flash_attn import flash_attn_func

        self.plain, self.alibi, self.function = plain, alibi, flash_attn_func
        self.window = (-1, -1) if plain.window is None else (plain.window, 0)

    def __call__(self, query_BHSd: Tensor, key_BKPd: Tensor, value_BKPd: Tensor, document_BS: Tensor | None, dropout: float) -> Tensor:
        """As `Attend` says."""
        if document_BS is not None:
            return self.plain(query_BHSd, key_BKPd, value_BKPd, document_BS, dropout)
        context_BSHd: Tensor = self.function(
            query_BHSd.transpose(1, 2),
            key_BKPd.transpose(1, 2),
            value_BKPd.transpose(1, 2),
            dropout_p=dropout,
            causal=True,
            window_size=self.window,
            alibi_slopes=None if self.alibi is None else self.alibi.numbers,
        )
        return context_BSHd.transpose(1, 2)


def reason_against_flash(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why flash_attn cannot compute this model's attention. None: it can."""
    if device.type != "cuda":
        return f"flash_attn runs on CUDA devices only, and this device is {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash_attn computes in fp16 and bfloat16 only, and this model is in {str(dtype).removeprefix('torch.')}"
    if model.pos_emb == "rpe":
        return "flash_attn cannot add the biases of pos_emb: rpe"
    if model.head_width > MAX_HEAD_DIM:
        return f"flash_attn takes heads of up to {MAX_HEAD_DIM} dimensions, and this model's heads have {model.head_width}"
    return _reason_against_package()


def _reason_against_package() -> str | None:
    try:
        version = importlib.metadata.version("flash_attn")
    except importlib.metadata.PackageNotFoundError:
        return "flash_attn is not installed (pip install flash-attn)"
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < OLDEST:
        return f"flash_attn {version} is installed, and {'.'.join(map(str, OLDEST))} or newer is needed"
    return None
