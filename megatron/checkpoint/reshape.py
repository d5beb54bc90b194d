"""A checkpoint written again for another number of tensor-parallel processes and pipeline stages, layer by layer, without an engine.

The weights lie as GPT-NeoX's processes read them. The optimizer's state lies whole in files of our own, one a layer: this program resumes from them
in any layout. About one layer is in memory at a time. With `stages` 0 GPT-NeoX wants a process's weights in one file: they are in memory together.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.checkpoint import layout
from megatron.checkpoint.checksum import checksum, hexadecimal
from megatron.checkpoint.engine import write_tensors
from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.fill import stored_scaler
from megatron.checkpoint.foreign_parts import ForeignParts
from megatron.checkpoint.held import MASTER, WEIGHT
from megatron.checkpoint.layerwise import layer_of
from megatron.checkpoint.logical import LogicalCheckpoint
from megatron.checkpoint.manifest import FileRecord, read_manifest, write_bytes
from megatron.checkpoint.random_state import KEYS
from megatron.checkpoint.save import commit, prepare
from megatron.checkpoint.save_weights import Division
from megatron.checkpoint.shards import rule_for, split_state
from megatron.checkpoint.stored import client_state_of
from megatron.checkpoint.sums import DTYPE, SHAPE, Described, expected_sum, stored_sums
from megatron.checkpoint.table import Table, table_bytes
from megatron.checkpoint.weights import Expected
from megatron.model.division import Cut, whole_cut
from megatron.mpu.topology import Layout, Topology

KEPT = ("lr_scheduler", "global_steps", "global_samples", "skipped_steps")
"""DeepSpeed's entries of a model file that a run goes on from."""
Report = Callable[[int], None]
"""Told how many bytes were written since the last time."""


class Reshaped(NamedTuple):
    """The new checkpoint, what was said on reading the old one, and how many checksums of the old one were compared."""

    path: Path
    notices: tuple[str, ...]
    compared: int


class Job(NamedTuple):
    """What is written again, and where."""

    staged: Path
    checkpoint: LogicalCheckpoint
    division: Division
    report: Report


@dataclass
class Written:
    """What was written so far."""

    files: dict[str, FileRecord] = field(default_factory=dict)
    sums: Described = field(default_factory=dict)
    cuts: dict[str, dict[int, Cut]] = field(default_factory=dict)
    modules: list[dict[str, Tensor]] = field(default_factory=list)
    """With `stages` 0: each process's weights, until they are written."""


def reshape_checkpoint(source: Path, directory: Path, division: Division, expected: Expected, report: Report = lambda size: None) -> Reshaped:
    """Writes the checkpoint at `source` as <directory>/global_stepN for the processes of `division`, whole or not at all.

    At the end the new files are read again, and the checksum of every tensor is compared: with the source's manifest where it has one, and with what
    was read. Raises CheckpointError, and OSError for a full disk.
    """
    checkpoint = LogicalCheckpoint(source, expected)
    state = {key: value for key, value in client_state_of(source, checkpoint.head).items() if key not in KEYS}
    iteration = state.get("iteration")
    if iteration is None:
        raise CheckpointError(f"{source} does not say at which iteration it was saved, so the new checkpoint has no name.")
    if (directory / layout.tag(iteration)).exists():
        raise CheckpointError(f"{directory / layout.tag(iteration)} exists already: choose another directory, or delete it.")
    prepare(directory)
    staged = layout.staging(directory) / layout.tag(iteration)
    staged.mkdir()
    try:
        written = _write(staged, checkpoint, _head(checkpoint, state, division), division, report)
        compared = _verify(staged, source, written, expected, report)
        facts = {**_facts(source), "iteration": iteration, layout.TENSORS: written.sums}
        commit(directory, staged, written.files, _documents(source), facts)
    finally:
        shutil.rmtree(layout.staging(directory), ignore_errors=True)
    return Reshaped(directory / layout.tag(iteration), tuple(checkpoint.notices), compared)


