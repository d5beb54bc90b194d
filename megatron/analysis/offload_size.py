"""What `expert_offload` will do, computed from the configuration alone."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.analysis.tables import bytes_text
from megatron.config.expert_offload import ExpertOffload, bytes_of, fewest_slots
from megatron.config.neox import NeoXConfig
from megatron.config.size import count_parameters

PROCESS = 300 * 10**6
"""About what the interpreter, the libraries and the room for work take, in bytes."""
BYTES = {"fp32": 4, "fp16": 2, "bfloat16": 2}


def offload_lines(config: NeoXConfig, padded_vocab_size: int) -> Iterator[tuple[str, str]]:
    """(what, value) for a table. Nothing without `expert_offload`."""
    offload = config.inference.expert_offload
    if offload is None:
        return
    count, size = count_parameters(config.model, config.moe, padded_vocab_size), BYTES[config.precision]
    moved, units = _moved(config, offload), _units(config, offload)
    what = "LoREs" if offload.granularity == "lore" else "experts"
    yield f"{what} at rest", f"{bytes_text(moved * size)} in {offload.store or 'the checkpoint'}"
    stays = (count.total_sum - moved) * size
    yield "weights that stay", bytes_text(stays)
    slot = moved * size // units
    if offload.slots is not None:
        slots = min(offload.slots, units)
        yield "resident", f"{slots} of {units} {what} of each layer ({offload.policy}), {bytes_text(slots * slot)}"
        return
    room = (bytes_of(offload.memory or "") or 0) - stays - PROCESS
    fewest = 1 if offload.misses == "in_place" else fewest_slots(offload, config.moe)
    if room < fewest * slot:
        least = -(-(stays + PROCESS + fewest * slot) // 10**6)
        yield "resident", f"memory {offload.memory} does not suffice for {fewest} {what} of each layer; give about {least}MB or more"
    else:
        yield "resident", f"about {min(units, room // max(1, slot))} of {units} {what} of each layer ({offload.policy}) in {offload.memory}"


def _moved(config: NeoXConfig, offload: ExpertOffload) -> int:
    """Parameters that move."""
    count, moe = count_parameters(config.model, config.moe, 0).total, config.moe
    if offload.granularity == "expert":
        return count["experts"] + count["lores"]
    experts = sum(section.num_experts for section in moe.for_layers(config.model.num_layers).values())
    return count["lores"] - experts * moe.moe_num_lores * moe.expert_model(config.model).hidden_size


def _units(config: NeoXConfig, offload: ExpertOffload) -> int:
    """Of the layer that has most."""
    most = max(section.num_experts for section in config.moe.for_layers(config.model.num_layers).values())
    return most * (config.moe.moe_num_lores if offload.granularity == "lore" else 1)
