"""Which tokens make sample i: NeoX's packed sample index (documents shuffled over all epochs, cut every seq_length tokens).

Shapes: N documents of the data file, P positions = documents x epochs, R rows = samples + 1
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron.data.cache import cache_key, find, publish
from megatron.data.indexed import DatasetError, IndexedDataset

logger = logging.getLogger(__name__)
ALGORITHM = "packed-1"  # part of every cache key: change it whenever the order changes


class IndexMaps(NamedTuple):
    """Sample i runs from row s = shuffle_index[i] of sample_index to row s + 1, both tokens included (seq_length + 1 tokens)."""

    document_index: np.ndarray  # int32 [P]: document at each position of the shuffled order
    sample_index: np.ndarray  # int32|int64 [R, 2]: (position in document_index, token offset in that document)
    shuffle_index: np.ndarray  # uint32|int64 [R - 1]


def build_index_maps(sizes_N: np.ndarray, documents: np.ndarray, *, seq_length: int, num_samples: int, seed: int) -> IndexMaps:
    """NeoX section 5.2, vectorised: E epochs, the fewest that give `num_samples`, documents shuffled over all of them together.

    Raises DatasetError when `documents` hold fewer than seq_length + 1 tokens.
    """
    documents = np.asarray(documents, dtype=np.int32)
    tokens = int(sizes_N[documents].sum(dtype=np.int64))
    if tokens <= seq_length:
        raise DatasetError(
            f"{len(documents):,} documents with {tokens:,} tokens in all are less than one sample of seq_length + 1 = {seq_length + 1:,} tokens"
        )
    epochs = max(1, -(-(num_samples * seq_length + 1) // tokens))
    rng = np.random.RandomState(seed)
    document_index = np.tile(documents, epochs)
    rng.shuffle(document_index)
    sample_index = cut_samples(sizes_N[document_index], seq_length, (epochs * tokens - 1) // seq_length + 1)
    count = len(sample_index) - 1
    shuffle_index = np.arange(count, dtype=np.uint32 if count < np.iinfo(np.uint32).max - 1 else np.int64)
    rng.shuffle(shuffle_index)
    return IndexMaps(document_index, sample_index, shuffle_index)


def cut_samples(sizes_P: np.ndarray, seq_length: int, rows: int) -> np.ndarray:
    """Row k = (position, offset) of token k * seq_length in the concatenation of documents of these sizes; empty documents hold no token."""
    ends_P = np.cumsum(sizes_P, dtype=np.int64)
    token_R = np.arange(rows, dtype=np.int64) * seq_length
    position_R = np.searchsorted(ends_P, token_R, side="right")
    position_R[0] = 0  # the walk starts at the first document even when that one is empty
    token_R -= ends_P[position_R]
    token_R += sizes_P[position_R]
    token_R[0] = 0
    small = max(len(sizes_P), rows) < np.iinfo(np.int32).max
    sample_index = np.empty((rows, 2), np.int32 if small else np.int64)
    sample_index[:, 0] = position_R
    sample_index[:, 1] = token_R
    return sample_index


def load_or_build(dataset: IndexedDataset, documents: range, *, seq_length: int, num_samples: int, seed: int) -> IndexMaps:
    """The maps for a contiguous range of documents, from the cache when they were built before from the same `.idx` and settings.

    Raises DatasetError when there are no documents or too few tokens.
    """
    if not documents:
        raise DatasetError(f"{dataset.prefix}: no documents to draw samples from (the file has {len(dataset):,})")
    facts: dict[str, Any] = {
        "algorithm": ALGORITHM,
        "index": dataset.index_hash,
        "documents": [documents.start, documents.stop],
        "seq_length": seq_length,
        "num_samples": num_samples,
        "seed": seed,
    }
    key = cache_key(dataset.prefix, facts)
    cached = find(dataset.prefix, key)
    maps = load(cached) if cached else None
    if maps is not None:
        return maps
    try:
        maps = build_index_maps(dataset.sizes, np.arange(documents.start, documents.stop), seq_length=seq_length, num_samples=num_samples, seed=seed)
    except DatasetError as error:
        raise DatasetError(f"{dataset.prefix}: {error}; use more text or a shorter seq_length") from None
    written = publish(dataset.prefix, key, lambda directory: save(maps, directory))
    return (load(written) if written else None) or maps


def save(maps: IndexMaps, directory: Path) -> None:
    for name, values in maps._asdict().items():
        with (directory / f"{name}.npy").open("wb") as file:
            np.save(file, values)
            file.flush()
            os.fsync(file.fileno())


def load(directory: Path) -> IndexMaps | None:
    """Mapped from `directory`; None, and the directory is removed, when a file in it is damaged."""
    try:
        maps = IndexMaps(*(np.load(directory / f"{name}.npy", mmap_mode="r") for name in IndexMaps._fields))
    except (OSError, ValueError) as error:
        logger.warning("%s is damaged (%s); building it again", directory, error)
        shutil.rmtree(directory, ignore_errors=True)
        return None
    return maps
