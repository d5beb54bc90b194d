"""What the sections share: names and colours of models and domains, and figures of one number for each layer.

Shapes: G groups of tokens; L layers with experts; E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron.analysis.charts.chart import Figure, Lines, Series, View, span_of
from megatron.analysis.page import COLOURS
from megatron.analysis.routing.findings import ALL, Findings, Model

Floats = npt.NDArray[np.floating]
RANDOM = "#7f7f7f"
LAYER = "layer"
"""Menus of this group change together."""
MIXTRAL = "Mixtral of Experts (Jiang et al., 2024)"
COSMOES = "CoSMoEs (Huber et al., 2025)"
OLMOE = "OLMoE (Muennighoff et al., 2024)"
LOCALITY = "Not All Models Suit Expert Offloading (Liang et al., 2025)"
MENU_LAYERS = 12
"""Where a menu of layers would make the page too large, it has so many, evenly spread."""


@dataclass(frozen=True)
class Measure:
    """A number for each group and layer of a model."""

    label: str
    """With its unit, for the axis."""
    value_GL: Callable[[Model], Floats]
    random_L: Callable[[Model], Floats] | None = None
    """What random choices would give. None: not known, or 0."""
    title: str = ""
    factor: float = 100.0
    """Shares are shown in percent."""
    by_domain: bool = True
    """False: the number is of all tokens together."""
    reference: str = "random choices"
    """What the dashed line is called."""
    compared: bool = True
    """False: for all tokens together it says nothing."""


def colour(place: int) -> str:
    """Of the domain, or of one of several sizes, at that place."""
    return COLOURS[place % (len(COLOURS) - 1)]


def model_colour(place: int) -> str:
    """Of the model at that place: others than those of the first domains."""
    return colour(place + 3)


def all_of(model: Model) -> int:
    """The place of the group of all tokens: the last one, also where there is one domain."""
    return len(model.groups) - 1


def domains(model: Model) -> list[int]:
    """The places of the domains; of all tokens together if there is nothing else."""
    found = [place for place, name in enumerate(model.groups) if name != ALL]
    return found or [all_of(model)]


def domain_names(found: Findings) -> list[str]:
    """Of all models, each once."""
    return list(dict.fromkeys(model.groups[place] for model in found.models for place in domains(model)))


def domain_colours(found: Findings) -> dict[str, str]:
    """A domain has one colour, whatever the model."""
    return {name: colour(place) for place, name in enumerate(domain_names(found))}


def titled(found: Findings, model: Model, text: str = "") -> str:
    """The title of a chart: the model's name comes first where there are several."""
    return ": ".join(filter(None, ([model.name] if len(found.models) > 1 else []) + [text]))


def names_of(values: Sequence[int] | range) -> list[str]:
    """Numbers as names."""
    return [str(value) for value in values]


def layers_of(found: Findings) -> list[int]:
    """Of all models, each once."""
    return sorted({layer for model in found.models for layer in model.layers})


def few_layers(found: Findings) -> list[int]:
    """All layers, or MENU_LAYERS of them: the first, the last, and some in between."""
    layers = layers_of(found)
    if len(layers) <= MENU_LAYERS:
        return layers
    places = np.unique(np.linspace(0, len(layers) - 1, MENU_LAYERS).round().astype(int))
    return [layers[place] for place in places]


def with_layer(found: Findings, layer: int) -> Iterator[tuple[Model, int]]:
    """The models that have the layer, and its place in each."""
    for model in found.models:
        if layer in model.layers:
            yield model, model.layers.index(layer)


def left_out(found: Findings) -> str:
    """A sentence for captions, if menus do not have all layers."""
    count = len(layers_of(found))
    return f" The menu has {MENU_LAYERS} of {count} layers; routing.json has all." if count > MENU_LAYERS else ""


def by_layer(found: Findings, measures: Sequence[Measure], figure: Figure) -> Figure | None:
    """The figure with a line of layers for each measure: by domain for each model and, if there are several models, all tokens of each model
    together. The charts of a measure share their range. None: nothing was measured."""
    charts: list[Lines] = []
    for measure in measures:
        values = [measure.value_GL(model) * measure.factor for model in found.models]
        if not any(np.isfinite(value).any() for value in values):
            continue
        randoms = [measure.random_L(model) * measure.factor for model in found.models] if measure.random_L else []
        low, high = span_of(np.concatenate([np.ravel(value) for value in [*values, *randoms]]).tolist())
        y_range = (min(0.0, low), high + 0.08 * (high - min(0.0, low)) or 1.0)
        if len(found.models) > 1 and measure.compared:
            charts.append(_compared(found, measure, y_range))
        charts.extend(_of_model(found, measure, model, y_range) for model in found.models)
    if not charts:
        return None
    return Figure(figure.name, figure.title, [View("", charts)], figure.caption, figure.source)


def _compared(found: Findings, measure: Measure, y_range: tuple[float, float]) -> Lines:
    layers = layers_of(found)
    series = []
    for place, model in enumerate(found.models):
        y = np.full(len(layers), np.nan)
        y[[layers.index(layer) for layer in model.layers]] = measure.value_GL(model)[all_of(model)] * measure.factor
        series.append(Series(model.name, y, model_colour(place)))
    if measure.random_L is not None and len({tuple(measure.random_L(model).round(9)) for model in found.models}) == 1:
        series.append(Series(measure.reference, measure.random_L(found.models[0]) * measure.factor, RANDOM, dashed=True))
    title = ": ".join(filter(None, (measure.title, "all text")))
    return Lines(title, layers, series, "layer", measure.label, y_range=y_range)


def _of_model(found: Findings, measure: Measure, model: Model, y_range: tuple[float, float]) -> Lines:
    colours = domain_colours(found)
    values = measure.value_GL(model) * measure.factor
    series = [Series(model.groups[place], values[place], colours[model.groups[place]]) for place in domains(model)]
    if not measure.by_domain:
        series = [Series("all text", values[all_of(model)], model_colour(found.models.index(model)))]
    if measure.random_L is not None:
        series.append(Series(measure.reference, measure.random_L(model) * measure.factor, RANDOM, dashed=True))
    return Lines(titled(found, model, measure.title), model.layers, series, "layer", measure.label, y_range=y_range)


def visible(piece: str) -> str:
    """A token's text with marks in place of what cannot be seen: spaces, ends of lines, control characters."""
    marks = {"\n": "⏎", "\t": "⇥", " ": "␣", "\r": "␍"}
    return "".join(marks.get(sign) or (sign if sign.isprintable() else f"\\x{ord(sign):02x}") for sign in piece)
