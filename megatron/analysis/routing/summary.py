"""The findings as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rich.table import Table

from megatron.analysis.routing.findings import Findings, Floats, Model


def summary_tables(found: Findings) -> Iterator[Table | str]:
    """A table of means over the layers for each model; saturation; notes."""
    for model in found.models:
        yield model_table(model)
        if model.lores is not None:
            yield lore_table(model)
    if (saturation := found.saturation) is not None:
        title = f"router saturation: choices that the last one makes, too ({saturation.tokens:,} tokens)"
        table = _table(title, "model", "share", "first choice", "random")
        for place, name in enumerate(saturation.names):
            numbers = saturation.share_SL[place], saturation.first_SL[place], saturation.random_L
            table.add_row(name, *(_percent(values) for values in numbers))
        yield table
    yield from found.notes


def model_table(model: Model) -> Table:
    """One row for each domain, and one for random choices."""
    size = f"{len(model.layers)} layers, {min(model.experts_L)}"
    size += f" to {max(model.experts_L)}" if len(set(model.experts_L)) > 1 else ""
    title = f"{model.name}: {size} experts, {model.experts_per_token:.3g} for each token (means over the layers)"
    window = len(model.locality.windows) // 2
    shown = model.locality.windows[window : window + 1]
    names = ["domain", "tokens", "busiest / mean", "dead", "Δ uniform", "same first", "same any", "ExRep", *(f"SRP, {length}" for length in shown)]
    table = _table(title, *names, "vocabulary")
    load, repeats, special = model.load, model.repeats, model.specialisation
    for place, name in enumerate(model.groups):
        srp = [_percent(model.locality.srp_GLW[place, :, window])] if shown else []
        last = [_percent(special.vocabulary_L)] if place == len(model.groups) - 1 else [""]
        numbers = [_percent(values[place]) for values in (load.delta_uniform_GL, repeats.first_GL, repeats.any_GL, repeats.exrep_GL)]
        busiest = f"{np.nanmean(load.percentiles_GLP[place, :, -1]):.2f}" if load.choice_GLKE[place].any() else "-"
        table.add_row(name, f"{model.tokens_G[place]:,}", busiest, f"{load.dead_GL[place].sum()}", *numbers, *srp, *last)
    random = [_percent(values) for values in (repeats.random_first_L, repeats.random_any_L, repeats.random_exrep_L)]
    table.add_row("random", "", "1.00", "0", "0.0 %", *random, *[""] * len(shown), _percent(special.vocabulary_even_L), style="dim")
    return table


def lore_table(model: Model) -> Table:
    """The LoREs within the experts: one row for each domain."""
    lores = model.lores
    assert lores is not None
    title = f"{model.name}: {lores.num_lores} LoREs in each expert, {lores.per_token} for each token (means over the experts)"
    table = _table(title, "domain", "dead", "dead if random", "entropy / even", "Δ uniform", "coverage of 90 %", "same LoRE, same expert")
    for place, name in enumerate(model.groups):
        dead, random_dead = f"{lores.dead_GLE[place].sum()}", f"{np.nansum(lores.random_dead_GLE[place]):.1f}"
        numbers = (lores.entropy_GLE, lores.delta_uniform_GLE, lores.coverage_GLE, lores.repeat_GL)
        table.add_row(name, dead, random_dead, *(_percent(values[place]) for values in numbers))
    table.add_row("random", "", "", "100.0 %", "0.0 %", "90.0 %", f"{lores.random_repeat:.1%}".replace("%", " %"), style="dim")
    return table


def _percent(values: Floats) -> str:
    """The mean of what is known."""
    known = values[~np.isnan(values)]
    return f"{100 * known.mean():.1f} %" if known.size else "-"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
    for position, column in enumerate(columns):
        table.add_column(column, justify="right" if position else "left", no_wrap=True)
    return table
