"""What is held out depends on the corpus alone and loses no text."""

from __future__ import annotations

import random
from itertools import chain

import pytest

from megatron.data.corpus.hold_out import FEW_DOCUMENTS, Fraction, HoldOut, Newest, Survey, snap
from megatron.data.indexed import DatasetError


def divide(rule: HoldOut, texts: list[str]) -> dict[str, list[str]]:
    survey = Survey()
    for text in texts:
        survey.note(text)
    parts, found = rule.divide(survey), {"train": [], "valid": [], "test": []}
    for number, text in enumerate(texts):
        for split, piece in parts.pieces(number, text):
            found[split].append(piece)
    return found


def test_the_newest_are_for_test_and_the_ones_before_for_validation() -> None:
    texts = [str(i) * 10 for i in range(8)]
    found = divide(Newest(valid_bytes=15, test_bytes=30), texts)
    assert found == {"train": texts[:3], "valid": texts[3:5], "test": texts[5:]}
    found = divide(Newest(valid_bytes=10, test_bytes=11), texts)
    assert found == {"train": texts[:5], "valid": texts[5:6], "test": texts[6:]}


@pytest.mark.parametrize("sizes", [(5, 5), (100, 5), (10, 100), (100, 100)])
def test_nothing_left_to_train_on_is_explained(sizes: tuple[int, int]) -> None:
    with pytest.raises(DatasetError, match=r"the corpus has 3 document\(s\) with 30 bytes in all: nothing would be left to train on"):
        divide(Newest(*sizes) if sum(sizes) > 30 else Newest(15, 15), ["x" * 10] * 3)
    with pytest.raises(DatasetError, match=r"1 document\(s\) with 2 bytes"):
        divide(Fraction(0.1, 0.1), ["ab"])


def test_many_documents_are_divided_by_hash_whatever_their_order() -> None:
    texts = [f"document {i}" for i in range(1000)]
    found = divide(Fraction(0.05, 0.1), texts)
    assert {split: len(part) for split, part in found.items()} == {"train": 850, "valid": 50, "test": 100}
    assert sorted(chain(*found.values())) == sorted(texts)
    shuffled = random.Random(0).sample(texts, len(texts))
    assert {split: set(part) for split, part in divide(Fraction(0.05, 0.1), shuffled).items()} == {split: set(part) for split, part in found.items()}


def test_equal_texts_stay_together() -> None:
    found = divide(Fraction(0.1, 0.1), [f"document {i % 70}" for i in range(700)])
    sets = [set(part) for part in found.values()]
    assert all(sets)
    assert len(set.union(*sets)) == sum(map(len, sets)) == 70


@pytest.mark.parametrize("count", [1, 2, FEW_DOCUMENTS - 1])
def test_few_documents_give_their_tail_cut_at_lines(count: int) -> None:
    texts = ["".join(f"line {i} of {number}\n" for i in range(2000 // count)) for number in range(count)]
    found = divide(Fraction(0.1, 0.2), texts)
    assert "".join(chain(*found.values())) == "".join(texts)
    assert all(piece.endswith("\n") for part in found.values() for piece in part)
    total = sum(map(len, texts))
    assert [round(sum(map(len, part)) / total, 2) for part in found.values()] == [0.7, 0.1, 0.2]


def test_cuts_fall_on_lines_words_or_characters() -> None:
    assert snap(b"one\ntwo three", 9) == 4
    assert snap(b"two three", 6) == 4
    assert snap("日本語".encode(), 4) == 3
    assert [snap(b"ab", position) for position in (-1, 0, 2, 3)] == [0, 0, 2, 2]


def test_zero_holds_nothing_out_and_other_shares_are_explained() -> None:
    for texts in (["a b c d"], [f"document {i}" for i in range(200)]):
        assert divide(Fraction(0, 0), texts) == {"train": texts, "valid": [], "test": []}
    for valid, test in ((0.5, 0.5), (-0.1, 0.1), (0.1, 0), (0, 0.1)):
        with pytest.raises(DatasetError, match=r"--valid-fraction .* and --test-fraction .*: both must be above 0"):
            Fraction(valid, test)


def test_recent_is_the_newest_of_the_training_part_once_more() -> None:
    survey = Survey()
    texts = ["x" * 10] * 6
    for text in texts:
        survey.note(text)
    parts = Newest(valid_bytes=10, test_bytes=10, recent_bytes=15).divide(survey)
    assert [[split for split, _ in parts.pieces(number, text)] for number, text in enumerate(texts)] == [
        ["train"],
        ["train"],
        ["train", "recent"],
        ["train", "recent"],
        ["valid"],
        ["test"],
    ]
