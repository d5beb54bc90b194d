"""The content of a checkpoint's directory: which files belong together, what they say about themselves, and whether all of them are there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint import layout
from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.manifest import read_manifest
from megatron.checkpoint.reading import read_file

MAX_LISTED = 4


@dataclass(frozen=True)
class StoredCheckpoint:
    """`head`: the first model file without its weights. `shards`: the weights of each tensor-parallel rank under NeoX's names, memory-mapped; under
    ZeRO 3 those of rank 0, whose parameters are empty. `is_layered`: they come from layer files.
    """

    path: Path
    head: dict[str, Any]
    shards: tuple[dict[str, torch.Tensor], ...]
    is_zero3: bool
    is_layered: bool

    @property
    def world_size(self) -> int:
        """Data-parallel processes that saved it."""
        return self.head.get("dp_world_size") or 1

    @property
    def client_state(self) -> dict[str, Any]:
        """Everything in the head that is not DeepSpeed's."""
        return client_state_of(self.path, self.head)

    @property
    def is_own(self) -> bool:
        """Whether this program wrote it."""
        return (self.path / layout.MANIFEST).exists() or layout.GQA_LAYOUT_KEY in self.head

    @property
    def model_files(self) -> list[Path]:
        """The files with what every process of the model has: more than one for tensor or pipeline parallelism."""
        return layout.matching_files(self.path, layout.MODEL_FILE_PATTERN)

    @property
    def optimizer_files(self) -> list[Path]:
        """The files with ZeRO's parts of the optimizer's state."""
        return layout.matching_files(self.path, layout.OPTIMIZER_FILE_PATTERN)

    @property
    def has_optimizer(self) -> bool:
        """Whether it holds an optimizer's state at all."""
        return bool(self.head.get("optimizer") or self.optimizer_files or layout.matching_files(self.path, layout.LAYER_OPTIMIZER_FILE_PATTERN))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter and buffer of rank 0 with its full shape, also under ZeRO 3."""
        module = {name: tuple(tensor.shape) for name, tensor in self.shards[0].items()}
        if not self.is_zero3:
            return module
        buffers = {name: module[name] for name in self.head["buffer_names"] if name in module}
        full = {
            name: tuple(shape)
            for shapes in [*self.head["param_shapes"], self.head.get("frozen_param_shapes") or {}]
            for name, shape in shapes.items()
        }
        shared = {name: full[source] for name, source in (self.head.get("shared_params") or {}).items()}
        return {**buffers, **full, **shared}


def client_state_of(path: Path, head: Mapping[str, Any]) -> dict[str, Any]:
    """What a model file holds beside what is DeepSpeed's. `iteration` is also found under its old name, `args` always is a dictionary. Raises
    CheckpointError for an iteration that is none."""
    state = {key: value for key, value in head.items() if key not in layout.DEEPSPEED_KEYS}
    if "total_iters" in state:
        state.setdefault("iteration", state["total_iters"])
    if "iteration" in state and not _is_count(state["iteration"]):
        raise CheckpointError(f"{path}: its iteration is {state['iteration']!r}, which is not a number of steps.")
    if "args" in state and not isinstance(state["args"], dict):
        state["args"] = dict(vars(state["args"])) if hasattr(state["args"], "__dict__") else {}
    return state


def inspect_checkpoint(path: Path) -> StoredCheckpoint:
    """Reads what `path` holds, tensors memory-mapped. Raises CheckpointError for missing and damaged files."""
    if layout.matching_files(path, layout.LAYER_FILE_PATTERN):
        return _layered(path)
    if zero3 := layout.matching_files(path, layout.ZERO3_MODEL_FILE_PATTERN):
        if any("mp_rank_00" not in file.name for file in zero3):
            raise CheckpointError(
                f"{path} was saved with ZeRO 3 and model_parallel_size above 1 ({zero3[-1].name}). This program cannot read such checkpoints."
            )
        model = _read_model(zero3[0])
        return StoredCheckpoint(path, _head(model), (model["module"],), is_zero3=True, is_layered=False)
    files = layout.matching_files(path, layout.MODEL_FILE_PATTERN)
    if not files:
        raise CheckpointError(f"{path} holds no model weights (no {layout.model_file(0)}).")
    models = [_read_model(file) for file in files]
    count = _tensor_parallel_size(models[0], default=max(len(files), models[0].get("mp_world_size") or 1))
    _check_all_there(path, [layout.model_file(rank) for rank in range(count)], {file.name for file in files}, count)
    return StoredCheckpoint(path, _head(models[0]), tuple(model["module"] for model in models[:count]), is_zero3=False, is_layered=False)


def check_known_layout(stored: StoredCheckpoint) -> None:
    """Raises CheckpointError for a checkpoint of a later version of this program whose weights are laid out in a way that this one does not know."""
    written = stored.head.get(layout.GQA_LAYOUT_KEY, layout.GQA_LAYOUT)
    if written != layout.GQA_LAYOUT:
        raise CheckpointError(
            f"{stored.path} has its query/key/value rows in the order {written!r}, but this version knows only {layout.GQA_LAYOUT!r}: load it with "
            "the version that wrote it."
        )


def _layered(path: Path) -> StoredCheckpoint:
    """The weights from layer files (pipe_parallel_size 1 or more), the head from the model file of the first process."""
    heads = layout.matching_files(path, layout.MODEL_FILE_PATTERN)
    head = read_file(heads[0], mmap=True) if heads else {}
    if not isinstance(head, dict):
        raise CheckpointError(f"{heads[0]} holds a {type(head).__name__}: it is not a checkpoint in GPT-NeoX's layout.")
    ranks_by_layer: dict[int, set[int]] = defaultdict(set)
    for file in layout.matching_files(path, layout.LAYER_FILE_PATTERN):
        layer, rank = _numbers(file)
        ranks_by_layer[layer].add(rank)
    count = _tensor_parallel_size(head, default=max(max(ranks) for ranks in ranks_by_layer.values()) + 1)
    layers = sorted({*ranks_by_layer, *_transformer_layers(head)})
    expected = [layout.layer_file(layer, rank) for layer in layers for rank in range(count)]
    _check_all_there(path, expected, {file.name for file in layout.matching_files(path, layout.LAYER_FILE_PATTERN)}, count)
    shards = tuple(_layers_of_rank(path, layers, rank) for rank in range(count))
    return StoredCheckpoint(path, _head(head), shards, is_zero3=False, is_layered=True)


def _layers_of_rank(path: Path, layers: list[int], rank: int) -> dict[str, torch.Tensor]:
    shard: dict[str, torch.Tensor] = {}
    for layer in layers:
        file = path / layout.layer_file(layer, rank)
        content = read_file(file, mmap=True)
        shard |= {f"sequential.{layer}.{name}": tensor for name, tensor in _weights(file, content).items()}
    return shard


def _read_model(file: Path) -> dict[str, Any]:
    model = read_file(file, mmap=True)
    if not isinstance(model, dict) or not isinstance(model.get("module"), dict):
        raise CheckpointError(f"{file} holds no weights (no 'module' entry): it is not a checkpoint in GPT-NeoX's layout.")
    return {**model, "module": _weights(file, model["module"])}


def _weights(file: Path, content: Any) -> dict[str, torch.Tensor]:
    """Tensors by name; Transformer Engine's entries without a tensor are left out."""
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{file} does not hold a dictionary of weights.")
    weights = {name: tensor for name, tensor in content.items() if not name.endswith("_extra_state")}
    if wrong := next((name for name, tensor in weights.items() if not isinstance(tensor, torch.Tensor)), None):
        raise CheckpointError(f"{file}: {wrong} is a {type(weights[wrong]).__name__}, not a tensor.")
    return weights


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _head(model: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in model.items() if key != "module"}


