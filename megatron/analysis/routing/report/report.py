"""Writes the routing report: `routing.html`, which needs no network, and a PNG of each figure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from megatron.analysis.charts.chart import Figure
from megatron.analysis.charts.interactive import page_part
from megatron.analysis.charts.picture import write_picture
from megatron.analysis.page import Part, Section, page_html, write_page
from megatron.analysis.routing.findings import Findings
from megatron.analysis.routing.report.frames import all_of
from megatron.analysis.routing.report.load import load_figures
from megatron.analysis.routing.report.lores import lore_figures, with_lores
from megatron.analysis.routing.report.repeats import locality_figures, repeat_figures, saturation_figures, table_5
from megatron.analysis.routing.report.specialisation import co_activation_figure, pair_table, specialisation_figures, token_tables
from megatron.analysis.routing.report.summary import notices, summary_table
from megatron.analysis.routing.report.text import coloured_text, expert_swaps

PAGE = "routing.html"


def write_report(found: Findings, folder: Path, *, progress: Callable[[str], None] | None = None) -> Path:
    """Writes the page and the pictures into the folder and returns the page's path. `progress` hears of every file (None: nobody does). Each file is
    written completely or not at all. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    page, figures = report_page(found)
    for figure in figures:
        write_picture(figure, folder / f"{figure.name}.png")
        if progress is not None:
            progress(f"{figure.name}.png")
    write_page(folder / PAGE, page)
    if progress is not None:
        progress(PAGE)
    return folder / PAGE


def report_page(found: Findings) -> tuple[str, list[Figure]]:
    """The page as HTML, and the figures in it."""
    sections, figures = _sections(found)
    names = " and ".join(model.name for model in found.models)
    return page_html(f"Routing of {names}", sections, subtitle="Which experts the tokens of a text go to.", facts=_facts(found)), figures


def _facts(found: Findings) -> dict[str, str]:
    facts = {}
    for model in found.models:
        name = f"{model.name}: " if len(found.models) > 1 else ""
        facts[f"{name}source"] = model.source
        if model.iteration is not None:
            facts[f"{name}step"] = f"{model.iteration:,}"
        facts[f"{name}tokens"] = f"{int(model.tokens_G[all_of(model)]):,} ({', '.join(model.groups[: all_of(model)] or model.groups)})"
        facts[f"{name}analysed in"] = f"{model.seconds:.1f} s"
    return facts


def _sections(found: Findings) -> tuple[list[Section], list[Figure]]:
    """The sections that have something to show, and the figures in them."""
    figures: list[Figure] = []

    def drawn(several: Iterable[Figure | None]) -> list[Part]:
        kept = [figure for figure in several if figure is not None]
        figures.extend(kept)
        return [page_part(figure) for figure in kept]

    def present(*several: Part | None) -> list[Part]:
        return [part for part in several if part is not None]

    sections = [
        Section("Summary", [*notices(found), summary_table(found)]),
        Section("Load", drawn(load_figures(found))),
        Section("Text", [*present(coloured_text(found)), *drawn([expert_swaps(found)])]),
        Section("Repeats", [*drawn(repeat_figures(found)), table_5(found)]),
        Section("Locality", drawn(locality_figures(found))),
        Section("Specialisation", [*drawn(specialisation_figures(found)), *present(token_tables(found))]),
        Section("Co-activation", [*drawn([co_activation_figure(found)]), *present(pair_table(found))]),
    ]
    if with_lores(found):
        sections.append(Section("LoREs within experts", drawn(lore_figures(found))))
    if found.saturation is not None:
        sections.append(Section("Saturation", drawn(saturation_figures(found.saturation))))
    return [section for section in sections if section.parts], figures
