"""Loading a model whose experts stay in files: the other weights are read layer by layer, and experts are never in memory together."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.expert_places import LayerPlaces, places_in_checkpoint
from megatron.checkpoint.layerwise import LayerwiseWeights, layer_of
from megatron.checkpoint.load import check_args, check_shapes, module_shapes
from megatron.checkpoint.vocabulary import fit_vocabulary
from megatron.checkpoint.weights import Expected
from megatron.config.expert_offload import bytes_of, fewest_slots
from megatron.config.neox import NeoXConfig
from megatron.inference.offload.budget import Need, cache_bytes, resident_bytes, slots_for
from megatron.inference.offload.errors import OffloadError
from megatron.inference.offload.offloaded import Offloaded, Plan, put_slots
from megatron.inference.offload.packed import open_store
from megatron.inference.offload.policies import Steps
from megatron.inference.offload.store import Store, files_of, total_bytes
from megatron.inference.offload.units import EMPTY, LayerUnits, fingerprint, moe_layers, units_in
from megatron.kernels.precision import DTYPES
from megatron.model.gpt import GPT
from megatron.monitor.routing_trace import read_trace

log = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """A model with slots."""

    gpt: GPT
    offloaded: Offloaded
    client_state: Mapping[str, Any]
    """Of the checkpoint: step, args, ..."""


def load_offloaded(config: NeoXConfig, path: Path, expected: Expected, device: torch.device) -> Loaded:
    """The model of the checkpoint at `path`, in evaluation mode.

    Raises OffloadError, TraceError, and CheckpointError for a checkpoint that cannot be read or does not fit the configuration.
    """
    options = config.inference.expert_offload
    assert options is not None
    if options.granularity == "lore" and device.type != "cpu":
        raise OffloadError("expert_offload.granularity: lore needs a CPU in this version. Write granularity: expert, or set DS_ACCELERATOR=cpu.")
    vocabulary, dtype = expected.args["padded_vocab_size"], DTYPES[config.precision]
    gpt = GPT(config.model, config.moe, vocabulary, EMPTY)
    shapes = module_shapes(gpt)
    units = units_in(gpt, granularity=options.granularity)
    store, of = _open_store(config, path, units)
    _without_numbers(gpt, units, dtype)
    gpt = gpt.to(dtype=dtype)
    client_state = load_rest(gpt, path, expected, shapes=shapes, left_out={each.prefix + name for each in units.values() for name in each.names})
    if of is not None:
        _check_belongs(path, expected, units, of=of, store=str(options.store))
    gpt = gpt.to(device=device).eval().requires_grad_(False)
    sections = config.moe.for_layers(config.model.num_layers)
    plan = Plan(options, config.model, sections, units, _slots(config, store, units, dtype), _steps(config))
    offloaded = put_slots(gpt, store, plan)
    log.info("%s", _described(offloaded, units))
    return Loaded(gpt, offloaded, client_state)


def _open_store(config: NeoXConfig, path: Path, units: Mapping[int, LayerUnits]) -> tuple[Store, int | None]:
    """(the store, the fingerprint of the checkpoint that it is of; None: it is the checkpoint itself)."""
    options = config.inference.expert_offload
    assert options is not None
    direct = not options.page_cache and options.misses == "move"
    if options.store is not None:
        opened = open_store(Path(options.store), units)
        return Store(opened.places, checksums=opened.checksums, direct=direct), opened.of
    try:
        found: Mapping[int, LayerPlaces] = places_in_checkpoint(path, {number: each.wanted for number, each in units.items()})
    except CheckpointError as error:
        raise OffloadError(str(error)) from error
    return Store(found, direct=direct), None


def _check_belongs(path: Path, expected: Expected, units: Mapping[int, LayerUnits], *, of: int, store: str) -> None:
    """Raises OffloadError for experts of another checkpoint, which no shape would tell."""
    weights = LayerwiseWeights(path, expected)
    same = fingerprint(weights.read, units) == of
    weights.close()
    if not same:
        raise OffloadError(
            f"expert_offload.store: the experts in {store} are not those of {path}, because the routers differ. Write the file again from this "
            "checkpoint with tools/ckpts/pack_experts.py."
        )


def _without_numbers(gpt: GPT, units: Mapping[int, LayerUnits], dtype: torch.dtype) -> None:
    """Takes the memory of what moves, so that casting the model does not write it. LoREs keep their shape, which the layer asks for."""
    for number, part in moe_layers(gpt).items():
        whole = set(units[number].names) == {name for name, _ in part.experts.named_parameters()}
        if whole:
            part.experts = nn.Module()
            continue
        for name in units[number].names:
            parameter = part.experts.get_parameter(name)
            parameter.data = torch.empty(parameter.shape, dtype=dtype)


def load_rest(gpt: GPT, path: Path, expected: Expected, *, shapes: Mapping[str, tuple[int, ...]], left_out: set[str]) -> Mapping[str, Any]:
    """Reads all weights but those `left_out`, layer by layer; the checkpoint's client state. `shapes`: of the whole model. Raises CheckpointError."""
    weights = LayerwiseWeights(path, expected)
    state = weights.client_state
    check_args(path, state.get("args") or {}, expected.args)
    for notice in weights.notices:
        log.info("%s", notice)
    targets = gpt.state_dict(keep_vars=True)
    stored: dict[str, tuple[int, ...]] = {}
    for _, names in groupby(weights.names, key=layer_of):
        layer = {name: weights.read(name) for name in names}
        if expected.vocab_size is not None:
            layer = fit_vocabulary(layer, rows=expected.args["padded_vocab_size"], vocab_size=expected.vocab_size, args=state.get("args") or {}).state
        stored |= {name: tuple(tensor.shape) for name, tensor in layer.items()}
        if wrong := {name: stored[name] for name in layer if name in shapes and shapes[name] != stored[name]}:
            check_shapes(path, wrong, {name: shapes[name] for name in wrong})
        _copy(layer, targets, left_out)
    check_shapes(path, stored, shapes)
    weights.close()
    return state


