"""A checkpoint's weights and facts without an engine: what inference, conversion and the checks before loading read.

Under ZeRO 3 (`zero_pp_rank_{r}_...`) each parameter of n elements is cut into W parts of ceil(n / W), the last one padded; rank r's optimizer file
holds its parts one after the other, in the order of `param_shapes`, as float32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron.checkpoint import layout
from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.reading import read_file


class ModelWeights(NamedTuple):
    """Weights by NeoX's names in the precision they were trained in, the resolved configuration (empty for another program's checkpoint),
    and the client state (iteration, args, ...)."""

    state_dict: dict[str, torch.Tensor]
    config: dict[str, Any]
    client_state: dict[str, Any]


@dataclass(frozen=True)
class StoredCheckpoint:
    """What rank 0's files say: `zero_stage` 0, 1, 2 or 3; `model` is the whole content of the model file (tensors memory-mapped)."""

    path: Path
    zero_stage: int
    world_size: int
    model: dict[str, Any]

    @property
    def client_state(self) -> dict[str, Any]:
        """Everything that is not DeepSpeed's."""
        return {key: value for key, value in self.model.items() if key not in layout.DEEPSPEED_KEYS}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter and buffer with its full shape."""
        module = {name: tuple(tensor.shape) for name, tensor in self.model["module"].items()}
        if self.zero_stage < 3:
            return module
        buffers = {name: module[name] for name in self.model["buffer_names"] if name in module}
        full = {
            name: tuple(shape)
            for shapes in [*self.model["param_shapes"], self.model.get("frozen_param_shapes") or {}]
            for name, shape in shapes.items()
        }
        shared = {name: full[source] for name, source in (self.model.get("shared_params") or {}).items()}
        return {**buffers, **full, **shared}


def inspect_checkpoint(path: Path) -> StoredCheckpoint:
    """Reads what kind of checkpoint `path` is. Raises CheckpointError for layouts that are not read (model parallel) and for damaged files."""
    if layout.matching_files(path, layout.LAYER_FILE_PATTERN):
        return StoredCheckpoint(path, 0, 1, _pipeline_model(path))
    zero3 = layout.matching_files(path, layout.ZERO3_MODEL_FILE_PATTERN)
    files = zero3 or layout.matching_files(path, layout.MODEL_FILE_PATTERN)
    if not files:
        raise CheckpointError(f"{path} holds no model weights (no mp_rank_00_model_states.pt).")
    if any("mp_rank_00" not in file.name for file in files):
        raise CheckpointError(f"{path} was saved with model_parallel_size above 1 ({files[-1].name}): such checkpoints cannot be loaded.")
    model = read_file(files[0], mmap=True)
    if not isinstance(model, dict) or not isinstance(model.get("module"), dict):
        raise CheckpointError(f"{files[0]} holds no weights (no 'module' entry): it is no checkpoint of GPT-NeoX's layout.")
    return StoredCheckpoint(path, 3 if zero3 else _zero_stage(path), int(model.get("dp_world_size", 1)), model)


def load_model_weights(path: Path | str) -> ModelWeights:
    """Reads the weights of a checkpoint for use without DeepSpeed. `path`: a checkpoint, or a directory of them (then the one `latest` names).

    Tensors are read from the file when they are used: copy them before the checkpoint may be deleted. Raises CheckpointError.
    """
    path = Path(path)
    if not layout.looks_like_checkpoint(path):
        path = find_checkpoint(path)
    stored = inspect_checkpoint(path)
    state_dict = _merge_zero3(stored) if stored.zero_stage == 3 else dict(stored.model["module"])
    return ModelWeights(state_dict, read_config(path), stored.client_state)


def read_config(path: Path) -> dict[str, Any]:
    """The resolved configuration inside a checkpoint; empty when it has none. Raises CheckpointError when unreadable."""
    file = path / layout.CONFIGS / layout.RESOLVED_CONFIG
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds a {type(config).__name__}, not the keys of a configuration.")
    return config


def _zero_stage(path: Path) -> int:
    files = layout.matching_files(path, layout.OPTIMIZER_FILE_PATTERN)
    if not files:
        return 0
    stage = read_file(files[0], mmap=True)["optimizer_state_dict"].get("zero_stage")
    values = getattr(stage, "values", [1])  # the stage is an enumeration of DeepSpeed's, read as a stand-in; its BF16 optimizer names none
    return int(values[0])


def _pipeline_model(path: Path) -> dict[str, Any]:
    """The content of a model file, put together from layer files (pipe_parallel_size 1 or more)."""
    module: dict[str, torch.Tensor] = {}
    for file in layout.matching_files(path, layout.LAYER_FILE_PATTERN):
        match = layout.LAYER_FILE_PATTERN.fullmatch(file.name)
        assert match is not None
        if int(match.group(2)) > 0:
            raise CheckpointError(f"{path} was saved with model_parallel_size above 1 ({file.name}): such checkpoints cannot be loaded.")
        module |= {f"sequential.{int(match.group(1))}.{name}": tensor for name, tensor in read_file(file, mmap=True).items()}
    heads = layout.matching_files(path, layout.MODEL_FILE_PATTERN)
    head = read_file(heads[0], mmap=True) if heads else {}
    return {**head, "module": module}


def _merge_zero3(stored: StoredCheckpoint) -> dict[str, torch.Tensor]:
    files = layout.matching_files(stored.path, layout.OPTIMIZER_FILE_PATTERN)
    if len(files) != stored.world_size:
        raise CheckpointError(
            f"{stored.path} was saved by {stored.world_size} processes but holds {len(files)} *_optim_states.pt files: some are missing."
        )
    parts = [torch.cat(_flat_groups(file)) for file in files]
    module, offset = stored.model["module"], 0
    merged = {name: module[name] for name in stored.model["buffer_names"]}
    for name, shape in ((name, shape) for group in stored.model["param_shapes"] for name, shape in group.items()):
        length = math.ceil(math.prod(shape) / stored.world_size)
        if offset + length > parts[0].numel():
            raise CheckpointError(f"{stored.path}: the optimizer files hold {parts[0].numel():,} elements a rank, too few for {name}.")
        merged[name] = torch.cat([part[offset : offset + length] for part in parts])[: math.prod(shape)].view(shape).to(module[name].dtype)
        offset += length
    if offset != parts[0].numel():
        raise CheckpointError(f"{stored.path}: the optimizer files hold {parts[0].numel():,} elements a rank, but the parameters take {offset:,}.")
    merged |= _merge_frozen(stored)
    merged |= {name: merged[source] for name, source in (stored.model.get("shared_params") or {}).items()}
    return merged


def _flat_groups(file: Path) -> list[torch.Tensor]:
    return [group.reshape(-1) for group in read_file(file, mmap=True)["optimizer_state_dict"]["fp32_flat_groups"]]


def _merge_frozen(stored: StoredCheckpoint) -> dict[str, torch.Tensor]:
    """Parameters that are not trained lie in parts in the model files of all ranks."""
    shapes: Mapping[str, Any] = stored.model.get("frozen_param_shapes") or {}
    if not shapes:
        return {}
    models = [read_file(file, mmap=True) for file in layout.matching_files(stored.path, layout.ZERO3_MODEL_FILE_PATTERN)]
    fragments = [model["frozen_param_fragments"] for model in models]
    return {name: torch.cat([parts[name].reshape(-1) for parts in fragments])[: math.prod(shape)].view(shape) for name, shape in shapes.items()}
