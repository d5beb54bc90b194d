"""The whole weights of a checkpoint that ZeRO 3 has cut up.

In `zero_pp_rank_{r}_...` files each parameter of n elements is cut into W parts of ceil(n / W), the last one padded; rank r's optimizer file holds
its parts one after the other, in the order of `param_shapes`, as float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint import layout
from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.reading import read_file
from megatron.checkpoint.stored import StoredCheckpoint


def merge_zero3(stored: StoredCheckpoint) -> dict[str, torch.Tensor]:
    """Every parameter and buffer, whole, in the precision it was trained in. Raises CheckpointError for missing and contradicting files."""
    files = stored.optimizer_files
    if len(files) != stored.world_size:
        raise CheckpointError(
            f"{stored.path} was saved by {stored.world_size} processes but holds {len(files)} *_optim_states.pt files: some are missing."
        )
    parts = [torch.cat(_flat_groups(file)) for file in files]
    module, offset = stored.shards[0], 0
    merged = {name: module[name] for name in stored.head["buffer_names"]}
    for name, shape in ((name, shape) for group in stored.head["param_shapes"] for name, shape in group.items()):
        length = math.ceil(math.prod(shape) / stored.world_size)
        if offset + length > parts[0].numel():
            raise CheckpointError(f"{stored.path}: the optimizer files hold {parts[0].numel():,} elements a rank, too few for {name}.")
        merged[name] = torch.cat([part[offset : offset + length] for part in parts])[: math.prod(shape)].view(shape).to(module[name].dtype)
        offset += length
    if offset != parts[0].numel():
        raise CheckpointError(f"{stored.path}: the optimizer files hold {parts[0].numel():,} elements a rank, but the parameters take {offset:,}.")
    merged |= _merge_frozen(stored)
    merged |= {name: merged[source] for name, source in (stored.head.get("shared_params") or {}).items()}
    return merged


def _flat_groups(file: Path) -> list[torch.Tensor]:
    return [group.reshape(-1) for group in read_file(file, mmap=True)["optimizer_state_dict"]["fp32_flat_groups"]]


def _merge_frozen(stored: StoredCheckpoint) -> dict[str, torch.Tensor]:
    """Parameters that are not trained lie in parts in the model files of all ranks."""
    shapes: Mapping[str, Any] = stored.head.get("frozen_param_shapes") or {}
    if not shapes:
        return {}
    models = [read_file(file, mmap=True) for file in layout.matching_files(stored.path, layout.ZERO3_MODEL_FILE_PATTERN)]
    fragments = [model["frozen_param_fragments"] for model in models]
    return {name: torch.cat([parts[name].reshape(-1) for parts in fragments])[: math.prod(shape)].view(shape) for name, shape in shapes.items()}
