"""Single tokens: Mixtral's Figure 8 (text in the colours of experts) and CoSMoEs' Figure 5 (experts that come and go)."""

from __future__ import annotations

import numpy as np

from megatron.analysis.charts.chart import TWO_TONE, Figure, HeatMap, Scale, View
from megatron.analysis.page import Captioned, Choice, Part, Tokens
from megatron.analysis.routing.findings import Counts, Findings, Model, Sample
from megatron.analysis.routing.report.frames import COSMOES, LAYER, MIXTRAL, few_layers, left_out, names_of, titled, visible, with_layer

SHOWN = 48
"""Tokens in the picture of experts that come and go."""


def coloured_text(found: Findings) -> Captioned | None:
    """The texts, with a menu of domains. None: no sample was kept."""
    options: list[tuple[str, list[Part]]] = []
    for model in found.models:
        options += [(titled(found, model, sample.domain), [_tokens(model, sample)]) for sample in model.samples if sample.pieces]
    if not options:
        return None
    return Captioned(
        "Text in the colours of experts",
        [Choice("Text", options)] if len(options) > 1 else options[0][1],
        "Each token has the colour of its first expert in the chosen layer. Under the pointer, or with the arrow keys, a token shows its "
        "experts in all "
        "layers, their weights, and the LoREs inside them. Mixtral's authors saw that routing follows syntax more than topic: look at indentation, "
        "punctuation and the parts of words.",
        f"{MIXTRAL}, Figure 8.",
    )


def _tokens(model: Model, sample: Sample) -> Tokens:
    """The sample in the form of the page: without the places that are empty, the layer first."""
    chosen_NLK = sample.expert_NLK >= 0
    layers = range(len(model.layers))
    places = range(len(sample.pieces))
    experts = [[sample.expert_NLK[n, layer][chosen_NLK[n, layer]].tolist() for n in places] for layer in layers]
    weights = lores = None
    if sample.weight_NLK is not None:
        rounded = np.nan_to_num(sample.weight_NLK).round(3)
        weights = [[rounded[n, layer][chosen_NLK[n, layer]].tolist() for n in places] for layer in layers]
    if sample.lore_NLKU is not None:
        lores = [[[_real(row) for row in sample.lore_NLKU[n, layer][chosen_NLK[n, layer]]] for n in places] for layer in layers]
    return Tokens(sample.pieces, model.layers, experts, model.experts_L, weights=weights, lores=lores, group=f"text of {model.name}")


def _real(row: Counts) -> list[int]:
    numbers: list[int] = row[row >= 0].tolist()
    return numbers


def expert_swaps(found: Findings) -> Figure | None:
    """Experts by the first tokens of the first sample, for every model. None: no sample was kept."""
    views = []
    for layer in few_layers(found):
        charts = [
            _swaps(found, model, model.samples[0], layer)
            for model, _ in with_layer(found, layer)
            if model.samples and len(model.samples[0].pieces) > 1
        ]
        if charts:
            views.append(View(str(layer), charts, smallest=900))
    if not views:
        return None
    return Figure(
        "expert_swaps",
        "Experts that come and go",
        views,
        "A dark cell is an expert that the token uses. A dark cell without a dark neighbour on its left is an expert that has to be "
        "loaded if only the "
        f"experts of the token before are in memory.{left_out(found)}",
        f"{COSMOES}, Figure 5.",
        menu="Layer",
        group=LAYER,
    )


def _swaps(found: Findings, model: Model, sample: Sample, layer: int) -> HeatMap:
    place = model.layers.index(layer)
    chosen_NK = sample.expert_NLK[:SHOWN, place]
    used_NE = np.zeros((len(chosen_NK), model.experts_L[place]), dtype=bool)
    token_place, choice = np.nonzero(chosen_NK >= 0)
    used_NE[token_place, chosen_NK[token_place, choice]] = True
    pairs = [n for n in range(1, len(used_NE)) if n not in set(sample.starts)]
    loaded = int(sum((used_NE[n] & ~used_NE[n - 1]).sum() for n in pairs))
    kept_E = np.flatnonzero(used_NE.any(axis=0)) if used_NE.shape[1] > 16 else np.arange(used_NE.shape[1])
    return HeatMap(
        titled(found, model, f"{sample.domain}: {loaded} replacements, {int(used_NE.any(axis=0).sum())} of {used_NE.shape[1]} experts used"),
        used_NE[:, kept_E].T.astype(np.float64),
        "token",
        "expert",
        [f"{n} {visible(piece)}" for n, piece in enumerate(sample.pieces[:SHOWN])],
        names_of(kept_E.tolist()),
        Scale(0, 1, "used", TWO_TONE, bar=False),
        decimals=0,
    )
