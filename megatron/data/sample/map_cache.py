"""Builds index maps once and keeps them under a name that contains everything they depend on."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron.data.cache import cache_key, find, publish
from megatron.data.indexed import DatasetError, IndexedDataset
from megatron.data.sample.index_map import IndexMaps, build_index_maps
from megatron.data.sample.whole_maps import build_overflow_maps, build_unpacked_maps, usable_documents
from megatron.data.vocabulary import bin_identity

logger = logging.getLogger(__name__)
ALGORITHMS = {"packed": "packed-1", "pack_until_overflow": "overflow-1", "unpacked": "unpacked-1"}
"""These are part of every name. Change one of them whenever its order changes."""


@dataclass(frozen=True)
class Packing:
    """How documents become samples."""

    impl: Literal["packed", "pack_until_overflow", "unpacked"] = "packed"
    allow_chopped: bool = True
    labels: IndexedDataset | None = None
    """The labels. Samples of whole documents leave out documents without any label. None: all documents are used."""

    def facts(self) -> dict[str, Any]:
        if self.impl == "packed":
            return {"algorithm": ALGORITHMS[self.impl]}
        labels = None if self.labels is None else [self.labels.index_hash, *bin_identity(self.labels)]
        return {"algorithm": ALGORITHMS[self.impl], "allow_chopped": self.allow_chopped, "labels": labels}


PACKED = Packing()


def load_or_build(
    dataset: IndexedDataset, documents: range, *, seq_length: int, num_samples: int | None, seed: int, packing: Packing = PACKED
) -> IndexMaps:
    """The maps for a contiguous range of documents, from the cache when they were built before from the same files and settings.

    `num_samples` None: one epoch, packed. Raises DatasetError when there are no documents or too few tokens.
    """
    if not documents:
        raise DatasetError(f"{dataset.prefix}: no documents to draw samples from (the file has {len(dataset):,})")
    facts: dict[str, Any] = {
        **packing.facts(),
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
    maps = build(dataset, documents, seq_length=seq_length, num_samples=num_samples, seed=seed, packing=packing)
    written = publish(dataset.prefix, key, lambda directory: save(maps, directory))
    return (load(written) if written else None) or maps


def build(dataset: IndexedDataset, documents: range, *, seq_length: int, num_samples: int | None, seed: int, packing: Packing) -> IndexMaps:
    """The maps by the algorithm that `packing` names. Raises DatasetError that names the file."""
    try:
        if packing.impl == "packed":
            numbers = np.arange(documents.start, documents.stop, dtype=np.int32)
            return build_index_maps(dataset.sizes, numbers, seq_length=seq_length, num_samples=num_samples, seed=seed)
        assert num_samples is not None
        usable_N = usable_documents(
            dataset,
            packing.labels,
            documents,
            longest=None if packing.allow_chopped else seq_length + 1,
            labelled_within=seq_length if packing.impl == "unpacked" else seq_length + 1,
        )
        if packing.impl == "unpacked":
            return build_unpacked_maps(usable_N, documents, num_samples=num_samples, seed=seed)
        return build_overflow_maps(dataset.sizes, usable_N, documents, seq_length=seq_length, num_samples=num_samples, seed=seed)
    except DatasetError as error:
        raise DatasetError(f"{dataset.prefix}: {error}") from None


def save(maps: IndexMaps, directory: Path) -> None:
    for name, values in maps._asdict().items():
        with (directory / f"{name}.npy").open("wb") as file:
            np.save(file, values)
            file.flush()
            os.fsync(file.fileno())


def load(directory: Path) -> IndexMaps | None:
    """The maps in `directory`, memory-mapped. None: a file cannot be read or is damaged. Damaged maps are removed."""
    try:
        maps = IndexMaps(*(np.load(directory / f"{name}.npy", mmap_mode="r") for name in IndexMaps._fields))
    except PermissionError as error:
        logger.warning("%s cannot be read (%s); it is built again", directory, error.strerror)
        return None
    except OSError as error:
        if error.errno in (errno.ENOMEM, errno.EMFILE, errno.ENFILE):  # the machine's fault, not the file's
            raise
        remove_damaged(directory, error)
        return None
    except (EOFError, ValueError) as error:
        remove_damaged(directory, error)
        return None
    return maps


def remove_damaged(directory: Path, error: Exception) -> None:
    logger.warning("%s is damaged (%s); it is built again", directory, error)
    shutil.rmtree(directory, ignore_errors=True)
