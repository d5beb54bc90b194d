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
