"""Data sets for training, validation and test, and endless batches from them.

Shapes: B micro-batch, S sequence length
"""

from __future__ import annotations

import atexit
import logging
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader

from megatron.data.blend import BlendedDataset, check_weights, corpus_names, samples_each, weights_by_documents
from megatron.data.indexed import DatasetError, IndexedDataset
from megatron.data.sample.index_map import epochs_for
from megatron.data.sample.map_cache import Packing, load_or_build
from megatron.data.sample.packed import PackedDataset
from megatron.data.sample.samples import SampleDataset, Source
from megatron.data.sample.whole_documents import WholeDocumentDataset
from megatron.data.sampler import MicroBatchSampler, Start
from megatron.data.split import SPLITS, parse_split, split_documents
from megatron.data.vocabulary import check_labels, check_vocabulary

if TYPE_CHECKING:
    from megatron.config.data import DataConfig

logger = logging.getLogger(__name__)
TextDataset = SampleDataset | BlendedDataset
LOSS_OF = {"valid": "validation", "test": "test"}


@dataclass(frozen=True, kw_only=True)
class SamplePlan:
    """How many samples a run will draw. 0: that part is not used. None: one epoch of it.

    NeoX: train = train_iters * batch, valid = (train_iters // eval_interval + 1) * eval_iters * batch, test = eval_iters * batch.
    """

    train_samples: int | None
    valid_samples: int | None
    test_samples: int | None
    samples_at_once: int = 1
    """The samples that all processes together take for one forward pass. A data set with fewer cannot be used."""

    def wanted(self, name: str) -> int | None:
        return {"train": self.train_samples, "valid": self.valid_samples, "test": self.test_samples}[name]


@dataclass(frozen=True)
class Datasets:
    """The data sets of a run. None: the plan uses no samples of that part, or the config gives it no data (no paths, a zero share of `split`)."""

    train: TextDataset | None
    valid: TextDataset | None
    test: TextDataset | None


@dataclass(frozen=True, kw_only=True)
class SampleOrder:
    """The settings, besides the data, that decide the samples and their order."""

    seq_length: int
    seed: int
    pack_impl: Literal["packed", "pack_until_overflow", "unpacked"]
    allow_chopped: bool
    samples_at_once: int


def build_data(
    data: DataConfig, *, seq_length: int, plan: SamplePlan, seed: int, vocab_size: int | None = None, number_documents: bool = False
) -> Datasets:
    """The data sets of a config: `data_path` cut by `split`, or train/valid/test_data_paths blended by weight.

    With `vocab_size`, every file's token ids are checked against it. `number_documents`: samples hold the number of each token's document, also if
    `data` does not ask for it. Raises DatasetError for anything wrong with the data.
    """
    order = SampleOrder(
        seq_length=seq_length, seed=seed, pack_impl=data.pack_impl, allow_chopped=data.allow_chopped, samples_at_once=plan.samples_at_once
    )
    if data.data_path is not None:
        return build_from_split(open_source(data.data_path, None, data, vocab_size, number_documents=number_documents), data.split, plan, order)
    if not data.train_data_paths:
        raise DatasetError(
            "no training data: set data_path, or train_data_paths (and valid_data_paths, test_data_paths); `python prepare_data.py` makes some"
        )
    built: list[TextDataset | None] = []
    for name in SPLITS:
        paths, labels = getattr(data, f"{name}_data_paths"), getattr(data, f"{name}_label_data_paths")
        count = plan.wanted(name)
        if not paths or count == 0:
            built.append(None)
            continue
        weights = check_weights(getattr(data, f"{name}_data_weights"), paths, name)
        pairs = zip(paths, labels or [None] * len(paths), strict=True)
        sources = [open_source(path, label, data, vocab_size, number_documents=number_documents) for path, label in pairs]
        if data.weight_by_num_documents:
            weights = weights_by_documents([len(source.tokens) for source in sources], data.weighted_sampler_alpha)
            logger.info("%s data by numbers of documents: weights %s.", name, ", ".join(f"{weight:.4f}" for weight in weights))
        names = corpus_names(paths) if name != "train" and len(paths) > 1 else ()
        built.append(build_blended(sources, weights, count, name=name, order=order, names=names))
    return Datasets(*built)


def open_source(path: str, label_path: str | None, data: DataConfig, vocab_size: int | None, *, number_documents: bool = False) -> Source:
    """The token file and its label file, if one is given. Raises DatasetError if the two do not match."""
    tokens = IndexedDataset(path)
    if vocab_size is not None:
        check_vocabulary(tokens, vocab_size)
    labels = None
    if label_path is not None:
        labels = IndexedDataset(label_path)
        check_labels(labels, tokens, vocab_size)
    if data.mmap_warmup:
        for file in filter(None, (tokens, labels)):
            file.warm_up()
    return Source(tokens, labels, number_documents=number_documents or data.reset_attention_mask or data.reset_position_ids)


