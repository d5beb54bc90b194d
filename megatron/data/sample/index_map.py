"""Which tokens make sample i: NeoX's index maps, the packed ones built here (documents shuffled over all epochs, cut every seq_length tokens).

Shapes: N documents of the data file, P positions = documents x epochs, R rows = samples + 1
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import psutil

from megatron.data.builders import builders
from megatron.data.indexed import DatasetError

BYTES_PER_POSITION, BYTES_PER_ROW = 16, 40  # what building takes at its peak


class IndexMaps(NamedTuple):
    """Sample i begins at row shuffle_index[i] of sample_index. Packed, it ends with the first token of the next row, seq_length + 1 tokens in all."""

    document_index: np.ndarray  # int32 [P]: document at each position of the shuffled order
    sample_index: np.ndarray  # int32|int64 [R, 2]: (position in document_index, token offset in that document)
    shuffle_index: np.ndarray  # uint32|int64 [R - 1]


def build_index_maps(sizes_N: np.ndarray, documents: np.ndarray, *, seq_length: int, num_samples: int | None, seed: int) -> IndexMaps:
    """The maps of E epochs, the fewest that give `num_samples` (None: one epoch). Documents are shuffled over all epochs together.

    Raises DatasetError if `documents` hold no tokens, if one epoch was asked for and holds fewer than seq_length + 1 tokens, or if the maps do not
    fit
    into the memory.
    """
    documents = np.asarray(documents, dtype=np.int32)
    tokens = int(sizes_N[documents].sum(dtype=np.int64))
    if not tokens or (num_samples is None and tokens <= seq_length):
        raise DatasetError(
            f"{len(documents):,} documents with {tokens:,} tokens in all are not enough for one sample of seq_length + 1 = {seq_length + 1:,} "
            "tokens; "
            "use more text or a shorter seq_length"
        )
    epochs = epochs_for(tokens, num_samples, seq_length)
    rows = (epochs * tokens - 1) // seq_length + 1
    check_memory(rows - 1, positions=len(documents) * epochs, rows=rows)
    rng = np.random.RandomState(seed)
    document_index = np.tile(documents, epochs)
    rng.shuffle(document_index)
    sample_index = builders().cut_samples(sizes_N, document_index, seq_length, rows)
    return IndexMaps(document_index, sample_index, shuffled_range(rows - 1, rng))


def epochs_for(tokens: int, num_samples: int | None, seq_length: int) -> int:
    """The fewest epochs of that many tokens that give `num_samples`, as in NeoX; 1 where None are asked for."""
    return 1 if num_samples is None else max(1, -(-(num_samples * seq_length + 1) // tokens))


def shuffled_range(count: int, rng: np.random.RandomState) -> np.ndarray:
    """0..count - 1 in random order; uint32 as long as it can hold them, as in NeoX."""
    values = np.arange(count, dtype=np.uint32 if count < np.iinfo(np.uint32).max - 1 else np.int64)
    rng.shuffle(values)
    return values


def check_memory(num_samples: int, *, positions: int, rows: int) -> None:
    """Raises DatasetError when building maps of this size takes more memory than is free."""
    needed, free = positions * BYTES_PER_POSITION + rows * BYTES_PER_ROW, psutil.virtual_memory().available
    if needed > free:
        raise DatasetError(
            f"the order of {num_samples:,} samples from {positions:,} documents (repeated ones counted again) needs {needed / 2**30:,.1f} GiB "
            f"of memory, but {free / 2**30:,.1f} GiB are free. Use fewer steps or a smaller batch, so that fewer samples are needed"
        )