@torch.no_grad()
def _copy(layer: Mapping[str, Tensor], targets: Mapping[str, Tensor], left_out: set[str]) -> None:
    for name, tensor in layer.items():
        if name not in left_out and name in targets:
            targets[name].copy_(tensor)


def _slots(config: NeoXConfig, store: Store, units: Mapping[int, LayerUnits], dtype: torch.dtype) -> int:
    """Slots of each layer, as they are given or as the budget allows."""
    options = config.inference.expert_offload
    assert options is not None
    fewest, most = fewest_slots(options, config.moe), max(each.units for each in units.values())
    if options.slots is not None:
        return min(options.slots, most)
    memory = bytes_of(options.memory or "")
    assert memory is not None
    of_unit = {number: sum(part.length // part.dtype.itemsize for part in layer[0].values()) for number, layer in store.places.items()}
    largest = max(of_unit.values()) * max(dtype.itemsize, 4)
    reading = options.readers * largest + (bytes_of(options.host_memory or "0kB") or 0)
    need = Need(resident_bytes(), cache_bytes(config.model, dtype.itemsize), reading, sum(of_unit.values()) * dtype.itemsize)
    return slots_for(memory, need, fewest=1 if options.misses == "in_place" else fewest, most=most)


def _steps(config: NeoXConfig) -> Mapping[int, Steps]:
    options = config.inference.expert_offload
    assert options is not None
    if options.trace is None:
        return {}
    trace = read_trace(Path(options.trace))
    return {layer: trace.steps(layer, granularity=options.granularity) for layer in trace.layers}


def _described(offloaded: Offloaded, units: Mapping[int, LayerUnits]) -> str:
    """What was done, for the log."""
    what = "LoREs" if offloaded.options.granularity == "lore" else "experts"
    places = offloaded.store.places
    files = files_of(places)
    where = str(files[0]) if len(files) == 1 else f"{len(files)} files in {files[0].parent}"
    direct = all(file.is_direct for file in offloaded.store.files.opened.values())
    how = "past the page cache" if direct else "through the page cache" if offloaded.options.page_cache else "without O_DIRECT"
    count, resident = max(each.units for each in units.values()), offloaded.slots
    return (
        f"expert_offload: {resident} of {count} {what} of each layer are resident ({offloaded.options.policy}); {total_bytes(places):,} bytes rest "
        f"in {where}, read {how}."
    )
