"""Facts about the data that a run reads. A checkpoint holds them, and a run that goes on compares them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from megatron.data.blend import BlendedDataset
from megatron.data.indexed import IndexedDataset
from megatron.data.loader import LOSS_OF, Datasets, TextDataset
from megatron.data.split import SPLITS
from megatron.data.vocabulary import bin_identity

if TYPE_CHECKING:
    from megatron.config.data import DataConfig

KEYS = ("split", "pack_impl", "allow_chopped", "weight_by_num_documents", "weighted_sampler_alpha", *(f"{name}_data_weights" for name in SPLITS))
"""Keys of the data section that decide, besides the files, which sample comes when."""
PATHS = ("data_path", *(f"{name}_data_paths" for name in SPLITS), *(f"{name}_label_data_paths" for name in SPLITS))
NAMES = {"train": "training", **LOSS_OF}

Facts = dict[str, Any]


def data_facts(data: DataConfig, datasets: Datasets, order: Mapping[str, int]) -> Facts:
    """The facts as JSON values: the keys that decide the order (`order`: those of other sections), and for each corpus its path, documents, tokens
    and a
    value that changes with its content."""
    corpora = {name: [corpus_facts(tokens) for tokens in files_of(getattr(datasets, name))] for name in SPLITS}
    return {"keys": {**{key: getattr(data, key) for key in KEYS}, **order}, "corpora": corpora}


def files_of(dataset: TextDataset | None) -> list[IndexedDataset]:
    """The token files of a data set, each followed by its labels."""
    parts = dataset.datasets if isinstance(dataset, BlendedDataset) else [] if dataset is None else [dataset]
    return [file for part in parts for file in (part.source.tokens, part.source.labels) if file is not None]


def corpus_facts(file: IndexedDataset) -> Facts:
    size, modified, first, last = bin_identity(file)
    ends = hashlib.blake2b(f"{first} {last}".encode(), digest_size=12).hexdigest()
    counts = {"documents": len(file), "tokens": file.num_tokens, "index": file.index_hash, "bytes": size}
    return {"path": str(file.prefix), **counts, "ends": ends, "modified": modified}


def changes(before: Facts, now: Facts) -> list[str]:
    """Clauses about the differences. Empty if the run that goes on reads the same data."""
    found = [
        f"{key} was {before['keys'][key]!r} and is {now['keys'][key]!r}"
        for key in now["keys"]
        if key in before["keys"] and before["keys"][key] != now["keys"][key] and matters(key, now)
    ]
    for name in SPLITS:
        old, new = before["corpora"].get(name, []), now["corpora"][name]
        if old and new and len(old) != len(new):
            found.append(f"the {NAMES[name]} data was {paths_of(old)} and is {paths_of(new)}")
        elif old and new:
            found += (clause for first, second in zip(old, new, strict=True) for clause in corpus_changes(first, second))
    return list(dict.fromkeys(found))


def matters(key: str, now: Facts) -> bool:
    """Whether a changed key has an effect. `split` has none if every part has its own files."""
    parts = [{corpus["path"] for corpus in now["corpora"][name]} for name in SPLITS if now["corpora"][name]]
    return key != "split" or len(parts) < 2 or bool(set.intersection(*parts))


def corpus_changes(before: Facts, now: Facts) -> Iterator[str]:
    path = now["path"]
    same = all(before.get(key) == now[key] for key in ("index", "bytes", "ends"))
    if before["path"] != path:
        yield f"{before['path']} is replaced by {path}" + (", which holds the same documents" if same else "")
    if not same:
        counts = [f"{before[key]:,} {key}, now {now[key]:,}" for key in ("documents", "tokens") if before[key] != now[key]]
        yield f"{path} has other content" + (
            f" (before {'; before '.join(counts)})" if counts else " (with the same numbers of documents and tokens)"
        )
    elif before["path"] == path and before["modified"] != now["modified"]:
        yield f"{path} was written again since, with the same documents and the same beginning and end"


def changed_keys(stored: Mapping[str, Any], data: DataConfig) -> list[str]:
    """The differences for a checkpoint without facts: only the keys of its configuration are compared."""
    return [
        f"{key} was {stored[key]!r} and is {getattr(data, key)!r}" for key in (*PATHS, *KEYS) if key in stored and stored[key] != getattr(data, key)
    ]


def paths_of(corpora: list[Facts]) -> str:
    return ", ".join(corpus["path"] for corpus in corpora)
