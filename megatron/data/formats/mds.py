"""MDS (mosaicml-streaming): a folder with `index.json` and shards, whole or compressed. A sample has typed columns; the tokens are one of them.

Shard: u32 samples, u32 [samples + 1] byte offsets, the shard's settings as JSON, then the samples: u32 sizes of the columns without fixed size, then
the columns. The layout is read here and not with the package, which pulls in cloud clients, torchvision and transformers.

Facts: mosaicml-streaming 0.13.0, streaming/base/format/mds/ (writer.py, encodings.py).
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.formats.source import INTEGERS, Documents, ReadOptions, files_for, gathered
from megatron.data.indexed import DatasetError
from megatron.data.input.compression import zstandard_for

USUAL_COLUMNS = ("tokens", "input_ids", "token_ids")
VALUE_TYPES = {8: "u1", 9: "i1", 16: "<u2", 17: "<i2", 32: "<u4", 33: "<i4", 64: "<u8", 65: "<i8"}
SHAPE_TYPES = ("u1", "<u2", "<u4", "<u8")
INDEX = "index.json"

Decode = Callable[[memoryview], np.ndarray]


class MdsSource:
    """A TokenSource: each sample is a document."""

    has_borders = True
    has_loss = False

    def __init__(self, inputs: Sequence[str], options: ReadOptions) -> None:
        indexes = files_for([f"{text}/{INDEX}" if (Path(text) / INDEX).is_file() else text for text in inputs], INDEX, "the folder of an index.json")
        self._shards = [Shard(path.parent, shard, options) for path in indexes for shard in shards_of(path)]
        self.tokens = 0  # not in the index
        self.notes: Sequence[str] = ()

    def batches(self) -> Iterator[Documents]:
        for shard in self._shards:
            yield from gathered(shard.documents())


def shards_of(path: Path) -> list[dict[str, Any]]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        shards: list[dict[str, Any]] = index["shards"]
        other = next((shard["format"] for shard in shards if shard["format"] != "mds"), None)
    except (ValueError, KeyError, TypeError):
        raise DatasetError(f"{path} is not an index of MDS: it has no list `shards`") from None
    if other is not None:
        raise DatasetError(f"{path} describes shards of the format {other}; only mds is read here")
    return shards


class Shard:
    """One file of samples. Its size is checked when it is opened."""

    def __init__(self, folder: Path, facts: dict[str, Any], options: ReadOptions) -> None:
        self._facts = facts
        self.raw = folder / facts["raw_data"]["basename"]
        packed: dict[str, Any] = facts.get("zip_data") or {}
        self.path = self.raw if self.raw.is_file() or not packed else folder / packed["basename"]
        if not self.path.is_file():
            raise DatasetError(f"no file {self.path}, which the index names; copy the whole folder")
        wanted = (facts["raw_data"] if self.path == self.raw else packed)["bytes"]
        if self.path.stat().st_size != wanted:
            raise DatasetError(f"{self.path} has {self.path.stat().st_size:,} bytes, but the index says {wanted:,}: a copy was cut short")
        self._column = choose_column(self.path, facts["column_names"], options.column)
        self._decode = decoder(self.path, facts["column_encodings"][self._column], options)

    def documents(self) -> Iterator[tuple[str, np.ndarray]]:
        data = self._content()
        count = self._facts["samples"]
        if np.frombuffer(data, "<u4", 1)[0] != count:
            raise DatasetError(f"{self.path} has another number of samples than the index says ({count:,}): the two were not written together")
        offsets = np.frombuffer(data, "<u4", count + 1, 4).tolist()
        if offsets[-1] != len(data) or any(after < before for before, after in itertools.pairwise(offsets)):
            raise DatasetError(f"{self.path} is damaged: the byte offsets of its samples do not fit its size")
        for number in range(count):
            yield f"{self.path}, sample {number}", self._decode(self._value(data[offsets[number] : offsets[number + 1]]))

    def _value(self, sample: memoryview) -> memoryview:
        """The bytes of the column."""
        fixed = self._facts["column_sizes"]
        varied = np.frombuffer(sample, "<u4", sum(size is None for size in fixed)).tolist()
        start, sizes = 4 * len(varied), iter(varied)
        for column, size in enumerate(fixed):
            length = next(sizes) if size is None else size
            if column == self._column:
                return sample[start : start + length]
            start += length
        raise AssertionError(self._column)

    def _content(self) -> memoryview:
        if self.path == self.raw:
            return memoryview(np.memmap(self.path, np.uint8, "r"))  # type: ignore[arg-type]
        kind = str(self._facts["compression"]).partition(":")[0]
        packed = self.path.read_bytes()
        check_hashes(self.path, packed, self._facts["zip_data"].get("hashes") or {})
        size = self._facts["raw_data"]["bytes"]
        try:
            content = unpacked(kind, packed, size, self.path)
        except DatasetError:
            raise
        except Exception as error:  # each library raises its own
            raise DatasetError(f"{self.path} is damaged: {error}") from None
        if len(content) != size:
            raise DatasetError(f"{self.path} unpacks to {len(content):,} bytes, but the index says {size:,}: it is damaged")
        return memoryview(content)


def unpacked(kind: str, packed: bytes, size: int, path: Path) -> bytes:
    if kind == "zstd":
        content: bytes = zstandard_for(str(path)).ZstdDecompressor().decompress(packed, max_output_size=size)
        return content
    if kind in ("gz", "bz2"):
        return gzip.decompress(packed) if kind == "gz" else bz2.decompress(packed)
    raise DatasetError(f"{path} is compressed with {kind}; zstd, gz and bz2 are read here. Unpack the shards with mosaicml-streaming first")


def check_hashes(path: Path, data: bytes, hashes: dict[str, str]) -> None:
    """Compares those that Python can compute."""
    for name, wanted in hashes.items():
        if name in hashlib.algorithms_available and hashlib.new(name, data, usedforsecurity=False).hexdigest() != wanted:
            raise DatasetError(f"{path} is damaged: its {name} is not the one in the index")


def choose_column(path: Path, names: Sequence[str], wanted: str | None) -> int:
    usual = [name for name in USUAL_COLUMNS if name in names]
    name = wanted if wanted is not None else names[0] if len(names) == 1 else usual[0] if usual else None
    if name is None or name not in names:
        what = f"no column {wanted!r}" if wanted is not None else "several columns"
        raise DatasetError(f"{path}: {what}; the columns are: {', '.join(names)} (choose the one with the tokens by --column)")
    return list(names).index(name)


def decoder(path: Path, encoding: str, options: ReadOptions) -> Decode:
    """Turns a column's bytes into numbers. Raises DatasetError for columns that do not hold token ids."""
    kind, _, rest = encoding.partition(":")
    dtype, _, shape = rest.partition(":")
    if kind == "bytes":
        if options.dtype is None:
            raise DatasetError(f"{path}: the tokens are stored as plain bytes. Give their type with --dtype (llm-foundry wrote int64)")
        return plain(path, options.dtype)
    if kind != "ndarray":
        raise DatasetError(
            f"{path}: the column has the encoding {encoding!r}; token ids are read from ndarray and bytes. Choose a column with --column"
        )
    if dtype and dtype not in INTEGERS:
        raise DatasetError(f"{path}: the column holds {dtype} numbers and not token ids; choose another one with --column")
    if shape:
        return plain(path, np.dtype(dtype).newbyteorder("<"))
    return with_shape(path, np.dtype(dtype).newbyteorder("<") if dtype else None)


def plain(path: Path, dtype: np.dtype[Any]) -> Decode:
    def decode(data: memoryview) -> np.ndarray:
        if len(data) % dtype.itemsize:
            raise DatasetError(f"{path}: a sample has {len(data)} bytes, which is not a whole number of {dtype} values; give the right --dtype")
        return np.frombuffer(data, dtype)

    return decode


def with_shape(path: Path, dtype: np.dtype[Any] | None) -> Decode:
    """Arrays that say their shape, and their type if `dtype` is None."""

    def decode(data: memoryview) -> np.ndarray:
        start, of = 0, dtype
        if of is None:
            if data[0] not in VALUE_TYPES:
                raise DatasetError(f"{path}: a sample holds values of type code {data[0]} and not token ids; choose another column with --column")
            start, of = 1, np.dtype(VALUE_TYPES[data[0]])
        dimensions, of_shape = data[start] >> 2, np.dtype(SHAPE_TYPES[data[start] % 4])
        shape = np.frombuffer(data, of_shape, dimensions, start + 1)
        return np.frombuffer(data, of, int(shape.prod(dtype=np.int64)), start + 1 + dimensions * of_shape.itemsize)

    return decode
