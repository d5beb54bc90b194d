"""Whether a converted model gives the same logits as the original, on the same tokens. They are compared in float32, and again in float64 if
float32 leaves a doubt.

Shapes: B texts; S tokens; V rows of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.checkpoint.names import is_derived
from megatron.convert.architecture import Source
from megatron.convert.errors import ConversionError
from megatron.convert.parts import Parts, first_difference, our_parts, recorded, their_parts
from megatron.convert.tokenizers import SAMPLE
from megatron.data.tokenizer import Tokenizer
from megatron.model import build_model

LIMIT = 1e-4
"""Largest difference that rounding explains."""
TOKENS = 64


@dataclass
class Logits:
    """Logits [1, S, V] of each text, computed in a number format, and the outputs of the model's parts in the last computation."""

    compute: Callable[[torch.dtype, Parts], list[Tensor]]
    parts: Parts = field(default_factory=dict)

    def __call__(self, dtype: torch.dtype) -> list[Tensor]:
        """The logits."""
        self.parts.clear()
        return self.compute(dtype, self.parts)


def first_rows(logits: Logits, count: int) -> Logits:
    """Of the first `count` rows of the vocabulary alone."""
    return Logits(lambda dtype, parts: [logits_BSV[..., :count] for logits_BSV in logits.compute(dtype, parts)])


class Compared(NamedTuple):
    """`difference`: the largest of any logit, in float32; `texts`: on what; `exact`: the same in float64, None where float32 was enough."""

    difference: float
    texts: str
    exact: float | None = None
    relative: float = 0.0
    """`difference`, in float32, as a part of the largest logit of the original."""

    def __str__(self) -> str:
        rounding = "" if self.exact is None else f" ({self.exact:.1e} in float64; the rest is rounding)"
        return f"largest difference of a logit {self.difference:.1e} on {self.texts}, in float32{rounding}"


def tokens_to_compare(source: Source, tokenizer: Tokenizer | None) -> list[Tensor]:
    """Tokens [1, S] of a real text, where there is a tokenizer, and random ones."""
    length = min(TOKENS, source.config.model.seq_length)
    limit = source.vocabulary if tokenizer is None else min(source.vocabulary, tokenizer.vocab_size)
    texts = [torch.randint(limit, (1, length), generator=torch.Generator().manual_seed(0))]
    if tokenizer is not None and (ids := [token for token in tokenizer.encode(SAMPLE) if token < limit][:length]):
        texts.insert(0, torch.tensor([ids]))
    return texts


def our_logits(
    source: Source, read: Callable[[str], Tensor], texts: list[Tensor], *, precision: torch.dtype | None = None, exact: Collection[str] = ()
) -> Logits:
    """Of our model with the weights that `read` gives, rounded to `precision` first (None: as they are); those named in `exact` never are."""

    def run(dtype: torch.dtype, parts: Parts) -> list[Tensor]:
        gpt = build_model(source.config.model, source.config.moe, source.vocabulary, seed=0, dtype=dtype).eval().requires_grad_(False)
        for name, tensor in gpt.state_dict().items():
            if not is_derived(name):
                stored = read(name)
                kept = precision is None or name in exact or not stored.is_floating_point()
                tensor.copy_(stored if kept else stored.to(precision))
        with recorded(our_parts(gpt), parts):
            return [_logits(gpt(text).logits_BSV) for text in texts]

    return Logits(run)


class Allowed(NamedTuple):
    """`trusted`: code that lies in the directory may run; `left_out`: how the names of weights begin that may lie there and take no part."""

    trusted: bool = False
    left_out: Collection[str] = ()


def their_logits(directory: Path, texts: list[Tensor], *, precision: torch.dtype, loader: Any, allowed: Allowed) -> Logits:
    """Of the model that `loader` (a class or auto class of transformers) makes of a directory, its weights rounded to `precision` first.

    The result raises ConversionError where a weight is missing, too many or of another shape.
    """

    def run(dtype: torch.dtype, parts: Parts) -> list[Tensor]:
        from transformers.utils import logging

        logging.disable_progress_bar()
        try:
            model, report = loader.from_pretrained(directory, dtype=precision, trust_remote_code=allowed.trusted, output_loading_info=True)
        except Exception as error:  # each class refuses in its own way
            raise ConversionError(f"transformers cannot load the model for the comparison: {' '.join(str(error).split())}.") from error
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if names := sorted(name for name in map(str, report[kind]) if not name.startswith(tuple(allowed.left_out))):
                raise ConversionError(f"transformers loads the model with {kind.replace('_', ' ')}: {', '.join(names[:4])} ({len(names)} in all).")
        model = model.eval().to(dtype)
        if dtype == torch.float64:
            with suppress(ValueError):  # a class without experts refuses it
                model.set_experts_implementation("eager")  # the fused ones have no float64
        try:
            with torch.no_grad(), recorded(their_parts(model), parts):
                return [_logits(model(text, return_dict=True).logits) for text in texts]
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:  # settings that its class does not check
            raise ConversionError(f"transformers loads the model for the comparison, but cannot run it: {' '.join(str(error).split())}.") from error

    return Logits(run)


def compare(ours: Logits, theirs: Logits, *, limit: float = LIMIT) -> Compared:
    """One model after the other. Where float32 does not settle it, since deep models round more, float64 does.

    Raises ConversionError when they are further apart than `limit` there too, or not numbers.
    """
    first = ours(torch.float32)
    second = theirs(torch.float32)
    difference, largest = largest_difference(first, second), max(logits.abs().max().item() for logits in second)
    result = Compared(difference, _texts(first), relative=difference / largest if largest else difference)
    if all(any(bool(logits.isnan().any()) for logits in side) for side in (first, second)):
        raise ConversionError(f"The logits on {result.texts} are NaN. The weights are damaged, or numbers became too large for their number format.")
    if not result.difference <= limit:
        result = result._replace(exact=largest_difference(ours(torch.float64), theirs(torch.float64)))
        if result.exact is None or not result.exact <= limit:
            raise ConversionError(
                f"The converted model does not give the logits of the original. Largest difference of a logit: {result.difference:.1e} on "
                f"{result.texts} in float32, {result.exact:.1e} in float64, more than the {limit:.0e} that rounding explains.{_where(ours, theirs)}"
            )
    return result


def _where(ours: Logits, theirs: Logits) -> str:
    """A sentence on the first part of the model that differs, after both have run."""
    if not (ours.parts and theirs.parts):
        return ""
    part = first_difference(ours.parts, theirs.parts) or "the head"
    return f" The first difference is in {part} (the first layer is 0). All parts before it agree."


def largest_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """NaN where either is."""
    return torch.stack([(a.double() - b.double()).abs().max() for a, b in zip(ours, theirs, strict=True)]).max().item()


def _texts(logits: list[Tensor]) -> str:
    if len(logits) == 1:
        return f"{logits[0].shape[1]} random tokens"
    return f"{logits[0].shape[1]} tokens of a text and {logits[-1].shape[1]} random ones"


def _logits(logits_BSV: Any) -> Tensor:
    assert isinstance(logits_BSV, Tensor)
    return logits_BSV