def total_bytes(source: Path, expected: Expected) -> int:
    """About how many bytes `reshape_checkpoint` reports: everything is written, and read again."""
    checkpoint = LogicalCheckpoint(source, expected)
    sizes = {name: torch.Size(shape).numel() for name, shape in checkpoint.shapes.items()}
    weights = sum(size * checkpoint.dtypes[name].itemsize for name, size in sizes.items())
    states = sum(4 * size * len(_states(checkpoint, name)) for name, size in sizes.items())
    checkpoint.close()
    return 2 * (weights + states)


def _write(staged: Path, checkpoint: LogicalCheckpoint, head: dict[str, Any], division: Division, report: Report) -> Written:
    written = Written(modules=[{} for _ in range(division.tensor_parallel)])
    for layer, names in _layers(checkpoint.shapes):
        _write_weights(Job(staged, checkpoint, division, report), layer, names, written)
        states = {name: entry for name in names if (entry := _read_states(checkpoint, name, written))}
        if states:
            file = layout.layer_optimizer_file(int(layer or 0))
            written.files[file] = write_tensors(states, staged / file)
            report(written.files[file].size)
        checkpoint.close()
    for process in range(division.tensor_parallel * max(1, division.stages)):
        file = layout.model_file(process)
        content = {**head, "module": None if division.stages else written.modules[process]}
        written.files[file] = write_tensors(content, staged / file)
        if not division.stages:
            written.modules[process] = {}
            report(written.files[file].size)
    if division.tensor_parallel > 1:
        table = _table(written, division.tensor_parallel)
        written.files[layout.DIVISION] = write_bytes(staged / layout.DIVISION, table_bytes(table))
    return written


def _table(written: Written, count: int) -> Table:
    """Which part of every weight each of `count` tensor-parallel processes has. Stages do not matter for that."""
    numbers = {file: match for file in written.files if (match := layout.LAYER_FILE_PATTERN.fullmatch(file))}
    writers = {file: int(match[2]) for file, match in numbers.items()}
    heads = {file: int(match[1]) % count for file in written.files if (match := layout.MODEL_FILE_PATTERN.fullmatch(file))}
    return Table(Topology(count, layout=Layout(tensor=count)), written.cuts, {**writers, **heads}, {})


def _write_weights(job: Job, layer: str, names: list[str], written: Written) -> None:
    staged, checkpoint, division = job.staged, job.checkpoint, job.division
    count = division.tensor_parallel
    whole = {name: checkpoint.read(name, WEIGHT, checkpoint.whole(name)) for name in names}
    for name, tensor in whole.items():
        _note(written, name, WEIGHT, tensor, checkpoint)
    shards = split_state(whole, count, parallel_residual=False)
    if count > 1:
        parts = ForeignParts({name: tuple(tensor.shape) for name, tensor in shards[0].items()}, count, heads=1, per_head=False)
        for process, shard in enumerate(shards):
            for name, tensor in shard.items():
                placed = parts.part(name, tuple(tensor.shape), process)
                assert placed is not None, name
                written.cuts.setdefault(name, {})[process] = placed[1]
                if process and division.parallel_residual and rule_for(name).added:
                    shard[name] = torch.zeros_like(tensor)  # GPT-NeoX adds the copies up, and the table says that the first one counts
    for process, shard in enumerate(shards):
        owned = {name: tensor.clone() for name, tensor in shard.items()}
        if not division.stages:
            written.modules[process] |= owned
            continue
        file = layout.layer_file(int(layer), process)
        written.files[file] = write_tensors({key.split(".", 2)[2]: tensor for key, tensor in owned.items()}, staged / file)
        job.report(written.files[file].size)


