"""Measures how well a model predicts a text: loss, perplexity, bits per byte.

Shapes: N tokens of the text; W windows of a batch; S tokens of a window

The text is read through windows of S tokens that overlap. Every token counts once, in the first window that reaches it. There it has at least
S - stride tokens before it, except in the first window of the text. The first token is predicted from the end-of-document token, as in training,
so every byte counts. If the tokenizer has no such token, the first token counts as a uniform guess, log(vocabulary). p is the model's softmax over
its whole padded vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.data.tokenizer.lost import LossFinder, lost_text
from megatron.inference.errors import InferenceError
from megatron.inference.model import ReadyModel
from megatron.mpu.groups import current_groups

# Tokens in one batch of windows: enough to keep the matrix products busy, little enough for the memory that activations take.
BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}

Progress = Callable[[int, int], None]


class Window(NamedTuple):
    """Reads tokens begin..end-1 and counts the predictions made from first..end-1."""

    begin: int
    first: int
    end: int


@dataclass(frozen=True)
class TextScore:
    """Sums over a text. nats: -log p(text) under the model. exact: whether decoding the tokens gives exactly the text. lost: pieces of the text that
    no token stands for, and how often each occurs."""

    tokens: int
    bytes: int
    nats: float
    exact: bool
    lost: Counter[str] = field(default_factory=Counter)

    @property
    def loss(self) -> float:
        """Mean of -log p over the tokens."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite if it is too large for a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Sum of -log2 p over all tokens, divided by the bytes of the text in UTF-8. Comparable across tokenizers."""
        return self.nats / math.log(2) / self.bytes


def score_text(ready: ReadyModel, text: str, *, stride: int, progress: Progress | None = None) -> TextScore:
    """Scores one text as one document. `progress` is called with the tokens counted since its last call and the total. None: there is no progress.

    Raises InferenceError for a text without tokens.
    """
    tokens = ready.tokenizer.encode(text)
    lost = LossFinder(ready.tokenizer).find(text, tokens)
    if not tokens:
        what = f"The tokenizer has no tokens for {lost_text(lost)} of the text" if lost else "The text holds no tokens"
        raise InferenceError(f"{what}: there is nothing to predict.")
    loss_N = score_tokens(ready, tokens, stride=stride, progress=progress)
    return TextScore(len(tokens), len(text.encode()), float(loss_N.double().sum()), ready.tokenizer.decode(tokens) == text, lost)


def score_tokens(ready: ReadyModel, tokens: Sequence[int], *, stride: int, progress: Progress | None = None) -> Tensor:
    """loss_N: -log p of each token, float32 on the CPU. Raises InferenceError when the model's output is not finite."""
    eod = ready.tokenizer.eod
    known = [tokens[0]] if eod is None else [eod, tokens[0]]
    text_N1 = torch.tensor([*known, *tokens[1:]], dtype=torch.int64)
    windows = plan_windows(len(text_N1) - 1, ready.context_length, stride)
    losses = [torch.tensor([math.log(ready.tokenizer.vocab_size)])] if eod is None else []
    per_batch = max(1, BATCH_TOKENS.get(ready.device.type, BATCH_TOKENS["cpu"]) // ready.context_length)
    for batch in (windows[i : i + per_batch] for i in range(0, len(windows), per_batch)):
        loss_WS = window_losses(ready, text_N1, batch)
        losses += [row_S[window.first - window.begin :] for row_S, window in zip(loss_WS, batch, strict=True)]
        if progress is not None:
            progress(sum(window.end - window.first for window in batch), len(text_N1) - 1)
    loss_N = torch.cat(losses)
    if not bool(loss_N.isfinite().all()):
        raise InferenceError(
            f"The model in {ready.path} gives a loss that is NaN or infinite: its training diverged, or the range of {ready.dtype} is too small "
            "for it."
        )
    return loss_N


def plan_windows(total: int, length: int, stride: int) -> list[Window]:
    """Windows that count each of `total` predictions once. Each has `length` tokens, if the text has that many."""
    windows = [Window(0, 0, min(length, total))] if total else []
    while windows and windows[-1].end < total:
        first = windows[-1].end
        end = min(first + stride, total)
        windows.append(Window(end - length, first, end))
    return windows


@torch.inference_mode()
def window_losses(ready: ReadyModel, text_N1: Tensor, windows: Sequence[Window]) -> Tensor:
    """loss_WS: -log p of the token after each token of windows of one length, float32 on the CPU."""
    tokens_WS = torch.stack([text_N1[window.begin : window.end] for window in windows]).to(ready.device)
    labels_WS = torch.stack([text_N1[window.begin + 1 : window.end + 1] for window in windows]).to(ready.device)
    losses_WS = ready.gpt(tokens_WS, labels_BS=labels_WS).token_loss_BS.float()
    return current_groups().pipe.sum(losses_WS).cpu()  # the stages before the last have zeros
