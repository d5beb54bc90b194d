"""Which experts the tokens of a text went to, for whoever asks: a page, a trace file, an offload simulator.

Shapes: T tokens; K experts of a token; L LoREs of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        layers = self.layers()
        return [_record(layers, token) for token in range(len(layers[0].expert_TK) if layers else 0)]


def _joined(parts: Sequence[Chosen]) -> Chosen:
    lores = [part.lore_TKL for part in parts if part.lore_TKL is not None]
    return Chosen(torch.cat([part.expert_TK for part in parts]), torch.cat([part.weight_TK for part in parts]), torch.cat(lores) if lores else None)


def _record(layers: Sequence[Chosen], token: int) -> TokenRouting:
    experts: list[list[int]] = []
    weights: list[list[float]] = []
    lores: list[list[list[int]]] = []
    for layer in layers:
        expert_K = layer.expert_TK[token].tolist()
        used = [place for place, expert in enumerate(expert_K) if expert >= 0]
        weight_K = layer.weight_TK[token].tolist()
        experts.append([expert_K[place] for place in used])
        weights.append([round(weight_K[place], 4) for place in used])
        lores.append([] if layer.lore_TKL is None else [layer.lore_TKL[token, place].tolist() for place in used])
    return TokenRouting(experts, weights, lores if any(lores) else None)
