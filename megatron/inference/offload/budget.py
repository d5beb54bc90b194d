"""How many experts a budget of memory leaves room for. The budget is for the whole process: interpreter, libraries, weights, slots, keys and values,
buffers.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from megatron.config.model import ModelConfig
from megatron.inference.offload.errors import OffloadError

WORK = 48 * 2**20
"""Bytes kept free for activations, logits and what libraries allocate at their first use."""


class Need(NamedTuple):
    """What competes for the budget, in bytes."""

    taken: int
    """By the process before the slots exist."""
    cache: int
    """Keys and values of one text of the model's context."""
    reading: int
    """Buffers of the reading threads and the host's tier."""
    slot: int
    """One slot in every layer."""


def slots_for(memory: int, need: Need, *, fewest: int, most: int) -> int:
    """Slots of each layer. Raises OffloadError where the budget has no room for one token's experts."""
    room = memory - need.taken - need.cache - need.reading - WORK
    slots = max(0, room) // max(1, need.slot)
    if slots < fewest:
        least = memory - room + fewest * need.slot
        raise OffloadError(
            f"expert_offload.memory: {memory:,} bytes leave room for {slots} experts (or LoREs) of each layer, and one token needs {fewest}. The "
            f"process takes {need.taken:,} bytes without experts, {need.cache + need.reading + WORK:,} are kept for texts and reading, and one "
            f"expert in every layer takes {need.slot:,}. Give at least {-(-least // 10**6)}MB."
        )
    return min(slots, most)


def cache_bytes(model: ModelConfig, itemsize: int) -> int:
    """Keys and values of one text that fills the context."""
    return 2 * model.num_layers * model.attended_kv_heads * model.head_width * model.seq_length * itemsize


def resident_bytes() -> int:
    """The memory that this process takes now, as the system counts it."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
