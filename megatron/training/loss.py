"""What the model is asked to predict, and which predictions count.

Shapes: B micro-batch, S sequence length
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Targets(NamedTuple):
    """Model inputs, what should follow each of them, and how much each prediction counts (None: all the same)."""

    tokens_BS: Tensor
    labels_BS: Tensor
    loss_mask_BS: Tensor | None


def next_token_targets(text: Tensor, *, masked_token: int | None = None) -> Targets:
    """Inputs are the first S of S + 1 tokens, labels the last S.

    `masked_token` (NeoX's eod_mask_loss): predictions *after* this token do not count. None: all count.
    """
    tokens, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    mask = None if masked_token is None else (tokens != masked_token).to(torch.float32)
    return Targets(tokens, labels, mask)


def poison_if_not_finite(loss: Tensor) -> Tensor:
    """The loss itself, but one that is NaN or infinite gets NaN gradients everywhere, so that no part of the step can be taken by mistake.

    Without this a loss that overflowed in its last addition could still have finite gradients. No synchronisation with the device.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)
