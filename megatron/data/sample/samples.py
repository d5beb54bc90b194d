"""A sample: pieces of documents, the labels of their tokens, and the document of each token.

Shapes: S sequence length
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from megatron.data.indexed import DatasetError, IndexedDataset
from megatron.data.sample.index_map import IndexMaps


class Piece(NamedTuple):
    """`length` tokens of a document from token `offset` on."""

    document: int
    offset: int
    length: int


@dataclass(frozen=True)
class Source:
    """What samples are read from."""

    tokens: IndexedDataset
    labels: IndexedDataset | None = None
    """Documents of the same sizes, which hold the label of each token; a negative label does not count. None: the tokens are their own labels."""
    number_documents: bool = False
    """Whether samples say which document each token is from."""

    def gather(self, pieces: Sequence[Piece]) -> dict[str, np.ndarray]:
        """The pieces end to end: "text", with labels "label", and "document" where they are numbered (from 0); int64 each."""
        sample = {"text": np.concatenate([self.tokens.get(*piece) for piece in pieces], dtype=np.int64)}
        if self.labels is not None:
            sample["label"] = np.concatenate([self.labels.get(*piece) for piece in pieces], dtype=np.int64)
        if self.number_documents:
            sample["document"] = np.repeat(np.arange(len(pieces)), [piece.length for piece in pieces])
        return sample


class SampleDataset(Dataset[dict[str, np.ndarray]], ABC):
    """Item i is {"text": int64 [S + 1]}, and "label" and "document" of the same shape where there are any: see Source.

    Inputs are the first S tokens, targets the last S. `len` is one less than the length of the shuffle index, as in NeoX. Raises DatasetError if no
    sample is left.
    """

    def __init__(self, source: Source, maps: IndexMaps, name: str) -> None:
        self.source = source
        self.maps = maps
        self.name = name
        if len(self) < 1:
            raise DatasetError(
                f"{source.tokens.prefix}: the {name} documents give {len(maps.shuffle_index)} sample(s). The last one is never used, so no "
                "sample is left. "
                "Use more text, a shorter seq_length or a larger share in 'split'"
            )

    def __len__(self) -> int:
        return min(len(self.maps.shuffle_index), len(self.maps.sample_index)) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.name}")
        return self.sample_of_row(int(self.maps.shuffle_index[index]))

    def wrapped(self, index: int) -> dict[str, np.ndarray]:
        """Sample `index` of an endless repetition. As in NeoX the first round may reach the sample that `len` leaves out."""
        return self.sample_of_row(int(self.maps.shuffle_index[index if index < len(self.maps.shuffle_index) else index % len(self)]))

    @abstractmethod
    def sample_of_row(self, row: int) -> dict[str, np.ndarray]:
        """The sample that begins at row `row` of the sample index."""
