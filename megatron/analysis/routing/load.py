"""Which experts the tokens went to: Mixtral's Figures 7 and 9, CoSMoEs' Figure 6, dead experts. Sources and formulas: `findings.Load`."""

from __future__ import annotations

import numpy as np

from megatron.analysis.routing.blocks import Block, Shape, View, divided, evenness
from megatron.analysis.routing.findings import PERCENTILES, Counts, Floats, Load


class LoadCount:
    """How often each expert was first, second, ... choice."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._choice_DLKE = np.zeros((len(shape.domains), len(shape.layers), shape.top_k, shape.experts), np.int64)
        self._weight_LK = np.zeros((len(shape.layers), shape.top_k))
        self._weighed_LK = np.zeros((len(shape.layers), shape.top_k), np.int64)
        self.tokens_D = np.zeros(len(shape.domains), np.int64)

    def add(self, view: View) -> None:
        """Counts the new tokens."""
        block = view.block
        self._choice_DLKE[block.domain] += choice_counts(block, self._shape)
        self.tokens_D[block.domain] += len(block.expert_TLK)
        if block.weight_TLK is not None:
            there_TLK = block.expert_TLK >= 0
            self._weight_LK += np.where(there_TLK, block.weight_TLK, 0).sum(0, dtype=np.float64)
            self._weighed_LK += there_TLK.sum(0)

    def found(self) -> Load:
        """Of all tokens so far."""
        choice_GLKE = self._shape.over_groups(self._choice_DLKE)
        return load_of(choice_GLKE, self._shape, weight_LK=divided(self._weight_LK, self._weighed_LK))


def choice_counts(block: Block, shape: Shape) -> Counts:
    """choice_LKE of the new tokens."""
    _, layers, top_k = block.expert_TLK.shape
    slot_LK = np.arange(layers * top_k).reshape(layers, top_k)
    code_TLK = slot_LK * (shape.experts + 1) + np.where(block.expert_TLK < 0, shape.experts, block.expert_TLK)
    counts = np.bincount(code_TLK.ravel(), minlength=layers * top_k * (shape.experts + 1))
    return counts.reshape(layers, top_k, shape.experts + 1)[:, :, :-1]


def load_of(choice_GLKE: Counts, shape: Shape, *, weight_LK: Floats) -> Load:
    """The measures of these counts."""
    real_LE, count_L = shape.real_LE, shape.count_L
    total_GLE = choice_GLKE.sum(2)
    either_GLE = _shares(total_GLE, real_LE)
    second = choice_GLKE[:, :, 1] if choice_GLKE.shape[2] > 1 else np.zeros_like(total_GLE)
    over_mean_GLE = either_GLE * count_L[:, None]
    groups, layers = over_mean_GLE.shape[:2]
    return Load(
        choice_GLKE,
        _shares(choice_GLKE[:, :, 0], real_LE),
        _shares(second, real_LE),
        either_GLE,
        1 / count_L,
        np.array([[_mean_distance(either_GLE[g, i], count_L[i]) for i in range(layers)] for g in range(groups)]),
        evenness(either_GLE, count_L),
        np.array([[_percentiles(over_mean_GLE[g, i]) for i in range(layers)] for g in range(groups)]),
        np.array([_percentiles(over_mean_GLE[g].ravel()) for g in range(groups)]),
        ((total_GLE == 0) & real_LE).sum(-1),
        weight_LK,
    )


def _shares(count_GLE: Counts, real_LE: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> Floats:
    return np.where(real_LE, divided(count_GLE, count_GLE.sum(-1, keepdims=True)), np.nan)


def _mean_distance(share_E: Floats, experts: int) -> float:
    """delta uniform of one layer."""
    return float(np.abs(share_E[:experts] - 1 / experts).mean())


def _percentiles(load_N: Floats) -> Floats:
    known = load_N[~np.isnan(load_N)]
    return np.percentile(known, PERCENTILES) if len(known) else np.full(len(PERCENTILES), np.nan)
