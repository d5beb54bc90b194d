"""The experts of a Hugging Face model where they lie in its safetensors files, and as our weights, through the architecture's table.

Shapes: E experts; F expert width; D model width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.checkpoint.expert_places import LayerPlaces, Place, Wanted
from megatron.config import NeoXConfig, config_from_dict
from megatron.convert.architecture import Source
from megatron.convert.errors import ConversionError
from megatron.convert.from_huggingface import AUTO, Import, Theirs, open_theirs, precision_of
from megatron.convert.layouts import Arranged
from megatron.convert.mapping import Entry, PerExpert, Reshaped, Same, to_ours
from megatron.convert.tensor_files import StoredTensors

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@dataclass(frozen=True)
class TheirModel:
    """A folder of Hugging Face's with its table."""

    theirs: Theirs
    source: Source
    table: Mapping[str, Entry]
    """By the names of our weights."""
    arranged: Arranged

    @property
    def config(self) -> NeoXConfig:
        """The configuration of ours that computes the same."""
        return self.source.config

    def read(self, name: str) -> Tensor:
        """One of our weights. Raises ConversionError."""
        if name not in self.table:
            raise ConversionError(f"{self.theirs.stored.directory}: the architecture {self.theirs.architecture.name} has no {name}.")
        return next(iter(to_ours([self.table[name]], self.arranged.read))).tensor

    def places(self, wanted: Mapping[int, Wanted]) -> dict[int, LayerPlaces]:
        """The records of every layer in its files. Raises ConversionError for weights that are not stored expert by expert."""
        heads = _Heads(self.theirs.stored)
        found: dict[int, LayerPlaces] = {}
        for layer, want in wanted.items():
            columns = {name: self._column(heads, want.prefix + name, want.units) for name in want.names}
            found[layer] = [{name: parts[unit] for name, parts in columns.items()} for unit in range(want.units)]
        return found

    def _column(self, heads: _Heads, name: str, units: int) -> list[Place]:
        entry = self.table.get(name)
        if entry is not None and isinstance(entry.form, Same | Reshaped):
            whole = heads.place(self.arranged.place_of(entry.theirs[0]).stored)
            return _rows(whole._replace(shape=entry.form.ours) if isinstance(entry.form, Reshaped) else whole, units)
        if entry is None or not isinstance(entry.form, PerExpert) or len(entry.theirs) != units:
            raise ConversionError(f"{self.theirs.stored.directory}: {name} is not stored expert by expert. Pack the experts without --index.")
        return [self._part(heads, theirs, transposed=entry.form.transposed) for theirs in entry.theirs]

    def _part(self, heads: _Heads, name: str, *, transposed: bool) -> Place:
        stored, role, expert = self.arranged.place_of(name)
        whole = heads.place(stored)
        if role is None:
            return whole._replace(transposed=transposed)
        rows, columns = whole.shape[-2:]
        half = rows // 2 if role in ("gate", "up") else rows
        begin = expert * rows + (half if role == "up" else 0)
        return Place(whole.file, whole.offset + begin * columns * whole.dtype.itemsize, whole.dtype, (half, columns), transposed)


def open_their_model(directory: Path) -> TheirModel:
    """Raises ConversionError for a folder that no table reads."""
    theirs = open_theirs(directory)
    precision = precision_of(Import(directory, directory, precision=AUTO), theirs.settings)
    config = config_from_dict({**theirs.keys(), "precision": precision, "make_vocab_size_divisible_by": 1})
    source = Source(config, theirs.settings["vocab_size"])
    table = list(theirs.architecture.table(source))
    named = {entry.ours: entry for entry in table if entry.ours is not None}
    return TheirModel(theirs, source, named, Arranged(theirs.stored, table, source))


def _rows(whole: Place, units: int) -> list[Place]:
    """The parts of a matrix whose rows lie unit by unit, as in our own exports."""
    part = whole._replace(shape=(whole.shape[0] // units, *whole.shape[1:]))
    return [part._replace(offset=whole.offset + unit * part.length) for unit in range(units)]


class _Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    begin: int


class _Heads:
    """The headers of safetensors files: 8 bytes for their length, JSON, then the numbers."""

    def __init__(self, stored: StoredTensors) -> None:
        self._directory, self._files = stored.directory, stored.index
        self._read: dict[str, dict[str, _Tensor]] = {}

    def place(self, name: str) -> Place:
        """Where a tensor lies."""
        file = self._files[name]
        path = self._directory / file
        if path.suffix != ".safetensors":
            raise ConversionError(f"{path} is no safetensors file, so its experts cannot be read one by one. Pack them without --index.")
        if file not in self._read:
            self._read[file] = _header(path)
        tensor = self._read[file][name]
        if tensor.dtype not in DTYPES:
            raise ConversionError(f"{path}: {name} has the number format {tensor.dtype}; known are {', '.join(DTYPES)}.")
        return Place(path.resolve(), tensor.begin, DTYPES[tensor.dtype], tensor.shape)


def _header(path: Path) -> dict[str, _Tensor]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        content: dict[str, Any] = json.loads(file.read(length))
    return {
        name: _Tensor(entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in content.items()
        if name != "__metadata__"
    }
