"""Positions added to the embeddings, T5's buckets, tables under GPT-NeoX's names, and positions that start again at every document."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from megatron.model.positions import positions_in_documents
from megatron.model.positions.rpe import relative_bucket
from tests.model.tiny_model import DENSE, VOCAB, model_section, moe_section, tiny_model, tokens


@pytest.mark.parametrize("offset", [0, 2])
def test_learned_positions_are_rows_of_a_table(offset: int) -> None:
    model = tiny_model(model_section(pos_emb="learned", opt_pos_emb_offset=offset), DENSE)
    embedding, text = model.sequential["0"], tokens()
    table = embedding.position_embeddings.weight
    assert table.shape == (16, 16), "max_position_embeddings rows, the offset among them"
    wanted = torch.stack([embedding.word_embeddings.weight[text[0, s]] + table[s + offset] for s in range(9)])
    torch.testing.assert_close(embedding(text)[0], wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinusoidal_positions(dtype: torch.dtype) -> None:
    model = tiny_model(model_section(pos_emb="sinusoidal"), DENSE, dtype=dtype)
    embedding, text = model.sequential["0"], tokens()
    angles = [[p * 10000 ** (-2 * j / 16) for j in range(8)] for p in range(9)]
    waves = torch.tensor([[*map(math.sin, row), *map(math.cos, row)] for row in angles]).to(dtype)
    torch.testing.assert_close(embedding(text)[1], embedding.word_embeddings.weight[text[1]] + waves)


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (4, 8), (2, 2), (16, 1000)])
def test_buckets_are_t5_s(buckets: int, max_distance: int) -> None:
    distance = torch.arange(2 * max_distance + 3)
    wanted = T5Attention._relative_position_bucket(-distance, bidirectional=False, num_buckets=buckets, max_distance=max_distance)
    assert torch.equal(relative_bucket(distance, buckets, max_distance), wanted)


def test_all_layers_share_one_table_under_neox_s_name() -> None:
    model = tiny_model(model_section(pos_emb="rpe", num_layers=3), DENSE)
    tables = [layer.attention.rpe.weight for layer in model.layers]
    assert tables[0].shape == (32, 4)
    assert all(table is tables[0] for table in tables)
    assert [name for name in model.state_dict() if "rpe" in name] == [f"sequential.{i}.attention.rpe.weight" for i in (2, 3, 4)]
    assert tables[0].std().item() == pytest.approx(math.sqrt(2 / 36), rel=0.2), "drawn by xavier_normal, as GPT-NeoX does"


DERIVED = {
    "attention.alibi_embed.slopes": {"pos_emb": "alibi"},
    "attention.rotary_emb.inv_freq": {"pos_emb": "rotary", "rotary_save_freqs_buffer": True},
    "position_embeddings.inv_freq": {"pos_emb": "sinusoidal"},
}


@pytest.mark.parametrize(("name", "keys"), DERIVED.items(), ids=DERIVED)
def test_what_neox_keeps_in_checkpoints_is_written_and_never_read(name: str, keys: dict[str, object]) -> None:
    section = model_section(**keys)
    model, low = tiny_model(section, DENSE), tiny_model(section, DENSE, dtype=torch.bfloat16)
    state = model.state_dict()
    derived = {key: tensor for key, tensor in state.items() if key.endswith(name)}
    assert derived
    for key, tensor in derived.items():
        assert torch.equal(low.state_dict()[key], tensor), "float32 in a model of 16 bits, too"
        state[key] = tensor + 1
    model.load_state_dict(state)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in derived.items())
    model.load_state_dict({key: tensor for key, tensor in state.items() if key not in derived})


def test_without_the_key_no_frequencies_are_written() -> None:
    assert not [name for name in tiny_model(model_section(), DENSE).state_dict() if "inv_freq" in name]


def test_positions_start_again_at_every_document() -> None:
    document_BS = torch.tensor([[0, 0, 0, 1, 1, 2], [5, 5, 5, 5, 5, 5], [0, 1, 2, 2, 3, 3]])
    assert positions_in_documents(document_BS).tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 0, 1]]


POSITIONS = [
    {"pos_emb": "rotary"},
    {"pos_emb": "rotary", "use_qk_layernorm": True},
    {"pos_emb": "learned"},
    {"pos_emb": "sinusoidal"},
    {"pos_emb": "alibi"},
    {"pos_emb": "rpe"},
    {"pos_emb": "none"},
]


@pytest.mark.parametrize("recompute", [0, 1])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("keys", POSITIONS, ids=str)
def test_separated_documents_are_as_if_each_were_alone(keys: dict[str, object], window: int | None, recompute: int) -> None:
    model = tiny_model(model_section(**keys, sliding_window_width=window), DENSE)
    model.separate_documents(attention=True, positions=True)
    if recompute:
        model.enable_activation_checkpointing(recompute)
    first, second = tokens(1, 5, seed=1), tokens(1, 4, seed=2)
    both, document_BS = torch.cat([first, second], 1), torch.tensor([[3] * 5 + [4] * 4])
    logits = model(both, document_BS=document_BS).logits_BSV
    torch.testing.assert_close(logits, torch.cat([model(first).logits_BSV, model(second).logits_BSV], 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("attention", "positions"), [(True, False), (False, True)])
@pytest.mark.parametrize("keys", POSITIONS, ids=str)
def test_each_of_the_two_can_be_had_alone(keys: dict[str, object], attention: bool, positions: bool) -> None:
    model = tiny_model(model_section(**keys), DENSE)
    text, document_BS = tokens(1, 8), torch.tensor([[0] * 4 + [1] * 4])
    changed = text.clone()
    changed[:, 0] = (changed[:, 0] + 1) % VOCAB
    plain = model(text).logits_BSV
    model.separate_documents(attention=attention, positions=positions)
    logits = model(text, document_BS=document_BS).logits_BSV
    assert torch.equal(logits[:, 4:], model(changed, document_BS=document_BS).logits_BSV[:, 4:]) == attention
    torch.testing.assert_close(logits[:, :4], plain[:, :4])
    unaffected = keys["pos_emb"] in ("alibi", "rpe", "none") and not attention
    assert torch.allclose(logits[:, 4:], plain[:, 4:], atol=1e-6) == unaffected


def test_documents_of_moe_layers_change_attention_only() -> None:
    model = tiny_model(model_section(), moe_section())
    model.separate_documents(attention=True, positions=True)
    out = model(tokens(), labels_BS=tokens(), document_BS=torch.zeros(2, 9, dtype=torch.int64))
    plain = model(tokens(), labels_BS=tokens())
    torch.testing.assert_close(out.loss, plain.loss)
    assert torch.equal(out.report.expert_load_XE, plain.report.expert_load_XE)
