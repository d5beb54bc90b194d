"""The articles of a Wikipedia dump: `enwik8`, which is the beginning of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron.data.input.bad_input import OnProblem
from megatron.data.input.reading import Document, Meter, read_documents

ENWIK8_URL = "http://mattmahoney.net/dc/enwik8.zip"
END = "</page>\n"


def read_articles(path: Path, on_problem: OnProblem, meter: Meter | None) -> Iterator[Document]:
    """Each page with its markup, unchanged. Together the pages are the whole dump, with the text before the first and after the last page."""
    place, text = f"{path}", ""
    for part in read_documents(path, "text", on_problem, meter, form="text"):
        place, text = (place if text else part.origin), text + part.text
        start = 0
        while (end := text.find(END, start)) >= 0:
            yield Document(place, text[start : end + len(END)])
            start = end + len(END)
        text = text[start:]
    if text.strip():
        yield Document(place, text)
