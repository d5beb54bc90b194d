"""Attention against a loop over positions and heads, rotary positions, layouts of the fused projection, and decoding with a cache.

Shapes: B batch; S sequence; H query heads; K key/value heads; d head dimension; D model width.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron.model import LayerCache, build_cache
from megatron.model.attention import CacheError, SelfAttention
from megatron.model.attention.rotary import HeadLayout, rotary_table, split_rotated
from megatron.model.attention.self_attention import widened
from megatron.model.initialization import build_initializer
from tests.model.tiny_model import DENSE, VOCAB, model_section, moe_section, tiny_model, tokens


def turned(vector_d: Tensor, position: int, rotary_dim: int) -> Tensor:
    """Rotate-half, one number at a time."""
    out, half = vector_d.clone(), rotary_dim // 2
    for j in range(half):
        angle = position * 10000 ** (-2 * j / rotary_dim)
        first, second = vector_d[j], vector_d[j + half]
        out[j] = first * math.cos(angle) - second * math.sin(angle)
        out[j + half] = second * math.cos(angle) + first * math.sin(angle)
    return out


def slow_attention(attention: SelfAttention, x_SD: Tensor, rotary_dim: int) -> Tensor:
    """One sequence, a head and a position at a time."""
    heads, kv_heads, d = attention.layout
    fused = attention.query_key_value(x_SD)
    contexts = []
    for h in range(heads):
        g = h // (heads // kv_heads)
        if heads == kv_heads:
            q, k, v = (fused[:, (3 * h + part) * d : (3 * h + part + 1) * d] for part in range(3))
        else:
            q = fused[:, h * d : (h + 1) * d]
            k, v = (fused[:, (heads + part * kv_heads + g) * d : (heads + part * kv_heads + g + 1) * d] for part in range(2))
        q = torch.stack([turned(row, s, rotary_dim) for s, row in enumerate(q)])
        k = torch.stack([turned(row, s, rotary_dim) for s, row in enumerate(k)])
        rows = [torch.softmax(k[: s + 1] @ q[s] / math.sqrt(d), 0) @ v[: s + 1] for s in range(len(x_SD))]
        contexts.append(torch.stack(rows))
    return attention.dense(torch.cat(contexts, -1))


@pytest.mark.parametrize("rotary_pct", [1.0, 0.5])
@pytest.mark.parametrize("kv_heads", [None, 2, 1])
def test_attention_a_position_at_a_time(kv_heads: int | None, rotary_pct: float) -> None:
    model = model_section(num_kv_heads=kv_heads, rotary_pct=rotary_pct)
    attention = SelfAttention(model, build_initializer(model, 0)).double()
    x_BSD = torch.randn(2, 5, 16, dtype=torch.float64)
    out = attention(x_BSD)
    for b in range(2):
        torch.testing.assert_close(out[b], slow_attention(attention, x_BSD[b], model.rotary_dim), rtol=1e-6, atol=1e-6)


def test_without_rotary_positions_order_does_not_matter() -> None:
    model = model_section(pos_emb="none")
    attention = SelfAttention(model, build_initializer(model, 0)).double()
    x_BSD = torch.randn(1, 5, 16, dtype=torch.float64)
    swapped = x_BSD[:, [1, 0, 2, 3, 4]]
    torch.testing.assert_close(attention(x_BSD)[:, -1], attention(swapped)[:, -1])


@pytest.mark.parametrize("layout", [HeadLayout(4, 4, 6), HeadLayout(4, 2, 6)])
def test_gradcheck_of_the_split_and_rotation(layout: HeadLayout) -> None:
    cos, sin = rotary_table(3, 4, 100, torch.device("cpu"))
    fused = torch.randn(2, 3, (layout.heads + 2 * layout.kv_heads) * 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: split_rotated(f, layout, cos.double(), sin.double()), (fused,))


def test_the_rotary_table_serves_training_after_inference() -> None:
    rotary_table.cache_clear()
    with torch.inference_mode():
        rotary_table(3, 4, 100, torch.device("cpu"))
    assert not rotary_table(3, 4, 100, torch.device("cpu"))[0].is_inference()


@pytest.mark.parametrize("length", [1, 2, 7])
def test_attention_never_looks_ahead(length: int) -> None:
    model = tiny_model(model_section(pos_emb="learned"), DENSE).eval()
    text = tokens()
    changed = text.clone()
    changed[:, length:] = (changed[:, length:] + 1) % VOCAB
    assert torch.equal(model(text).logits_BSV[:, :length], model(changed).logits_BSV[:, :length])


@pytest.mark.parametrize("steps", [[1] * 9, [9], [4, 1, 1, 3], [1, 8]])
@pytest.mark.parametrize("kv_heads", [None, 2])
@pytest.mark.parametrize("pos_emb", ["rotary", "learned"])
def test_decoding_with_a_cache_equals_the_full_forward(pos_emb: str, kv_heads: int | None, steps: list[int]) -> None:
    section = model_section(pos_emb=pos_emb, num_kv_heads=kv_heads)
    model, text = tiny_model(section, moe_section()).eval(), tokens()
    cache = build_cache(section, 2, 10)
    with torch.inference_mode():
        parts = [model(part, cache=cache).logits_BSV for part in text.split(steps, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(text).logits_BSV, rtol=1e-4, atol=1e-5)
    assert [layer.length for layer in cache] == [9, 9]


def test_a_cache_has_room_for_what_it_was_made_for() -> None:
    section = model_section()
    model, cache = tiny_model(section), build_cache(section, 2, 4)
    with pytest.raises(CacheError, match="0 \\+ 9 tokens do not fit into a cache of 4 positions"):
        model(tokens(), cache=cache)
    with pytest.raises(CacheError, match="a batch of 3 for a cache of batch 2"):
        model(tokens(3, 4), cache=cache)
    with pytest.raises(CacheError, match="a cache of 17 positions: the model has at most 16"):
        build_cache(section, 1, 17)


def test_a_cache_is_of_one_request() -> None:
    first, second = (build_cache(model_section(), 1, 4) for _ in range(2))
    tiny_model()(tokens(1, 3), cache=first)
    assert isinstance(first[0], LayerCache)
    assert (first[0].length, second[0].length) == (3, 0)
    assert not second[0].keys_BHPd.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_attend_in_float32_on_a_cpu(dtype: torch.dtype) -> None:
    section = model_section(num_kv_heads=2)
    model, text = tiny_model(section, DENSE, dtype=dtype).eval(), tokens()
    assert widened(torch.zeros(1, dtype=dtype)).dtype == torch.float32
    assert widened(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
    cache = build_cache(section, 2, 9, dtype=dtype)
    with torch.inference_mode():
        full = model(text).logits_BSV
        parts = [model(part, cache=cache).logits_BSV for part in text.split([5, 1, 3], dim=1)]
    assert full.dtype == cache[0].keys_BHPd.dtype == dtype
    torch.testing.assert_close(torch.cat(parts, 1).float(), full.float(), rtol=0.05, atol=0.05)
