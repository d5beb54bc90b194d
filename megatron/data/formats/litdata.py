"""litdata (Lightning): a folder with `index.json` and chunks. Chunk: u32 items, u32 [items + 1] byte offsets, then the items.

With the TokensLoader an item is one document's tokens and nothing else, and its borders are kept, although litdata's reader does not use them.
With the default loader (PyTreeLoader) an item begins with the u32 byte sizes of its leaves. The layout is read here: litdata needs torch, boto3 and
a reader process for the same bytes. Chunks that it compresses inside, encrypts or writes as Arrow are refused.

Facts: litdata 0.2.76, litdata/streaming/writer.py, item_loader.py, serializers.py and constants.py.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.formats.mds import choose_column
from megatron.data.formats.source import Documents, ReadOptions, files_for, gathered
from megatron.data.indexed import DatasetError
from megatron.data.input.compression import zstandard_for

INDEX = "index.json"
TORCH_TYPES = {11: "u1", 12: "i1", 13: "<i2", 14: "<i2", 15: "<i4", 16: "<i4", 17: "<i8", 18: "<i8", 20: "<u2"}
NUMPY_TYPES = dict(enumerate(("i1", "<i2", "<i4", "<i8", "u1", "<u2", "<u4", "<u8")))
KINDS = {"no_header_tensor": TORCH_TYPES, "no_header_numpy": NUMPY_TYPES}
BY_LOADER = {"TokensLoader": False, "PyTreeLoader": True}


@dataclass(frozen=True)
class Layout:
    """`leaves`: the number of leaves of an item whose byte sizes it begins with; 0: the item is one leaf. `leaf`: the one with the tokens."""

    dtype: np.dtype[Any]
    leaves: int
    leaf: int
    packed: bool


class LitdataSource:
    """A TokenSource: each item is a document."""

    has_borders = True
    has_loss = False

    def __init__(self, inputs: Sequence[str], options: ReadOptions) -> None:
        indexes = files_for([f"{text}/{INDEX}" if (Path(text) / INDEX).is_file() else text for text in inputs], INDEX, "the folder of an index.json")
        self._chunks: list[tuple[Path, int, Layout]] = []
        self.tokens = 0
        for path in indexes:
            chunks, layout = read_index(path, options)
            self._chunks += [(check_chunk(path.parent / chunk["filename"], chunk, layout), chunk["chunk_size"], layout) for chunk in chunks]
            self.tokens += sum(chunk.get("dim") or 0 for chunk in chunks)
        self.notes: Sequence[str] = ()

    def batches(self) -> Iterator[Documents]:
        for path, items, layout in self._chunks:
            yield from gathered(documents(path, items, layout))


def read_index(path: Path, options: ReadOptions) -> tuple[list[dict[str, Any]], Layout]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        chunks, config = index["chunks"], index["config"]
        loader, forms = config["item_loader"], config["data_format"]
    except (ValueError, KeyError, TypeError):
        raise DatasetError(f"{path} is not an index of litdata: it has no `chunks` and `config`") from None
    compression, inside = config.get("compression"), config.get("compression_level")
    refused = (
        "encrypted" if config.get("encryption")
        else f"compressed inside their chunks (compression_level {inside})" if compression and inside in ("batch", "sample")
        else f"compressed with {compression}" if compression and not str(compression).startswith("zstd")
        else f"written for the {loader}" if loader not in BY_LOADER
        else "stored as Arrow rows" if config.get("ipc_compression")
        else None
    )  # fmt: skip
    if refused is not None:
        raise DatasetError(
            f"{path}: the items are {refused}, which only litdata itself reads. Write them again by litdata.optimize with "
            "item_loader=TokensLoader() and without compression"
        )
    leaf = choose_column(path, leaf_names(config, len(forms)), options.column)
    kind, _, code = forms[leaf].partition(":")
    if kind not in KINDS or int(code or -1) not in KINDS[kind]:
        raise DatasetError(
            f"{path}: the items are stored as {forms[leaf]!r}; token ids are read from one-dimensional tensors or arrays of whole numbers "
            "(no_header_tensor, no_header_numpy). Choose another part of the item with --column"
        )
    dtype = np.dtype(KINDS[kind][int(code)])
    return chunks, Layout(dtype, len(forms) if BY_LOADER[loader] else 0, leaf, bool(compression))


def leaf_names(config: dict[str, Any], count: int) -> list[str]:
    """The keys of the items if they are dictionaries, else their places."""
    try:
        names = json.loads(json.loads(config["data_spec"])[1]["context"])
    except (ValueError, KeyError, TypeError, IndexError):
        names = None
    return (
        names
        if isinstance(names, list) and len(names) == count and all(isinstance(name, str) for name in names)
        else [str(place) for place in range(count)]
    )


def check_chunk(path: Path, chunk: dict[str, Any], layout: Layout) -> Path:
    if not path.is_file():
        raise DatasetError(f"no file {path}, which the index names; copy the whole folder")
    size = path.stat().st_size
    header = 4 * (chunk["chunk_size"] + 2)
    dim = chunk.get("dim")
    wanted = header + dim * layout.dtype.itemsize if not layout.packed and not layout.leaves and dim is not None else None
    if (wanted is not None and size != wanted) or (not layout.packed and size < header):
        raise DatasetError(f"{path} has {size:,} bytes, but the index describes {wanted or header:,}: a copy was cut short")
    return path


def documents(path: Path, items: int, layout: Layout) -> Iterator[tuple[str, np.ndarray]]:
    data = content(path, layout)
    head = np.frombuffer(data, "<u4", 1)[0] if len(data) >= 4 else -1
    if head != items or len(data) < 4 * (items + 2):
        raise DatasetError(f"{path} holds {head} items and not the {items:,} of the index: the two were not written together")
    offsets = np.frombuffer(data, "<u4", items + 1, 4).tolist()
    if offsets[-1] != len(data) or any(after < before for before, after in itertools.pairwise(offsets)):
        raise DatasetError(f"{path} is damaged: the byte offsets of its items do not fit its size ({len(data):,} bytes)")
    for number in range(items):
        item = data[offsets[number] : offsets[number + 1]]
        start, end = 0, len(item)
        if layout.leaves:
            sizes = np.frombuffer(item, "<u4", layout.leaves).tolist()
            start = 4 * layout.leaves + sum(sizes[: layout.leaf])
            end = start + sizes[layout.leaf]
        if end > len(item) or (end - start) % layout.dtype.itemsize:
            raise DatasetError(f"{path}, item {number}: {end - start} bytes are not a whole number of {layout.dtype} values: the chunk is damaged")
        yield f"{path}, item {number}", np.frombuffer(item[start:end], layout.dtype)


def content(path: Path, layout: Layout) -> memoryview:
    if not layout.packed:
        return memoryview(np.memmap(path, np.uint8, "r"))  # type: ignore[arg-type]
    zstandard = zstandard_for(str(path))
    try:
        data: bytes = zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())
    except zstandard.ZstdError as error:
        raise DatasetError(f"{path} is damaged: {error}") from None
    return memoryview(data)
