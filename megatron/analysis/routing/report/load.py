"""Which experts the tokens go to: Mixtral's Figures 7 and 9, CoSMoEs' Figure 6, percentiles across layers, expert parallelism."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron.analysis.charts.chart import Bars, Figure, HeatMap, Lines, Series, View, ratio_colours, ratio_scale, span_of
from megatron.analysis.routing.findings import PERCENTILES, Findings, Load, Model
from megatron.analysis.routing.report.frames import (
    COSMOES,
    LAYER,
    MIXTRAL,
    Floats,
    Measure,
    all_of,
    by_layer,
    colour,
    domain_colours,
    domains,
    layers_of,
    model_colour,
    names_of,
    titled,
    with_layer,
)

CHOICES = {"either choice": "either_GLE", "first choice": "first_GLE", "second choice": "second_GLE"}
WIDE = 24
"""Charts of more bars than this stand alone in their row."""


def load_figures(found: Findings) -> Iterator[Figure | None]:
    """The figures of the section."""
    yield load_map(found)
    yield share_by_domain(found)
    yield by_layer(
        found,
        [
            Measure("delta uniform (%)", lambda model: model.load.delta_uniform_GL, title="distance from even"),
            Measure("entropy (% of even)", lambda model: model.load.entropy_GL, title="entropy"),
        ],
        Figure(
            "balance",
            "How even the load is, layer by layer",
            [],
            "Delta uniform is the mean distance of an expert's share from 1/E: 0 is even, and large values mean that a few experts do the work. "
            "Entropy says the same from the other side: 100 % is even, 0 % is one expert for all tokens.",
            f"{COSMOES}, Figure 6.",
        ),
    )
    yield percentiles(found)
    yield overload(found)


def choices(model: Model) -> list[str]:
    """Where a token has one expert, the first choice is all there is."""
    return list(CHOICES) if model.top_k > 1 else ["first choice"]


def share_of(load: Load, choice: str) -> Floats:
    """The shares of one kind of choice."""
    shares: Floats = getattr(load, CHOICES[choice])
    return shares


def load_map(found: Findings) -> Figure:
    """Layer by expert, for each domain; a menu of choices."""
    scale = ratio_scale("over even")
    views = []
    for choice in dict.fromkeys(choice for model in found.models for choice in choices(model)):
        charts = []
        for model in found.models:
            if choice not in choices(model):
                continue
            share_GLE = share_of(model.load, choice)
            for place in [*domains(model), all_of(model)] if len(domains(model)) > 1 else domains(model):
                charts.append(
                    HeatMap(
                        titled(found, model, model.groups[place]),
                        ratio_colours(share_GLE[place], model.load.even_L[:, None]),
                        "expert",
                        "layer",
                        names_of(range(share_GLE.shape[2])),
                        names_of(model.layers),
                        scale,
                        shown_YX=share_GLE[place] * 100,
                        decimals=1,
                        unit=" % of the choices",
                    )
                )
        views.append(View(choice, charts, smallest=620 if share_GLE.shape[2] > WIDE else 520 if len(charts) == 4 else 380))
    return Figure(
        "load_map",
        "Share of every expert in every layer",
        views,
        "The numbers are percent of the choices of a layer. White is an even share, red is more, blue is less; the darkest blue is a "
        "quarter or nothing. "
        "If the pictures of two domains look alike, the experts do not divide the domains among them.",
        f"The data of {MIXTRAL}, Figures 7 and 9, for all layers.",
        menu="Choice",
    )


def share_by_domain(found: Findings) -> Figure:
    """Mixtral's Figures 7 and 9: bars for each expert and domain; a menu of layers."""
    colours = domain_colours(found)
    views = []
    for layer in layers_of(found):
        charts = []
        for model, place in with_layer(found, layer):
            experts = model.experts_L[place]
            for choice in choices(model):
                share_GLE = share_of(model.load, choice)
                series = [Series(model.groups[one], share_GLE[one, place, :experts] * 100, colours[model.groups[one]]) for one in domains(model)]
                even = float(model.load.even_L[place]) * 100
                charts.append(Bars(titled(found, model, choice), names_of(range(experts)), series, "expert", "share (%)", even=even))
        most = max(len(chart.names) * len(chart.series) for chart in charts)
        views.append(View(str(layer), charts, smallest=900 if most > 3 * WIDE else 340))
    return Figure(
        "share_by_domain",
        "Share of every expert by domain",
        views,
        "The dashed line is an even share, 1/E. Bars of one expert that differ show that it is chosen for some domains more than for others. "
        "Mixtral's authors found little of that.",
        f"{MIXTRAL}, Figures 7 (either choice) and 9 (first, second).",
        menu="Layer",
        group=LAYER,
        legend=list(colours.items()) if len(colours) > 1 else (),
    )


def percentiles(found: Findings) -> Figure:
    """The spread of the experts' loads in each layer."""
    names = {name: PERCENTILES.index(name) for name in (0, 5, 25, 50, 75, 95, 100)}
    _, high = span_of(np.concatenate([model.load.percentiles_GLP.ravel() for model in found.models]).tolist())
    charts = []
    for number, model in enumerate(found.models):
        p_LP = model.load.percentiles_GLP[all_of(model)]
        tint = model_colour(number)
        series = [
            Series("busiest and idlest", p_LP[:, names[100]], "#7f7f7f"),
            Series("", p_LP[:, names[0]], "#7f7f7f"),
            Series("5 % to 95 %", p_LP[:, names[50]], tint, low=p_LP[:, names[5]], high=p_LP[:, names[95]]),
            Series("median, 25 % to 75 %", p_LP[:, names[50]], tint, low=p_LP[:, names[25]], high=p_LP[:, names[75]]),
        ]
        charts.append(Lines(titled(found, model), model.layers, series, "layer", "load over mean load", y_range=(0.0, high * 1.08 or 1.0), even=1.0))
    return Figure(
        "percentiles",
        "Spread of the load across layers",
        [View("", charts)],
        "The line is the median expert; the dark band holds half of the experts, the light one nine of ten; grey are the busiest and the idlest. "
        "A layer whose busiest expert is far above the others slows down every process that waits for it.",
    )


def overload(found: Findings) -> Figure | None:
    """How uneven the work of expert-parallel processes would be."""
    charts = []
    high = span_of(np.concatenate([model.overload.worst_LR.ravel() for model in found.models if model.overload.processes] or [np.ones(1)]).tolist())[
        1
    ]
    for model in found.models:
        of = model.overload
        if not of.processes or not np.isfinite(of.mean_LR).any():
            continue
        series = [
            Series(f"{processes} processes", of.mean_LR[:, place], colour(place), low=of.mean_LR[:, place], high=of.worst_LR[:, place])
            for place, processes in enumerate(of.processes)
            if np.isfinite(of.mean_LR[:, place]).any()
        ]
        charts.append(Lines(titled(found, model), model.layers, series, "layer", "busiest process over mean", y_range=(0.9, high * 1.05), even=1.0))
    if not charts:
        return None
    tokens = found.models[0].overload.batch_tokens
    return Figure(
        "overload",
        "Expert parallelism: rows of the busiest process",
        [View("", charts)],
        f"If the experts of a layer were divided among processes in equal blocks, the busiest process would get so many times the mean, "
        "in batches of "
        f"{tokens:,} tokens. Lines are the mean over the batches, bands reach to the worst batch. 1 is even; all others wait for the busiest.",
    )
