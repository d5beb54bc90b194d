"""Pages that need no network, opened by a headless Chromium: pictures are drawn, texts are never code, menus act, no request leaves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest

from megatron.analysis.page import Captioned, Choice, DataTable, Grid, Legend, Notice, Part, Plot, Section, Text, Tokens, page_html, write_page
from megatron.analysis.page import plotly_text as shown
from tests.browser import Browser, colours_in, needs_chromium

DRAWN = "document.documentElement.dataset.drawn === 'yes'"
EVIL = "</script><img src=https://example.org/x onerror=\"document.title='owned'\">{{ 1 }}"


def heat(title: str = "share") -> Plot:
    values = np.arange(8, dtype=np.float32).reshape(2, 4)
    return Plot(go.Figure(go.Heatmap(z=values, colorscale="Cividis"), layout={"title": {"text": shown(title)}}), label=title)


def tokens(texts: list[str], group: str = "") -> Tokens:
    count = len(texts)
    first = [[t % 4, (t + 1) % 4] for t in range(count)]
    return Tokens(
        texts, [0, 3], [first, [[3, 2]] * count], [4, 4], weights=[[[0.75, 0.25]] * count] * 2, lores=[[[[1, 2], [0]]] * count] * 2, group=group
    )


def opened(browser: Browser, folder: Path, parts: list[Part], **settings: float) -> Path:
    write_page(folder / "page.html", page_html("A page", [Section("One", parts)], refresh_seconds=settings.get("refresh_seconds")))
    browser.open((folder / "page.html").as_uri())
    browser.wait(DRAWN)
    return folder / "page.html"


@needs_chromium
def test_pictures_are_drawn_and_nothing_leaves(browser: Browser, tmp_path: Path) -> None:
    opened(browser, tmp_path, [Captioned("Share", [Grid([heat(), heat()])], "What to see.", "A paper, Figure 7", "share.png")])
    assert browser.evaluate("document.querySelectorAll('.plot .heatmaplayer image').length") == 2
    browser.screenshot(tmp_path / "plot.png", ".plot")
    assert colours_in(tmp_path / "plot.png") > 20
    assert browser.left() == browser.errors == []


@needs_chromium
def test_a_picture_that_is_not_drawn_is_blank(browser: Browser, tmp_path: Path) -> None:
    """What the test above would see if Plotly drew nothing."""
    opened(browser, tmp_path, [heat()])
    browser.evaluate("document.querySelector('.plot').lastElementChild.remove()")
    browser.screenshot(tmp_path / "plot.png", ".plot")
    assert colours_in(tmp_path / "plot.png") == 1


@needs_chromium
def test_a_request_is_seen_and_refused(browser: Browser, tmp_path: Path) -> None:
    path = opened(browser, tmp_path, [Text("x")])
    plain = tmp_path / "plain.html"
    plain.write_text("<img src='http://127.0.0.1:9/seen.png'>")
    browser.open(plain.as_uri())
    assert browser.left() == ["http://127.0.0.1:9/seen.png"]
    browser.requests.clear()
    browser.open(path.as_uri())
    assert browser.evaluate("fetch('http://127.0.0.1:9/x').then(() => 'sent', (error) => error.name)") == "TypeError"
    assert "Content Security Policy" in browser.errors[-1]


@needs_chromium
def test_no_button_sends_the_data_to_a_server(browser: Browser, tmp_path: Path) -> None:
    opened(browser, tmp_path, [heat()])
    browser.point(".plot")
    titles = browser.evaluate("[...document.querySelectorAll('.modebar-btn')].map((one) => one.dataset.title ?? one.getAttribute('aria-label'))")
    assert any("Download" in title for title in titles), titles
    assert not any("Share" in title or "loud" in title for title in titles), titles


@needs_chromium
def test_texts_are_never_code(browser: Browser, tmp_path: Path) -> None:
    parts: list[Part] = [
        *(Text(EVIL), Notice(EVIL, "bad"), DataTable([EVIL, "b"], [[EVIL, "1"]], label=EVIL), heat(EVIL), Legend([(EVIL, "#000")])),
        *(Captioned(EVIL, [], EVIL, EVIL), Choice(EVIL, [(EVIL, [Text(EVIL)])]), tokens([EVIL, "b\u202e", "\ud800"])),
    ]
    page = page_html(EVIL, [Section(EVIL, parts), Section("b")], subtitle=EVIL, facts={EVIL: EVIL})
    write_page(tmp_path / "page.html", page)
    browser.open((tmp_path / "page.html").as_uri())
    browser.wait(DRAWN)
    assert browser.evaluate("document.title") == EVIL
    assert browser.evaluate("document.querySelectorAll('img, a[href^=http]').length") == 0
    assert browser.evaluate("document.querySelector('.token').textContent") == EVIL
    assert browser.evaluate("document.querySelector('.plot .gtitle').textContent") == EVIL
    assert browser.left() == browser.errors == []


@needs_chromium
def test_a_menu_shows_and_draws_its_picture(browser: Browser, tmp_path: Path) -> None:
    layers = [("0", [heat("zero")]), ("1", [heat("one")])]
    path = opened(browser, tmp_path, [Choice("Layer", layers, group="layer"), Choice("Layer", layers, group="layer"), Choice("Layer", layers)])
    seen = "[...document.querySelectorAll('.plot')].filter((one) => one.offsetParent).map((one) => one.querySelector('.gtitle').textContent)"
    assert browser.evaluate(seen) == ["zero"] * 3
    browser.evaluate("(() => { const menu = document.querySelector('select'); menu.value = '1'; menu.dispatchEvent(new Event('change')); })()")
    browser.wait(DRAWN)
    assert browser.evaluate(seen) == ["one", "one", "zero"]
    browser.open(path.as_uri())
    browser.wait(DRAWN)
    assert browser.evaluate(seen) == ["one", "one", "zero"]
    assert browser.errors == []


@needs_chromium
def test_tokens_have_the_colours_of_their_experts(browser: Browser, tmp_path: Path) -> None:
    opened(browser, tmp_path, [tokens(["a", "b\n", "c", "d", "e"])])
    colours = browser.evaluate("[...document.querySelectorAll('.token')].map((one) => getComputedStyle(one).backgroundColor)")
    assert colours[0] == colours[4]
    assert len(set(colours)) == 4
    browser.point("[data-position='1']")
    rows = browser.evaluate("[...document.querySelectorAll('.detail tr')].map((row) => [...row.cells].map((cell) => cell.textContent))")
    assert rows == [
        ["Layer", "Expert", "Weight", "LoRE"],
        *(["0", "1", "0.75", "1, 2"], ["0", "2", "0.25", "0"], ["3", "3", "0.75", "1, 2"], ["3", "2", "0.25", "0"]),
    ]
    assert browser.evaluate("document.querySelector('.detail code').textContent") == "b⏎"
    browser.evaluate("document.querySelector('.text').focus()")
    browser.press("ArrowRight")
    assert browser.evaluate("document.querySelector('.chosen').textContent") == "c"
    browser.evaluate("(() => { const menu = document.querySelector('.one'); menu.value = '2'; menu.dispatchEvent(new Event('change')); })()")
    assert browser.evaluate("[...document.querySelectorAll('.token')].map((one) => one.classList.contains('other'))") == [
        True,
        False,
        False,
        True,
        True,
    ]
    browser.evaluate("(() => { const menu = document.querySelector('select'); menu.value = '1'; menu.dispatchEvent(new Event('change')); })()")
    assert browser.evaluate("document.querySelector('.legend').textContent") == "Expert 3: 100 %"


@needs_chromium
def test_light_and_dark(browser: Browser, tmp_path: Path) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    ink = "getComputedStyle(document.querySelector('.plot .gtitle')).fill"
    browser.show(1000)
    opened(browser, tmp_path, [heat()])
    light = browser.evaluate(ground), browser.evaluate(ink)
    browser.show(1000, dark=True)
    dark = browser.evaluate(ground), browser.evaluate(ink)
    assert light[0] != dark[0]
    assert light[1] != dark[1]
    browser.point("#theme", click=True)
    assert (browser.evaluate(ground), browser.evaluate(ink)) == light


@needs_chromium
def test_a_page_is_read_anew_until_the_reader_says_no(browser: Browser, tmp_path: Path) -> None:
    path = opened(browser, tmp_path, [Text("before")], refresh_seconds=0.3)
    write_page(path, page_html("A page", [Section("One", [Text("after")])], refresh_seconds=0.3))
    browser.wait("document.querySelector('main p')?.textContent === 'after'")
    browser.evaluate("document.getElementById('refresh').click()")
    write_page(path, page_html("A page", [Section("One", [Text("later")])], refresh_seconds=0.3))
    assert browser.evaluate("new Promise((done) => setTimeout(() => done(document.querySelector('main p').textContent), 700))") == "after"


@needs_chromium
def test_a_narrow_window_scrolls_only_downwards(browser: Browser, tmp_path: Path) -> None:
    browser.show(360)
    opened(browser, tmp_path, [Grid([heat(), heat()]), DataTable(["a", "b"], [["x" * 60, "1" * 40]]), tokens(["word "] * 50)])
    assert browser.evaluate("document.documentElement.scrollWidth") <= 360


def test_a_page_without_pictures_leaves_plotly_out() -> None:
    assert len(page_html("A page", [Section("One", [Text("x")])])) < 30_000
    inner = page_html("A page", [Section("One", [Choice("a", [("b", [Captioned("c", [Grid([heat()])])])])])])
    assert inner.count("plotly.js v") == 1


def test_a_page_is_written_completely_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "page.html").mkdir()
    with pytest.raises(OSError, match=r"page\.html"):
        write_page(tmp_path / "page.html", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
