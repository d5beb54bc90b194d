"""Checkpoints as GPT-NeoX writes them, cut up by a few lines of their own rather than by the table that is tested."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

State = dict[str, Tensor]


def cut_for_rank(state: Mapping[str, Tensor], rank: int, count: int, *, queries: int, kv: int, gated: bool) -> State:
    """One tensor-parallel rank's part of the whole weights. `queries` and `kv`: rows of all queries and of all keys; biases of rows are copied."""

    def rows(tensor: Tensor) -> Tensor:
        size = tensor.shape[0] // count
        return tensor[rank * size : (rank + 1) * size]

    def packed(tensor: Tensor, *sizes: int) -> Tensor:
        return torch.cat([rows(part) for part in tensor.split(list(sizes))])

    def part(name: str, tensor: Tensor) -> Tensor:
        if "query_key_value" in name:
            return rows(tensor) if kv == queries else packed(tensor, queries, kv, kv)
        if "linear1" in name:
            return packed(tensor, tensor.shape[0] // 2, tensor.shape[0] // 2) if gated else rows(tensor)
        if name.endswith(("dense.weight", "linear2.weight")):
            width = tensor.shape[1] // count
            return tensor[:, rank * width : (rank + 1) * width]
        return rows(tensor) if re.search(r"word_embeddings|final_linear|experts", name) else tensor

    return {name: part(name, tensor).clone() for name, tensor in state.items()}


def head(iteration: int, args: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """What a model file holds beside the weights, objects of NumPy's included."""
    return {
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [{}],
        "frozen_param_shapes": None,
        "shared_params": {},
        "frozen_param_fragments": None,
        "lr_scheduler": {"start_lr": 1e-3, "warmup_iter": 0.5, "num_iters": iteration, "decay_style": "cosine", "end_iter": 50, "min_lr": 0.0},
        "data_sampler": None,
        "random_ltd": None,
        "sparse_tensor_module_names": set(),
        "skipped_steps": 0,
        "global_steps": iteration,
        "global_samples": 4 * iteration,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {"train_batch_size": 4, "zero_optimization": {"stage": 0}},
        "ds_version": "0.16.5",
        "iteration": iteration,
        "args": dict(args),
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
        **changes,
    }


def write_sequential(directory: Path, shards: list[State], content: Mapping[str, Any]) -> Path:
    """pipe_parallel_size 0: a model file for each tensor-parallel rank. Returns the checkpoint's path; `latest` names it."""
    path = _folder(directory, content)
    for rank, shard in enumerate(shards):
        torch.save({"module": shard, **content, "mp_world_size": len(shards)}, path / f"mp_rank_{rank:02d}_model_states.pt")
    return path


def write_layers(directory: Path, shards: list[State], content: Mapping[str, Any], *, stages: int = 1) -> Path:
    """pipe_parallel_size `stages`: a file for each layer and rank, and model files without weights for all processes that share the model."""
    path = _folder(directory, content)
    for number in range(stages * len(shards)):
        torch.save({"module": None, **content, "mp_world_size": stages * len(shards)}, path / f"mp_rank_{number:02d}_model_states.pt")
    for rank, shard in enumerate(shards):
        layers: dict[int, State] = {}
        for name, tensor in shard.items():
            _, index, key = name.split(".", 2)
            layers.setdefault(int(index), {})[key] = tensor
        for index, layer in layers.items():
            torch.save(layer, path / f"layer_{index:02d}-model_{rank:02d}-model_states.pt")
    return path


def _folder(directory: Path, content: Mapping[str, Any]) -> Path:
    path = directory / f"global_step{content.get('iteration', content.get('total_iters', 0))}"
    path.mkdir(parents=True)
    (directory / "latest").write_text(path.name)
    return path


def renamed(state: Mapping[str, Tensor], change: Callable[[str], str]) -> State:
    """The same weights under other names."""
    return {change(name): tensor for name, tensor in state.items()}


def with_llama_names(state: Mapping[str, Tensor]) -> State:
    """linear1 = [up ; gate] as w3 and w1, linear2 as w2: what a gated MLP was called until September 2024."""
    old: State = {}
    for name, tensor in state.items():
        if name.endswith("mlp.linear1.weight"):
            old[name.replace("linear1", "w3")], old[name.replace("linear1", "w1")] = (half.clone() for half in tensor.chunk(2))
        else:
            old[name.replace("mlp.linear2", "mlp.w2")] = tensor
    return old
