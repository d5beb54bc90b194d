"""Loss and perplexity by context length (Mixtral of Experts, Jiang et al., 2024, figure 4, right).

Shapes: N tokens of the text; W windows of a batch; S tokens of a window

The text is cut into windows that do not overlap, so a token at position p of its window has p + 1 tokens before it, the window's first one included.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from megatron.inference.errors import InferenceError
from megatron.inference.model import ReadyModel
from megatron.inference.score import BATCH_TOKENS, Progress, Window, window_losses


class RangeLoss(NamedTuple):
    """The predictions of the positions first..last of every window."""

    first: int
    """Fewest tokens that the model reads before it predicts; at least 1."""
    last: int
    """Most tokens."""
    tokens: int
    loss: float
    """Mean of -log p in nats."""
    standard_error: float
    """Of the loss, as if tokens were independent; NaN for one token."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def as_json(self) -> dict[str, float | None]:
        """For the results file; JSON has no NaN."""
        error = None if math.isnan(self.standard_error) else self.standard_error
        return {**self._asdict(), "standard_error": error, "perplexity": self.perplexity}


def losses_by_position(ready: ReadyModel, name: str, text: str, *, ranges: int, progress: Progress) -> list[RangeLoss]:
    """The loss in each of `ranges` ranges of positions. Each range is twice as long as the one before, and the last one ends with the window.

    Raises InferenceError for a text that is shorter than one window, and for more ranges than there are.
    """
    length, tokenizer = ready.context_length, ready.tokenizer
    most = int(math.log2(length)) + 1
    if ranges > most:
        raise InferenceError(f"eval_position_ranges = {ranges}: a window of {length} tokens (seq_length) has at most {most} ranges.")
    tokens = tokenizer.encode(text)
    text_N1 = torch.tensor([*([] if tokenizer.eod is None else [tokenizer.eod]), *tokens], dtype=torch.int64)
    count = (len(text_N1) - 1) // length
    if not count:
        raise InferenceError(f"{name} has {len(tokens):,} tokens and a window {length:,} (seq_length): give a longer text for eval_position_ranges.")
    windows = [Window(begin, begin, begin + length) for begin in range(0, count * length, length)]
    per_batch = max(1, BATCH_TOKENS.get(ready.device.type, BATCH_TOKENS["cpu"]) // length)
    losses: list[Tensor] = []
    for begin in range(0, count, per_batch):
        batch = windows[begin : begin + per_batch]
        losses.append(window_losses(ready, text_N1, batch))
        progress(len(batch) * length, count * length)
    return summed(torch.cat(losses).double(), ranges)


def summed(loss_WS: Tensor, ranges: int) -> list[RangeLoss]:
    """The mean over the windows and the positions of each range."""
    length = loss_WS.shape[1]
    borders = [0, *(length >> shift for shift in range(ranges - 1, -1, -1))]
    found = []
    for first, end in pairwise(borders):
        part = loss_WS[:, first:end].flatten()
        error = float(part.std()) / math.sqrt(len(part)) if len(part) > 1 else math.nan
        found.append(RangeLoss(first + 1, end, len(part), float(part.mean()), error))
    return found


def positions_table(rows: list[RangeLoss]) -> Table:
    """A row for each range."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("tokens of context", "predictions", "loss", "± standard error", "perplexity"):
        table.add_column(title, justify="right")
    for row in rows:
        span = f"{row.first:,}" if row.first == row.last else f"{row.first:,} to {row.last:,}"
        table.add_row(span, f"{row.tokens:,}", f"{row.loss:.4f}", f"{row.standard_error:.4f}", f"{row.perplexity:,.2f}")
    return table
