"""Which texts and tokens an expert gets (OLMoE, arXiv 2409.02060, sections 5.3 and 5.4). Formulas: `findings.Specialisation`.

A table of all tokens by all experts of all layers would not fit a memory. Rows are kept for the tokens that occur most often, as many as `BUDGET`
allows, and only for those that occur `LEAST` times: what is rare cannot be told from chance.

Shapes: V different tokens that have a row; and those of `blocks.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.analysis.routing.blocks import Pieces, Shape, View, divided
from megatron.analysis.routing.findings import ExpertTokens, Floats, Load, Specialisation, TokenShare

BUDGET = 96 << 20
"""Bytes of one table; there are three."""
LEAST = 20
SURE = 0.95
SEED = 1234
"""Of the halves: text may repeat in step with any rule."""
MOST_ENTRIES = 20_000
"""Tokens in the result: with many experts each gets a shorter list."""


class TokenCount:
    """How often each token goes to each expert: in two halves of the occurrences, and for the token that comes next."""

    def __init__(self, shape: Shape, occurrences: Mapping[int, int]) -> None:
        """`occurrences` of each token in all text, from which the rows are chosen. Empty: the tokens are not known."""
        self._shape, self._rng = shape, np.random.default_rng(SEED)
        cells = len(shape.layers) * shape.experts
        often = sorted((token for token, count in occurrences.items() if count >= LEAST), key=lambda token: (-occurrences[token], token))
        self._tokens = np.array(often[: max(1, BUDGET // (4 * cells))], np.int64)
        self._row_of = np.full(max(occurrences, default=-1) + 1, -1, np.int64)
        self._row_of[self._tokens] = np.arange(len(self._tokens))
        self._half_2VLE, self._next_VLE = (np.zeros((*part, len(self._tokens), len(shape.layers), shape.experts), np.int32) for part in ((2,), ()))
        self._occurred_2V, self._followed_V = np.zeros((2, len(self._tokens)), np.int64), np.zeros(len(self._tokens), np.int64)

    def add(self, view: View) -> None:
        """Counts the new tokens; those that come next, from their second token on."""
        token_T, block = view.block.token_T, view.block
        if token_T is None or not len(self._tokens):
            return
        row_T = self._row_of[token_T]
        half_T = self._rng.integers(0, 2, len(row_T))
        for half in (0, 1):
            own_T = (row_T >= 0) & (half_T == half)
            _count(self._half_2VLE[half], row_T[own_T], block.expert_TLK[own_T])
            np.add.at(self._occurred_2V[half], row_T[own_T], 1)
        if view.token_T is not None:
            following_P = self._row_of[view.token_T[view.follow()]]
            known_P = following_P >= 0
            _count(self._next_VLE, following_P[known_P], view.expert_TLK[view.precede()][known_P])
            np.add.at(self._followed_V, following_P[known_P], 1)

    def found(self, load: Load, tokens_G: npt.NDArray[np.int64], pieces: Pieces) -> Specialisation:
        """Of all tokens so far."""
        total_GLE = load.choice_GLKE.sum(2)
        domain_GLE = np.where(self._shape.real_LE, divided(total_GLE, tokens_G[:, None, None]), np.nan)
        distance_GL = np.nansum(np.abs(load.either_GLE - load.either_GLE[-1]), -1) / 2
        return Specialisation(
            domain_GLE,
            np.where(total_GLE.any(-1), distance_GL, np.nan),
            self._vocabulary_L(),
            np.nanmax(domain_GLE[-1], -1),
            LEAST,
            len(self._tokens),
            self._lists(self._half_2VLE.sum(0), self._occurred_2V.sum(0), domain_GLE[-1], pieces),
            self._lists(self._next_VLE, self._followed_V, domain_GLE[-1], pieces),
        )

    def _vocabulary_L(self) -> Floats:
        """The expert is chosen on one half and measured on the other."""
        hits_L, total = np.zeros(len(self._shape.layers)), 0
        for half in (0, 1):
            best_VL = self._half_2VLE[half].argmax(-1)
            known_V = self._occurred_2V[half] > 0
            other = np.take_along_axis(self._half_2VLE[1 - half], best_VL[..., None], -1)[..., 0]
            hits_L += other[known_V].sum(0)
            total += int(self._occurred_2V[1 - half][known_V].sum())
        return divided(hits_L, np.full(len(hits_L), total))

    def _lists(self, count_VLE: npt.NDArray[Any], total_V: npt.NDArray[np.int64], base_LE: Floats, pieces: Pieces) -> list[ExpertTokens]:
        if not len(self._tokens):
            return []
        z = NormalDist().inv_cdf(1 - (1 - SURE) / 2 / len(self._tokens))
        length = max(1, min(10, MOST_ENTRIES // sum(self._shape.experts_L)))
        found = []
        for place, layer in enumerate(self._shape.layers):
            lower_VE = divided(wilson_lower(count_VLE[:, place], total_V[:, None], z), base_LE[place])
            for expert in range(self._shape.experts_L[place]):
                best = np.argsort(-np.nan_to_num(lower_VE[:, expert]), kind="stable")[:length]
                kept = [int(row) for row in best if lower_VE[row, expert] > 1]
                base = float(base_LE[place, expert])
                shares = [self._share(row, int(count_VLE[row, place, expert]), int(total_V[row]), pieces) for row in kept]
                lifted = [
                    replace(share, lift=share.share / base, lower=float(lower_VE[row, expert])) for row, share in zip(kept, shares, strict=True)
                ]
                found.append(ExpertTokens(int(layer), expert, lifted))
        return found

    def _share(self, row: int, count: int, total: int, pieces: Pieces) -> TokenShare:
        token = int(self._tokens[row])
        return TokenShare(token, pieces.get(token, str(token)), count, total, count / total, lift=0.0, lower=0.0)


def _count(table_VLE: npt.NDArray[np.int32], row_P: npt.NDArray[np.int64], expert_PLK: npt.NDArray[Any]) -> None:
    _, layers, experts = table_VLE.shape
    code_PLK = (row_P[:, None, None] * layers + np.arange(layers)[:, None]) * experts + expert_PLK
    np.add.at(table_VLE.reshape(-1), code_PLK[expert_PLK >= 0], 1)


def wilson_lower(count: npt.NDArray[Any], total: npt.NDArray[Any], z: float) -> Floats:
    """The lower end of Wilson's interval for count/total at z standard deviations (Wilson, 1927). NaN without occurrences."""
    share = divided(count, total)
    middle = share + z * z / (2 * np.maximum(total, 1))
    reach = z * np.sqrt(share * (1 - share) / np.maximum(total, 1) + (z / (2 * np.maximum(total, 1))) ** 2)
    return (middle - reach) / (1 + z * z / np.maximum(total, 1))
