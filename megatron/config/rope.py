"""Scaled rotary frequencies, under Hugging Face's names. Models use them to read longer texts than they were first trained on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megatron.config.section import PositiveFloat, PositiveInt, Problem, Section

_LLAMA3_KEYS = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class RopeScaling(Section):
    rope_type: Literal["linear", "llama3"]
    """How the frequencies are scaled. linear: all are divided by `factor`. llama3 (Llama 3.1 and 3.2): low frequencies are divided by `factor`,
    high ones stay, and those between change gradually."""
    factor: Annotated[float, Field(ge=1)]
    """The number that frequencies are divided by."""
    low_freq_factor: PositiveFloat | None = None
    """llama3: a frequency with fewer turns than this in the original context is divided by `factor`. None: an error with llama3."""
    high_freq_factor: PositiveFloat | None = None
    """llama3: a frequency with more turns than this in the original context stays as it is. None: an error with llama3."""
    original_max_position_embeddings: PositiveInt | None = None
    """llama3: length of the original context, in tokens. None: an error with llama3."""


def rope_problems(scaling: RopeScaling, pos_emb: str) -> Iterator[Problem]:
    """The rules of `rope_scaling` in a model whose positions are `pos_emb`."""
    if pos_emb != "rotary":
        yield Problem(("rope_scaling", "pos_emb"), f"is for pos_emb: rotary; pos_emb: {pos_emb} has no frequencies to scale")
    for key in _LLAMA3_KEYS:
        given = getattr(scaling, key) is not None
        if scaling.rope_type == "llama3" and not given:
            yield Problem((f"rope_scaling.{key}", "rope_scaling.rope_type"), "must be given with rope_type: llama3")
        if scaling.rope_type == "linear" and given:
            yield Problem((f"rope_scaling.{key}", "rope_scaling.rope_type"), "is for rope_type: llama3; rope_type: linear takes only factor")
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if low is not None and high is not None and low >= high:
        yield Problem(("rope_scaling.low_freq_factor", "rope_scaling.high_freq_factor"), f"must be less than high_freq_factor ({high})")
