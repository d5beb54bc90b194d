"""The routing report, opened by a headless Chromium without a network: every picture of every menu is drawn, and its numbers are the findings'."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.analysis.charts.chart import HeatMap
from megatron.analysis.page import write_page
from megatron.analysis.routing.example import example, random_trace
from megatron.analysis.routing.findings import Findings
from megatron.analysis.routing.from_trace import blocks_of, shape_of
from megatron.analysis.routing.report import report_page, write_report
from megatron.analysis.routing.report.frames import few_layers, visible
from megatron.analysis.routing.report.load import load_map
from megatron.analysis.routing.report.repeats import table_5
from megatron.analysis.routing.report.summary import notices, summary_table
from megatron.analysis.routing.report.text import expert_swaps
from megatron.analysis.routing.tally import Measures, Origin, Tally
from tests.browser import Browser, colours_in, needs_chromium

DRAWN = "document.documentElement.dataset.drawn === 'yes'"
EVIL = "</script><img src=https://example.org/x onerror=\"document.title='owned'\">"
UNDRAWN = """[...document.querySelectorAll('.plot')].filter((one) => one.offsetParent !== null && !one.querySelector(
    '.heatmaplayer image, .scatterlayer .lines path, .scatterlayer .points path, .barlayer path')).map((one) => one.getAttribute('aria-label'))"""


def one_model(tokens: int = 400, *, name: str = "one", texts: dict[str, Any] | None = None, **shape: int) -> Findings:
    trace = random_trace(tokens, **shape)._replace(**(texts or {}))
    assert trace.token_T is not None
    tally = Tally(shape_of(trace), Measures(), Counter(trace.token_T.tolist()))
    for block in blocks_of(trace):
        tally.add(block)
    return Findings([tally.found(Origin(name, name, "trace", None), trace.pieces or {}, seconds=1.0)])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two models, without its PNGs."""
    path = tmp_path_factory.mktemp("report") / "routing.html"
    write_page(path, report_page(example(600))[0])
    return path


@needs_chromium
def test_the_report_opens_without_a_network(browser: Browser, written: Path, tmp_path: Path) -> None:
    browser.show(1300)
    browser.open(written.as_uri())
    browser.wait(DRAWN)
    titles = browser.evaluate("[...document.querySelectorAll('h2')].map((one) => one.textContent)")
    assert titles == ["Summary", "Load", "Text", "Repeats", "Locality", "Specialisation", "Co-activation", "LoREs within experts", "Saturation"]
    assert browser.evaluate("document.querySelectorAll('.plot[data-drawn]').length") > 40
    assert browser.evaluate(UNDRAWN) == []
    for number in (2, 5, 9):
        browser.screenshot(tmp_path / "section.png", f"#section-{number} .plot")
        assert colours_in(tmp_path / "section.png") > 20, titles[number - 1]
    assert browser.left() == browser.errors == []


@pytest.mark.slow
@needs_chromium
def test_every_menu_shows_pictures(browser: Browser, written: Path) -> None:
    browser.open(written.as_uri())
    browser.wait(DRAWN)
    browser.evaluate("""for (const menu of document.querySelectorAll('.choice > label > select')) {
        menu.selectedIndex = menu.options.length - 1; menu.dispatchEvent(new Event('change')); }""")
    browser.wait(DRAWN)
    assert browser.evaluate(UNDRAWN) == []
    menus = "[...document.querySelectorAll('.choice[data-group=layer] > label > select')]"
    browser.evaluate(f"(() => {{ const menu = {menus}[0]; menu.value = '3'; menu.dispatchEvent(new Event('change')); }})()")
    browser.wait(DRAWN)
    assert browser.evaluate(f"{menus}.filter((one) => one.value !== '3' && one.querySelector('option:nth-child(4)')).length") == 0
    assert browser.evaluate(UNDRAWN) == []
    assert browser.left() == browser.errors == []


@needs_chromium
def test_no_text_of_a_model_is_code(browser: Browser, tmp_path: Path) -> None:
    found = one_model(texts={"pieces": dict.fromkeys(range(20), EVIL), "domains": (EVIL, "b")}, name=EVIL, layers=1)
    write_page(tmp_path / "routing.html", report_page(found)[0])
    browser.open((tmp_path / "routing.html").as_uri())
    browser.wait(DRAWN)
    assert browser.evaluate("document.title") == f"Routing of {EVIL}"
    assert browser.evaluate("document.querySelectorAll('img').length") == 0
    assert browser.evaluate("document.querySelector('.token').textContent") == EVIL
    assert browser.left() == browser.errors == []


