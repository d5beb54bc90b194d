"""The page in a headless Chromium: a person writes a prompt, reads the text, chooses a layer, points at a token."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import Browser, needs_chromium
from tests.inference.serve.conftest import Served, served


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    made = Browser(tmp_path / "profile")
    try:
        yield made
    finally:
        made.close()


def generate(browser: Browser, prompt: str, tokens: int = 8) -> None:
    values = {"prompt": prompt, "tokens": tokens, "temperature": 0}
    browser.evaluate(f"for (const [id, value] of Object.entries({json.dumps(values)})) document.getElementById(id).value = value")
    browser.point("#run", click=True)
    browser.wait("!document.getElementById('run').disabled")


def shown(browser: Browser, expression: str) -> list[Any]:
    """The expression for each token `t` on the page."""
    found: list[Any] = browser.evaluate(f"[...document.querySelectorAll('#text [data-position]')].map((t) => {expression})")
    return found


@needs_chromium
def test_tokens_have_the_colours_of_their_experts(browser: Browser, here: Served, tmp_path: Path) -> None:
    browser.open(f"{here.url}/")
    browser.wait("document.getElementById('model').textContent.includes('2 layers with experts, 4 experts, 4 LoREs in each')")
    generate(browser, "Hello")
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 8, "temperature": 0, "return_routing": True}
    (choice,) = here.post("/v1/completions", body).json()["choices"]
    records = choice["routing"]
    assert browser.evaluate("document.getElementById('status').textContent").startswith("8 tokens in")
    assert shown(browser, "t.firstChild.textContent") == [record["text"] for record in records]
    assert shown(browser, "t.classList.contains('prompt')") == [True] * 5 + [False] * 7
    assert browser.evaluate("document.querySelector('.unread').textContent") == choice["text"][-1]

    def strongest(layer: int) -> list[str]:
        return [str(max(zip(record["weights"][layer], record["experts"][layer], strict=True))[1]) for record in records]

    assert shown(browser, "t.dataset.expert") == strongest(0)
    colours = dict(zip(strongest(0), shown(browser, "getComputedStyle(t).backgroundColor"), strict=True))
    assert shown(browser, "getComputedStyle(t).backgroundColor") == [colours[expert] for expert in strongest(0)]
    assert len(set(colours.values())) == len(colours) > 1
    browser.evaluate("layer.value = '1'; layer.dispatchEvent(new Event('change'))")
    assert shown(browser, "t.dataset.expert") == strongest(1)
    assert strongest(0) != strongest(1)
    browser.screenshot(tmp_path / "page.png")
    assert browser.errors == []


@needs_chromium
def test_a_token_under_the_pointer_shows_its_experts_and_lores(browser: Browser, here: Served) -> None:
    browser.open(f"{here.url}/")
    generate(browser, "Hello")
    record = here.post("/v1/completions", {"model": "tiny", "prompt": "Hello", "max_tokens": 8, "temperature": 0, "return_routing": True}).json()[
        "choices"
    ][0]["routing"][2]
    browser.point("[data-position='2']")
    rows = browser.evaluate("[...document.querySelectorAll('#detail tr')].map((row) => [...row.cells].map((cell) => cell.textContent))")
    expected = [
        [str(layer), str(expert), f"{weight:.3f}", ", ".join(map(str, lores))]
        for layer in (0, 1)
        for expert, weight, lores in zip(record["experts"][layer], record["weights"][layer], record["lores"][layer], strict=True)
    ]
    assert rows == [["Layer", "Expert", "Weight", "LoRE"], *expected]
    browser.evaluate("document.getElementById('text').focus()")
    browser.press("ArrowRight")
    assert browser.evaluate("document.querySelector('#detail p').textContent") == "Token 3: l"
    browser.press("ArrowLeft")
    assert browser.evaluate("document.querySelector('.chosen').dataset.position") == "2"


@needs_chromium
def test_a_model_s_text_is_never_code(browser: Browser, here: Served) -> None:
    browser.open(f"{here.url}/")
    generate(browser, "<img src=x onerror=alert(1)><b>bold</b>", tokens=2)
    assert browser.evaluate("document.querySelectorAll('#text img, #text b').length") == 0
    assert "".join(shown(browser, "t.firstChild.textContent")).startswith("<img src=x onerror=alert(1)><b>bold</b>")


@needs_chromium
def test_a_refusal_is_shown_and_a_key_can_be_given(browser: Browser) -> None:
    with served(key="secret") as running:
        browser.open(f"{running.url}/")
        browser.wait("document.getElementById('status').textContent.includes('needs a key')")
        browser.evaluate("key.value = 'secret'; key.dispatchEvent(new Event('change'))")
        browser.wait("document.getElementById('model').textContent.startsWith('tiny')")
        generate(browser, "a" * 256)
        assert "context is 256 tokens" in browser.evaluate("document.getElementById('status').textContent")
        assert browser.evaluate("document.getElementById('status').className") == "wrong"
        generate(browser, "Hello", tokens=3)
        assert len(shown(browser, "t.textContent")) == 7


@needs_chromium
def test_the_page_has_names_for_everything_a_person_uses(browser: Browser, here: Served) -> None:
    browser.open(f"{here.url}/")
    generate(browser, "Hello", tokens=3)
    tree = browser.call("Accessibility.getFullAXTree")["nodes"]
    used = [
        node for node in tree if node.get("role", {}).get("value") in ("textbox", "spinbutton", "combobox", "checkbox", "button", "group", "list")
    ]
    names = {node.get("name", {}).get("value", "") for node in used if not node.get("ignored")}
    assert {"Prompt", "Tokens", "Temperature", "Seed", "Generate", "Stop", "Layer", "Show expert numbers"} <= names
    assert "" not in names


def test_the_page_loads_nothing_from_elsewhere(here: Served) -> None:
    import httpx

    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
        answer = httpx.get(here.url + path)
        assert answer.headers["content-type"].startswith(kind)
        assert answer.headers["content-security-policy"].startswith("default-src 'self'")
        assert "//" not in answer.text.replace("// ", "")
