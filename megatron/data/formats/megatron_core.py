"""Megatron-Core's pairs `NAME.bin/.idx`: GPT-NeoX's layout, but a document may have several sequences, multimodal files have a mode (int8) for each
sequence at the end of the index, and the codes of float32 and float64 are exchanged (6 and 7).

Facts: megatron-core 0.16.1, megatron/core/datasets/indexed_dataset.py.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron.data.formats.source import BATCH_TOKENS, Documents, ReadOptions, files_for, mapped
from megatron.data.indexed import DTYPES, HEADER, MAGIC, VERSION, DatasetError, map_bytes

DOCUMENTS_AT_ONCE = 1 << 16
NAMES = "Megatron's .bin/.idx pairs (a folder, or the path of an .idx)"


class Pair(NamedTuple):
    path: Path
    tokens_T: np.ndarray
    sizes_N: np.ndarray
    boundaries: np.ndarray


class MegatronSource:
    """A TokenSource that keeps documents of several sequences."""

    has_borders = True
    has_loss = False

    def __init__(self, inputs: Sequence[str], options: ReadOptions) -> None:
        named = [f"{text}.idx" if Path(f"{text}.idx").is_file() else text for text in inputs]
        self._pairs = [open_pair(path) for path in files_for(named, "*.idx", NAMES)]
        self.tokens = sum(len(pair.tokens_T) for pair in self._pairs)
        self.notes: Sequence[str] = ()

    def batches(self) -> Iterator[Documents]:
        for pair in self._pairs:
            start = 0
            for document in range(0, len(pair.boundaries) - 1, DOCUMENTS_AT_ONCE):
                boundaries = pair.boundaries[document : document + DOCUMENTS_AT_ONCE + 1]
                sizes_N = pair.sizes_N[boundaries[0] : boundaries[-1]]
                tokens = int(sizes_N.sum(dtype=np.int64))
                yield from block(
                    f"{pair.path}, after document {document}", pair.tokens_T[start : start + tokens], sizes_N, boundaries - boundaries[0]
                )
                start += tokens


def block(origin: str, tokens_T: np.ndarray, sizes_N: np.ndarray, boundaries: np.ndarray) -> Iterator[Documents]:
    """Batches of the documents whose sequences have these sizes; `boundaries` as in the index, from 0."""
    ends_N = np.append(0, np.cumsum(sizes_N, dtype=np.int64))
    ends_D = ends_N[boundaries]  # in tokens
    first = 0
    while first < len(boundaries) - 1:
        after = max(int(np.searchsorted(ends_D, ends_D[first] + BATCH_TOKENS, side="right")) - 1, first + 1)
        items = slice(boundaries[first], boundaries[after])
        yield Documents(origin, tokens_T[ends_D[first] : ends_D[after]], sizes_N[items], boundaries[first + 1 : after + 1] - boundaries[first])
        first = after


def open_pair(index: Path) -> Pair:
    """Raises DatasetError if a file is missing, damaged, or holds images or numbers."""
    binary = index.with_suffix(".bin")
    if not binary.is_file():
        raise DatasetError(f"no file {binary} beside {index.name}; give {NAMES}")
    dtype, sizes_N, offsets_N, boundaries = read_index(index)
    if dtype.kind == "f":
        raise DatasetError(f"{index} says that {binary.name} holds {dtype} numbers and not token ids")
    tokens_T = mapped(binary, dtype)
    total = int(sizes_N.sum(dtype=np.int64))
    if total != len(tokens_T):
        raise DatasetError(
            f"{binary} has {len(tokens_T):,} tokens but {index.name} describes {total:,}: the two were not written together, or a copy was cut short"
        )
    if len(sizes_N) and (int(sizes_N.min()) < 0 or offsets_N[0] != 0 or (np.diff(offsets_N) != sizes_N[:-1].astype(np.int64) * dtype.itemsize).any()):
        raise DatasetError(f"{index} is damaged: its sizes and byte offsets contradict each other")
    if not len(boundaries) or boundaries[0] != 0 or boundaries[-1] != len(sizes_N) or (np.diff(boundaries) < 0).any():
        raise DatasetError(
            f"{index} has lost its document borders (Megatron's and GPT-NeoX's merge tools have dropped them). The pair can be trained on as it is: "
            "every sequence counts as a document"
        )
    return Pair(index, tokens_T, sizes_N, boundaries)


def read_index(path: Path) -> tuple[np.dtype[Any], np.ndarray, np.ndarray, np.ndarray]:
    """(type, sizes in tokens, byte offsets, document borders in sequences)."""
    index = map_bytes(path)
    try:
        magic, version, code, count, boundaries = HEADER.unpack(index[: HEADER.size].tobytes())
    except struct.error:
        raise DatasetError(f"{path} is cut short: it has {len(index)} bytes, and the header alone needs {HEADER.size}") from None
    if magic != MAGIC or version != VERSION or code not in DTYPES:
        raise DatasetError(
            f"{path} is not an index of Megatron-Core: it begins with {magic!r}, version {version}, type {code}; known: {MAGIC!r}, {VERSION}, "
            f"{', '.join(str(known) for known in DTYPES)}"
        )
    want = HEADER.size + 12 * count + 8 * boundaries
    if len(index) not in (want, want + count):
        raise DatasetError(f"{path} has {len(index):,} bytes, but {count:,} sequences and {boundaries:,} borders need {want:,}: copy it again")
    if len(index) > want and index[want:].any():
        raise DatasetError(f"{path} is a multimodal index: {np.count_nonzero(index[want:]):,} of its {count:,} sequences are no text (mode above 0)")
    arrays = [
        np.frombuffer(index, "<i4", count, HEADER.size),
        np.frombuffer(index, "<i8", count, HEADER.size + 4 * count),
        np.frombuffer(index, "<i8", boundaries, HEADER.size + 12 * count),
    ]
    return DTYPES[code], arrays[0], arrays[1], arrays[2]
