"""What some routers look at beside the hidden states of their own layer: the memory of the layer below, and the documents of the tokens.

Shapes: B batch; S sequence; T = B*S tokens; E experts; P width of the memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron.model.attention.cache import LayerCache

MIX_1, MIX_2, MIX_3 = -7046029254386353131, -4658895280553007687, -7723592293110705685
"""The odd constants of SplitMix64 (Steele et al., 2014), as signed numbers. Products wrap around."""


class Documents(NamedTuple):
    """The documents of the tokens of one call."""

    number_BS: Tensor
    """int64: 0, 1, 2, ... within each row of the batch."""
    hash_BS: Tensor
    """int64: a number that follows from the document's tokens in this row."""

    def sums(self, value_BSE: Tensor) -> Tensor:
        """At each token, the sum over its document. Whole numbers."""
        index_BSE = self.number_BS[..., None].expand_as(value_BSE)
        return torch.zeros_like(value_BSE).scatter_add_(1, index_BSE, value_BSE).gather(1, index_BSE)

    def running_sums(self, value_BSE: Tensor, before_BE: Tensor | None) -> Tensor:
        """At each token, the sum over its document up to itself. `before_BE`: the sum before the first token. None: nothing is before it."""
        sum_BSE = value_BSE.cumsum(1)
        if before_BE is not None:
            return sum_BSE + before_BE[:, None]
        first_BS = torch.searchsorted(self.number_BS, self.number_BS)  # the place of the document's first token
        earlier_BSE = (sum_BSE - value_BSE).gather(1, first_BS[..., None].expand_as(sum_BSE))
        return sum_BSE - earlier_BSE

    def drawn(self, layer: int) -> Tensor:
        """int64 from 0 to 2**31 - 1: as if drawn for each document and layer, and always the same for the same tokens."""
        mixed_BS = self.hash_BS + torch.full_like(self.hash_BS, layer) * MIX_1
        for shift, factor in ((30, MIX_2), (27, MIX_3), (31, 1)):
            mixed_BS = (mixed_BS ^ (mixed_BS >> shift)) * factor
        return (mixed_BS >> 24) & (2**31 - 1)


class Surroundings(NamedTuple):
    """What a router may look at, if its class says `looks_around = True`."""

    layer: int = 0
    """Which layer with experts this is, from 0."""
    memory_TP: Tensor | None = None
    """`Routing.memory_TP` of the layer with experts before this one. None: this is the first."""
    documents: Documents | None = None
    """None: no router of this model asks for them (`wants_documents = True`)."""
    cache: LayerCache | None = None
    """The layer's cache, to which attention has added the tokens of this call. None: the tokens begin their text."""


NOTHING_AROUND = Surroundings()


def documents_of(tokens_BS: Tensor, document_BS: Tensor | None) -> Documents:
    """From the tokens and the numbers of their documents, which differ between neighbours. None: each row is one document."""
    number_BS = torch.zeros_like(tokens_BS)
    if document_BS is not None:
        number_BS[:, 1:] = (document_BS[:, 1:] != document_BS[:, :-1]).cumsum(1)
    token_BS1 = ((tokens_BS.long() + 1) * MIX_2)[..., None]
    token_BS1 = (token_BS1 ^ (token_BS1 >> 29)) * MIX_3
    return Documents(number_BS, Documents(number_BS, number_BS).sums(token_BS1).squeeze(-1))
