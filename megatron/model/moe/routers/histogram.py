"""Quantiles of each expert's scores over all tokens of a step, from counts that can be added up.

Shapes: T tokens; E experts; N bins; C = E*N.

Every micro-batch and every process counts its own tokens. The counts are whole numbers. Their sum, and so the quantile, is the same however the
tokens of a step are divided among micro-batches and processes. (Megatron-Core 0.19 takes the mean of the micro-batches' quantiles instead.)

The bins of an expert lie around a value that is known before the step, its present threshold: bin n holds the scores from edge n to edge n + 1, with

    edge_n = centre + WIDTH * sinh(-REACH + n * 2 * REACH / N),    REACH = asinh(FARTHEST / WIDTH)

They are narrow near the centre (0.0015) and wide far from it (15 % of the distance). Within a bin the quantile is interpolated. So a quantile is
found roughly if it has moved far, and precisely if it hardly moves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BINS, WIDTH, FARTHEST = 128, 0.01, 64.0
REACH = math.asinh(FARTHEST / WIDTH)


@torch.no_grad()
def count_scores(score_TE: Tensor, centre_E: Tensor) -> Tensor:
    """int64 scores_C: how many tokens have a score in each bin of each expert. Scores beyond the bins count in the outermost ones."""
    far_TE = torch.asinh((score_TE - centre_E.to(score_TE.dtype)) / WIDTH).nan_to_num(0.0)
    bin_TE = ((far_TE + REACH) * (BINS / (2 * REACH))).floor().long().clamp(0, BINS - 1)
    bin_TE = bin_TE + BINS * torch.arange(score_TE.shape[1], device=score_TE.device)
    scores_C = torch.zeros(score_TE.shape[1] * BINS, dtype=torch.int64, device=score_TE.device)
    return scores_C.scatter_add_(0, bin_TE.flatten(), torch.ones_like(bin_TE).flatten())


@torch.no_grad()
def quantile(scores_C: Tensor, centre_E: Tensor, share_above: float) -> Tensor:
    """float64: the value of each expert that `share_above` (from 0 to 1) of the counted tokens exceed. Without any token, the centre."""
    count_EN = scores_C.view(-1, BINS).double()
    up_to_EN = count_EN.cumsum(1)
    tokens_E1 = up_to_EN[:, -1:]
    below_E1 = (1 - share_above) * tokens_E1
    bin_E1 = torch.searchsorted(up_to_EN, below_E1).clamp(max=BINS - 1)
    inside_E1 = count_EN.gather(1, bin_E1)
    part_E1 = (below_E1 - (up_to_EN.gather(1, bin_E1) - inside_E1)) / inside_E1.clamp(min=1)
    far_E = (-REACH + (bin_E1 + part_E1.clamp(0, 1)) * (2 * REACH / BINS)).squeeze(1)
    moved_E = (WIDTH * torch.sinh(far_E)).masked_fill(tokens_E1.squeeze(1) == 0, 0.0)
    return centre_E.double() + moved_E