def _numbers(file: Path) -> tuple[int, int]:
    match = layout.LAYER_FILE_PATTERN.fullmatch(file.name)
    assert match is not None
    return int(match[1]), int(match[2])


def _tensor_parallel_size(model: Mapping[str, Any], *, default: int) -> int:
    """As NeoX's args say it, else `default`: DeepSpeed's own number also counts pipeline stages."""
    args = model.get("args")
    size = args.get("model_parallel_size") if isinstance(args, dict) else getattr(args, "model_parallel_size", None)
    return size if isinstance(size, int) and _is_count(size) and size else default


def _transformer_layers(head: Mapping[str, Any]) -> range:
    """The numbers of the transformer layers, as far as the args say how many there are: from 2 on, after the embedding and a change of shape."""
    args = head.get("args")
    layers = args.get("num_layers") if isinstance(args, dict) else getattr(args, "num_layers", None)
    return range(2, 2 + layers) if isinstance(layers, int) and _is_count(layers) else range(0)


def _check_all_there(path: Path, expected: list[str], present: set[str], count: int) -> None:
    missing = [name for name in expected if name not in present]
    if missing:
        more = f" and {len(missing) - MAX_LISTED} more" if len(missing) > MAX_LISTED else ""
        raise CheckpointError(
            f"{path} is incomplete: {', '.join(missing[:MAX_LISTED])}{more} missing. It was saved with model_parallel_size {count}: copy all of its "
            "files."
        )


def has_checksums(path: Path) -> bool:
    """Whether its files can be checked. Raises CheckpointError when the manifest is unreadable."""
    return read_manifest(path) is not None
