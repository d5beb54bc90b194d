"""Consecutive tokens: Mixtral's Table 5 and Figure 10, CoSMoEs' ExRep, SRP and SCH, router saturation."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron.analysis.charts.chart import Figure, HeatMap, Lines, Scale, Series, View
from megatron.analysis.page import Captioned, DataTable
from megatron.analysis.routing.findings import Findings, Locality, Model, Saturation
from megatron.analysis.routing.report.frames import (
    COSMOES,
    LOCALITY,
    MIXTRAL,
    OLMOE,
    RANDOM,
    Measure,
    all_of,
    by_layer,
    colour,
    domain_colours,
    domains,
    names_of,
    titled,
)


def repeat_figures(found: Findings) -> Iterator[Figure | None]:
    """The figures of the section."""
    several = any(model.top_k > 1 for model in found.models)
    measures = [Measure("same expert (%)", lambda model: model.repeats.first_GL, lambda model: model.repeats.random_first_L, "first choice")]
    if several:
        measures.append(
            Measure(
                "expert in common (%)",
                lambda model: model.repeats.first_or_second_GL,
                lambda model: model.repeats.random_first_or_second_L,
                "first or second choice",
            )
        )
    yield by_layer(
        found,
        measures,
        Figure(
            "repeats",
            "Repeated experts of consecutive tokens",
            [],
            "The dashed line is what random choices give. Above it, the next token tends to stay with the experts of the token before: good for a "
            "cache of experts, bad for balance within a batch.",
            f"{MIXTRAL}, Figure 10.",
        ),
    )
    yield by_layer(
        found,
        [Measure("ExRep (%)", lambda model: model.repeats.exrep_GL, lambda model: model.repeats.random_exrep_L)],
        Figure(
            "exrep",
            "ExRep: experts replaced from one token to the next",
            [],
            "The share of a token's experts that the token before did not use. An offloaded model must load so many; below the dashed line it loads "
            "fewer than with random choices.",
            f"{COSMOES}, equations 4 and 5, Table 3.",
        ),
    )


def table_5(found: Findings) -> Captioned:
    """Mixtral's Table 5, for each model."""
    return Captioned(
        "Repeated experts by domain",
        [_table_5(found, model) for model in found.models],
        "Percent of the pairs of consecutive tokens that have the same expert, in the first, the middle and the last layer.",
        f"{MIXTRAL}, Table 5.",
    )


