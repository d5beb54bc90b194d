"""Data sets for training, validation and test, and endless batches from them.

Shapes: B micro-batch, S sequence length
"""

from __future__ import annotations

import atexit
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader

from megatron.data.blend import BlendedDataset, check_weights, samples_each
from megatron.data.index_map import load_or_build
from megatron.data.indexed import DatasetError, IndexedDataset
from megatron.data.packed import PackedDataset
from megatron.data.sampler import MicroBatchSampler
from megatron.data.split import SPLITS, parse_split, split_documents
from megatron.data.vocabulary import check_vocabulary

if TYPE_CHECKING:
    from megatron.config.data import DataConfig

TextDataset = PackedDataset | BlendedDataset


@dataclass(frozen=True, kw_only=True)
class SamplePlan:
    """How many samples a run will draw. 0: that part is not wanted.

    NeoX: train = train_iters * batch, valid = (train_iters // eval_interval + 1) * eval_iters * batch, test = eval_iters * batch.
    """

    train_samples: int
    valid_samples: int
    test_samples: int

    def wanted(self, name: str) -> int:
        return {"train": self.train_samples, "valid": self.valid_samples, "test": self.test_samples}[name]


@dataclass(frozen=True)
class Datasets:
    """None: the plan wants no samples of that part, or the config gives it no data (no paths, a zero share of `split`)."""

    train: TextDataset | None
    valid: TextDataset | None
    test: TextDataset | None


@dataclass(frozen=True, kw_only=True)
class SampleOrder:
    """What the order of samples depends on besides the data."""

    seq_length: int
    seed: int


def build_data(data: DataConfig, *, seq_length: int, plan: SamplePlan, seed: int, vocab_size: int | None = None) -> Datasets:
    """The data sets of a config: `data_path` cut by `split`, or train/valid/test_data_paths blended by weight.

    With `vocab_size`, every file's token ids are checked against it. Raises DatasetError for anything wrong with the data.
    """
    order = SampleOrder(seq_length=seq_length, seed=seed)
    if data.data_path is not None:
        file = open_file(data.data_path, vocab_size, data.mmap_warmup)
        return build_from_split(file, data.split, plan, order)
    if not data.train_data_paths:
        raise DatasetError(
            "no training data: set data_path, or train_data_paths (and valid_data_paths, test_data_paths); `python prepare_data.py` makes some"
        )
    built: list[TextDataset | None] = []
    for name in SPLITS:
        paths, weights = getattr(data, f"{name}_data_paths"), getattr(data, f"{name}_data_weights")
        count = plan.wanted(name)
        if not paths or not count:
            built.append(None)
            continue
        weights = check_weights(weights, paths, name)
        files = [open_file(path, vocab_size, data.mmap_warmup) for path in paths]
        built.append(build_blended(files, weights, count, name=name, order=order))
    return Datasets(*built)


def open_file(path: str, vocab_size: int | None, warm_up: bool) -> IndexedDataset:
    file = IndexedDataset(path)
    if vocab_size is not None:
        check_vocabulary(file, vocab_size)
    if warm_up:
        file.warm_up()
    return file


def build_from_split(file: IndexedDataset, split: str, plan: SamplePlan, order: SampleOrder) -> Datasets:
    """One file's documents, the first for training, then validation, then test. Raises when a share that is wanted got no document."""
    built: list[TextDataset | None] = []
    if not len(file):
        raise DatasetError(f"{file.prefix} holds no documents; prepare it again from text that is not empty")
    for name, documents, share in zip(SPLITS, split_documents(split, len(file)), parse_split(split), strict=True):
        count = plan.wanted(name)
        if not count or not share:
            built.append(None)
            continue
        if not documents:
            raise DatasetError(
                f"split = {split!r} leaves no document of {file.prefix} ({len(file)} documents) for {name}; "
                f"give {name} a larger share, or ask for no {name} samples"
            )
        built.append(build_packed(file, documents, count, name=name, order=order))
    return Datasets(*built)


def build_packed(file: IndexedDataset, documents: range, num_samples: int, *, name: str, order: SampleOrder) -> PackedDataset:
    maps = load_or_build(file, documents, seq_length=order.seq_length, num_samples=num_samples, seed=order.seed)
    return PackedDataset(file, maps, name)


def build_blended(files: Sequence[IndexedDataset], weights: Sequence[float], num_samples: int, *, name: str, order: SampleOrder) -> BlendedDataset:
    counts = samples_each(weights, num_samples)
    parts = [build_packed(file, range(len(file)), count, name=name, order=order) for file, count in zip(files, counts, strict=True)]
    return BlendedDataset(parts, weights)


class Batches:
    """Endless iterator of {"text": int64 [B, S + 1]} for one rank.

    num_workers 0 reads in this process; more prefetch in as many processes, in the same order. `close` ends them; so does
    leaving the interpreter.
    """

    def __init__(self, dataset: TextDataset, sampler: MicroBatchSampler, num_workers: int) -> None:
        # A generator of its own: torch draws a seed for workers, and from the global one that would shift the model's dropout.
        loader: DataLoader[dict[str, np.ndarray]] = DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=num_workers,
            collate_fn=stack,
            worker_init_fn=leave_signals_to_parent,
            generator=torch.Generator(),
        )
        self._iterator: Iterator[dict[str, torch.Tensor]] | None = iter(loader)
        atexit.register(self.close)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        if self._iterator is None:
            raise StopIteration
        return next(self._iterator)

    def close(self) -> None:
        """Ends the worker processes (dropping torch's iterator does)."""
        self._iterator = None
        atexit.unregister(self.close)


def batches(dataset: TextDataset, *, micro_batch: int, rank: int = 0, world_size: int = 1, start_iteration: int = 0, num_workers: int = 0) -> Batches:
    """Micro-batches of `dataset` from number `start_iteration` on, without reading the ones before. Wraps at the end, as NeoX does."""
    sampler = MicroBatchSampler(len(dataset), micro_batch=micro_batch, rank=rank, world_size=world_size, start_iteration=start_iteration)
    return Batches(dataset, sampler, num_workers)


def stack(samples: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in samples[0]}


def leave_signals_to_parent(worker: int) -> None:
    """Ctrl-C and SIGTERM reach the whole process group; the training process decides, and needs its batches until the save is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
