"""What the model must predict, and which predictions count in the loss.

Shapes: B micro-batch, S sequence length
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Targets(NamedTuple):
    """Model inputs, the token that should follow each of them, and the weight of each prediction (None: all the same)."""

    tokens_BS: Tensor
    labels_BS: Tensor
    loss_mask_BS: Tensor | None


def next_token_targets(text: Tensor, label: Tensor | None = None, *, masked_token: int | None = None) -> Targets:
    """Inputs are the first S of S + 1 tokens. Targets are the last S of `label` (None: of the tokens). As in NeoX, these places do not count:

    - a place whose label is negative,
    - a place whose *input* is `masked_token` (eod_mask_loss): it predicts the first token after the end of a document. None: such places count.
    """
    tokens, following = text[:, :-1].contiguous(), (text if label is None else label)[:, 1:].contiguous()
    masks = [] if label is None else [following >= 0]
    masks += [] if masked_token is None else [tokens != masked_token]
    mask = torch.stack(masks).all(0).to(torch.float32) if masks else None
    return Targets(tokens, following if label is None else following.clamp(min=0), mask)


def poison_if_not_finite(loss: Tensor) -> Tensor:
    """The loss itself. If it is NaN or infinite, all its gradients become NaN, so that no part of the step changes a weight by mistake.

    Without this, a loss that overflowed in its last addition could still have finite gradients. The device is not synchronised.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)