def build_from_split(source: Source, split: str, plan: SamplePlan, order: SampleOrder) -> Datasets:
    """One file's documents, the first for training, then validation, then test.

    As in NeoX, validation or test without a document is left out; here a warning says so. Raises DatasetError if no document is left for training.
    """
    built: list[TextDataset | None] = []
    file = source.tokens
    if not len(file):
        raise DatasetError(f"{file.prefix} holds no documents; prepare it again from text that is not empty")
    for name, documents, share in zip(SPLITS, split_documents(split, len(file)), parse_split(split), strict=True):
        count = plan.wanted(name)
        if count == 0 or (not share and name != "train"):
            built.append(None)
        elif documents:
            built.append(build_samples(source, documents, count, name=name, order=order))
        else:
            what = f"split = {split!r} leaves no document of {file.prefix} ({len(file):,} documents) for {name}"
            if name == "train":
                raise DatasetError(f"{what}, so there is nothing to train on; give train a larger share")
            logger.warning("%s: there is no %s loss. Give %s a larger share to have one.", what, LOSS_OF[name], name)
            built.append(None)
    return Datasets(*built)


def build_samples(source: Source, documents: range, num_samples: int | None, *, name: str, order: SampleOrder, alone: bool = True) -> SampleDataset:
    """A range of one file's documents as samples, packed as the order says. `alone`: the file is not mixed with others.

    If the tokens are too few for one sample, they are repeated in it, as in NeoX, with a warning.
    """
    packing = Packing(order.pack_impl, order.allow_chopped, source.labels)
    if num_samples is not None and (packing.impl != "packed" or gives_too_few(source.tokens, documents, num_samples, order, alone)):
        num_samples = max(num_samples, order.samples_at_once + 1)  # of what is given NeoX never uses the last
    maps = load_or_build(source.tokens, documents, seq_length=order.seq_length, num_samples=num_samples, seed=order.seed, packing=packing)
    if packing.impl == "packed":
        tokens = int(source.tokens.sizes[documents.start : documents.stop].sum(dtype=np.int64))
        if tokens <= order.seq_length:
            what = f"{len(documents):,} document(s) with {tokens:,} tokens"
            logger.warning("%s: the %s part, %s, is shorter than one sequence, so it is repeated in each sequence.", source.tokens.prefix, name, what)
        return PackedDataset(source, maps, name)
    return WholeDocumentDataset(source, maps, name, seq_length=order.seq_length)


def gives_too_few(tokens: IndexedDataset, documents: range, num_samples: int, order: SampleOrder, alone: bool) -> bool:
    """Whether packing these documents gives too few samples: fewer than one step needs, or none if they are mixed with others.

    Packing repeats the documents until they give `num_samples`.
    """
    counted = int(tokens.sizes[documents.start : documents.stop].sum(dtype=np.int64))
    epochs = epochs_for(counted, num_samples, order.seq_length) if counted else 0
    return (epochs * counted - 1) // order.seq_length - 1 < (order.samples_at_once if alone else 1)


def build_blended(
    sources: Sequence[Source], weights: Sequence[float], num_samples: int | None, *, name: str, order: SampleOrder, names: Sequence[str] = ()
) -> BlendedDataset:
    """Several files mixed by weight. If `names` are given, samples are marked with them.

    In an epoch of files with equal weights each file is read once; NeoX repeats the short ones.
    """
    counts = [None] * len(sources) if num_samples is None else samples_each(weights, num_samples)
    parts = [
        build_samples(source, range(len(source.tokens)), count, name=name, order=order, alone=False)
        for source, count in zip(sources, counts, strict=True)
    ]
    if num_samples is None and len(set(weights)) == 1:
        weights = [float(len(part)) for part in parts]
    return BlendedDataset(parts, weights, names)


class Batches:
    """Endless iterator of {"text": int64 [B, S + 1]} for one rank, with "label", "document" and "corpus" if samples have them.

    num_workers 0 reads in this process. A larger number prefetches in that many processes, in the same order. `close` ends them, and so does
    the end of the interpreter.
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
    """Micro-batches of `dataset` from number `start_iteration` on; earlier ones are not read. At the end it begins again, as NeoX does."""
    start = Start(start_iteration * micro_batch * world_size)
    sampler = MicroBatchSampler(len(dataset), micro_batch=micro_batch, rank=rank, world_size=world_size, start=start)
    return Batches(dataset, sampler, num_workers)


def stack(samples: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in samples[0]}


def leave_signals_to_parent(worker: int) -> None:
    """Ignores Ctrl-C and SIGTERM in a worker. They reach the whole process group, but the training process needs its batches until it has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
