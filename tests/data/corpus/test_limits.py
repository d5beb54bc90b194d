"""How much of a corpus is taken: never more than asked for, and never a document that nobody will use."""

from __future__ import annotations

import argparse
from collections.abc import Generator

import pytest

from megatron.data.corpus import limits as module
from megatron.data.corpus.limits import ALL, Limiter, Limits, amount_of
from megatron.data.indexed import DatasetError
from megatron.data.input.reading import Document

TEXTS = ["zwölf", "a", "bb", "ccc", "dddd"]


class Source:
    """Documents that know how many of them were asked for, and whether somebody closed them."""

    def __init__(self) -> None:
        self.given = 0
        self.closed = False

    def documents(self) -> Generator[Document]:
        try:
            for text in TEXTS:
                self.given += 1
                yield Document("", text)
        finally:
            self.closed = True


def lengths(texts: list[str]) -> list[int]:
    return [len(text) for text in texts]


@pytest.mark.parametrize(
    ("limits", "taken", "asked"),
    [
        (Limits(), 5, 5),
        (Limits(documents=ALL), 5, 5),
        (Limits(documents=2), 2, 2),
        (Limits(documents=9), 5, 5),
        (Limits(bytes=6), 1, 1),
        (Limits(bytes=7), 2, 2),
        (Limits(bytes=9), 3, 3),
        (Limits(bytes=8), 2, 3),
        (Limits(bytes=9, documents=2), 2, 2),
        (Limits(tokens=6), 2, 5),
        (Limits(tokens=7), 2, 5),
        (Limits(tokens=8, bytes=7), 2, 5),
    ],
)
def test_documents_until_the_next_would_be_too_much(limits: Limits, taken: int, asked: int) -> None:
    source = Source()
    limiter = Limiter(limits, lengths)
    assert [document.text for document in limiter.take(source.documents())] == TEXTS[:taken]
    assert source.given == asked
    assert source.closed
    assert 0 <= limiter.fraction <= 1


def test_tokens_are_counted_in_batches_and_no_further_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 6)
    source, sizes = Source(), []

    def count(texts: list[str]) -> list[int]:
        sizes.append(len(texts))
        return [10] * len(texts)

    assert len(list(Limiter(Limits(tokens=20), count).take(source.documents()))) == 2
    assert (sizes, source.given, source.closed) == ([2], 2, True)


def test_who_stops_early_closes_the_source() -> None:
    source = Source()
    taken = Limiter(Limits(documents=3)).take(source.documents())
    next(taken)
    taken.close()
    assert source.closed


def test_what_cannot_be_is_explained() -> None:
    with pytest.raises(DatasetError, match=r"--max-bytes 5 leaves no document: the first one already has 6 bytes"):
        list(Limiter(Limits(bytes=5)).take(Source().documents()))
    with pytest.raises(DatasetError, match=r"--max-tokens counts tokens .* needs a tokenizer that exists already\. Give -v FILE"):
        Limiter(Limits(tokens=5))


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("500", 500),
        ("10k", 10_000),
        ("2.5M", 2_500_000),
        ("1B", 10**9),
        ("2GB", 2 * 10**9),
        ("100 MB", 10**8),
        ("1,000", 1000),
        ("all", ALL),
        ("3T", 3 * 10**12),
    ],
)
def test_amounts(text: str, amount: int | str) -> None:
    assert amount_of(text) == amount


@pytest.mark.parametrize("text", ["", "0", "-3", "ten", "1e9", "0.1", "k"])
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"is not an amount; give a number above 0, which may end in k, M, B, G or T, or give 'all'"):
        amount_of(text)
