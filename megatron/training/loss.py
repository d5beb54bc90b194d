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


def next_token_targets(text: Tensor, label: Tensor | None = None, *, masked_token: int | None = None) -> Targets:
    """Inputs are the first S of S + 1 tokens; what should follow, the last S of `label` (None: of the tokens). As in NeoX, what does not count is

    - a place whose label is negative,
    - with `masked_token` (eod_mask_loss), a place whose *input* is that token: what follows the end of a document. None: those count.
    """
    tokens, following = text[:, :-1].contiguous(), (text if label is None else label)[:, 1:].contiguous()
    masks = [] if label is None else [following >= 0]
    masks += [] if masked_token is None else [tokens != masked_token]
    mask = torch.stack(masks).all(0).to(torch.float32) if masks else None
    return Targets(tokens, following if label is None else following.clamp(min=0), mask)


def poison_if_not_finite(loss: Tensor) -> Tensor:
    """The loss itself, but one that is NaN or infinite gets NaN gradients everywhere, so that no part of the step can be taken by mistake.

    Without this a loss that overflowed in its last addition could still have finite gradients. No synchronisation with the device.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)
