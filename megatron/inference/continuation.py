"""Continues one prompt. All state of a request is created for it and dropped after it.

Shapes: S tokens of one call; V vocabulary
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron.data.tokenizer.lost import LossFinder, lost_text
from megatron.inference.errors import InferenceError
from megatron.inference.model import ReadyModel
from megatron.inference.sampling import Sampling, choose_token
from megatron.model.attention import LayerCache, build_cache

log = logging.getLogger(__name__)
INCOMPLETE = "\ufffd"  # what bytes decode to that do not end a character


@dataclass(frozen=True)
class Continuation:
    """The result of one prompt, under NeoX's names.

    length: generated tokens, without the one that ended the text. finished: whether the model ended the text itself. message: why there is less text
    than was asked for, or None.
    """

    context: str
    text: str
    length: int
    finished: bool
    message: str | None
    duration_seconds: float


def complete(
    ready: ReadyModel,
    prompt: str,
    *,
    sampling: Sampling,
    maximum_tokens: int,
    generator: torch.Generator,
    on_text: Callable[[str], None] | None = None,
) -> Continuation:
    """Continues `prompt` (empty: from the end-of-document token). `on_text` is called with each new piece of text. None: nothing is called.

    Raises InferenceError when there is nothing to start from, or the model's output is not finite.
    """
    started = time.perf_counter()
    tokens = encode_prompt(ready, prompt)
    text, finished, length = TextStream(ready), False, 0
    for token in generate_tokens(ready, tokens, sampling=sampling, maximum_tokens=maximum_tokens, generator=generator):
        finished = token in ready.stop_tokens
        if finished:
            break
        length += 1
        piece = text.push(token)
        if piece and on_text is not None:
            on_text(piece)
    rest = text.finish()
    if rest and on_text is not None:
        on_text(rest)
    message = None if finished or length == maximum_tokens else _why_short(ready, len(tokens), length)
    return Continuation(prompt, text.shown, length, finished, message, time.perf_counter() - started)


def encode_prompt(ready: ReadyModel, prompt: str) -> list[int]:
    """The prompt's tokens; the end-of-document token for an empty one. Raises InferenceError when the tokenizer has none."""
    tokens = ready.tokenizer.encode(prompt)
    if lost := LossFinder(ready.tokenizer).find(prompt, tokens):
        if not tokens:
            raise InferenceError(f"The tokenizer has no tokens for the prompt {prompt!r}: write it with characters that the tokenizer has.")
        log.warning("The tokenizer has no tokens for %s of the prompt, so the model does not see them.", lost_text(lost))
    if tokens:
        return tokens
    if ready.tokenizer.eod is None:
        raise InferenceError(
            "The tokenizer has no end-of-document token, so a text cannot start without a prompt. Give a prompt (sample_input_file)."
        )
    return [ready.tokenizer.eod]


def generate_tokens(
    ready: ReadyModel, prompt: Sequence[int], *, sampling: Sampling, maximum_tokens: int, generator: torch.Generator
) -> Iterator[int]:
    """Yields at most `maximum_tokens` tokens that follow `prompt`, up to and including a stop token. Prompt and answer together never
    exceed the context. The work of each new token is one position, because a cache keeps the keys and values of the others. The iterator owns the
    cache.
    """
    total = min(len(prompt) + maximum_tokens, ready.context_length)
    if len(prompt) >= total:
        return
    cache = build_cache(ready.sizes, 1, total, dtype=ready.dtype, device=str(ready.device))
    new = list(prompt)
    for _ in range(total - len(prompt)):
        token = choose_token(next_logits(ready, new, cache), sampling, generator)
        yield token
        if token in ready.stop_tokens:
            return
        new = [token]


@torch.inference_mode()
def next_logits(ready: ReadyModel, tokens: Sequence[int], cache: Sequence[LayerCache] | None) -> Tensor:
    """logits_V, float32, of the next token after `tokens`, which continue those in `cache` (None: they are the whole text). V is the tokenizer's
    vocabulary:
    the padding of the model's vocabulary is never chosen.

    Raises InferenceError when they are not finite.
    """
    tokens_BS = torch.tensor([tokens], dtype=torch.int64, device=ready.device)
    logits_BSV = ready.gpt(tokens_BS, cache=cache).logits_BSV
    logits_V = logits_BSV[0, -1, : ready.tokenizer.vocab_size].float()
    if not bool(logits_V.isfinite().all()):
        raise InferenceError(
            f"The model in {ready.path} gives NaN or infinite numbers: its training diverged, or the range of {ready.dtype} is too small for it."
        )
    return logits_V


def sample_generator(seed: int, index: int) -> torch.Generator:
    """The random numbers of sample `index`. They depend on these two numbers alone, and not on earlier samples."""
    state = int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state >> 1)


class TextStream:
    """Turns tokens into pieces of text that can be shown at once. A piece always ends with a whole character."""

    def __init__(self, ready: ReadyModel) -> None:
        self._tokenizer = ready.tokenizer
        self._tokens: list[int] = []
        self.shown = ""

    def push(self, token: int) -> str:
        """The text that `token` adds. Empty if the token only begins a character."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        return "" if text.endswith(INCOMPLETE) else self._show(text)

    def finish(self) -> str:
        """The rest of the text, which `push` did not return yet."""
        return self._show(self._tokenizer.decode(self._tokens)) if self._tokens else ""

    def _show(self, text: str) -> str:
        piece = text[len(self.shown) :]
        self.shown = text
        return piece


def _why_short(ready: ReadyModel, prompt: int, length: int) -> str:
    context = ready.context_length
    if length == 0:
        return f"the prompt has {prompt:,} tokens and the model's context {context:,} (seq_length): there is no room for an answer"
    return f"prompt ({prompt:,} tokens) and answer ({length:,}) fill the model's context of {context:,} tokens (seq_length)"
