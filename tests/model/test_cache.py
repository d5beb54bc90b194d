"""Decoding with a key/value cache equals the full forward, in every variant of attention and positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.model import LayerCache, build_cache
from megatron.model.attention import CacheError
from tests.model.tiny_model import DENSE, model_section, moe_section, tiny_model, tokens

VARIANTS: list[dict[str, Any]] = [
    {"pos_emb": "rotary"},
    {"pos_emb": "rotary", "num_kv_heads": 2},
    {"pos_emb": "rotary", "rotary_pct": 0.5, "sliding_window_width": 3},
    {"pos_emb": "learned"},
    {"pos_emb": "learned", "opt_pos_emb_offset": 2},
    {"pos_emb": "learned", "num_kv_heads": 2, "sliding_window_width": 1},
    {"pos_emb": "sinusoidal"},
    {"pos_emb": "alibi"},
    {"pos_emb": "alibi", "num_kv_heads": 1, "sliding_window_width": 2},
    {"pos_emb": "rpe", "rpe_num_buckets": 4, "rpe_max_distance": 8},
    {"pos_emb": "rpe", "sliding_window_width": 4, "num_kv_heads": 2},
    {"pos_emb": "none"},
    {"pos_emb": "rotary", "use_qk_layernorm": True},
    {"pos_emb": "rotary", "head_dim": 6, "num_kv_heads": 2},
    {"pos_emb": "rotary", "head_dim": 10, "use_qk_layernorm": True, "num_kv_heads": 2},
    {"pos_emb": "alibi", "head_dim": 10, "qk_norm_all_heads": True, "norm": "rmsnorm", "num_kv_heads": 2},
    {"pos_emb": "alibi", "qk_norm_per_head": True, "norm": "rmsnorm", "num_kv_heads": 2},
    {"pos_emb": "rotary", "gpt_j_residual": True, "gpt_j_tied": True, "attention_config": [[["global", "flash"], "all"]]},
]


@pytest.mark.parametrize("steps", [[1] * 9, [9], [4, 1, 1, 3], [1, 8]], ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_decoding_with_a_cache_equals_the_full_forward(variant: dict[str, Any], steps: list[int]) -> None:
    section = model_section(**variant)
    model, text = tiny_model(section, moe_section()).eval(), tokens()
    cache = build_cache(section, 2, 10)
    with torch.inference_mode():
        parts = [model(part, cache=cache).logits_BSV for part in text.split(steps, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(text).logits_BSV, rtol=1e-4, atol=1e-5)
    assert [layer.length for layer in cache] == [9, 9]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "variant", [{"num_kv_heads": 2}, {"pos_emb": "alibi"}, {"pos_emb": "rpe"}, {"pos_emb": "sinusoidal"}, {"use_qk_layernorm": True}]
)
def test_in_sixteen_bits(dtype: torch.dtype, variant: dict[str, Any]) -> None:
    section = model_section(**variant)
    model, text = tiny_model(section, DENSE, dtype=dtype).eval(), tokens()
    cache = build_cache(section, 2, 9, dtype=dtype)
    with torch.inference_mode():
        full = model(text).logits_BSV
        parts = [model(part, cache=cache).logits_BSV for part in text.split([5, 1, 3], dim=1)]
    assert full.dtype == cache[0].keys_BHPd.dtype == dtype
    torch.testing.assert_close(torch.cat(parts, 1).float(), full.float(), rtol=0.05, atol=0.05)


def test_a_cache_has_room_for_what_it_was_made_for() -> None:
    section = model_section()
    model, cache = tiny_model(section), build_cache(section, 2, 4)
    with pytest.raises(CacheError, match="0 \\+ 9 tokens do not fit into a cache of 4 positions"):
        model(tokens(), cache=cache)
    with pytest.raises(CacheError, match="a batch of 3 for a cache of batch 2"):
        model(tokens(3, 4), cache=cache)
    with pytest.raises(CacheError, match="a cache of 17 positions: the model has at most 16"):
        build_cache(section, 1, 17)
    with pytest.raises(CacheError, match="a cache of 15 positions: the model has at most 14"):
        build_cache(model_section(pos_emb="learned", opt_pos_emb_offset=2), 1, 15)


def test_a_cache_is_of_one_request() -> None:
    first, second = (build_cache(model_section(), 1, 4) for _ in range(2))
    tiny_model()(tokens(1, 3), cache=first)
    assert isinstance(first[0], LayerCache)
    assert (first[0].length, second[0].length) == (3, 0)
    assert not second[0].keys_BHPd.any()
