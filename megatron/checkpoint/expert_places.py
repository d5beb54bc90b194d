"""Where the parts of one expert (or LoRE) lie in files: a checkpoint of ours, an export in safetensors, a packed file. Nothing is read here.

A unit is what moves as a whole: an expert, or a LoRE. Its record has a part for each parameter of the layer's experts that divides by unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.checkpoint import layout
from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.names import logical_name, modern_names
from megatron.checkpoint.reading import read_file
from megatron.checkpoint.table import read_table


class Place(NamedTuple):
    """One matrix in a file."""

    file: Path
    offset: int
    """Bytes from the beginning of the file."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    """As it is stored."""
    transposed: bool = False
    """Whether the model has it turned."""

    @property
    def length(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


Record = Mapping[str, Place]
"""The parts of a unit by the name of the parameter, within the layer's experts module."""
LayerPlaces = Sequence[Record]
"""The records of a layer by unit."""


class Wanted(NamedTuple):
    """What is looked for in one layer."""

    prefix: str
    """Of the parameters' names in a checkpoint: `sequential.2.mlp.experts.`."""
    names: Sequence[str]
    units: int
    """Each parameter's rows divide by this."""


def places_in_checkpoint(path: Path, wanted: Mapping[int, Wanted]) -> dict[int, LayerPlaces]:
    """The records of every layer in the files of the checkpoint at `path`. Raises CheckpointError where its files hold no whole experts."""
    table = read_table(path)
    if table is not None and table.is_divided:
        raise CheckpointError(f"{path}: several processes share its experts, so no file holds a whole one. {PACK}")
    if layout.matching_files(path, layout.ZERO3_MODEL_FILE_PATTERN):
        raise CheckpointError(f"{path} was saved with ZeRO 3, which cuts every expert in parts. {PACK}")
    layered = bool(layout.matching_files(path, layout.LAYER_FILE_PATTERN))
    if layout.matching_files(path, layout.PART_FILE_PATTERN) or _is_foreign_division(path, layered=layered):
        raise CheckpointError(f"{path}: several processes share its experts, so no file holds a whole one. {PACK}")
    found: dict[int, LayerPlaces] = {}
    whole = None if layered else _outline(path / layout.model_file(0))
    for layer, want in wanted.items():
        number = want.prefix.split(".")[1]
        file = path / (layout.layer_file(int(number), 0) if layered else layout.model_file(0))
        weights = _outline(file, f"sequential.{number}.") if whole is None else whole
        found[layer] = _records(file, weights, want)
    return found


PACK = "Write its experts into one file with tools/ckpts/pack_experts.py, and name that file in expert_offload.store."


def _is_foreign_division(path: Path, *, layered: bool) -> bool:
    pattern = layout.LAYER_FILE_PATTERN if layered else layout.MODEL_FILE_PATTERN
    files = layout.matching_files(path, pattern)
    ranks = {int(match.groups()[-1]) for file in files if (match := pattern.fullmatch(file.name))}
    return len(ranks) > 1


def _outline(file: Path, prefix: str = "") -> Mapping[str, Tensor]:
    """The tensors of a file under today's names, without their numbers, each with the place of its storage in the file."""
    content = read_file(file, mmap=False, device="meta")
    weights = content["module"] if isinstance(content, dict) and isinstance(content.get("module"), dict) else content
    if not isinstance(weights, dict):
        raise CheckpointError(f"{file} does not hold a dictionary of weights.")
    return modern_names({prefix + logical_name(name): tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}).state


def _records(file: Path, weights: Mapping[str, Tensor], want: Wanted) -> LayerPlaces:
    columns = {name: _parts(file, want.prefix + name, weights, want.units) for name in want.names}
    return [{name: parts[unit] for name, parts in columns.items()} for unit in range(want.units)]


def _parts(file: Path, name: str, weights: Mapping[str, Tensor], units: int) -> list[Place]:
    """The parts of one parameter by unit."""
    tensor = weights.get(name)
    if tensor is None:
        raise CheckpointError(f"{file} holds no {name}. Load the checkpoint with the configuration of its training.")
    begin = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if begin is None or not tensor.is_contiguous() or tensor.shape[0] % units:
        raise CheckpointError(f"{file}: the rows of {name} {list(tensor.shape)} do not lie expert by expert ({units} units). {PACK}")
    shape = (tensor.shape[0] // units, *tensor.shape[1:])
    length = math.prod(shape) * tensor.dtype.itemsize
    first = int(begin) + tensor.storage_offset() * tensor.dtype.itemsize
    return [Place(file, first + unit * length, tensor.dtype, shape) for unit in range(units)]
