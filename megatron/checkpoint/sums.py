"""Checksums of every weight and of its optimizer state over all processes: written into a manifest, compared with what an engine holds later.

They do not depend on how the tensors are divided, so they hold across layouts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron.checkpoint import layout, ranks
from megatron.checkpoint.checksum import MODULUS, checksum, hexadecimal
from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.held import MASTER, WEIGHT, Held, Share, held_optimizer, held_weights, optimizer_slots
from megatron.checkpoint.manifest import read_manifest
from megatron.model.division import Cut
from megatron.mpu.topology import Topology

DTYPE, SHAPE = "dtype", "shape"
FLOAT32 = "float32"
MAX_NAMED = 4
WORDS = {WEIGHT: "the weight itself", MASTER: "its float32 copy"}

Described = dict[str, dict[str, Any]]
"""Name -> `dtype` and `shape` of the whole weight, and kind -> checksum in hexadecimal."""


class Part(NamedTuple):
    """What one process sums up of a weight."""

    cut: Cut
    dtype: str
    """Of the weight in the engine."""
    sums: dict[str, int]


class OwnSums(NamedTuple):
    """What one process sums up. `alike`: tensors that all data-parallel processes hold alike. `runs`: those of which each has a run."""

    alike: dict[str, Part]
    runs: dict[str, Part]


def own_sums(engine: Any, share: Share, *, optimizer: bool, copies: bool) -> OwnSums:
    """This process's sums over the weights, and over the optimizer's state if `optimizer`. `copies` False: what other data-parallel processes count
    is left out."""
    stage = int(engine.zero_optimization_stage())
    sums = OwnSums({}, {})
    dtypes: dict[str, tuple[Cut, str]] = {}
    for held in held_weights(engine, share):
        dtypes[held.name] = held.cut, str(held.values.dtype).removeprefix("torch.")
        if (stage == 3 and _is_run(held)) or copies or share.counts_replicated:
            _add(sums.runs if stage == 3 and _is_run(held) else sums.alike, WEIGHT, held, dtypes)
    if not optimizer:
        return sums
    partitioned = stage > 0 or hasattr(engine.optimizer, "fp32_groups_flat_partition")
    if partitioned or copies or share.counts_replicated:
        for kind, held in held_optimizer(engine, optimizer_slots(engine, share)):
            _add(sums.runs if partitioned else sums.alike, kind, held, dtypes)
    return sums


def _is_run(held: Held) -> bool:
    return held.values.numel() != math.prod(held.cut.local_shape)


def _add(parts: dict[str, Part], kind: str, held: Held, dtypes: Mapping[str, tuple[Cut, str]]) -> None:
    part = parts.setdefault(held.name, Part(*dtypes[held.name], {}))
    part.sums[kind] = checksum(held.cut, held.start, held.values)


def described(gathered: Sequence[OwnSums], topology: Topology) -> Described:
    """The entry of a manifest, from the sums of every process."""
    entries: Described = {}
    for name, part in _all_parts(gathered):
        entries.setdefault(name, {SHAPE: list(part.cut.shape), DTYPE: part.dtype})
    for name, kinds in totals(gathered, topology, replica=0).items():
        entries[name] |= {kind: hexadecimal(total) for kind, total in kinds.items()}
    return entries


def totals(gathered: Sequence[OwnSums], topology: Topology, *, replica: int) -> dict[str, dict[str, int]]:
    """Name -> kind -> sum over the parts of a weight. Where several processes hold the same part, copy number `replica` counts, or the last."""
    result: dict[str, dict[str, int]] = {}
    for partitioned in (False, True):
        teams: dict[str, dict[Cut, dict[Any, list[dict[str, int]]]]] = {}
        for process, sums in enumerate(gathered):
            place = topology.place_of(process)
            team = (place.pipe, place.tensor) if partitioned else process
            for name, part in (sums.runs if partitioned else sums.alike).items():
                teams.setdefault(name, {}).setdefault(part.cut, {}).setdefault(team, []).append(part.sums)
        for name, by_cut in teams.items():
            kinds = result.setdefault(name, {})
            for copies in by_cut.values():
                for member in list(copies.values())[min(replica, len(copies) - 1)]:
                    for kind, value in member.items():
                        kinds[kind] = (kinds.get(kind, 0) + value) % MODULUS
    return result


def check_sums(path: Path, engine: Any, share: Share, *, optimizer: bool) -> None:
    """Compares what the engine holds with the manifest of the checkpoint that it was loaded from. A checkpoint without sums is not compared.

    Raises CheckpointError on every rank, which names the tensors that differ. Collective.
    """
    stored = ranks.together(lambda: stored_sums(path))
    if not stored:
        return
    gathered = ranks.gather(own_sums(engine, share, optimizer=optimizer, copies=True))
    problems = list(dict.fromkeys(_differences(stored, gathered, share.topology, optimizer=optimizer)))
    if problems:
        more = f"; and {len(problems) - MAX_NAMED} more" if len(problems) > MAX_NAMED else ""
        raise CheckpointError(
            f"{path} was not loaded as it was saved: {'; '.join(problems[:MAX_NAMED])}{more}. Either the checkpoint is damaged, or this program has "
            "an error; do not train on. Load another checkpoint, or load this one in the layout in which it was saved."
        )


def stored_sums(path: Path) -> Described:
    """The checksums in a manifest; empty where it has none."""
    manifest = read_manifest(path)
    found = {} if manifest is None else manifest.facts.get(layout.TENSORS) or {}
    if not isinstance(found, dict) or not all(isinstance(entry, dict) for entry in found.values()):
        raise CheckpointError(f"{path / layout.MANIFEST} is damaged: its entry {layout.TENSORS!r} must hold checksums by the names of weights.")
    return found


def _differences(stored: Described, gathered: Sequence[OwnSums], topology: Topology, *, optimizer: bool) -> Iterator[str]:
    parts = dict(_all_parts(gathered))
    for name in stored:
        if name not in parts:
            yield f"the model does not hold {name}"
    for replica in range(topology.data_parallel_size):
        for name, kinds in totals(gathered, topology, replica=replica).items():
            entry = stored.get(name)
            if entry is None or entry.get(SHAPE) != list(parts[name].cut.shape):
                continue  # rows that only fill up the vocabulary were cut off or added
            wanted = [kind for kind in entry if kind not in (DTYPE, SHAPE, WEIGHT, MASTER)] if optimizer else []
            for kind in dict.fromkeys([*kinds, *wanted]):
                expected, found = expected_sum(entry, kind, parts[name].dtype), kinds.get(kind)
                if expected is not None and (found is None or expected != hexadecimal(found)):
                    is_now = "is missing" if found is None else f"has the checksum {hexadecimal(found)}"
                    yield f"{WORDS.get(kind, kind)} of {name} {is_now}, but {expected} was saved"


def expected_sum(entry: Mapping[str, Any], kind: str, dtype: str) -> str | None:
    """The stored checksum that a tensor must have in an engine whose weight is in `dtype`; None where the formats differ and nothing can be said."""
    stored_dtype = entry.get(DTYPE)
    if kind == WEIGHT and stored_dtype != dtype:
        return entry.get(MASTER) if dtype == FLOAT32 else None
    if kind == MASTER and MASTER not in entry:
        return entry.get(WEIGHT) if stored_dtype == FLOAT32 else None
    return entry.get(kind)


def _all_parts(gathered: Sequence[OwnSums]) -> Iterator[tuple[str, Part]]:
    for sums in gathered:
        yield from sums.alike.items()
        yield from sums.runs.items()
