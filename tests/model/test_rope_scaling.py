"""Scaled rotary frequencies: Hugging Face's, number for number, and what they do to a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron.model.positions import START
from megatron.model.positions.rope_scaling import rotary_frequencies
from tests.model.tiny_model import DENSE, model_section, tiny_model, tokens

LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SCALINGS: list[tuple[int, float, dict[str, Any]]] = [
    (500_000, 1.0, LLAMA31),
    (500_000, 1.0, {**LLAMA31, "factor": 32.0}),
    (10_000, 0.5, {**LLAMA31, "low_freq_factor": 0.5, "high_freq_factor": 32.0, "original_max_position_embeddings": 100}),
    (10_000, 0.25, {"rope_type": "linear", "factor": 4.0}),
]


@pytest.mark.parametrize(("base", "share", "scaling"), SCALINGS, ids=str)
def test_frequencies_are_hugging_face_s(base: int, share: float, scaling: dict[str, Any]) -> None:
    rope = {**scaling, "rope_theta": base, "partial_rotary_factor": share}
    theirs = transformers.LlamaConfig(hidden_size=512, num_attention_heads=4, max_position_embeddings=131_072, rope_parameters=rope)
    wanted, _ = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs, torch.device("cpu"))
    model = model_section(hidden_size=512, num_attention_heads=4, rotary_emb_base=base, rotary_pct=share, rope_scaling=scaling)
    ours = rotary_frequencies(model)
    torch.testing.assert_close(torch.tensor(ours), wanted, rtol=2e-6, atol=0)
    plain = rotary_frequencies(model.model_copy(update={"rope_scaling": None}))
    changed = sum(abs(scaled / unscaled - 1) > 1e-3 for scaled, unscaled in zip(ours, plain, strict=True))
    assert changed > len(ours) / 8, "the test scales something"


def test_the_frequencies_written_for_neox_are_the_scaled_ones() -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    state = tiny_model(model_section(rope_scaling=scaling, rotary_save_freqs_buffer=True), DENSE).state_dict()
    assert state["sequential.2.attention.rotary_emb.inv_freq"].tolist() == pytest.approx([0.5, 0.005])


def test_twice_as_slow_is_half_as_far() -> None:
    """Scaled linearly by 2, position 2p turns as far as p did."""
    plain, scaled = (tiny_model(model_section(rope_scaling=scaling), DENSE) for scaling in (None, {"rope_type": "linear", "factor": 2.0}))
    scaled.load_state_dict(plain.state_dict())
    assert not torch.allclose(plain(tokens()).logits_BSV, scaled(tokens()).logits_BSV, atol=1e-3)
    cos, half = (model.layers[0].attention.split.rotary.rows(START, 8, torch.device("cpu"))[0] for model in (plain, scaled))
    torch.testing.assert_close(half[::2], cos[:4])
