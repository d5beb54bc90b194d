"""Which documents make sample i where samples are made of whole documents, in NeoX's order.

Shapes: N documents of the data file, P positions in the shuffled order, R rows = samples + 1
"""

from __future__ import annotations

import logging
import math

import numpy as np

from megatron.data.builders import builders
from megatron.data.builders.reference import index_dtype
from megatron.data.indexed import DatasetError, IndexedDataset
from megatron.data.sample.index_map import IndexMaps, check_memory, shuffled_range

logger = logging.getLogger(__name__)
IGNORED_LABEL = -100
"""The label of tokens that do not count in the loss, in NeoX's files and in padding. Any negative label has this effect, but only documents in which
every label is this one are left out."""
LABELS_AT_ONCE = 1 << 24


def build_overflow_maps(sizes_N: np.ndarray, usable_N: np.ndarray, documents: range, *, seq_length: int, num_samples: int, seed: int) -> IndexMaps:
    """NeoX's pack_until_overflow: the usable documents, shuffled anew for each pass, joined to samples of at most seq_length + 1 tokens.

    The last sample holds one document: packing stops when it begins.
    """
    part = slice(documents.start, documents.stop)
    mean_size = float(sizes_N[part][usable_N[part]].mean(dtype=np.float64))
    check_memory(num_samples, positions=math.ceil(num_samples * max(1.0, (seq_length + 1) / mean_size)), rows=num_samples + 1)
    rng = np.random.RandomState(seed)
    shuffle_index = shuffled_range(num_samples, rng)
    order_P = np.arange(documents.start, documents.stop, dtype=np.int32)
    chosen: list[np.ndarray] = []
    begun: list[np.ndarray] = []
    samples = positions = filled = 0
    while samples < num_samples:
        rng.shuffle(order_P)
        pass_P = order_P[usable_N[order_P]]
        starts, filled = builders().pack_documents(sizes_N[pass_P], filled, seq_length + 1)
        starts = starts[: num_samples - samples]
        samples += len(starts)
        if samples == num_samples:
            pass_P = pass_P[: starts[-1] + 1]
        begun.append(starts + positions)
        chosen.append(pass_P)
        positions += len(pass_P)
    return IndexMaps(np.concatenate(chosen), rows_at(np.append(np.concatenate(begun), positions), positions), shuffle_index)


def build_unpacked_maps(usable_N: np.ndarray, documents: range, *, num_samples: int, seed: int) -> IndexMaps:
    """NeoX's unpacked: one usable document for each sample, in the order of the file and repeated as needed. Then the samples are shuffled."""
    check_memory(num_samples, positions=num_samples + 1, rows=num_samples + 1)
    shuffle_index = shuffled_range(num_samples, np.random.RandomState(seed))
    usable = np.flatnonzero(usable_N[documents.start : documents.stop]) + documents.start
    document_index = np.resize(usable, num_samples + 1).astype(np.int32)
    return IndexMaps(document_index, rows_at(np.arange(num_samples + 1), num_samples + 1), shuffle_index)


def rows_at(position_R: np.ndarray, positions: int) -> np.ndarray:
    """A sample index whose samples begin with the documents at these positions."""
    sample_index = np.zeros((len(position_R), 2), index_dtype(positions, len(position_R)))
    sample_index[:, 0] = position_R
    return sample_index


def usable_documents(
    tokens: IndexedDataset, labels: IndexedDataset | None, documents: range, *, longest: int | None, labelled_within: int
) -> np.ndarray:
    """bool [N]: whether a document is not empty, has at most `longest` tokens (None: any length), and has a label in its first `labelled_within`
    tokens.

    The numbers of unusable documents are logged. Raises DatasetError if no document is left.
    """
    sizes_N = tokens.sizes
    reasons = {"empty": sizes_N == 0}
    if longest is not None:
        reasons[f"longer than seq_length + 1 = {longest:,} tokens (allow_chopped is false)"] = sizes_N > longest
    if labels is not None:
        reasons[f"without a label in the first {labelled_within:,} tokens"] = (sizes_N > 0) & ~has_labels(labels, labelled_within)
    usable_N = ~np.logical_or.reduce(list(reasons.values()))
    part = slice(documents.start, documents.stop)
    counts = [f"{count:,} {why}" for why, hit in reasons.items() if (count := int(hit[part].sum()))]
    sentence = f"of {len(documents):,} documents {', '.join(counts)}"
    if not usable_N[part].any():
        raise DatasetError(f"no document is left for samples: {sentence}")
    if counts:
        logger.info("%s: left out %s.", tokens.prefix, sentence)
    return usable_N


def has_labels(labels: IndexedDataset, within: int) -> np.ndarray:
    """bool [N]: whether any of the first `within` labels of a document is not -100."""
    found_N = np.zeros(len(labels), bool)
    begin_N = labels.offsets_N // labels.dtype.itemsize
    filled = np.flatnonzero(labels.sizes)
    block_N = begin_N[filled] // LABELS_AT_ONCE
    for block in np.split(filled, np.flatnonzero(np.diff(block_N)) + 1):
        if not len(block):
            continue
        first = int(begin_N[block[0]])
        stop = int(begin_N[block[-1]]) + int(labels.sizes[block[-1]])
        counts = labels.tokens[first:stop] != IGNORED_LABEL
        edges = np.stack([begin_N[block], begin_N[block] + np.minimum(labels.sizes[block], within)], axis=1).reshape(-1) - first
        found_N[block] = np.logical_or.reduceat(np.append(counts, False), edges)[::2]
    return found_N
