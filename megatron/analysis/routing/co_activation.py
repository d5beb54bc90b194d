"""Which experts work together (OLMoE, arXiv 2409.02060, section 5.2). Formulas: `findings.CoActivation`."""

from __future__ import annotations

import numpy as np

from megatron.analysis.routing.blocks import Shape, View, divided
from megatron.analysis.routing.findings import CoActivation, Counts, Floats, Pair

SHOWN = 32
"""Most experts of a layer in the matrix, as in OLMoE's Figure 20."""
PAIRS = 8


class CoActivationCount:
    """Pairs of experts of the same token."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._pair_LEE = np.zeros((len(shape.layers), shape.experts, shape.experts), np.int64)

    def add(self, view: View) -> None:
        """Counts the new tokens."""
        used_LTE = view.used_TLE[view.old :].transpose(1, 0, 2).astype(np.float32)
        self._pair_LEE += np.rint(used_LTE.transpose(0, 2, 1) @ used_LTE).astype(np.int64)

    def found(self, top_k_L: Floats) -> CoActivation | None:
        """None: tokens use one expert. `top_k_L`: mean number of experts that a token uses."""
        if self._shape.top_k < 2:
            return None
        shown_LH = np.array([self._shown(place) for place in range(len(self._shape.layers))])
        share = [self._share(place, [expert for expert in row if expert >= 0], shown_LH.shape[1]) for place, row in enumerate(shown_LH.tolist())]
        random_L = divided(top_k_L - 1, self._shape.count_L - 1)
        return CoActivation(shown_LH, np.array(share), random_L, [pair for place in range(len(share)) for pair in self._pairs(place)])

    def _shown(self, place: int) -> list[int]:
        count, width = self._shape.experts_L[place], min(SHOWN, self._shape.experts)
        pair_EE = self._pair_LEE[place, :count, :count]
        in_pairs_E = pair_EE.sum(1) - pair_EE.diagonal()
        chosen = sorted(int(expert) for expert in np.argsort(-in_pairs_E, kind="stable")[:width])
        return chosen + [-1] * (width - len(chosen))

    def _share(self, place: int, experts: list[int], width: int) -> Floats:
        pair_HH = self._pair_LEE[place][np.ix_(experts, experts)]
        share_HH = np.full((width, width), np.nan)
        share_HH[: len(experts), : len(experts)] = divided(pair_HH, pair_HH.diagonal()[:, None])
        np.fill_diagonal(share_HH, np.nan)
        return share_HH

    def _pairs(self, place: int) -> list[Pair]:
        """By the lower end of what the lift may be (three standard deviations of a count), so that a rare pair does not win by chance."""
        pair_EE: Counts = self._pair_LEE[place]
        lift_EE = lifts(pair_EE)
        lower_EE = np.triu(np.nan_to_num(lift_EE) * (1 - 3 / np.sqrt(np.maximum(pair_EE, 1))), 1)
        best = [divmod(int(code), len(pair_EE)) for code in np.argsort(-lower_EE, axis=None, kind="stable")[:PAIRS]]
        layer = int(self._shape.layers[place])
        return [Pair(layer, i, j, int(pair_EE[i, j]), float(lift_EE[i, j])) for i, j in best if lower_EE[i, j] > 1]


def lifts(pair_EE: Counts) -> Floats:
    """Tokens of each pair over the number that chance would give: pairs in proportion to both experts' loads (on the diagonal), as many in all."""
    off_EE = pair_EE * ~np.eye(len(pair_EE), dtype=np.bool_)
    load_E = pair_EE.diagonal().astype(np.float64)
    expected_EE = np.outer(load_E, load_E) * ~np.eye(len(pair_EE), dtype=np.bool_)
    return divided(off_EE, expected_EE * (off_EE.sum() / max(expected_EE.sum(), 1)))
