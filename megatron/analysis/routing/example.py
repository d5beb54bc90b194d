"""Findings of a random trace: for tests, and for whoever draws them."""

from __future__ import annotations

from collections import Counter

import numpy as np

from megatron.analysis.routing.findings import Findings
from megatron.analysis.routing.from_trace import blocks_of, shape_of
from megatron.analysis.routing.saturation import Kept, saturation
from megatron.analysis.routing.tally import Measures, Origin, Tally
from megatron.monitor.routing_trace import Numbers, Trace

WORDS = ["the", "of", "and", "to", "in", "is", "def", "self", "return", "import", "=", "(", ")", ":", ",", "0", "1", "2", "+", "Question"]


def random_trace(tokens: int = 2000, *, experts: int = 8, top_k: int = 2, layers: int = 4, lores: int = 4, seed: int = 0) -> Trace:
    """Every set of experts is equally likely, and so is every LoRE. `lores` 0: there are none. Half of the tokens are of each of two domains."""
    rng = np.random.default_rng(seed)
    expert_TLK = _random_sets(rng, (tokens, layers), experts)[..., :top_k]
    lore_TLKM = _random_sets(rng, (tokens, layers, top_k), lores)[..., :2] if lores else None
    weight_TLK = -np.sort(-rng.dirichlet(np.ones(top_k), (tokens, layers))).astype(np.float32)
    sequence_T = np.arange(tokens) // 250
    return Trace(
        np.arange(tokens),
        list(range(layers)),
        expert_TLK,
        experts,
        lore_TLKM,
        lores,
        weight_TLK,
        token_T=rng.integers(0, len(WORDS), tokens),
        sequence_T=sequence_T,
        domain_T=(np.arange(tokens) * 2 // max(1, tokens)).astype(np.int64),
        domains=("prose", "code"),
        pieces=dict(enumerate(WORDS)),
        model="random",
    )


def _random_sets(rng: np.random.Generator, shape: tuple[int, ...], size: int) -> Numbers:
    order: Numbers = rng.random((*shape, size)).argsort(-1)
    return order


def example(tokens: int = 2000, *, models: int = 2, lores: int = 4) -> Findings:
    """A report's content: one or several models with random routing, each with everything that can be measured."""
    found, kept = [], []
    for number in range(models):
        trace = random_trace(tokens, lores=lores, seed=number)
        shape = shape_of(trace)
        assert trace.token_T is not None
        tally = Tally(shape, Measures(), Counter(trace.token_T.tolist()))
        for block in blocks_of(trace):
            tally.add(block)
        origin = Origin(f"random {number}", f"random{number}.npz", "trace", 100 * (number + 1))
        found.append(tally.found(origin, trace.pieces or {}, seconds=1.0))
        kept.append(Kept(origin.name, origin.iteration, shape.layers, shape.experts_L, np.arange(tokens), trace.expert_TLK))
    compared = saturation(kept)
    return Findings(found, None if isinstance(compared, str) else compared, ["The routing is random."])
