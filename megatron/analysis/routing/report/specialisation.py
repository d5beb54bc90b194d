"""What experts are chosen for, and together with which others: OLMoE's section 5."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from megatron.analysis.charts.chart import Figure, HeatMap, Scale, View, ratio_colours, ratio_scale
from megatron.analysis.page import Captioned, Choice, DataTable, Part
from megatron.analysis.routing.findings import CoActivation, ExpertTokens, Findings, Model, TokenShare
from megatron.analysis.routing.report.frames import (
    LAYER,
    OLMOE,
    Measure,
    by_layer,
    domains,
    few_layers,
    left_out,
    names_of,
    titled,
    visible,
    with_layer,
)

TABLE_EXPERTS = 32
TABLE_TOKENS = 10
"""Of each expert at most so many tokens, and of each layer at most so many experts, those surest above chance."""


def specialisation_figures(found: Findings) -> Iterator[Figure | None]:
    """The figures of the section."""
    yield _domains(found)
    yield by_layer(
        found,
        [
            Measure("distance from all text (%)", lambda model: model.specialisation.domain_distance_GL, title="domains", compared=False),
            Measure(
                "same expert (%)",
                lambda model: np.broadcast_to(model.specialisation.vocabulary_L, (len(model.groups), len(model.layers))),
                lambda model: model.specialisation.vocabulary_even_L,
                "vocabulary",
                by_domain=False,
                reference="if the token made no difference",
            ),
        ],
        Figure(
            "specialisation",
            "How far experts specialise, layer by layer",
            [],
            "Domains: how much of a domain's choices would have to move to look like those of all text; 0 is no specialisation. "
            "Vocabulary: how often a "
            "token goes to the expert that it mostly goes to; the dashed line is what the busiest expert alone would give.",
            f"{OLMOE}, sections 5.3 and 5.4.",
        ),
    )


def _domains(found: Findings) -> Figure | None:
    """Domain by expert; a menu of layers. None: there is one domain."""
    scale = ratio_scale("over k/E")
    views = []
    for layer in few_layers(found):
        charts = []
        for model, place in with_layer(found, layer):
            if len(domains(model)) > 1:
                share_GE = model.specialisation.domain_GLE[domains(model), place, : model.experts_L[place]]
                even = model.experts_per_token / model.experts_L[place]
                names = [model.groups[one] for one in domains(model)]
                columns = names_of(range(share_GE.shape[1]))
                charts.append(
                    HeatMap(
                        titled(found, model),
                        ratio_colours(share_GE, even),
                        "expert",
                        "domain",
                        columns,
                        names,
                        scale,
                        shown_YX=share_GE * 100,
                        unit=" % of the tokens",
                    )
                )
        if charts:
            views.append(View(str(layer), charts, smallest=560))
    if not views:
        return None
    caption = (
        "The numbers are percent of the domain's tokens that use the expert. White is what chance gives, k/E. "
        "A column with one red cell is an expert of one domain."
    )
    return Figure(
        "domain_specialisation",
        "Domain specialisation",
        views,
        f"{caption}{left_out(found)}",
        f"{OLMOE}, section 5.3.",
        menu="Layer",
        group=LAYER,
    )


def token_tables(found: Findings) -> Captioned | None:
    """The tokens that each expert gets most above chance; a menu of layers. None: the traces have no tokens, or no expert has such tokens."""
    options: list[tuple[str, Sequence[Part]]] = []
    for layer in few_layers(found):
        tables = [_table(found, model, layer) for model, _ in with_layer(found, layer)]
        if any(table.rows for table in tables):
            options.append((str(layer), [table for table in tables if table.rows]))
    if not options:
        return None
    least = found.models[0].specialisation.least_count
    return Captioned(
        "Tokens that an expert gets most above chance",
        [Choice("Layer", options, LAYER)],
        f"The number is how many times more often than the average token it goes to the expert; the surest come first. Tokens that occur "
        f"fewer than {least:,} "
        f"times are left out, and so are experts without a token that is surely above chance. Of a layer at most {TABLE_EXPERTS} experts are listed."
        f"{left_out(found)} ␣ is a space, ⏎ the end of a line.",
        f"{OLMOE}, section 5.4.",
    )


def _table(found: Findings, model: Model, layer: int) -> DataTable:
    def surest(listed: ExpertTokens) -> float:
        return -max((one.lower for one in listed.tokens), default=0.0)

    nexts = {one.expert: one for one in model.specialisation.predicted if one.layer == layer}
    listed = [one for one in model.specialisation.tokens if one.layer == layer and (one.tokens or (one.expert in nexts and nexts[one.expert].tokens))]
    kept = sorted(sorted(listed, key=surest)[:TABLE_EXPERTS], key=lambda one: one.expert)
    rows = [
        [str(one.expert), _listed(one.tokens), *([_listed(nexts[one.expert].tokens) if one.expert in nexts else ""] if nexts else [])] for one in kept
    ]
    columns = ["Expert", "Tokens it reads", *(["Tokens that follow"] if nexts else [])]
    return DataTable(columns, rows, numbers=False, label=titled(found, model))


def _listed(tokens: Sequence[TokenShare]) -> str:
    return "   ".join(f"{visible(one.piece)}\u00a0{one.lift:.1f}×" for one in tokens[:TABLE_TOKENS])


def co_activation_figure(found: Findings) -> Figure | None:
    """Expert by expert; a menu of layers. None: every token has one expert."""
    high = max((float(np.nanmax(model.co_activation.share_LHH, initial=0.0)) for model in found.models if model.co_activation), default=0.0)
    if high == 0.0:
        return None
    scale = Scale(0, high * 100, "of its tokens (%)")
    views = []
    for layer in few_layers(found):
        charts = [_pairs(titled(found, model), model.co_activation, place, scale) for model, place in with_layer(found, layer) if model.co_activation]
        if charts:
            views.append(View(str(layer), charts, smallest=480))
    randoms = sorted({f"{100 * float(value):.1f} %" for model in found.models if model.co_activation for value in model.co_activation.random_L})
    return Figure(
        "co_activation",
        "Experts that work together",
        views,
        f"Of the tokens of the expert in the row, the share that the expert in the column got as well. Random choices give "
        f"{' or '.join(randoms[:3])}. A bright "
        f"cell is a pair that often works on the same token: place both on one process.{left_out(found)}",
        f"{OLMOE}, section 5.2.",
        menu="Layer",
        group=LAYER,
    )


def _pairs(title: str, of: CoActivation, place: int, scale: Scale) -> HeatMap:
    shown_H = of.shown_LH[place]
    real = shown_H >= 0
    names = names_of(shown_H[real].tolist())
    return HeatMap(title, of.share_LHH[place][np.ix_(real, real)] * 100, "expert", "expert", names, names, scale, unit=" % of its tokens")


def pair_table(found: Findings) -> DataTable | None:
    """The surest pairs of all layers. None: there are none."""
    rows = [
        [titled(found, model, f"layer {pair.layer}"), f"{pair.first} and {pair.second}", f"{pair.tokens:,}", f"{pair.lift:.2f}×"]
        for model in found.models
        if model.co_activation
        for pair in sorted(model.co_activation.pairs, key=lambda pair: -pair.lift)[:16]
    ]
    if not rows:
        return None
    return DataTable(["Where", "Experts", "Tokens with both", "Over chance"], rows, label="Pairs that are surely together more often than by chance.")
