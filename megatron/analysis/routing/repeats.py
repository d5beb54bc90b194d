"""How often the next token uses the same experts: Mixtral's Table 5 and Figure 10, CoSMoEs' ExRep. Sources and formulas: `findings.Repeats`.

Random lines: two tokens choose k of E experts each, every set equally likely. The second set misses the first with C(E-k, k) / C(E, k).
"""

from __future__ import annotations

from math import comb

import numpy as np

from megatron.analysis.routing.blocks import Choices, Shape, View, divided
from megatron.analysis.routing.findings import Counts, Floats, Repeats


class RepeatCount:
    """Pairs of consecutive tokens of one text."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        size = len(shape.domains), len(shape.layers)
        self._pairs_D = np.zeros(len(shape.domains), np.int64)
        self._first_DL, self._either_DL, self._any_DL, self._shared_DL, self._used_DL = (np.zeros(size, np.int64) for _ in range(5))
        self._all_used_L, self._tokens = np.zeros(len(shape.layers), np.int64), 0

    def add(self, view: View) -> None:
        """Counts the pairs that end in a new token."""
        self._all_used_L += (view.block.expert_TLK >= 0).sum((0, 2))
        self._tokens += len(view.block.expert_TLK)
        now, before = view.expert_TLK[view.follow()], view.expert_TLK[view.precede()]
        if not len(now):
            return
        shared_PL = (view.used_TLE[view.follow()] & view.used_TLE[view.precede()]).sum(-1)
        self._pairs_D[view.domain] += len(now)
        self._first_DL[view.domain] += ((now[:, :, 0] == before[:, :, 0]) & (now[:, :, 0] >= 0)).sum(0)
        self._either_DL[view.domain] += common(now[:, :, :2], before[:, :, :2]).sum(0)
        self._any_DL[view.domain] += (shared_PL > 0).sum(0)
        self._shared_DL[view.domain] += shared_PL.sum(0)
        self._used_DL[view.domain] += view.used_TLE[view.follow()].sum((0, 2))

    def found(self, top_k_L: Floats) -> Repeats:
        """Of all tokens so far. `top_k_L`: mean number of experts that a token uses, for the random lines."""
        over = self._shape.over_groups
        pairs_G, used_GL = over(self._pairs_D), over(self._used_DL)
        experts = self._shape.experts_L
        return Repeats(
            pairs_G,
            divided(over(self._first_DL), pairs_G[:, None]),
            divided(over(self._either_DL), pairs_G[:, None]),
            divided(over(self._any_DL), pairs_G[:, None]),
            np.array([1 / count for count in experts]),
            np.array([random_overlap(count, min(2, k)) for count, k in zip(experts, top_k_L, strict=True)]),
            np.array([random_overlap(count, k) for count, k in zip(experts, top_k_L, strict=True)]),
            1 - divided(over(self._shared_DL), used_GL),
            np.array([1 - k / count for count, k in zip(experts, top_k_L, strict=True)]),
        )

    @property
    def used_per_token_L(self) -> Floats:
        """Experts of a token, the mean over all tokens."""
        return divided(self._all_used_L, np.array(self._tokens))


def common(now_PLK: Choices, before_PLK: Choices) -> Counts:
    """common_PL: whether the two tokens of a pair have a choice in common."""
    same_PLKK = (now_PLK[..., :, None] == before_PLK[..., None, :]) & (now_PLK[..., :, None] >= 0)
    return same_PLKK.any((-1, -2)).astype(np.int64)


def random_overlap(experts: int, chosen: float) -> float:
    """1 - C(E-k, k) / C(E, k): that two random choices of k of E experts have one in common. Between whole k the line is straight."""
    low = int(chosen)
    return _overlap(experts, low) * (low + 1 - chosen) + _overlap(experts, low + 1) * (chosen - low)


def _overlap(experts: int, chosen: int) -> float:
    chosen = min(chosen, experts)
    return 1 - comb(experts - chosen, chosen) / comb(experts, chosen)
