"""One file with one aligned record for each unit, or an index: JSON that says where the units lie in other files.

    bytes 0 to 7        NEOXPACK
    bytes 8 to 15       length of the header, little-endian
    header              JSON: format, granularity, layers -> units, parts (name, number format, shape), first offset, stride, checksums (CRC-32)
    from 4096 on        a record for each unit, layer by layer, each at a multiple of 4096 bytes; in it the parts one after the other, each at a
                        multiple of 64 bytes
The file is written beside its place and renamed when it is whole, so that a file under its name is never half of one. Written again after it was
interrupted, it goes on after the last whole layer.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.checkpoint.expert_places import LayerPlaces, Place
from megatron.config.disk import explained
from megatron.inference.offload.errors import OffloadError
from megatron.inference.offload.files import BLOCK
from megatron.inference.offload.store import Key, files_of, memory_of
from megatron.inference.offload.units import LayerUnits

INDEX = "places of experts, version 1"

MAGIC, FORMAT, ALIGNMENT = b"NEOXPACK", 1, 64
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Part(NamedTuple):
    """One parameter's part of a record."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """From the beginning of the record."""


class PackedLayer(NamedTuple):
    """The records of one layer."""

    layer: int
    prefix: str
    units: int
    parts: tuple[Part, ...]
    begin: int
    stride: int


