"""Slots hold the experts that they should, reads that are waited for go first, and a second tier answers what it still has."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.inference.offload.counters import total
from megatron.inference.offload.errors import OffloadError
from megatron.inference.offload.experts import SlottedExperts
from megatron.inference.offload.lores import PagedMemory
from megatron.inference.offload.reader import Reader
from megatron.inference.offload.store import HostTier, Targets, Throttled
from megatron.inference.offload.table import Move
from megatron.inference.offload.units import moe_layers
from tests.inference.offload.conftest import load, logits_of


def slotted(keys: dict[str, Any], layer: int = 1, **offload: Any) -> SlottedExperts:
    experts = moe_layers(load(keys, **offload).gpt)[layer].experts
    assert isinstance(experts, SlottedExperts)
    return experts


@pytest.mark.parametrize("prefetch", [False, True])
def test_acquired_slots_hold_the_experts(gated: dict[str, Any], prefetch: bool) -> None:
    whole: Any = moe_layers(load(gated).gpt)[1].experts
    experts = slotted(gated, slots=4, policy="lru", prefetch=prefetch)
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(2, 32, generator=generator)
    for _ in range(30):
        expert_NK = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(2)])
        slot_NK = experts.acquire(expert_NK, hidden_ND)
        for expert, slot in zip(expert_NK.flatten().tolist(), slot_NK.flatten().tolist(), strict=True):
            for name, part in whole.expert_parameters(expert).items():
                assert torch.equal(experts.slab.expert_parameters(slot)[name], part)


def test_an_empty_place_has_the_number_behind_the_last_slot(gated: dict[str, Any]) -> None:
    experts = slotted(gated, slots=3)
    slot_NK = experts.acquire(torch.tensor([[5, 8], [5, 2]]), torch.zeros(2, 32))
    assert slot_NK[0, 0] == slot_NK[1, 0] != slot_NK[1, 1]
    assert slot_NK[0, 1] == experts.slab.num_experts == 3


def test_more_experts_than_slots(gated: dict[str, Any]) -> None:
    experts = slotted(gated, slots=3)
    with pytest.raises(
        OffloadError, match=r"4 experts \(or LoREs\) of a layer are needed at once, but there are 3 slots\. Raise expert_offload\.slots"
    ):
        experts.acquire(torch.tensor([[0, 1], [2, 3]]), torch.zeros(2, 32))


def test_reads_that_are_waited_for_go_first() -> None:
    reader, begin, order = Reader(threads=1), threading.Event(), list[str]()
    first = reader.submit(lambda: (begin.wait(), None)[1], urgent=True)
    soon = [reader.submit(lambda n=n: order.append(f"soon {n}"), urgent=False) for n in range(3)]  # type: ignore[misc]
    now = reader.submit(lambda: order.append("now"), urgent=True)
    assert soon[0].drop()
    reader.hurry(soon[2])
    begin.set()
    for job in (first, now, *soon):
        job.wait()
    reader.close()
    assert order == ["now", "soon 2", "soon 1"]


def test_an_error_belongs_to_who_waits() -> None:
    reader = Reader()

    def fail() -> None:
        raise OffloadError("no disk")

    job = reader.submit(fail, urgent=True)
    with pytest.raises(OffloadError, match="no disk"):
        job.wait()
    reader.close()


def test_a_lore_that_leaves_gives_its_memory_back() -> None:
    module = torch.nn.Module()
    module.a = torch.nn.Parameter(torch.empty(4 * 3, 1024), requires_grad=False)  # each of the four has three pages
    memory = PagedMemory(module, ["a"], 4)
    for unit in range(4):
        memory.targets(Move(unit, 0))["a"].fill_(unit + 1)
    memory.release(1)
    assert module.a.sum(1).tolist() == [1024] * 3 + [0] * 3 + [3 * 1024] * 3 + [4 * 1024] * 3


def test_a_lore_that_shares_a_page_stays_whole() -> None:
    module = torch.nn.Module()
    module.a = torch.nn.Parameter(torch.empty(4 * 3, 300), requires_grad=False)
    memory = PagedMemory(module, ["a"], 4)
    for unit in range(4):
        memory.targets(Move(unit, 0))["a"].fill_(unit + 1)
    for unit in (0, 2):
        memory.release(unit)
    assert module.a.view(4, -1)[[1, 3]].unique(dim=1).flatten().tolist() == [2, 4]


class Numbered:
    """A tier whose units hold their own number."""

    def __init__(self) -> None:
        self.reads: list[int] = []

    def read(self, layer: int, unit: int, targets: Targets) -> int:
        self.reads.append(unit)
        for target in targets.values():
            target.fill_(unit)
        return sum(target.nbytes for target in targets.values())


def read(tier: HostTier, unit: int) -> tuple[Tensor, int]:
    target = torch.zeros(4)
    count = tier.read(0, unit, {"w": target})
    return target, count


def test_the_second_tier_keeps_what_was_read_last() -> None:
    below = Numbered()
    tier = HostTier(below, 2 * 16, pinned=False)
    for unit, expected in ((1, 16), (2, 16), (1, 0), (3, 16), (1, 0), (2, 16)):
        target, count = read(tier, unit)
        assert count == expected
        assert bool((target == unit).all())
    assert below.reads == [1, 2, 3, 2]


def test_host_hits_are_counted(gated: dict[str, Any]) -> None:
    ready = load(gated, slots=2, host_memory="1MB")
    logits_of(ready)
    assert ready.offloaded is not None
    counted = total(ready.offloaded.counters)
    assert counted.host_hits > 0
    assert counted.bytes <= 8 * 3 * 3 * 32 * 64 * 4  # no expert is read from the file twice


def test_a_limited_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    now, slept = [100.0], list[float]()
    monkeypatch.setattr("megatron.inference.offload.store.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("megatron.inference.offload.store.time.sleep", slept.append)
    tier = Throttled(Numbered(), 160)
    for _ in range(3):
        tier.read(0, 1, {"w": torch.zeros(4)})
    assert slept == pytest.approx([0.1, 0.2, 0.3])  # 16 bytes each, nothing else passes meanwhile
