"""Which order grouped query/key/value rows are in: trained weights tell, others are taken in today's order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.gqa_layout import todays_order

HEADS, KEY_HEADS, SIZE, WIDTH = 8, 2, 16, 96
QUERIES, KEYS = HEADS * SIZE, KEY_HEADS * SIZE


def rows(*, trained: bool, seed: int = 0) -> Tensor:
    """[q; k; v]; in trained weights each kind has rows of its own length, with some spread."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(QUERIES + 2 * KEYS, WIDTH, generator=generator) / WIDTH**0.5
    if trained:
        spread = torch.exp(0.2 * torch.randn(len(weight), 1, generator=generator))
        lengths = torch.cat([torch.full((size, 1), length) for size, length in ((QUERIES, 1.0), (KEYS, 1.3), (KEYS, 0.6))])
        weight = weight * spread * lengths
    return weight


def head_by_head(weight: Tensor) -> Tensor:
    """The older order: for each query head its rows, then its share of the keys and of the values."""
    query, key, value = weight.split([QUERIES, KEYS, KEYS])
    share = KEYS // HEADS
    parts = [part for head in range(HEADS) for part in (query[head * SIZE :][:SIZE], key[head * share :][:share], value[head * share :][:share])]
    return torch.cat(parts)


def shard(weight: Tensor) -> dict[str, Tensor]:
    return {
        "sequential.2.attention.query_key_value.weight": weight,
        "sequential.2.attention.query_key_value.bias": weight[:, 0].clone(),
        "sequential.2.attention.dense.weight": torch.zeros(WIDTH, QUERIES),
    }


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("older", [True, False])
def test_trained_weights_tell_their_order(older: bool, seed: int) -> None:
    weight = rows(trained=True, seed=seed)
    ordered = todays_order([shard(head_by_head(weight) if older else weight)], heads=HEADS, layout="auto")
    assert torch.equal(ordered.shards[0]["sequential.2.attention.query_key_value.weight"], weight)
    assert torch.equal(ordered.shards[0]["sequential.2.attention.query_key_value.bias"], weight[:, 0])
    assert ordered.notice is not None
    assert ("head by head, as GPT-NeoX had them until November 2024" in ordered.notice) == older
    assert "of the variance of their lengths lies between" in ordered.notice
    assert "do not tell" not in ordered.notice


@pytest.mark.parametrize("seed", range(20))
def test_fresh_weights_do_not_tell(seed: int) -> None:
    weight = rows(trained=False, seed=seed)
    ordered = todays_order([shard(weight)], heads=HEADS, layout="auto")
    assert torch.equal(ordered.shards[0]["sequential.2.attention.query_key_value.weight"], weight)
    assert ordered.notice is not None
    assert "the weights do not show the order" in ordered.notice
    assert "-o gqa_layout=per_head" in ordered.notice


@pytest.mark.parametrize("trained", [True, False])
def test_what_the_configuration_says_decides(trained: bool) -> None:
    weight = rows(trained=trained)
    for given, layout, notice in ((head_by_head(weight), "per_head", "head by head"), (weight, "q,k,v", "as all queries, all keys, all values")):
        ordered = todays_order([shard(given)], heads=HEADS, layout=layout)
        assert torch.equal(ordered.shards[0]["sequential.2.attention.query_key_value.weight"], weight)
        assert ordered.notice is not None
        assert notice in ordered.notice
        assert "gqa_layout says so" in ordered.notice


def test_each_process_has_its_own_rows() -> None:
    weights = [rows(trained=True, seed=seed) for seed in (1, 2)]
    ordered = todays_order([shard(head_by_head(weight)) for weight in weights], heads=HEADS, layout="auto")
    for state, weight in zip(ordered.shards, weights, strict=True):
        assert torch.equal(state["sequential.2.attention.query_key_value.weight"], weight)


def test_as_many_keys_as_queries_need_no_decision() -> None:
    state = shard(torch.ones(3 * QUERIES, WIDTH))
    ordered = todays_order([state], heads=HEADS, layout="per_head")
    assert (ordered.shards, ordered.notice) == ([state], None)


def test_another_number_of_heads_is_refused() -> None:
    with pytest.raises(CheckpointError, match="cannot be the query/key/value projection of 7 query heads"):
        todays_order([shard(rows(trained=True))], heads=7, layout="auto")
