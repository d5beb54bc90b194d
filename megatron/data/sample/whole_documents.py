"""`pack_impl: pack_until_overflow` and `unpacked`: samples of whole documents, filled up with padding, as NeoX makes them.

Shapes: S sequence length
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron.data.sample.index_map import IndexMaps
from megatron.data.sample.samples import Piece, SampleDataset, Source
from megatron.data.sample.whole_maps import IGNORED_LABEL

PADDING = 0


class WholeDocumentDataset(SampleDataset):
    """Samples that begin with a document: the documents of a row, the first token of the next document, padding. They are cut at S + 1 tokens.

    The one token of the next document is there because NeoX does the same and losses depend on it. For the same reason the first sample takes the
    place
    of the last row, which has no next document. There is always a "label": the tokens themselves if the source has no labels, and -100 at padding.
    """

    def __init__(self, source: Source, maps: IndexMaps, name: str, *, seq_length: int) -> None:
        super().__init__(source, maps, name)
        self.length = seq_length + 1

    def sample_of_row(self, row: int) -> dict[str, np.ndarray]:
        first, last = (int(position) for position in self.maps.sample_index[row : row + 2, 0])
        if last == len(self.maps.document_index):
            substitute = int(self.maps.shuffle_index[row % len(self)])
            if substitute != row:
                return self.sample_of_row(substitute)
        return self._fill_up(self.source.gather(list(self._pieces(first, last))))

    def _pieces(self, first: int, last: int) -> Iterator[Piece]:
        """Of the documents at positions first..last - 1, and of the one at `last`, as much as fits."""
        room = self.length
        for position, document in enumerate(self.maps.document_index[first : last + 1].tolist(), first):
            length = min(room, 1 if position == last else int(self.source.tokens.sizes[document]))
            if length:
                yield Piece(document, 0, length)
            room -= length

    def _fill_up(self, sample: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        missing = self.length - len(sample["text"])
        sample.setdefault("label", sample["text"])
        fillings = {"text": PADDING, "label": IGNORED_LABEL}
        if "document" in sample:
            fillings["document"] = int(sample["document"][-1]) + 1
        return {key: np.pad(sample[key], (0, missing), constant_values=filling) for key, filling in fillings.items()}
