"""The summary: one number for each model and measure, what it means, and what is normal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron.analysis.page import DataTable, Notice
from megatron.analysis.routing.findings import Findings, LoreFindings, Model
from megatron.analysis.routing.report.frames import Floats, all_of

COLLAPSED = 0.5
"""Entropy of a layer below which a few experts do nearly all the work."""


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    value: Callable[[Model], str]
    meaning: str


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %" if np.isfinite(value) else "–"


def _mean(values: Floats) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")


def _against(value: float, random: float) -> str:
    return f"{_percent(value)} (random {_percent(random)})" if np.isfinite(value) else "–"


def _lowest(values_L: Floats, layers: Sequence[int]) -> str:
    if not np.isfinite(values_L).any():
        return "–"
    place = int(np.nanargmin(values_L))
    return f"{_percent(_mean(values_L))}, lowest {_percent(float(values_L[place]))} (layer {layers[place]})"


def _dead(model: Model) -> str:
    count = int(model.load.dead_GL[all_of(model)].sum())
    return f"{count} of {sum(model.experts_L)}"


def _overload(model: Model) -> str:
    of = model.overload
    usable = [place for place in range(len(of.processes)) if np.isfinite(of.mean_LR[:, place]).any()]
    if not usable:
        return "–"
    return f"{_mean(of.mean_LR[:, usable[-1]]):.2f}× on {of.processes[usable[-1]]} processes"


def _cache(model: Model) -> str:
    of = model.locality
    if not of.windows or not of.slots:
        return "–"
    window, slot = len(of.windows) // 2, _half(model)
    return f"{_percent(_mean(of.sch_GLWC[all_of(model), :, window, slot]))} ({of.slots[slot]} slots, {of.windows[window]} tokens)"


def _half(model: Model) -> int:
    """The place of the number of slots nearest to half of the experts."""
    return int(np.argmin([abs(slot - max(model.experts_L) / 2) for slot in model.locality.slots]))


def _domain(model: Model) -> str:
    return _percent(_mean(model.specialisation.domain_distance_GL[: all_of(model)])) if len(model.groups) > 1 else "– (one domain)"


EXPERTS = [
    Row(
        "Tokens",
        lambda model: f"{int(model.tokens_G[all_of(model)]):,}",
        "Shares of rare experts need many: take at least 100 for each expert of a layer.",
    ),
    Row(
        "Size",
        lambda model: f"{len(model.layers)} × {_range(model.experts_L)}, {model.experts_per_token:.3g} for a token",
        "Layers with experts × the experts of each, and how many work on one token.",
    ),
    Row("Dead experts", _dead, "Experts that no token used. Normal is 0; dead experts are memory without use."),
    Row(
        "Load entropy",
        lambda model: _lowest(model.load.entropy_GL[all_of(model)], model.layers),
        "How even the load of the experts is. Balanced training gives above 95 %; below 50 % a few experts do the work.",
    ),
    Row(
        "Delta uniform",
        lambda model: _percent(_mean(model.load.delta_uniform_GL[all_of(model)]), 2),
        "Mean distance of an expert's share from 1/E. 0 is even. CoSMoEs' Table 3 prints it.",
    ),
    Row(
        "Busiest expert",
        lambda model: f"{float(np.nanmax(model.load.percentiles_GLP[all_of(model), :, -1])):.2f}× the mean",
        "The largest load over the mean load of its layer. Below 2 is usual with a balance loss.",
    ),
    Row("Overload", _overload, "Rows of the busiest process over the mean, if equal blocks of experts lay on so many processes. All wait for it."),
    Row(
        "Repeated first choice",
        lambda model: _against(_mean(model.repeats.first_GL[all_of(model)]), _mean(model.repeats.random_first_L)),
        "Pairs of consecutive tokens with the same first expert. Mixtral has 14 % in layer 0 and 20 to 28 % in layers 15 and 31 (random 12.5 %).",
    ),
    Row(
        "ExRep",
        lambda model: _against(_mean(model.repeats.exrep_GL[all_of(model)]), _mean(model.repeats.random_exrep_L)),
        "Experts of a token that the token before did not use: what an offloaded model loads. Lower is cheaper.",
    ),
    Row("SCH", _cache, "Choices of a window that the best cache of half of the experts serves. Higher is better for offloading."),
    Row(
        "Domain distance",
        _domain,
        "How different the choices of a domain are from those of all text. 0 % is no specialisation, 100 % is experts of their own.",
    ),
    Row(
        "Vocabulary specialisation",
        lambda model: _against(_mean(model.specialisation.vocabulary_L), _mean(model.specialisation.vocabulary_even_L)).replace(
            "random", "no effect"
        ),
        "How often a token goes to the expert that it mostly goes to. High in early layers: experts of words, not of topics.",
    ),
]


def _range(values: Sequence[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"


def _lore(write: Callable[[LoreFindings, int], str]) -> Callable[[Model], str]:
    return lambda model: "–" if model.lores is None else write(model.lores, all_of(model))


LORES = [
    Row(
        "LoREs",
        _lore(lambda of, _: f"{of.num_lores} in each expert, {of.per_token} for a row"),
        "A row is a token that an expert works on.",
    ),
    Row(
        "Dead LoREs",
        _lore(
            lambda of, g: (
                f"{int(of.dead_GLE[g].sum())} of {of.dead_GLE[g].size * of.num_lores} (random {float(np.nansum(of.random_dead_GLE[g])):.1f})"
            )
        ),
        "LoREs without a row, in experts that have rows. Experts with few rows have some by chance.",
    ),
    Row("LoRE entropy", _lore(lambda of, g: _percent(_mean(of.entropy_GLE[g]))), "How even the use of LoREs within an expert is. 100 % is even."),
    Row(
        "LoRE coverage",
        _lore(lambda of, g: _percent(_mean(of.coverage_GLE[g]))),
        "The part of an expert's LoREs that 90 % of its choices need. About 90 % is even; low means that a few LoREs would do.",
    ),
    Row(
        "Repeated LoRE",
        _lore(lambda of, g: _against(_mean(of.repeat_GL[g]), of.random_repeat)),
        "Consecutive tokens of one expert that share a LoRE. Higher is better for keeping single LoREs in memory.",
    ),
]


def summary_table(found: Findings) -> DataTable:
    """All measures that a model of the report has."""
    rows = [*EXPERTS, *(LORES if any(model.lores is not None for model in found.models) else [])]
    columns = ["Measure", *([model.name for model in found.models] if len(found.models) > 1 else ["Value"]), "What it means, and what is normal"]
    return DataTable(columns, [[row.name, *(row.value(model) for model in found.models), row.meaning] for row in rows], numbers=False)


def notices(found: Findings) -> Iterator[Notice]:
    """What a reader must not overlook."""
    yield from (Notice(note, "warning") for note in found.notes)
    for model in found.models:
        yield from _warnings(model)


def _warnings(model: Model) -> Iterator[Notice]:
    here = all_of(model)
    dead_L = model.load.dead_GL[here]
    if dead_L.any():
        where = ", ".join(str(model.layers[place]) for place in np.flatnonzero(dead_L))
        yield Notice(
            f"{model.name}: {int(dead_L.sum())} experts got no token (layers {where}). Try a larger balance loss, or more tokens of text.", "bad"
        )
    low = [layer for layer, value in zip(model.layers, model.load.entropy_GL[here], strict=True) if value < COLLAPSED]
    if low:
        where = ", ".join(map(str, low))
        yield Notice(f"{model.name}: a few experts do nearly all the work in layers {where} (entropy below 50 %). Try a larger balance loss.", "bad")
    few = int(model.tokens_G[here]) < 100 * max(model.experts_L)
    if few:
        tokens = int(model.tokens_G[here])
        yield Notice(
            f"{model.name}: {tokens:,} tokens are few for {max(model.experts_L)} experts. Read the shares of single experts with care.", "warning"
        )
