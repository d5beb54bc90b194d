"""One level down: the LoREs within each expert of a StructMoE (load, entropy, coverage, co-selection). Formulas: `findings.LoreFindings`."""

from __future__ import annotations

import numpy as np

from megatron.analysis.routing.blocks import Shape, View, divided, evenness
from megatron.analysis.routing.findings import Counts, Floats, LoreFindings
from megatron.analysis.routing.repeats import random_overlap

COVERED = 0.9
MOST_CELLS = 300_000
"""Of the matrices of co-selection, which lie in the result."""


class LoreCount:
    """Rows of each LoRE, pairs of LoREs of one row, and pairs of consecutive tokens."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        cells = len(shape.layers), shape.experts, shape.num_lores
        self._count_DLEM = np.zeros((len(shape.domains), *cells), np.int64)
        self._rows_DLE = np.zeros(self._count_DLEM.shape[:-1], np.int64)
        together = shape.lores_per_token > 1 and int(np.prod(cells)) * shape.num_lores <= MOST_CELLS
        self._pair_LEMM = np.zeros((*cells, shape.num_lores), np.int64) if together else None
        self._same_expert_DL, self._same_lore_DL = (np.zeros((len(shape.domains), len(shape.layers)), np.int64) for _ in range(2))

    def add(self, view: View) -> None:
        """Counts the new tokens."""
        lore_TLKU, expert_TLK = view.block.lore_TLKU, view.block.expert_TLK
        if lore_TLKU is None or view.lore_TLKU is None:
            return
        layers, experts, lores = self._count_DLEM.shape[1:]
        row_TLK = np.arange(layers)[:, None] * experts + expert_TLK.astype(np.int64)
        code_TLKU = row_TLK[..., None] * lores + lore_TLKU
        there_TLKU = (expert_TLK >= 0)[..., None] & (lore_TLKU >= 0)
        counts = np.bincount(code_TLKU[there_TLKU], minlength=layers * experts * lores)
        self._count_DLEM[view.domain] += counts.reshape(layers, experts, lores)
        routed_TLK = there_TLKU.any(-1)
        self._rows_DLE[view.domain] += np.bincount(row_TLK[routed_TLK], minlength=layers * experts).reshape(layers, experts)
        if self._pair_LEMM is not None:
            for u in range(lore_TLKU.shape[-1]):
                pair_TLKU = (code_TLKU[..., u : u + 1] * lores + lore_TLKU)[there_TLKU & there_TLKU[..., u : u + 1]]
                self._pair_LEMM += np.bincount(pair_TLKU, minlength=self._pair_LEMM.size).reshape(self._pair_LEMM.shape)
        self._add_pairs(view, view.lore_TLKU)

    def _add_pairs(self, view: View, lore_TLKU: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> None:
        """Consecutive tokens that use the same expert, at whichever place."""
        now, before = view.expert_TLK[view.follow()], view.expert_TLK[view.precede()]
        lore_now, lore_before = lore_TLKU[view.follow()], lore_TLKU[view.precede()]
        for i in range(now.shape[2]):
            for j in range(now.shape[2]):
                same_PL = (
                    (now[:, :, i] == before[:, :, j]) & (now[:, :, i] >= 0) & (lore_now[:, :, i] >= 0).any(-1) & (lore_before[:, :, j] >= 0).any(-1)
                )
                lores_PLUU = (lore_now[:, :, i, :, None] == lore_before[:, :, j, None, :]) & (lore_now[:, :, i, :, None] >= 0)
                self._same_expert_DL[view.domain] += same_PL.sum(0)
                self._same_lore_DL[view.domain] += (same_PL & lores_PLUU.any((-1, -2))).sum(0)

    def found(self) -> LoreFindings:
        """Of all tokens so far."""
        over, lores, per_token = self._shape.over_groups, self._shape.num_lores, self._shape.lores_per_token
        count_GLEM, rows_GLE = over(self._count_DLEM), over(self._rows_DLE)
        share_GLEM = divided(count_GLEM, count_GLEM.sum(-1, keepdims=True))
        return LoreFindings(
            lores,
            per_token,
            count_GLEM,
            evenness(share_GLEM, np.array(lores)),
            np.abs(share_GLEM - 1 / lores).mean(-1),
            np.where(rows_GLE > 0, (count_GLEM == 0).sum(-1), 0),
            np.where(rows_GLE > 0, lores * (1 - per_token / lores) ** rows_GLE.astype(np.float64), np.nan),
            coverage(count_GLEM),
            None if self._pair_LEMM is None else _together(self._pair_LEMM),
            (per_token - 1) / (lores - 1) if lores > 1 else float("nan"),
            divided(over(self._same_lore_DL), over(self._same_expert_DL)),
            random_overlap(lores, per_token),
        )


def coverage(count: Counts) -> Floats:
    """Last axis: the share of the places that COVERED of the counts need, the largest first. NaN without counts."""
    ordered = -np.sort(-count, -1)
    total = ordered.sum(-1)
    needed = (ordered.cumsum(-1) < COVERED * total[..., None]).sum(-1) + 1
    return np.where(total > 0, needed / count.shape[-1], np.nan)


def _together(pair_LEMM: Counts) -> Floats:
    own_LEM = np.diagonal(pair_LEMM, axis1=-2, axis2=-1)
    share = divided(pair_LEMM, own_LEM[..., None])
    share[..., np.arange(share.shape[-1]), np.arange(share.shape[-1])] = np.nan
    return share