def _layers(names: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """(number, names of its weights), layer by layer; all weights in one where names have no numbers."""
    for layer, group in groupby(names, key=layer_of):
        yield layer, list(group)


def _states(checkpoint: LogicalCheckpoint, name: str) -> list[str]:
    """The kinds of tensors beside the weight: its float32 copy where the weight has another format, and the optimizer's."""
    copies = [MASTER] if checkpoint.has(name, MASTER) and checkpoint.dtypes[name] != torch.float32 else []
    return [*copies, *checkpoint.kinds(name)]


def _read_states(checkpoint: LogicalCheckpoint, name: str, written: Written) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    for kind in _states(checkpoint, name):
        tensor = checkpoint.read(name, kind, checkpoint.whole(name))
        _note(written, name, kind, tensor, checkpoint)
        entry[kind] = tensor.contiguous() if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
    if entry and name in checkpoint.sources.steps:
        entry["step"] = checkpoint.sources.steps[name]
    return entry


def _note(written: Written, name: str, kind: str, tensor: Tensor, checkpoint: LogicalCheckpoint) -> None:
    """Keeps the checksum of what was read, in the form of a manifest."""
    entry = written.sums.setdefault(name, {SHAPE: list(tensor.shape), DTYPE: str(checkpoint.dtypes[name]).removeprefix("torch.")})
    entry[kind] = hexadecimal(checksum(whole_cut(tensor.shape), 0, tensor))


def _verify(staged: Path, source: Path, written: Written, expected: Expected, report: Report) -> int:
    """Reads the new files and compares every checksum; returns how many the source had to compare with. Raises CheckpointError."""
    stored, compared = stored_sums(source), 0
    for name, entry in stored.items():
        if name not in written.sums:
            raise CheckpointError(f"{name} is in the manifest of {source}, but its files do not hold it. Nothing was written.")
        for kind, found in written.sums[name].items():
            wanted = expected_sum(entry, kind, written.sums[name][DTYPE]) if kind not in (SHAPE, DTYPE) else None
            compared += wanted is not None
            if wanted is not None and wanted != found:
                raise CheckpointError(f"{kind} of {name} in {source} has the checksum {found}, but its manifest says {wanted}. Nothing was written.")
    again = LogicalCheckpoint(staged, expected)
    for _, names in _layers(written.sums):
        for name in names:
            for kind, wanted in written.sums[name].items():
                if kind in (SHAPE, DTYPE):
                    continue
                tensor = again.read(name, kind, whole_cut(written.sums[name][SHAPE]))
                if hexadecimal(checksum(whole_cut(tensor.shape), 0, tensor)) != wanted:
                    raise CheckpointError(f"{kind} of {name} was not written as it was read. The disk or the memory may be faulty. Nothing was kept.")
                report(tensor.nbytes)
        again.close()
    return compared


def _head(checkpoint: LogicalCheckpoint, state: dict[str, Any], division: Division) -> dict[str, Any]:
    args = {**(state.get("args") or {}), "model_parallel_size": division.tensor_parallel}
    scaler = {name: value for name, value in stored_scaler(checkpoint).items() if isinstance(value, bool | int | float)}
    return {
        **{key: checkpoint.head[key] for key in KEPT if key in checkpoint.head},
        **state,
        "args": args,
        layout.GQA_LAYOUT_KEY: layout.GQA_LAYOUT,
        "optimizer": {"dynamic_loss_scale": True, **scaler} if scaler else None,
        "dp_world_size": 1,
        "mp_world_size": division.tensor_parallel * max(1, division.stages),
    }


def _facts(source: Path) -> dict[str, Any]:
    """What the new manifest takes over."""
    manifest = read_manifest(source)
    before: Mapping[str, Any] = {} if manifest is None else manifest.facts
    kept = {key: before[key] for key in (layout.LOSSES_FINITE,) if key in before}
    return {**kept, "world_size": before.get("world_size", 1), "zero_stage": 0, layout.RESHAPED: True}


def _documents(source: Path) -> dict[str, str]:
    folder = source / layout.CONFIGS
    files = sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
    return {file.name: file.read_text(encoding="utf-8", errors="replace") for file in files}
