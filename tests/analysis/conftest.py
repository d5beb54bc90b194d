"""What these tests share: one Chromium a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.browser import Browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("chromium"))
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def browser(chromium: Browser) -> Browser:
    """The one browser of the file, with an empty page and nothing noted."""
    chromium.call("Page.navigate", url="about:blank")
    chromium.errors.clear()
    chromium.requests.clear()
    chromium.show(1000)
    return chromium
