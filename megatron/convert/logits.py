"""Whether a converted model computes what the original does: the logits of both on the same tokens, in float32.

Shapes: B texts; S tokens; V rows of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.checkpoint.names import is_derived
from megatron.convert.architecture import Source
from megatron.convert.errors import ConversionError
from megatron.convert.tokenizers import SAMPLE
from megatron.data.tokenizer import Tokenizer
from megatron.model import build_model

LIMIT = 1e-4
"""Largest difference that rounding explains."""
TOKENS = 64


class Compared(NamedTuple):
    """`difference`: the largest of any logit; `texts`: on what."""

    difference: float
    texts: str

    def __str__(self) -> str:
        return f"largest difference of a logit {self.difference:.1e} on {self.texts}, in float32"


def tokens_to_compare(source: Source, tokenizer: Tokenizer | None) -> list[Tensor]:
    """Tokens [1, S] of a real text, where there is a tokenizer, and random ones."""
    length = min(TOKENS, source.config.model.seq_length)
    limit = source.vocabulary if tokenizer is None else min(source.vocabulary, tokenizer.vocab_size)
    texts = [torch.randint(limit, (1, length), generator=torch.Generator().manual_seed(0))]
    if tokenizer is not None and (ids := tokenizer.encode(SAMPLE)[:length]):
        texts.insert(0, torch.tensor([ids]))
    return texts


def our_logits(source: Source, read: Callable[[str], Tensor], texts: list[Tensor], precision: torch.dtype | None = None) -> list[Tensor]:
    """Logits [1, S, V] of our model with the weights that `read` gives, rounded to `precision` first (None: as they are)."""
    gpt = build_model(source.config.model, source.config.moe, source.vocabulary, seed=0).eval().requires_grad_(False)
    for name, tensor in gpt.state_dict().items():
        if is_derived(name):
            continue
        stored = read(name)
        tensor.copy_(stored if precision is None or not stored.is_floating_point() else stored.to(precision))
    return [_logits(gpt(text).logits_BSV) for text in texts]


def their_logits(directory: Path, texts: list[Tensor], precision: torch.dtype = torch.float32) -> list[Tensor]:
    """Logits [1, S, V] of the model that transformers makes of a directory, its weights rounded to `precision` first.

    Raises ConversionError where a weight is missing, too many or of another shape.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    loader: Any = AutoModelForCausalLM
    model, report = loader.from_pretrained(directory, dtype=precision, trust_remote_code=True, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report[kind])):
            raise ConversionError(f"transformers loads the export with {kind.replace('_', ' ')}: {', '.join(names[:4])} ({len(names)} in all).")
    with torch.no_grad():
        return [_logits(model.eval().float()(text).logits) for text in texts]


def compare(ours: list[Tensor], theirs: list[Tensor], *, limit: float = LIMIT) -> Compared:
    """Raises ConversionError when they are further apart than `limit`, or not numbers."""
    difference = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    kinds = f"{ours[0].shape[1]} tokens of a text and {ours[-1].shape[1]} random ones" if len(ours) > 1 else f"{ours[0].shape[1]} random tokens"
    result = Compared(difference, kinds)
    if not difference <= limit:
        raise ConversionError(f"The converted model does not compute what the original does: {result}, above the {limit:.0e} that rounding explains.")
    return result


def _logits(logits_BSV: Any) -> Tensor:
    assert isinstance(logits_BSV, Tensor)
    return logits_BSV.float()