@pytest.mark.slow  # 15 s; test_the_report_opens_without_a_network draws the same charts in the page
def test_every_figure_has_its_picture(tmp_path: Path) -> None:
    heard: list[str] = []
    written = write_report(one_model(200, layers=1), tmp_path / "report", progress=heard.append)
    linked = set(re.findall(r'href="([\w.]+\.png)"', written.read_text(encoding="utf-8")))
    assert linked == {path.name for path in written.parent.glob("*.png")}
    assert len(linked) == 17
    assert sorted(heard) == sorted([*linked, "routing.html"])
    assert all(colours_in(written.parent / name) > 20 for name in linked)


def test_the_map_of_shares_has_the_findings_numbers() -> None:
    found = one_model()
    (model,) = found.models
    (view, *_) = load_map(found).views
    maps = [chart for chart in view.charts if isinstance(chart, HeatMap)]
    assert [chart.title for chart in maps] == model.groups
    for place, chart in enumerate(maps):
        np.testing.assert_allclose(chart.shown_YX, model.load.either_GLE[place] * 100)
        np.testing.assert_allclose(2**chart.value_YX / 8, model.load.either_GLE[place])


def test_table_5_has_mixtral_s_random_line() -> None:
    (table,) = table_5(one_model(layers=1)).parts
    rows: Any = getattr(table, "rows")  # noqa: B009 - a part of any kind
    assert rows[-1] == ["random choices", "12.5", "46.4"]


def test_experts_that_come_and_go_are_those_of_the_sample() -> None:
    found = one_model(layers=1)
    sample = found.models[0].samples[0]
    figure = expert_swaps(found)
    assert figure is not None
    (chart,) = figure.views[0].charts
    assert isinstance(chart, HeatMap)
    sets = [set(sample.expert_NLK[n, 0].tolist()) for n in range(48)]
    assert [set(np.flatnonzero(column).tolist()) for column in chart.value_YX.T] == sets
    loaded = sum(len(sets[n] - sets[n - 1]) for n in range(1, 48) if n not in sample.starts)
    assert chart.title == f"prose: {loaded} replacements, {len(set.union(*sets))} of 8 experts used"


def test_dead_experts_and_a_collapsed_layer_are_said_first() -> None:
    found = one_model(layers=2)
    (model,) = found.models
    load = model.load
    load.dead_GL[-1, 1] = 3
    load.entropy_GL[-1, 1] = 0.2
    texts = [notice.text for notice in notices(found)]
    assert "one: 3 experts got no token (layers 1). Try a larger balance loss, or more tokens of text." in texts
    assert "one: a few experts do nearly all the work in layers 1 (entropy below 50 %). Try a larger balance loss." in texts
    assert "one: 400 tokens are few for 8 experts. Read the shares of single experts with care." in texts
    values = {row[0]: row[1] for row in summary_table(found).rows}
    assert values["Dead experts"] == "3 of 16"


def test_what_a_model_does_not_have_is_left_out() -> None:
    text, _ = report_page(one_model(200, top_k=1, layers=1, lores=0))
    titles = re.findall(r"<h2>(.*)</h2>", text)
    assert titles == ["Summary", "Load", "Text", "Repeats", "Locality", "Specialisation"]
    assert "second choice" not in text
    assert "LoRE entropy" not in text


def test_signs_that_cannot_be_seen_get_marks() -> None:
    assert visible(" a\n\tb\x07\ud800é") == "␣a⏎⇥b\\x07\\xd800é"


def test_menus_of_a_deep_model_have_twelve_layers() -> None:
    found = one_model(100, layers=40, experts=4, lores=0)
    layers = few_layers(found)
    assert (len(layers), layers[0], layers[-1]) == (12, 0, 39)


@pytest.mark.slow
def test_a_large_model_s_report_stays_below_15_mb(tmp_path: Path) -> None:
    found = one_model(4000, layers=48, experts=128, top_k=8, lores=0)
    assert write_report(found, tmp_path / "report").stat().st_size < 15e6
