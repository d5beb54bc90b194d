"""One data file as samples of seq_length + 1 tokens, in NeoX's order.

Shapes: S sequence length
"""

from __future__ import annotations

import numpy as np
from torch.utils.data import Dataset

from megatron.data.index_map import IndexMaps
from megatron.data.indexed import DatasetError, IndexedDataset


class PackedDataset(Dataset[dict[str, np.ndarray]]):
    """Item i is {"text": int64 [S + 1]}: inputs are its first S tokens, targets its last S.

    `len` is one less than the shuffle index has, as in NeoX. Raises DatasetError when that leaves no sample at all.
    """

    def __init__(self, tokens: IndexedDataset, maps: IndexMaps, name: str) -> None:
        self.tokens = tokens
        self.maps = maps
        self.name = name
        if len(self) < 1:
            raise DatasetError(
                f"{tokens.prefix}: the {name} documents give {len(maps.shuffle_index)} sample(s), and the last one is not used: "
                "too few for one; use more text, a shorter seq_length or a larger share in 'split'"
            )

    def __len__(self) -> int:
        return min(len(self.maps.shuffle_index) - 1, len(self.maps.sample_index) - 1)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.name}")
        return self._sample(index)

    def wrapped(self, index: int) -> dict[str, np.ndarray]:
        """Sample `index` of an endless repetition. As in NeoX the first round may reach the sample that `len` leaves out."""
        return self._sample(index if index < len(self.maps.shuffle_index) else index % len(self))

    def _sample(self, index: int) -> dict[str, np.ndarray]:
        row = int(self.maps.shuffle_index[index])
        (first, start), (last, end) = self.maps.sample_index[row].tolist(), self.maps.sample_index[row + 1].tolist()
        documents = self.maps.document_index[first : last + 1].tolist()
        if first == last:
            pieces = [self.tokens.get(documents[0], start, end - start + 1)]
        else:
            pieces = [self.tokens.get(documents[0], start), *map(self.tokens.get, documents[1:-1]), self.tokens.get(documents[-1], 0, end + 1)]
        return {"text": np.concatenate(pieces, dtype=np.int64)}