def _table_5(found: Findings, model: Model) -> DataTable:
    """Domains by layer."""
    places = sorted({0, (len(model.layers) - 1) // 2, len(model.layers) - 1})
    kinds = [("first choice", "first_GL", "random_first_L")]
    if model.top_k > 1:
        kinds.append(("first or second", "first_or_second_GL", "random_first_or_second_L"))
    rows = [
        [model.groups[one], *(_percent(getattr(model.repeats, name)[one, place]) for _, name, _ in kinds for place in places)]
        for one in domains(model)
    ]
    rows.append(["random choices", *(_percent(getattr(model.repeats, name)[place]) for _, _, name in kinds for place in places)])
    columns = ["Domain", *(f"{kind}, layer {model.layers[place]}" for kind, *_ in kinds for place in places)]
    return DataTable(columns, rows, label=titled(found, model))


def _percent(share: float) -> str:
    return f"{100 * share:.1f}" if np.isfinite(share) else "–"


def locality_figures(found: Findings) -> Iterator[Figure | None]:
    """SRP and SCH."""
    models = [model for model in found.models if model.locality.windows]
    if not models:
        return
    yield _cache_hits(found, models)
    yield _served(found, models)


def _cache_hits(found: Findings, models: list[Model]) -> Figure:
    """SCH over the size of the cache, a line for each window; and by layer for the window in the middle."""
    charts: list[Lines | HeatMap] = []
    for model in models:
        of, place = model.locality, all_of(model)
        series = [
            Series(f"{window} tokens", np.nanmean(of.sch_GLWC[place, :, number], axis=0) * 100, colour(number))
            for number, window in enumerate(of.windows)
        ]
        title = titled(found, model, "mean of the layers")
        charts.append(Lines(title, of.slots, series, "slots (experts)", "SCH (%)", y_range=(0.0, 102.0), logarithmic_x=True))
    for model in models:
        charts.append(_hits_by_layer(found, model, model.locality))
    return Figure(
        "cache_hits",
        "SCH: how much of a window the best cache serves",
        [View("", charts, smallest=400 if len(charts) == 2 else 520)],
        "The share of a window's choices that falls on the experts used most in it, as many as there are slots. It is what a cache of "
        "that size could "
        "hit at best. Short windows are easy; a model whose line falls slowly with the length suits offloading.",
        f"{LOCALITY}: segment cache best hit rate.",
    )


def _hits_by_layer(found: Findings, model: Model, of: Locality) -> HeatMap:
    middle = len(of.windows) // 2
    return HeatMap(
        titled(found, model, f"windows of {of.windows[middle]} tokens"),
        of.sch_GLWC[all_of(model), :, middle] * 100,
        "slots (experts)",
        "layer",
        names_of(of.slots),
        names_of(model.layers),
        Scale(0, 100, "SCH (%)"),
        decimals=0,
        unit=" %",
    )


def _served(found: Findings, models: list[Model]) -> Figure:
    """SRP over the length of the window, by domain."""
    colours = domain_colours(found)
    charts = []
    for model in models:
        of = model.locality
        with np.errstate(all="ignore"):
            srp_GW = np.nanmean(of.srp_GLW, axis=1) * 100
            size_GW = np.nanmean(of.srp_size_GLW, axis=1)
        series = [Series(model.groups[one], srp_GW[one], colours[model.groups[one]]) for one in domains(model)]
        charts.append(Lines(titled(found, model), of.windows, series, "window (tokens)", "SRP (%)", y_range=(0.0, 102.0), logarithmic_x=True))
        sizes = [Series(model.groups[one], size_GW[one], colours[model.groups[one]]) for one in domains(model)]
        charts.append(Lines(titled(found, model, "size of the set"), of.windows, sizes, "window (tokens)", "experts over k", logarithmic_x=True))
    return Figure(
        "best_sets",
        "SRP: how well one set of experts serves a window",
        [View("", charts, smallest=520)],
        "The best F1 of one set of experts for all tokens of a window, and how large that set is, compared with the experts of a token. 100 % means "
        "that all tokens of the window use the same experts.",
        f"{LOCALITY}: segment routing best performance.",
    )


def saturation_figures(of: Saturation) -> Iterator[Figure]:
    """How early the routers decide."""
    names = [f"step {step}" if step is not None else name for step, name in zip(of.iterations, of.names, strict=True)]
    every = all(step is not None for step in of.iterations)
    x = [float(step) for step in of.iterations if step is not None] if every else names
    mean = [
        Series("any choice", of.share_SL.mean(axis=1) * 100, colour(0), low=of.share_SL.min(axis=1) * 100, high=of.share_SL.max(axis=1) * 100),
        Series("first choice", of.first_SL.mean(axis=1) * 100, colour(1)),
        Series("random choices", np.full(len(names), of.random_L.mean() * 100), RANDOM, dashed=True),
    ]
    yield Figure(
        "saturation",
        "Router saturation: how early the routers decide",
        [
            View(
                "",
                [
                    Lines(
                        "mean of the layers", x, mean, "step" if every else "checkpoint", "choices of the last checkpoint (%)", y_range=(0.0, 102.0)
                    ),
                    HeatMap(
                        "by layer",
                        of.share_SL.T * 100,
                        "checkpoint",
                        "layer",
                        names,
                        names_of(of.layers),
                        Scale(0, 100, "same choices (%)"),
                        decimals=0,
                        unit=" %",
                    ),
                ],
                smallest=420,
            )
        ],
        f"The share of the last checkpoint's choices that an earlier one makes already, for the same {of.tokens:,} tokens. The band reaches from the "
        "lowest to the highest layer. OLMoE's authors saw most choices settle early, and in late layers before the first one.",
        f"{OLMOE}, section 5.1.",
    )
