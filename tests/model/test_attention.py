"""Attention against a loop over positions and heads, in every variant; rotary positions; layouts of the fused projection.

Shapes: B batch; S sequence; H query heads; K key/value heads; d head dimension; D model width.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.model.attention import SelfAttention
from megatron.model.attention.split import widened
from megatron.model.initialization import build_initializer
from megatron.model.positions import Places, positions_in_documents
from megatron.model.positions.rotary import HeadLayout, rotary_table, split_rotated
from megatron.model.positions.rpe import RelativePositions
from tests.model.tiny_model import DENSE, VOCAB, model_section, tiny_model, tokens

SLOPES = {2: [1 / 16, 1 / 256], 4: [1 / 4, 1 / 16, 1 / 64, 1 / 256], 3: [1 / 16, 1 / 256, 1 / 4]}
BUCKETS = [0, 1, 2, 2, 3, 3, 3, 3]
"""Of distances 0 to 7, with four buckets and a maximal distance of 8."""


def turned(vector_d: Tensor, position: int, rotary_dim: int) -> Tensor:
    """Rotate-half, one number at a time."""
    out, half = vector_d.clone(), rotary_dim // 2
    for j in range(half):
        angle = position * 10000 ** (-2 * j / rotary_dim)
        first, second = vector_d[j], vector_d[j + half]
        out[j] = first * math.cos(angle) - second * math.sin(angle)
        out[j + half] = second * math.cos(angle) + first * math.sin(angle)
    return out


def bias(model: ModelConfig, attention: SelfAttention, head: int, distance: int) -> Tensor | float:
    if model.pos_emb == "alibi":
        return -SLOPES[model.num_attention_heads][head] * distance
    if attention.rpe is not None:
        return math.sqrt(model.head_width) * attention.rpe.weight[BUCKETS[distance], head]
    return 0.0


def normed(model: ModelConfig, attention: SelfAttention, vectors_SHd: Tensor, which: str) -> Tensor:
    if model.use_qk_layernorm:
        return attention.qk_layernorm(vectors_SHd)  # keys: repeated by now
    if model.qk_norm_all_heads:
        return attention.get_submodule(which)(vectors_SHd.reshape(len(vectors_SHd), -1)).reshape(vectors_SHd.shape)
    return attention.get_submodule(which)(vectors_SHd) if model.qk_norm_per_head else vectors_SHd


def slow_attention(model: ModelConfig, attention: SelfAttention, x_SD: Tensor, document: list[int], position: list[int]) -> Tensor:
    """One sequence, a head and a position at a time."""
    heads, kv_heads, d = attention.layout
    fused, length = attention.query_key_value(x_SD), len(x_SD)
    if heads == kv_heads:
        query, key, value = fused.view(length, heads, 3, d).unbind(2)
    else:
        query, key, value = fused.view(length, heads + 2 * kv_heads, d).split([heads, kv_heads, kv_heads], 1)
    if model.use_qk_layernorm:  # as GPT-NeoX: keys and values are repeated, then normalised with the weights of the query heads
        key, value = (torch.stack([part[:, h * kv_heads // heads] for h in range(heads)], 1) for part in (key, value))
        kv_heads = heads
    query, key = normed(model, attention, query, "q_norm"), normed(model, attention, key, "k_norm")
    dimensions = model.rotary_dim if model.pos_emb == "rotary" else 0
    window = length if model.sliding_window_width is None else model.sliding_window_width
    contexts = []
    for h in range(heads):
        g = h // (heads // kv_heads)
        q = [turned(query[s, h], position[s], dimensions) for s in range(length)]
        k = [turned(key[s, g], position[s], dimensions) for s in range(length)]
        rows = []
        for s in range(length):
            seen = [t for t in range(max(0, s - window), s + 1) if document[t] == document[s]]
            scores = torch.stack([q[s] @ k[t] / math.sqrt(d) + bias(model, attention, h, s - t) for t in seen])
            rows.append(torch.softmax(scores, 0) @ value[seen, g])
        contexts.append(torch.stack(rows))
    return attention.dense(torch.cat(contexts, -1))


def build(model: ModelConfig, index: int = 0) -> SelfAttention:
    init, rpe = build_initializer(model, 0), None
    if model.pos_emb == "rpe":
        rpe = RelativePositions(model.num_attention_heads, model.head_width, model.rpe_num_buckets, model.rpe_max_distance, init.xavier_normal)
    attention = SelfAttention(model, init, index=index, rpe=rpe).double()
    for name, parameter in attention.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter)
    return attention


POSITIONS: list[dict[str, Any]] = [
    {"pos_emb": "none"},
    {"pos_emb": "rotary"},
    {"pos_emb": "rotary", "rotary_pct": 0.5},
    {"pos_emb": "alibi"},
    {"pos_emb": "rpe", "rpe_num_buckets": 4, "rpe_max_distance": 8},
]
SPLITS: list[dict[str, Any]] = [
    {},
    {"num_kv_heads": 2},
    {"num_kv_heads": 1},
    {"use_qk_layernorm": True},
    {"use_qk_layernorm": True, "norm": "rmsnorm"},
    {"use_qk_layernorm": True, "num_kv_heads": 2},
    {"use_qk_layernorm": True, "num_kv_heads": 1, "norm": "rmsnorm"},
    {"use_qk_layernorm": True, "num_kv_heads": 2, "norm": "scalenorm"},
    {"qk_norm_per_head": True, "num_kv_heads": 2},
    {"qk_norm_per_head": True, "norm": "rmsnorm"},
    {"qk_norm_all_heads": True, "num_kv_heads": 2},
    {"qk_norm_all_heads": True, "norm": "rmsnorm"},
]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("position", POSITIONS, ids=str)
def test_attention_a_position_at_a_time(position: dict[str, Any], split: dict[str, Any], window: int | None, documents: bool) -> None:
    model = model_section(**position, **split, sliding_window_width=window)
    attention, x_BSD = build(model), torch.randn(2, 7, 16, dtype=torch.float64)
    document_BS = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [0, 1, 1, 2, 2, 2, 2]])
    positions = [[0, 1, 2, 3, 0, 1, 2], [0, 0, 1, 0, 1, 2, 3]] if documents else [list(range(7))] * 2
    places = Places(position_BS=positions_in_documents(document_BS), document_BS=document_BS) if documents else Places()
    out = attention(x_BSD, places)
    for b in range(2):
        wanted = slow_attention(model, attention, x_BSD[b], document_BS[b].tolist() if documents else [0] * 7, positions[b])
        torch.testing.assert_close(out[b], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("heads", SLOPES)
def test_alibi_s_slopes(heads: int) -> None:
    model = model_section(pos_emb="alibi", num_attention_heads=heads, hidden_size=heads * 4)
    attention, x_SD = build(model), torch.randn(5, heads * 4, dtype=torch.float64)
    torch.testing.assert_close(attention(x_SD[None])[0], slow_attention(model, attention, x_SD, [0] * 5, list(range(5))), rtol=1e-6, atol=1e-6)
    assert attention.state_dict()["alibi_embed.slopes"].tolist() == SLOPES[heads]


@pytest.mark.parametrize("position", [{"pos_emb": "alibi"}, {"pos_emb": "rpe", "rpe_num_buckets": 4, "rpe_max_distance": 8}], ids=str)
@pytest.mark.parametrize(("kind", "index", "coefficient"), [("global", 0, 1), ("global", 1, 1), ("global", 3, 3), ("flash", 3, 1)])
def test_query_key_layer_scaling_multiplies_biases_of_global_layers(position: dict[str, Any], kind: str, index: int, coefficient: int) -> None:
    keys = {**position, "num_layers": 4, "attention_config": [[[kind], "all"]]}
    scaled = build(model_section(**keys, apply_query_key_layer_scaling=True), index)
    plain = build(model_section(**keys))
    plain.attend.coefficient = float(coefficient)
    x_BSD = torch.randn(1, 6, 16, dtype=torch.float64)
    torch.testing.assert_close(scaled(x_BSD), plain(x_BSD))


def test_without_positions_order_does_not_matter() -> None:
    attention, x_BSD = build(model_section(pos_emb="none")), torch.randn(1, 5, 16, dtype=torch.float64)
    swapped = x_BSD[:, [1, 0, 2, 3, 4]]
    torch.testing.assert_close(attention(x_BSD)[:, -1], attention(swapped)[:, -1])


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("layout", [HeadLayout(4, 4, 6), HeadLayout(4, 2, 6)])
def test_gradcheck_of_the_split_and_rotation(layout: HeadLayout, restart: bool) -> None:
    cos, sin = (table.double() for table in rotary_table(3, (1.0, 0.1), torch.device("cpu")))
    if restart:
        position_BS = torch.tensor([[0, 1, 2], [0, 0, 1]])
        cos, sin = cos[position_BS], sin[position_BS]
    fused = torch.randn(2, 3, (layout.heads + 2 * layout.kv_heads) * 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: split_rotated(f, layout, cos, sin), (fused,))


def test_the_rotary_table_serves_training_after_inference() -> None:
    rotary_table.cache_clear()
    with torch.inference_mode():
        rotary_table(3, (1.0, 0.1), torch.device("cpu"))
    assert not rotary_table(3, (1.0, 0.1), torch.device("cpu"))[0].is_inference()


@pytest.mark.parametrize("pos_emb", ["alibi", "rotary"])
def test_masks_serve_training_after_inference(pos_emb: str) -> None:
    model, text = tiny_model(model_section(pos_emb=pos_emb, sliding_window_width=2), DENSE), tokens(2, 11)
    with torch.inference_mode():
        model(text)
    model(text, labels_BS=text).loss.backward()


@pytest.mark.parametrize("pos_emb", ["learned", "alibi", "rpe"])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_attention_never_looks_ahead(length: int, pos_emb: str) -> None:
    model = tiny_model(model_section(pos_emb=pos_emb), DENSE).eval()
    text = tokens()
    changed = text.clone()
    changed[:, length:] = (changed[:, length:] + 1) % VOCAB
    assert torch.equal(model(text).logits_BSV[:, :length], model(changed).logits_BSV[:, :length])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_widened_on_a_cpu(dtype: torch.dtype) -> None:
    assert widened(torch.zeros(1, dtype=dtype)).dtype == torch.float32
    assert widened(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
