"""The positions of the tokens of one call in their text.

Shapes: B batch; S tokens of the call; P positions of a table; n numbers a position.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Places(NamedTuple):
    """Positions and documents of the tokens."""

    start: int = 0
    """Position of the first token; the others count on from it, unless `position_BS` says otherwise."""
    position_BS: Tensor | None = None
    """int64: positions that start again at every document. None: they count on from `start`."""
    document_BS: Tensor | None = None
    """int64: the number of each token's document; a token sees only its own document. None: it sees everything before it."""

    def rows(self, table_Pn: Tensor, length: int) -> Tensor:
        """The table's rows of `length` tokens: [S, n], or [B, S, n] where positions start again."""
        if self.position_BS is None:
            return table_Pn[self.start : self.start + length]
        return table_Pn[self.position_BS]

    def positions(self, length: int, device: torch.device) -> Tensor:
        """int64 [S], or [B, S] where positions start again."""
        if self.position_BS is None:
            return torch.arange(self.start, self.start + length, device=device)
        return self.position_BS


START = Places()
"""A text from its first token on."""


def positions_in_documents(document_BS: Tensor) -> Tensor:
    """int64 position_BS: 0, 1, 2, ... from each token whose document is not that of the token before."""
    index_S = torch.arange(document_BS.shape[1], device=document_BS.device)
    begins_BS = torch.ones_like(document_BS, dtype=torch.bool)
    begins_BS[:, 1:] = document_BS[:, 1:] != document_BS[:, :-1]
    return index_S - (index_S * begins_BS).cummax(1).values
