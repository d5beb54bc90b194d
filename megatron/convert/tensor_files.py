"""Hugging Face's files of weights: reading any of them by name, writing safetensors shard by shard."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.reading import read_file
from megatron.convert.errors import ConversionError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OLD_SINGLE, OLD_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class StoredTensors:
    """The weights of a directory of Hugging Face's by their names; files are opened when a weight of theirs is asked for, one at a time.

    Raises ConversionError for a directory without weights, a shard that is missing or cut short, and a name that is not there.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files = _files_by_name(directory)
        self._open: tuple[str, Callable[[str], Tensor]] | None = None

    @property
    def names(self) -> list[str]:
        """All of them."""
        return list(self._files)

    @property
    def index(self) -> dict[str, str]:
        """Each weight's file, relative to the directory."""
        return dict(self._files)

    @property
    def index_name(self) -> str | None:
        """What the index of several files is called. None: there is a single file, and no index."""
        return next((name for name in (INDEX, OLD_INDEX) if (self.directory / name).is_file()), None)

    def read(self, name: str) -> Tensor:
        """A weight as it is stored."""
        file = self._files.get(name)
        if file is None:
            raise ConversionError(f"{self.directory} holds no weight {name}.")
        if self._open is None or self._open[0] != file:
            self._open = None
            self._open = file, _opened(self.directory / file)
        try:
            return self._open[1](name)
        except (SafetensorError, KeyError) as error:
            raise ConversionError(f"{self.directory / file} is damaged: {name} is incomplete ({error}). Copy the file again.") from error


def _files_by_name(directory: Path) -> dict[str, str]:
    """Name of a weight -> the file it lies in."""
    for index in (INDEX, OLD_INDEX):
        if (directory / index).is_file():
            return _indexed(directory, directory / index)
    for single in (SINGLE, OLD_SINGLE):
        if (directory / single).is_file():
            return dict.fromkeys(_names_in(directory / single), single)
    raise ConversionError(f"{directory} holds no weights: there is no {SINGLE}, no {OLD_SINGLE} and no index of several files.")


def _indexed(directory: Path, index: Path) -> dict[str, str]:
    try:
        files = {str(name): str(file) for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{index} is damaged: it does not say which file holds which weight ({error}).") from error
    for file in sorted(set(files.values())):
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise ConversionError(f"{index} names {file}, which is outside the folder.")
        if not (directory / file).is_file():
            raise ConversionError(f"{directory / file} is missing: {index.name} names it.")
        _names_in(directory / file)
    return files


def _names_in(file: Path) -> list[str]:
    """The names in a file, which has to be whole."""
    if file.suffix == ".bin":
        return list(_read_old(file))
    try:
        with safe_open(file, "pt") as content:
            return list(content.keys())
    except PermissionError as error:
        raise ConversionError(f"{file} cannot be read: {error.strerror or error}.") from error
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{file} is damaged: {error}. Copy it again.") from error


def _opened(file: Path) -> Callable[[str], Tensor]:
    if file.suffix == ".bin":
        return _read_old(file).__getitem__
    read: Callable[[str], Tensor] = safe_open(file, "pt").get_tensor
    return read


def _read_old(file: Path) -> Mapping[str, Tensor]:
    try:
        content = read_file(file, mmap=True)
    except CheckpointError as error:
        raise ConversionError(str(error)) from error
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise ConversionError(f"{file} does not hold a dictionary of weights.")
    return content


class ShardWriter:
    """Writes weights into `directory` as they come, a file whenever `shard_bytes` are together, and an index where there are several."""

    def __init__(self, directory: Path, shard_bytes: int) -> None:
        self.directory, self.shard_bytes = directory, shard_bytes
        self.total_bytes = self.parameters = 0
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes a copy of a weight."""
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        if self._waiting and self._waiting_bytes + tensor.nbytes > self.shard_bytes:
            self._write()
        self._waiting[name] = tensor
        self._waiting_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes
        self.parameters += tensor.numel()

    def close(self) -> None:
        """Writes what is left and the index, under Hugging Face's names."""
        self._write()
        count = len(self._shards)
        names = [SINGLE] if count == 1 else [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
        for number, name in enumerate(names):
            self._part(number).rename(self.directory / name)
        if count > 1:
            places = {weight: name for name, weights in zip(names, self._shards, strict=True) for weight in weights}
            index: dict[str, Any] = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(places.items()))}
            (self.directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _write(self) -> None:
        part = self._part(len(self._shards))
        part.touch()  # as readable as any new file; the library's own are for their owner alone
        mode = part.stat().st_mode
        save_file(self._waiting, part, metadata={"format": "pt"})
        part.chmod(mode)
        self._shards.append(list(self._waiting))
        self._waiting, self._waiting_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self.directory / f"part-{number:05d}.safetensors"
