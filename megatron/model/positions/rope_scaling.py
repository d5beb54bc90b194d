"""Rotary frequencies as the model section has them, scaled for texts longer than those of the first training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megatron.model.positions.rotary import inverse_frequencies

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig
    from megatron.config.rope import RopeScaling


def rotary_frequencies(model: ModelConfig) -> tuple[float, ...]:
    """Radians from one position to the next, for each pair of dimensions that is turned."""
    plain = inverse_frequencies(model.rotary_dim, model.rotary_emb_base)
    scaling = model.rope_scaling
    if scaling is None:
        return tuple(plain)
    if scaling.rope_type == "linear":
        return tuple(frequency / scaling.factor for frequency in plain)
    return tuple(_llama3(frequency, scaling) for frequency in plain)


def _llama3(frequency: float, scaling: RopeScaling) -> float:
    """Llama 3.1's: s*f + (1 - s)*f/factor, where s rises from 0 to 1 between the two bounds on how often f turns in the original context."""
    low, high, context = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    assert low is not None
    assert high is not None
    assert context is not None
    turns = context * frequency / (2 * math.pi)
    share = min(1.0, max(0.0, (turns - low) / (high - low)))
    return share * frequency + (1 - share) * frequency / scaling.factor
