"""Checks token ids against the vocabulary before the first step. An id that is too large would index past the embedding."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np

from megatron.data.cache import cache_key, find, publish
from megatron.data.indexed import DatasetError, IndexedDataset

CHUNK_TOKENS = 1 << 24


def check_vocabulary(dataset: IndexedDataset, vocab_size: int) -> None:
    """Raises DatasetError if a token id is negative or at least `vocab_size`. The file is scanned once, and the result is kept for later calls."""
    if dataset.dtype.kind == "f":
        raise DatasetError(f"{dataset.bin_path} holds {dataset.dtype} values and not token ids, so it cannot be used as text for training")
    if not dataset.num_tokens:
        return
    low, high = token_range(dataset)
    if low < 0 or high >= vocab_size:
        raise DatasetError(
            f"{dataset.bin_path} holds token ids {low}..{high} but the vocabulary has {vocab_size:,} (0..{vocab_size - 1}): "
            "it was made with another tokenizer; set vocab_file to that one or prepare the text again"
        )


def check_labels(labels: IndexedDataset, tokens: IndexedDataset, vocab_size: int | None) -> None:
    """Raises DatasetError if `labels` do not have one label for each token of each document, or if a label is at least `vocab_size` (negative ones
    are
    masks)."""
    if labels.dtype.kind == "f":
        raise DatasetError(f"{labels.bin_path} holds {labels.dtype} values, not labels (the token, or -100 where the loss does not count)")
    beside = f"the labels {labels.prefix} do not fit the tokens {tokens.prefix}"
    if len(labels) != len(tokens):
        raise DatasetError(f"{beside}: {len(labels):,} and {len(tokens):,} documents; both come from one run of the preparation")
    if not np.array_equal(labels.sizes, tokens.sizes):
        different = np.flatnonzero(labels.sizes != tokens.sizes)
        first = int(different[0])
        raise DatasetError(
            f"{beside}: document {first} (counted from 0) has {int(labels.sizes[first]):,} labels and {int(tokens.sizes[first]):,} tokens"
            + (f", and {len(different) - 1:,} more documents differ" if len(different) > 1 else "")
            + "; both come from one run of the preparation"
        )
    if vocab_size is not None and labels.num_tokens and (high := token_range(labels)[1]) >= vocab_size:
        raise DatasetError(
            f"{labels.bin_path} holds labels up to {high} but the vocabulary has {vocab_size:,} (0..{vocab_size - 1}); "
            "masked tokens have the label -100, which needs a signed type such as int32"
        )


def token_range(dataset: IndexedDataset) -> tuple[int, int]:
    """(smallest, largest) token id. The result is kept for this `.bin` (size, time, both ends) and `.idx` (digest)."""
    key = cache_key(dataset.prefix, {"token_range": 1, "index": dataset.index_hash, "bin": bin_identity(dataset)})
    known = find(dataset.prefix, key)
    if known is not None:
        with contextlib.suppress(OSError, ValueError):  # a damaged note: look again
            low, high = json.loads((known / "token_range.json").read_text())
            return int(low), int(high)
    low, high = scan(dataset)
    publish(dataset.prefix, key, lambda directory: save(directory, low, high))
    return low, high


def save(directory: Path, low: int, high: int) -> None:
    (directory / "token_range.json").write_text(json.dumps([low, high]))


def scan(dataset: IndexedDataset) -> tuple[int, int]:
    tokens = dataset.tokens
    chunks = [tokens[start : start + CHUNK_TOKENS] for start in range(0, len(tokens), CHUNK_TOKENS)]
    return min(int(chunk.min()) for chunk in chunks), max(int(chunk.max()) for chunk in chunks)


def bin_identity(dataset: IndexedDataset) -> list[int | str]:
    status = dataset.bin_path.stat()
    tokens = dataset.tokens
    return [status.st_size, status.st_mtime_ns, tokens[:2048].tobytes().hex(), tokens[-2048:].tobytes().hex()]
