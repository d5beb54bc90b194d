"""Routing in pieces: what every count reads, so that a million tokens are never in memory at once.

A count is a class with `add(view)`, which is called for each block of consecutive tokens, and `found()`, which gives its part of `findings.Model`.

Shapes: D domains; T tokens of a block, after those that are kept of the block before; L layers with experts; E experts of the layer with the most;
        K experts of a token; U LoREs of a token in one expert; M LoREs of an expert; G groups of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron.analysis.routing.findings import ALL, Counts, Floats

Choices = npt.NDArray[Any]
"""Integers; -1 where there is none."""


@dataclass(frozen=True)
class Shape:
    """What is known before the first token."""

    layers: Sequence[int]
    experts_L: Sequence[int]
    top_k: int
    domains: Sequence[str]
    num_lores: int = 0
    """M. 0: there are none."""
    lores_per_token: int = 0
    """U."""

    @property
    def experts(self) -> int:
        """E."""
        return max(self.experts_L)

    @property
    def groups(self) -> list[str]:
        """The domains, and ALL where there are several."""
        return [*self.domains, *([ALL] if len(self.domains) > 1 else [])]

    @cached_property
    def count_L(self) -> Counts:
        """`experts_L` as an array."""
        return np.array(self.experts_L, np.int64)

    @cached_property
    def real_LE(self) -> npt.NDArray[np.bool_]:
        """Whether the layer has the expert."""
        return np.arange(self.experts) < self.count_L[:, None]

    def over_groups(self, value_D: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Counts of domains as counts of groups."""
        return np.concatenate([value_D, value_D.sum(0, keepdims=True)]) if len(self.domains) > 1 else value_D


class Block(NamedTuple):
    """Consecutive tokens of one text."""

    domain: int
    expert_TLK: Choices
    weight_TLK: npt.NDArray[np.float32] | None = None
    """None: not known."""
    token_T: Counts | None = None
    """None: not known."""
    lore_TLKU: Choices | None = None
    """None: there are none."""
    continues: bool = False
    """Whether the first token follows the last one of the block before."""


class View(NamedTuple):
    """A block with the end of the block before, where the text goes on."""

    domain: int
    expert_TLK: Choices
    lore_TLKU: Choices | None
    token_T: Counts | None
    used_TLE: npt.NDArray[np.bool_]
    """Whether a token uses an expert."""
    old: int
    """Tokens at the beginning that have been counted."""
    block: Block
    """The new tokens alone."""

    def follow(self) -> slice:
        """The new tokens that have a token before them in the same text."""
        return slice(max(1, self.old), None)

    def precede(self) -> slice:
        """The tokens before those."""
        return slice(max(1, self.old) - 1, -1)


class Viewer:
    """Keeps the end of a block for the next one."""

    def __init__(self, shape: Shape, keep: int) -> None:
        """`keep`: tokens that a window may reach back."""
        self._shape, self._keep = shape, keep
        self._last: View | None = None

    def view(self, block: Block) -> View:
        """The block as counts read it."""
        before = self._last if block.continues and self._last is not None and self._last.domain == block.domain else None
        old = 0 if before is None else min(self._keep, len(before.expert_TLK))
        expert_TLK, lore_TLKU, token_T = block.expert_TLK, block.lore_TLKU, block.token_T
        used_TLE = used(expert_TLK, self._shape.experts)
        if before is not None and old:
            expert_TLK = np.concatenate([before.expert_TLK[-old:], expert_TLK])
            used_TLE = np.concatenate([before.used_TLE[-old:], used_TLE])
            lore_TLKU = None if lore_TLKU is None or before.lore_TLKU is None else np.concatenate([before.lore_TLKU[-old:], lore_TLKU])
            token_T = None if token_T is None or before.token_T is None else np.concatenate([before.token_T[-old:], token_T])
        self._last = View(block.domain, expert_TLK, lore_TLKU, token_T, used_TLE, old, block)
        return self._last


def used(expert_TLK: Choices, experts: int) -> npt.NDArray[np.bool_]:
    """used_TLE: whether a token uses an expert."""
    found = np.zeros((*expert_TLK.shape[:2], experts + 1), np.bool_)
    np.put_along_axis(found, np.where(expert_TLK < 0, experts, expert_TLK).astype(np.int64), values=True, axis=2)
    return found[:, :, :-1]


def divided(part: npt.NDArray[Any], whole: npt.NDArray[Any]) -> Floats:
    """part / whole; NaN where the whole is 0."""
    part, whole = np.broadcast_arrays(np.asarray(part, np.float64), np.asarray(whole, np.float64))
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole != 0)


def evenness(share: Floats, places: npt.NDArray[Any]) -> Floats:
    """Entropy of the shares (last axis; NaN counts as 0) over log(places): 1 is even. NaN where no share is known or there is one place."""
    known = np.nan_to_num(share)
    entropy = 0.0 - (known * np.log(np.where(known > 0, known, 1))).sum(-1)  # not -0.0
    found = divided(entropy, np.broadcast_to(np.log(np.maximum(places, 1)), entropy.shape))
    return np.where(known.sum(-1) > 0, found, np.nan)


Pieces = Mapping[int, str]
"""The text of each token."""
