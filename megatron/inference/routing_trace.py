"""Which experts the tokens of a text went to, for whoever asks: a page, a trace file, an offload simulator.

Shapes: T tokens; K experts of a token; L LoREs of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from megatron.model.moe.routing import Chosen


class TokenRouting(NamedTuple):
    """The choices for one token, an entry for each MoE layer. Empty choices are left out."""

    experts: list[list[int]]
    weights: list[list[float]]
    """What each expert's output is multiplied by."""
    lores: list[list[list[int]]] | None
    """The LoREs inside each chosen expert, from 0. None: no layer has LoREs that are chosen."""


@dataclass
class RoutingTrace:
    """The choices of a runner's calls. Whoever wants them gives an empty trace to the calls, and the runner adds the tokens of each call in order."""

    calls: list[Sequence[Chosen]] = field(default_factory=list)
    """For each pass through the model what each MoE layer chose."""

    def add(self, layers: Sequence[Chosen]) -> None:
        """Adds the tokens of one pass through the model: what each MoE layer chose for them."""
        self.calls.append(layers)

    def layers(self) -> list[Chosen]:
        """What each MoE layer chose for all tokens. Empty: there is no MoE layer."""
        return [_joined(parts) for parts in zip(*self.calls, strict=True)]

    def tokens(self) -> list[TokenRouting]:
        """A record for each token; no records if there is no MoE layer."""
        by_token = (map(list, zip(*layers, strict=True)) for layers in zip(*map(_by_token, self.layers()), strict=True))
        return [TokenRouting(experts, weights, lores if any(lores) else None) for experts, weights, lores in by_token]


def _joined(parts: Sequence[Chosen]) -> Chosen:
    lores = [part.lore_TKL for part in parts if part.lore_TKL is not None]
    return Chosen(torch.cat([part.expert_TK for part in parts]), torch.cat([part.weight_TK for part in parts]), torch.cat(lores) if lores else None)


def _by_token(layer: Chosen) -> Iterator[tuple[list[int], list[float], list[list[int]]]]:
    """(experts, weights, LoREs inside each of them) of each token."""
    lore_TKL = [[]] * len(layer.expert_TK) if layer.lore_TKL is None else layer.lore_TKL.tolist()
    for expert_K, weight_K, lore_KL in zip(layer.expert_TK.tolist(), layer.weight_TK.tolist(), lore_TKL, strict=True):
        used = [place for place, expert in enumerate(expert_K) if expert >= 0]
        yield [expert_K[place] for place in used], [round(weight_K[place], 4) for place in used], [lore_KL[place] for place in used if lore_KL]
