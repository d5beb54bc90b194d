"""The beginning of each domain's text, token by token: Mixtral's Figure 8, CoSMoEs' Figure 5."""

from __future__ import annotations

import numpy as np

from megatron.analysis.routing.blocks import Block, Pieces, Shape, View
from megatron.analysis.routing.findings import Sample

LENGTH = 256
MOST_NUMBERS = 200_000
"""Choices in one sample: with many layers it is shorter."""


class SampleKeeper:
    """Keeps the first tokens of each domain."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        width = len(shape.layers) * shape.top_k * max(1, shape.lores_per_token)
        self.length = max(16, min(LENGTH, MOST_NUMBERS // width))
        self._blocks: dict[int, list[Block]] = {domain: [] for domain in range(len(shape.domains))}
        self._kept = dict.fromkeys(self._blocks, 0)

    def add(self, view: View) -> None:
        """Keeps the new tokens while there is room."""
        room = self.length - self._kept[view.domain]
        if room > 0:
            block = view.block
            short = Block(
                block.domain,
                block.expert_TLK[:room].copy(),
                None if block.weight_TLK is None else block.weight_TLK[:room].copy(),
                None if block.token_T is None else block.token_T[:room].copy(),
                None if block.lore_TLKU is None else block.lore_TLKU[:room].copy(),
                block.continues,
            )
            self._blocks[view.domain].append(short)
            self._kept[view.domain] += len(short.expert_TLK)

    def found(self, pieces: Pieces) -> list[Sample]:
        """A sample for each domain that has tokens."""
        return [self._sample(domain, blocks, pieces) for domain, blocks in self._blocks.items() if blocks]

    def _sample(self, domain: int, blocks: list[Block], pieces: Pieces) -> Sample:
        tokens = [int(token) for block in blocks if block.token_T is not None for token in block.token_T]
        lengths = np.cumsum([0, *(len(block.expert_TLK) for block in blocks)]).tolist()
        weights = [block.weight_TLK for block in blocks if block.weight_TLK is not None]
        lores = [block.lore_TLKU for block in blocks if block.lore_TLKU is not None]
        return Sample(
            self._shape.domains[domain],
            [pieces.get(token, str(token)) for token in tokens] or [""] * lengths[-1],
            np.concatenate([block.expert_TLK for block in blocks]).astype(np.int64),
            np.concatenate(weights).astype(np.float64) if len(weights) == len(blocks) else None,
            np.concatenate(lores).astype(np.int64) if len(lores) == len(blocks) else None,
            [begin for begin, block in zip(lengths, blocks, strict=False) if not block.continues],
        )
