"""Merges several `.bin/.idx` pairs into one that holds their documents one after the other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.data.indexed import DatasetError, IndexedDataset, IndexedDatasetWriter
from megatron.data.input.input_files import natural_order
from megatron.data.progress import Reporter


@dataclass(frozen=True)
class Merged:
    """`notices` are sentences about faults of the inputs that did not stop the merge."""

    inputs: tuple[Path, ...]
    documents: int
    tokens: int
    notices: tuple[str, ...]


def merge(folder: Path, output: Path, reporter: Reporter) -> Merged:
    """Writes the pair `output` from every other pair in `folder`, in natural order of their names. The pair is written completely or not at all.

    Raises DatasetError if there is no pair, if a file is missing or damaged, if the token types differ, and if the folder mixes texts and
    labels.
    """
    prefixes = pairs_in(folder, output)
    _check_kinds(prefixes)
    inputs = [IndexedDataset(prefix) for prefix in prefixes]
    first = inputs[0]
    for other in inputs[1:]:
        if other.dtype != first.dtype:
            raise DatasetError(
                f"{first.prefix} holds tokens of type {first.dtype} and {other.prefix} of type {other.dtype}: they come from vocabularies of "
                "different size and cannot be one file; prepare both with the same tokenizer, or train on both with train_data_paths"
            )
    if not output.parent.is_dir():
        raise DatasetError(f"--output-prefix {output}: there is no folder {output.parent}; make it or choose another one")
    sizes = [dataset.num_tokens * first.dtype.itemsize for dataset in inputs]
    with IndexedDatasetWriter(output, first.dtype) as writer, reporter.stage("merging", sum(sizes)) as stage:
        for dataset in inputs:
            stage.advance(0, documents=len(dataset))
            for size in writer.add_file(dataset):
                stage.advance(size, documents=0, tokens=size // first.dtype.itemsize)
    notices = [
        f"{dataset.idx_path} has lost its document boundaries (GPT-NeoX's own merge_datasets.py drops them); each of its {len(dataset):,} items "
        "counts as a document"
        for dataset in inputs
        if not dataset.has_boundaries
    ]
    documents = sum(len(dataset.document_ends) for dataset in inputs)
    return Merged(tuple(dataset.prefix for dataset in inputs), documents, sum(dataset.num_tokens for dataset in inputs), tuple(notices))


def pairs_in(folder: Path, output: Path) -> list[Path]:
    """Prefixes of the pairs in a folder, without `output`, which an earlier run may have written. A pair with a missing file counts: opening it
    says so."""
    if not folder.is_dir():
        raise DatasetError(f"--input {folder}: no such folder; give the folder that holds the .bin/.idx pairs")
    halves = itertools.chain(folder.glob("*.bin"), folder.glob("*.idx"))
    found = {path.with_suffix("") for path in halves}
    prefixes: Sequence[Path] = [prefix for prefix in found if prefix.resolve() != output.resolve()]
    if not prefixes:
        raise DatasetError(f"--input {folder}: no .bin/.idx pairs in this folder" + (" but the one to be written" if found else ""))
    return sorted(prefixes, key=lambda prefix: natural_order(prefix.name))


def _check_kinds(prefixes: Sequence[Path]) -> None:
    """Labels and rewards lie beside their texts, where the tools for masks and chats write them."""
    kinds = {prefix: next((kind for kind in ("label", "reward") if prefix.name.endswith(f"{kind}_document")), "text") for prefix in prefixes}
    first, *others = prefixes
    other = next((prefix for prefix in others if kinds[prefix] != kinds[first]), None)
    if other is not None:
        raise DatasetError(
            f"{first} and {other} are of different kinds by their names ({kinds[first]} and {kinds[other]}) and must not become "
            "documents of one file. Put each kind into its own folder and merge the folders one by one"
        )
