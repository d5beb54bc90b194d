"""One level down: the LoREs within each expert of a StructMoE."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron.analysis.charts.chart import Figure, HeatMap, Scale, View, ratio_colours, ratio_scale, span_of
from megatron.analysis.charts.interactive import FEW_COLUMNS
from megatron.analysis.routing.findings import Findings, LoreFindings, Model
from megatron.analysis.routing.report.frames import LAYER, Floats, Measure, all_of, by_layer, few_layers, left_out, names_of, titled, with_layer

SOURCE = "A level that the papers do not show."
PANELS = 8
"""Experts of a layer whose matrices of LoREs are shown: those with the most rows."""


def lore_figures(found: Findings) -> Iterator[Figure | None]:
    """The figures of the section."""
    yield _share(found)
    yield _by_expert(found)
    yield _repeats(found)
    yield _together(found)


def with_lores(found: Findings) -> list[tuple[Model, LoreFindings]]:
    """The models that have LoREs."""
    return [(model, model.lores) for model in found.models if model.lores is not None]


def _share(found: Findings) -> Figure:
    """Expert by LoRE; a menu of layers."""
    scale = ratio_scale("over even")
    views = []
    for layer in few_layers(found):
        charts = []
        for model, place in with_layer(found, layer):
            if model.lores is None:
                continue
            count_EM = model.lores.count_GLEM[all_of(model), place, : model.experts_L[place]].astype(np.float64)
            with np.errstate(invalid="ignore"):
                share_EM = count_EM / count_EM.sum(axis=1, keepdims=True)
            even = 1 / model.lores.num_lores
            charts.append(
                HeatMap(
                    titled(found, model),
                    ratio_colours(share_EM, even),
                    "LoRE",
                    "expert",
                    names_of(range(count_EM.shape[1])),
                    names_of(range(len(count_EM))),
                    scale,
                    shown_YX=share_EM * 100,
                    unit=" % of the expert's choices",
                )
            )
        if charts:
            views.append(View(str(layer), charts, smallest=420))
    return Figure(
        "lore_share",
        "Share of every LoRE within its expert",
        views,
        "The numbers are percent of the expert's choices. White is an even share, 1/M. A row with one red cell is an expert that uses one "
        "LoRE: it is no "
        f"larger than that LoRE. An empty row is an expert without tokens.{left_out(found)}",
        SOURCE,
        menu="Layer",
        group=LAYER,
    )


def _by_expert(found: Findings) -> Figure:
    """Layer by expert: entropy, coverage, dead LoREs, distance from even; a menu of these."""
    kinds = {
        "entropy": ("entropy (% of even)", lambda of: of.entropy_GLE * 100, (0.0, 100.0), "100 % is an even use of the expert's LoREs."),
        "coverage": ("coverage (%)", lambda of: of.coverage_GLE * 100, (0.0, 100.0), ""),
        "dead LoREs": ("dead LoREs", lambda of: of.dead_GLE.astype(np.float64), None, ""),
        "delta uniform": ("distance from even (%)", lambda of: of.delta_uniform_GLE * 100, None, ""),
    }
    views = []
    for name, (label, values, limits, _) in kinds.items():
        of_models = [(model, values(of)[all_of(model)]) for model, of in with_lores(found)]
        low, high = limits or (0.0, max(1.0, span_of(np.concatenate([value.ravel() for _, value in of_models]).tolist())[1]))
        scale = Scale(low, high, label)
        charts = [
            HeatMap(
                titled(found, model),
                _real(value_LE, model),
                "expert",
                "layer",
                names_of(range(value_LE.shape[1])),
                names_of(model.layers),
                scale,
                decimals=0,
            )
            for model, value_LE in of_models
        ]
        views.append(View(name, charts, smallest=420))
    return Figure(
        "lore_balance",
        "How even the use of LoREs is in each expert",
        views,
        "Entropy and delta uniform say how even the shares of an expert's LoREs are. Coverage is the part of its LoREs that 90 % of its "
        "choices need. "
        "Dead LoREs got no row; an expert with few tokens has some by chance (the summary says how many).",
        SOURCE,
        menu="Measure",
    )


def _real(value_LE: Floats, model: Model) -> Floats:
    """NaN in the places of experts that do not exist."""
    return np.where(np.arange(value_LE.shape[1]) < np.asarray(model.experts_L)[:, None], value_LE, np.nan)


def _repeats(found: Findings) -> Figure | None:
    """Consecutive tokens of one expert that share a LoRE."""
    models = Findings([model for model, _ in with_lores(found)])

    def repeat_GL(model: Model) -> Floats:
        assert model.lores is not None
        return model.lores.repeat_GL

    def random_L(model: Model) -> Floats:
        assert model.lores is not None
        return np.full(len(model.layers), model.lores.random_repeat)

    return by_layer(
        models,
        [Measure("LoRE in common (%)", repeat_GL, random_L)],
        Figure(
            "lore_repeats",
            "Repeated LoREs of consecutive tokens",
            [],
            "Of consecutive tokens with the same expert, the share that has a LoRE of it in common. The dashed line is what random choices give.",
            f"Mixtral's Figure 10, one level down. {SOURCE}",
        ),
    )


def _together(found: Findings) -> Figure | None:
    """LoRE by LoRE for the busiest experts; a menu of layers. None: a row uses one LoRE."""
    held = [of.together_LEMM for _, of in with_lores(found) if of.together_LEMM is not None]
    if not held:
        return None
    scale = Scale(
        0, 100 * max(float(np.nanmax(matrix, initial=0.0)) for matrix in held) or 1.0, "of its rows (%)", bar=held[0].shape[-1] > FEW_COLUMNS
    )
    views = []
    for layer in few_layers(found):
        charts = []
        for model, place in with_layer(found, layer):
            if model.lores is None or model.lores.together_LEMM is None:
                continue
            rows_E = model.lores.count_GLEM[all_of(model), place].sum(axis=-1)
            names = names_of(range(model.lores.num_lores))
            for expert in sorted(np.argsort(-rows_E, kind="stable")[:PANELS].tolist()):
                matrix = model.lores.together_LEMM[place, expert] * 100
                if rows_E[expert]:
                    charts.append(
                        HeatMap(
                            titled(found, model, f"expert {expert}"), matrix, "LoRE", "LoRE", names, names, scale, decimals=0, unit=" % of its rows"
                        )
                    )
        if charts:
            views.append(View(str(layer), charts, smallest=300))
    return Figure(
        "lores_together",
        "LoREs that are chosen together",
        views,
        f"Of the rows of the LoRE in the row, the share that the LoRE in the column got as well, for the {PANELS} busiest experts of the "
        "layer at most. Random "
        f"choices give {100 * with_lores(found)[0][1].random_together:.1f} %.{left_out(found)}",
        SOURCE,
        menu="Layer",
        group=LAYER,
    )
