"""Experts in slow memory while a model generates: where they rest, how many are resident, and which one leaves.

DeepSpeed's offloading of the optimizer and the weights in training is something else: `zero_optimization` (megatron.config.offload).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, get_args

from megatron.config.moe import MoEConfig
from megatron.config.section import PositiveInt, Problem, Section

UNITS = {"kb": 1000, "mb": 1000**2, "gb": 1000**3, "tb": 1000**4, "kib": 1024, "mib": 1024**2, "gib": 1024**3, "tib": 1024**4}
SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", re.IGNORECASE)
SIZE_RULE = "must be a number and a unit, such as 2GB or 512MiB"


PolicyName = Literal["on_demand", "lru", "lfu", "static", "belady"]
POLICY_NAMES: tuple[str, ...] = get_args(PolicyName)


class ExpertOffload(Section):
    """Entries of `expert_offload`."""

    slots: PositiveInt | None = None
    """Experts (or LoREs) of each layer that are resident at once. None: as many as `memory` allows."""
    memory: str | None = None
    """How much memory the whole process may take, such as 2GB. None: `slots` says how many experts are resident."""
    policy: PolicyName = "lru"
    """Which expert leaves its slot when another one is selected."""
    store: str | None = None
    """Where the experts rest: a file of tools/ckpts/pack_experts.py. None: the checkpoint that is loaded."""
    granularity: Literal["expert", "lore"] = "expert"
    """What moves. lore: the experts of StructMoE stay, and their LoREs move."""
    prefetch: bool = False
    """Whether the next layer's router is asked early, with this layer's input, and the experts that it chooses are read meanwhile."""
    misses: Literal["move", "in_place"] = "move"
    """What happens to an expert that is not resident. move: it is read into a slot. in_place: it is computed where it rests, from a memory map, and
    the resident ones stay (policy static)."""
    trace: str | None = None
    """Routing trace (tools/analysis/offload.py). static takes its profile from it, and belady the future. None: there is none."""
    record: str | None = None
    """File that gets the routing trace of this run (.npz). None: no file."""
    counters: str | None = None
    """File that gets what was counted, as JSON. None: no file."""
    host_memory: str | None = None
    """Memory for experts that were read but are not in a slot, such as 8GB: on a machine with a GPU, the host's. None: no such tier."""
    page_cache: bool = False
    """Whether files are read through the system's page cache."""
    readers: PositiveInt = 2
    """Threads that read."""
    bandwidth: str | None = None
    """Bytes that are read in a second at most, such as 500MB, to imitate slower memory. None: as fast as the disk allows."""

    @property
    def forward_only(self) -> str | None:
        """The entry that the model's own forward alone can follow. None: the compiled decoder can follow all of them."""
        if self.record is not None:
            return "expert_offload.record"  # the steps of a trace are the calls of the forward, which `belady` makes again
        entries = {"policy": "belady", "granularity": "lore", "misses": "in_place"}
        return next((f"expert_offload.{key}: {value}" for key, value in entries.items() if getattr(self, key) == value), None)

    def problems(self) -> Iterator[Problem]:
        """The rules of these entries; the section that holds them asks for it."""
        yield from (Problem(tuple(f"expert_offload.{key}" for key in keys), message) for keys, message in self._own_problems())

    def _own_problems(self) -> Iterator[Problem]:
        if (self.slots is None) == (self.memory is None):
            yield Problem(("slots", "memory"), "give either slots or memory; one of them says how many experts are resident")
        for key in ("memory", "host_memory", "bandwidth"):
            if (given := getattr(self, key)) is not None and bytes_of(given) is None:
                yield Problem((key,), SIZE_RULE)
        if self.policy == "belady" and self.trace is None:
            yield Problem(("policy", "trace"), "belady needs trace: the routing trace of the same text, which an earlier run recorded")
        if self.misses == "in_place":
            yield from self._in_place_problems()

    def _in_place_problems(self) -> Iterator[Problem]:
        if self.policy != "static":
            yield Problem(("misses", "policy"), f"in_place needs policy: static, because no expert moves; policy is {self.policy}")
        if self.granularity == "lore":
            yield Problem(("misses", "granularity"), "in_place computes whole experts; write granularity: expert")
        if self.prefetch:
            yield Problem(("misses", "prefetch"), "in_place moves no experts, so there is nothing to prefetch; write prefetch: false")


def bytes_of(size: str) -> int | None:
    """`2GB` -> 2,000,000,000. None: it is no size."""
    match = SIZE.fullmatch(size)
    unit = UNITS.get(match[2].lower()) if match else None
    return None if match is None or unit is None else int(float(match[1]) * unit)


def fewest_slots(offload: ExpertOffload, moe: MoEConfig) -> int:
    """The slots that one token needs: its experts; with LoREs, all those of one expert, because an expert's rows are computed together."""
    return moe.moe_num_lores if offload.granularity == "lore" else moe.top_k


def offload_problems(offload: ExpertOffload, moe: MoEConfig, *, validates: bool) -> Iterator[Problem]:
    """Rules that `expert_offload` and the experts have together. `validates`: whether logits are compared after loading."""
    key = "expert_offload"
    if not moe.has_experts:
        yield Problem((key, "moe_num_experts"), "needs a model with experts, and moe_num_experts is 1")
        return
    if moe.dispatcher == "library":
        yield Problem((key, "kernel_backends.experts"), "needs experts that are computed one by one; remove experts from kernel_backends")
    if offload.prefetch and moe.moe_latent_size is not None:
        yield Problem(
            (f"{key}.prefetch", "moe_latent_size"), "asks the next router with what the experts read, and latent experts do not read the hidden state"
        )
    if offload.policy == "belady" and validates:
        keys = (f"{key}.policy", "checkpoint_validation_with_forward_pass")
        yield Problem(
            keys, "belady takes the calls of its trace alone, and checkpoint_validation_with_forward_pass makes one more; remove one of the two"
        )
    if offload.granularity == "lore" and (moe.moe_expert_type != "structmoe" or not moe.moe_lore_routed):
        yield Problem((f"{key}.granularity", "moe_expert_type"), "lore needs experts of moe_expert_type: structmoe whose LoREs are routed")
    if offload.slots is not None and offload.slots < (fewest := fewest_slots(offload, moe)) and offload.misses == "move":
        what = "the LoREs of one expert (moe_num_lores)" if offload.granularity == "lore" else "one token's experts (moe_top_k)"
        yield Problem((f"{key}.slots",), f"must be at least {fewest}, so that {what} are resident together")
