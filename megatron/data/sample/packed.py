"""`pack_impl: packed`: documents end to end, cut every seq_length tokens, in NeoX's order."""

from __future__ import annotations

import numpy as np

from megatron.data.sample.samples import Piece, SampleDataset


class PackedDataset(SampleDataset):
    """Samples that begin and end anywhere in a document; neighbours share one token."""

    def sample_of_row(self, row: int) -> dict[str, np.ndarray]:
        (first, start), (last, end) = self.maps.sample_index[row].tolist(), self.maps.sample_index[row + 1].tolist()
        documents = self.maps.document_index[first : last + 1].tolist()
        sizes = self.source.tokens.sizes[documents].tolist()
        begins, ends = [start, *[0] * (last - first)], [*sizes[:-1], end + 1]
        pieces = (Piece(document, begin, stop - begin) for document, begin, stop in zip(documents, begins, ends, strict=True))
        return self.source.gather([piece for piece in pieces if piece.length])
