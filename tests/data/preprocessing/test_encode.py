"""Texts to columns of tokens: batches, the end of documents, labels behind a pattern, and ftfy."""

from __future__ import annotations

import random
import sys
from itertools import chain

import numpy as np
import pytest

from megatron.data.indexed import DatasetError
from megatron.data.input.bad_input import Kind
from megatron.data.preprocessing import encode
from megatron.data.preprocessing.encode import IGNORED, TextTask, batches, column, masked

CHARACTERS = "CharLevelTokenizer"


def labels_of(document: list[int], pattern: list[int]) -> list[int]:
    """The definition: everything up to and including the first place of the pattern is ignored."""
    for start in range(len(document) - len(pattern) + 1):
        if document[start : start + len(pattern)] == pattern:
            end = start + len(pattern)
            return [IGNORED] * end + document[end:]
    return document


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_labels_behind_a_pattern_document_by_document(length: int) -> None:
    draw = random.Random(length)
    for _ in range(60):
        documents = [draw.choices((1, 2), k=draw.randrange(9)) for _ in range(draw.randrange(6))]
        pattern = draw.choices((1, 2), k=length)
        text = column(documents, np.dtype("<i4"))
        labels = masked(text, tuple(pattern))
        expected = [labels_of(document, pattern) for document in documents]
        assert labels.tokens_T.tolist() == list(chain.from_iterable(expected))
        assert labels.sizes_N.tolist() == list(map(len, documents))
        assert IGNORED not in text.tokens_T


def test_columns_of_several_keys_and_their_ends() -> None:
    work = TextTask(CHARACTERS, append_eod=True).start()
    encoded = work([("ab", "x"), ("c", "yz")])
    assert [documents.tokens_T.tolist() for documents in encoded.columns] == [[97, 98, 0, 99, 0], [120, 0, 121, 122, 0]]
    assert [documents.sizes_N.tolist() for documents in encoded.columns] == [[3, 2], [2, 3]]
    assert {documents.tokens_T.dtype for documents in encoded.columns} == {np.dtype("<u2")}
    assert encoded.unusable == []


def test_a_document_without_tokens_is_in_no_column() -> None:
    """Not even as a lone end-of-document token, and the columns stay side by side."""
    encoded = TextTask(CHARACTERS, append_eod=True).start()([("ab", ""), ("c", "d")])
    assert [documents.tokens_T.tolist() for documents in encoded.columns] == [[99, 0], [100, 0]]
    assert [documents.sizes_N.tolist() for documents in encoded.columns] == [[0, 2], [0, 2]]
    assert encoded.unusable == [(0, Kind.BLANK, "no tokens in it")]


def test_labels_are_a_column_of_int32() -> None:
    text, labels = TextTask(CHARACTERS, append_eod=True, mask_before=(65, 58)).start()([("Q: q A: a",), ("none",)]).columns
    assert text.tokens_T.tolist() == [*b"Q: q A: a", 0, *b"none", 0]
    assert labels.tokens_T.tolist() == [IGNORED] * 7 + [*b" a", 0, *b"none", 0]
    assert text.tokens_T.dtype == labels.tokens_T.dtype == np.dtype("<i4")


def test_batches_are_of_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "BATCH_BYTES", 5)
    assert list(batches(["aaa", "bb", "c", "dddddddd", "e"], len)) == [["aaa", "bb"], ["c", "dddddddd"], ["e"]]
    assert list(batches([], len)) == []


def test_ftfy_mends_or_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ftfy")
    task = TextTask(CHARACTERS, ftfy=True)
    assert task.start()([("schÃ¶n",)]).columns[0].tokens_T.tolist() == list("schön".encode())
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(DatasetError, match="--ftfy needs the package ftfy: `pip install ftfy`"):
        task.start()