def outline(units: Mapping[int, LayerUnits], dtype: torch.dtype) -> list[PackedLayer]:
    """Where everything goes, in one number format."""
    layers, place = list[PackedLayer](), 0
    for number, each in sorted(units.items()):
        parts, offset = list[Part](), 0
        for name, shape in zip(each.names, each.shapes, strict=True):
            parts.append(Part(name, str(dtype).removeprefix("torch."), shape, offset))
            length = math.prod(shape) * dtype.itemsize
            offset += -(-length // ALIGNMENT) * ALIGNMENT
        stride = -(-offset // BLOCK) * BLOCK
        layers.append(PackedLayer(number, each.prefix, each.units, tuple(parts), place, stride))
        place += stride * each.units
    return layers


def write_packed(path: Path, layers: list[PackedLayer], read: Callable[[str], Tensor], *, of: int) -> Path:
    """Writes the records. `read` gives a whole parameter by its name in the checkpoint; `of` is the checkpoint's `fingerprint`. Raises
    OffloadError."""
    partial, done = path.with_name(path.name + ".partial"), path.with_name(path.name + ".progress")
    checksums: dict[str, list[int]] = {}
    signature = json.dumps([layers, of])
    try:
        if partial.exists() and done.exists():
            known = json.loads(done.read_text())
            checksums = known["checksums"] if known.get("layers") == signature else {}
        length = header_length(layers)
        with partial.open("r+b" if checksums else "wb") as file:
            for layer in layers:
                if str(layer.layer) in checksums:
                    continue
                checksums[str(layer.layer)] = _write_layer(file, length, layer, {part.name: read(layer.prefix + part.name) for part in layer.parts})
                file.flush()
                os.fsync(file.fileno())
                done.write_text(json.dumps({"layers": signature, "checksums": checksums}))
            file.truncate(length + sum(layer.stride * layer.units for layer in layers))
            file.seek(0)
            file.write(header(layers, checksums, length, of=of))
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        done.unlink(missing_ok=True)
    except OSError as error:
        raise OffloadError(f"{path} cannot be written: {explained(error, path)}.") from error
    return path


def _write_layer(file: Any, begin: int, layer: PackedLayer, weights: Mapping[str, Tensor]) -> list[int]:
    """Writes one layer; the checksum of each record."""
    sums = []
    parts = {part.name: weights[part.name].chunk(layer.units) for part in layer.parts}
    for unit in range(layer.units):
        total = 0
        for part in layer.parts:
            view = memory_of(parts[part.name][unit].to(DTYPES[part.dtype]).contiguous())
            file.seek(begin + layer.begin + unit * layer.stride + part.offset)
            file.write(view)
            total = zlib.crc32(view, total)
        sums.append(total)
    return sums


def header_length(layers: list[PackedLayer]) -> int:
    """Bytes before the first record: enough for checksums of the largest length."""
    longest = {str(layer.layer): [2**32 - 1] * layer.units for layer in layers}
    return -(-(16 + len(_json(layers, longest, 2**32 - 1))) // BLOCK) * BLOCK


def header(layers: list[PackedLayer], checksums: Mapping[str, list[int]], length: int, *, of: int) -> bytes:
    """The first `length` bytes."""
    text = _json(layers, checksums, of)
    return (MAGIC + len(text).to_bytes(8, "little") + text).ljust(length, b"\0")


def _json(layers: list[PackedLayer], checksums: Mapping[str, list[int]], of: int) -> bytes:
    entries = [{**layer._asdict(), "parts": [part._asdict() for part in layer.parts], "checksums": checksums[str(layer.layer)]} for layer in layers]
    return json.dumps({"format": FORMAT, "of": of, "layers": entries}).encode()


def write_index(path: Path, places: Mapping[int, LayerPlaces], *, of: int) -> Path:
    """Writes where experts lie in other files, as JSON, and what files these are. Raises OffloadError."""
    layers = {
        str(layer): [
            {name: {**place._asdict(), "file": str(place.file), "dtype": str(place.dtype).removeprefix("torch.")} for name, place in record.items()}
            for record in records
        ]
        for layer, records in places.items()
    }
    files = {str(file): _state_of(file) for file in files_of(places)}
    try:
        path.write_text(json.dumps({"format": INDEX, "of": of, "files": files, "layers": layers}) + "\n")
    except OSError as error:
        raise OffloadError(f"{path} cannot be written: {explained(error, path)}.") from error
    return path


def _state_of(file: Path) -> list[int]:
    """What changes with a file."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


class Opened(NamedTuple):
    """What a store's file says."""

    places: dict[int, LayerPlaces]
    checksums: dict[Key, int]
    """None are there in an index."""
    of: int
    """Fingerprint of the checkpoint that it was written from."""


def _read_index(path: Path) -> Opened | None:
    """None: the file is no index."""
    try:
        with path.open("rb") as file:
            if file.read(1) != b"{":
                return None
        content = json.loads(path.read_text())
        if content["format"] != INDEX:
            return None
        for file, state in content["files"].items():
            if _state_of(Path(file)) != state:
                raise OffloadError(f"{path} says where experts lie in {file}, which has changed since. Write {path.name} again.")
        places: dict[int, LayerPlaces] = {int(layer): [_indexed(record) for record in records] for layer, records in content["layers"].items()}
        return Opened(places, {}, content["of"])
    except OffloadError:
        raise
    except OSError as error:
        raise OffloadError(f"expert_offload.store: {path} cannot be read: {explained(error, path)}.") from error
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _indexed(record: Mapping[str, Any]) -> dict[str, Place]:
    return {
        name: Place(Path(part["file"]), part["offset"], DTYPES[part["dtype"]], tuple(part["shape"]), part["transposed"])
        for name, part in record.items()
    }


def open_store(path: Path, units: Mapping[int, LayerUnits]) -> Opened:
    """The records that the model's layers need, of a packed file or an index. Raises OffloadError."""
    indexed = _read_index(path)
    if indexed is None:
        return _open_packed(path, units)
    for number, each in units.items():
        records = indexed.places.get(number, ())
        _check_layer(path, each, len(records), list(records[0]) if records else [])
    return indexed


def _check_layer(path: Path, each: LayerUnits, units: int, names: list[str]) -> None:
    if units != each.units or sorted(names) != sorted(each.names):
        held = f"{units} units with {', '.join(sorted(names))}" if units else "nothing"
        raise OffloadError(
            f"{path} holds {held} for layer {each.layer}, and the model has {each.units} with {', '.join(sorted(each.names))}. Write the file again "
            "from this model's checkpoint with tools/ckpts/pack_experts.py, with the same granularity."
        )


def _open_packed(path: Path, units: Mapping[int, LayerUnits]) -> Opened:
    entries, begin, of = _read_header(path)
    places: dict[int, LayerPlaces] = {}
    checksums: dict[Key, int] = {}
    for number, each in units.items():
        entry = entries.get(number, {"units": 0, "parts": []})
        _check_layer(path, each, entry["units"], [part["name"] for part in entry["parts"]])
        first = begin + entry["begin"]
        places[number] = [
            {part["name"]: _place(path, part, first + unit * entry["stride"]) for part in entry["parts"]} for unit in range(entry["units"])
        ]
        checksums |= {(number, unit): total for unit, total in enumerate(entry["checksums"])}
    return Opened(places, checksums, of)


def _place(path: Path, part: Mapping[str, Any], record: int) -> Place:
    return Place(path, record + part["offset"], DTYPES[part["dtype"]], tuple(part["shape"]))


def _read_header(path: Path) -> tuple[dict[int, dict[str, Any]], int, int]:
    """(layer -> its entry, where the records begin, the checkpoint's fingerprint)."""
    try:
        with path.open("rb") as file:
            start = file.read(16)
            length = int.from_bytes(start[8:], "little")
            content: Any = json.loads(file.read(length)) if start[:8] == MAGIC and length < 2**31 else None
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise OffloadError(f"expert_offload.store: {path} cannot be read: {explained(error, path)}.") from error
    except ValueError:
        content = None
    try:
        entries, of = {entry["layer"]: entry for entry in content["layers"]}, int(content["of"])
        begin = header_length([_layer_of(entry) for entry in content["layers"]])
        known = content["format"] == FORMAT
    except (KeyError, TypeError, AttributeError):
        known = False
    if not known:
        raise OffloadError(f"expert_offload.store: {path} is not a file of tools/ckpts/pack_experts.py of this version. Write it again.")
    needed = begin + sum(entry["stride"] * entry["units"] for entry in content["layers"])
    if size < needed:
        raise OffloadError(f"expert_offload.store: {path} has {size:,} bytes of {needed:,}: it was cut short. Copy or write it again.")
    return entries, begin, of


def _layer_of(entry: Mapping[str, Any]) -> PackedLayer:
    parts = tuple(Part(part["name"], part["dtype"], tuple(part["shape"]), part["offset"]) for part in entry["parts"])
    return PackedLayer(entry["layer"], entry["prefix"], entry["units"], parts, entry["begin"], entry["stride"])
