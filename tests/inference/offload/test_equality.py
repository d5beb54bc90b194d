"""Logits with experts in slots are those without, bit for bit: every policy, every kind of expert, prompts and single tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.inference.offload.counters import total
from tests.inference.offload.conftest import KINDS, load, logits_of, record_of, write_model

POLICIES = ("on_demand", "lru", "lfu", "static")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_expert(kind: str, tmp_path: Path) -> None:
    keys = write_model(tmp_path, KINDS[kind])
    expected = logits_of(load(keys))
    slots = 8 if kind == "top p" else 3
    ready = load(keys, slots=slots)
    assert torch.equal(logits_of(ready), expected)
    assert ready.offloaded is not None
    counted = total(ready.offloaded.counters)
    assert counted.selections > counted.hits > 0
    assert counted.loads == counted.selections - counted.hits
    assert counted.bytes > 0


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy(policy: str, prefetch: bool, gated: dict[str, Any]) -> None:
    ready = load(gated, slots=2, policy=policy, prefetch=prefetch)
    assert torch.equal(logits_of(ready), logits_of(load(gated)))
    assert ready.offloaded is not None
    counted = total(ready.offloaded.counters)
    assert (counted.prefetches > 0) == prefetch
    assert counted.prefetches == counted.prefetches_used + counted.prefetches_wasted


@pytest.mark.parametrize("granularity", ["expert", "lore"])
def test_belady(granularity: str, structmoe: dict[str, Any], tmp_path: Path) -> None:
    record_of(structmoe, tmp_path / "trace.npz", new=8)
    ready = load(structmoe, slots=4, policy="belady", trace=str(tmp_path / "trace.npz"), granularity=granularity)
    assert torch.equal(logits_of(ready), logits_of(load(structmoe)))


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("kind", ["structmoe", "structmoe one lore", "structmoe both"])
@pytest.mark.parametrize("policy", POLICIES)
def test_lores_alone_move(policy: str, kind: str, prefetch: bool, tmp_path: Path) -> None:
    keys = write_model(tmp_path, KINDS[kind])
    ready = load(keys, slots=5, policy=policy, prefetch=prefetch, granularity="lore")
    assert torch.equal(logits_of(ready), logits_of(load(keys)))
    assert ready.offloaded is not None
    assert total(ready.offloaded.counters).replacements > 0


@pytest.mark.parametrize("kind", ["plain", "gated", "gated bf16", "structmoe", "decomposed"])
def test_experts_computed_in_place(kind: str, tmp_path: Path) -> None:
    keys = write_model(tmp_path, KINDS[kind])
    ready = load(keys, slots=3, policy="static", misses="in_place")
    assert torch.equal(logits_of(ready), logits_of(load(keys)))
    assert ready.offloaded is not None
    counted = total(ready.offloaded.counters)
    assert counted.in_place > 0
    assert counted.hits > 0
    assert counted.loads == 0


@pytest.mark.parametrize("changes", [{"page_cache": True}, {"host_memory": "1MB"}, {"readers": 1}, {"slots": 8}], ids=str)
def test_other_ways_to_read(changes: dict[str, Any], gated: dict[str, Any]) -> None:
    assert torch.equal(logits_of(load(gated, **{"slots": 2, **changes})), logits_of(load(gated)))


def test_a_float32_checkpoint_runs_in_bf16(gated: dict[str, Any]) -> None:
    keys = {**gated, "precision": "bfloat16"}
    assert torch.equal(logits_of(load(keys, slots=2)), logits_of(load(keys)))


NO_ROWS = {**KINDS["structmoe"], "moe_top_k": 1, "moe_zero_experts": 12, "moe_losses": {"lore_balance": 0.01}}
"""Most tokens choose a zero expert: then a layer's experts get no row."""


@pytest.mark.parametrize(
    "changes", [{"slots": 2}, {"slots": 2, "policy": "static", "misses": "in_place"}, {"slots": 4, "granularity": "lore"}, {"slots": 6}], ids=str
)
def test_a_token_that_no_expert_with_weights_gets(changes: dict[str, Any], tmp_path: Path) -> None:
    keys = write_model(tmp_path / "model", NO_ROWS)
    assert (record_of(keys, tmp_path / "trace.npz", new=8).expert_TLK[-8:] < 0).any()
    assert torch.equal(logits_of(load(keys, **changes)), logits_of(load(keys)))


def test_a_record_of_layers_with_different_numbers_of_choices(tmp_path: Path) -> None:
    """The router top_p has a place for every expert, so layers with more experts have more places."""
    changes = {"moe_num_experts": None, "moe_num_experts_by_layer": [4, 6], "moe_router_type": "top_p", "moe_top_k": None}
    keys = write_model(tmp_path / "model", {**KINDS["structmoe"], **changes})
    trace = record_of(keys, tmp_path / "trace.npz", new=3)
    assert trace.experts_by_layer == [4, 6]
    assert trace.lore_TLKM is not None
    assert trace.lore_TLKM.shape == (*trace.expert_TLK.shape, 2)
    assert ((trace.lore_TLKM >= 0).all(-1) == (trace.expert_TLK >= 0)).all()
    ready = load(keys, slots=6, policy="belady", trace=str(tmp_path / "trace.npz"))
    assert torch.equal(logits_of(ready, new=3), logits_of(load(keys), new=3))
