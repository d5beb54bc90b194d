"""Writing weights alone as a checkpoint, without an engine, in the layout of any number of tensor-parallel processes; whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.checkpoint import layout
from megatron.checkpoint.engine import write_tensors
from megatron.checkpoint.layerwise import layer_of
from megatron.checkpoint.manifest import FileRecord
from megatron.checkpoint.save import commit, prepare
from megatron.checkpoint.shards import split_state


@dataclass(frozen=True)
class Division:
    """How the weights lie on disk: for so many tensor-parallel processes, in a file each (`stages` 0), or a file for each layer, as a pipeline of
    `stages` has them. `parallel_residual`: biases of row-parallel layers are shared out among the processes."""

    tensor_parallel: int = 1
    stages: int = 0
    parallel_residual: bool = False


def save_weights(
    directory: Path, weights: Iterable[tuple[str, Tensor]], *, client_state: Mapping[str, Any], documents: Mapping[str, str], division: Division
) -> Path:
    """Writes <directory>/global_step<client_state["iteration"]> and returns that path. `weights` come layer by layer; with layer files one layer is
    in memory at a time, else all of them are. Raises CheckpointError, and OSError for a full disk.
    """
    iteration = client_state["iteration"]
    prepare(directory)
    staged = layout.staging(directory) / layout.tag(iteration)
    staged.mkdir()
    try:
        files = _write(staged, weights, {layout.GQA_LAYOUT_KEY: layout.GQA_LAYOUT, **client_state}, division)
        commit(directory, staged, files, documents, {"iteration": iteration, "world_size": 1, "zero_stage": 0})
    finally:
        shutil.rmtree(layout.staging(directory), ignore_errors=True)
    return directory / layout.tag(iteration)


def _write(staged: Path, weights: Iterable[tuple[str, Tensor]], state: dict[str, Any], division: Division) -> dict[str, FileRecord]:
    files: dict[str, FileRecord] = {}
    modules: list[dict[str, Tensor]] = [{} for _ in range(division.tensor_parallel)]
    for layer, shards in _layers(weights, division):
        for rank, shard in enumerate(shards):
            owned = {name: tensor.clone() for name, tensor in shard.items()}
            if not division.stages:
                modules[rank] |= owned
                continue
            name = layout.layer_file(int(layer), rank)
            files[name] = write_tensors({key.split(".", 2)[2]: tensor for key, tensor in owned.items()}, staged / name)
    processes = division.tensor_parallel * max(1, division.stages)  # that share the model: each has a file with what is no weight
    for rank in range(processes):
        name = layout.model_file(rank)
        content = {"module": None if division.stages else modules[rank], "dp_world_size": 1, "mp_world_size": processes, **state}
        files[name] = write_tensors(content, staged / name)
    return files


def _layers(weights: Iterable[tuple[str, Tensor]], division: Division) -> Iterator[tuple[str, list[dict[str, Tensor]]]]:
    """(number, the weights of each process), layer by layer."""
    for layer, group in groupby(weights, key=lambda item: layer_of(item[0])):
        yield layer, split_state(dict(group), division.tensor_parallel, parallel_residual=division.parallel_residual)
