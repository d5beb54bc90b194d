"""Scaled rotary frequencies, under Hugging Face's names: models that read longer texts than they were first trained on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megatron.config.section import PositiveFloat, PositiveInt, Problem, Section

_LLAMA3_KEYS = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class RopeScaling(Section):
    rope_type: Literal["linear", "llama3"]
    """linear: all frequencies divided by `factor`. llama3 (Llama 3.1 and 3.2): slow ones divided, fast ones kept, those between in between."""
    factor: Annotated[float, Field(ge=1)]
    """What frequencies are divided by."""
    low_freq_factor: PositiveFloat | None = None
    """llama3: frequencies with fewer turns than this in the original context are divided. None: refused with llama3."""
    high_freq_factor: PositiveFloat | None = None
    """llama3: frequencies with more turns than this in the original context are kept. None: refused with llama3."""
    original_max_position_embeddings: PositiveInt | None = None
    """llama3: the original context. None: refused with llama3."""


def rope_problems(scaling: RopeScaling, pos_emb: str) -> Iterator[Problem]:
    """The rules of `rope_scaling` in a model whose positions are `pos_emb`."""
    if pos_emb != "rotary":
        yield Problem(("rope_scaling", "pos_emb"), f"is for pos_emb: rotary; {pos_emb} positions have no frequencies to scale")
    for key in _LLAMA3_KEYS:
        given = getattr(scaling, key) is not None
        if scaling.rope_type == "llama3" and not given:
            yield Problem((f"rope_scaling.{key}", "rope_scaling.rope_type"), "must be given with rope_type: llama3")
        if scaling.rope_type == "linear" and given:
            yield Problem((f"rope_scaling.{key}", "rope_scaling.rope_type"), "is for rope_type: llama3; linear takes factor alone")
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if low is not None and high is not None and low >= high:
        yield Problem(("rope_scaling.low_freq_factor", "rope_scaling.high_freq_factor"), f"must be less than high_freq_factor ({high})")
