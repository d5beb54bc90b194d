"""Samples of whole documents against vectors made with NeoX's own code, and against its rules written out plainly."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.data.indexed import DatasetError, IndexedDataset
from megatron.data.sample import whole_maps
from megatron.data.sample.map_cache import Packing, load_or_build
from megatron.data.sample.samples import Source
from megatron.data.sample.whole_documents import WholeDocumentDataset
from megatron.data.sample.whole_maps import has_labels
from tests.data.conftest import write

SIZES = [3, 2, 4, 5, 1, 9, 2, 6]


def labels_of(sizes: Sequence[int], labelled: Sequence[int], path: Path) -> IndexedDataset:
    """As in the vectors: the numbered tokens of some documents without those divisible by three."""
    ends = np.cumsum(sizes)
    documents = [
        [token if number in labelled and token % 3 else -100 for token in range(end - size, end)]
        for number, (size, end) in enumerate(zip(sizes, ends, strict=True))
    ]
    return IndexedDataset(write(path, documents, "<i4"))


def whole(numbered: Callable[..., Path], case: dict[str, Any], documents: range | None = None, **more: Any) -> WholeDocumentDataset:
    tokens = IndexedDataset(numbered(case["sizes"]))
    labels = None if case["labelled"] is None else labels_of(case["sizes"], case["labelled"], tokens.prefix.with_name("labels"))
    packing = Packing(case["pack_impl"], case["allow_chopped"], labels)
    documents = documents or range(len(tokens))
    settings = {key: case[key] for key in ("seq_length", "num_samples", "seed")}
    maps = load_or_build(tokens, documents, **settings, packing=packing)
    return WholeDocumentDataset(Source(tokens, labels, **more), maps, "train", seq_length=case["seq_length"])


@pytest.mark.parametrize("number", range(4))
def test_golden_vectors(golden: dict[str, Any], numbered: Callable[..., Path], number: int) -> None:
    case = golden["whole"][number]
    dataset = whole(numbered, case)
    assert {name: values.tolist() for name, values in dataset.maps._asdict().items()} == {name: case[name] for name in dataset.maps._fields}
    assert len(dataset) == len(case["samples"])
    for i, expected in enumerate(case["samples"]):
        sample = {key: values.tolist() for key, values in dataset[i].items()}
        if "label" in expected:
            assert sample == expected
        else:  # NeoX pads unlabelled text with -100, which no embedding has; here the label says so
            assert sample == {"text": [max(token, 0) for token in expected["text"]], "label": expected["text"]}
        assert {values.dtype for values in dataset[i].values()} == {np.dtype(np.int64)}


def plain_overflow(usable: list[int], sizes: list[int], count: int, *, limit: int, num_samples: int, seed: int) -> tuple[list[int], list[int]]:
    """(documents in order, positions at which samples begin) by NeoX's loop, except that a pass may also end with a document that is left out."""
    rng = np.random.RandomState(seed)
    rng.shuffle(np.arange(num_samples))
    order = np.arange(count)
    chosen: list[int] = []
    begins: list[int] = []
    filled = 0
    while True:
        rng.shuffle(order)
        for document in order.tolist():
            if document not in usable:
                continue
            if filled == 0 or filled + sizes[document] > limit:
                begins.append(len(chosen))
                filled = 0
            filled += sizes[document]
            chosen.append(document)
            if len(begins) == num_samples:
                return chosen, [*begins, len(chosen)]


def test_overflow_of_many_random_documents(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(40):
        sizes = rng.integers(0, 9, rng.integers(2, 30)).tolist()
        seq_length, num_samples, seed, chopped = int(rng.integers(1, 12)), int(rng.integers(2, 60)), int(rng.integers(0, 2**32)), bool(number % 2)
        usable = [i for i, size in enumerate(sizes) if size and (chopped or size <= seq_length + 1)]
        tokens = IndexedDataset(write(tmp_path / f"text{number}", [[1] * size for size in sizes]))
        settings: dict[str, Any] = {"num_samples": num_samples, "seed": seed}
        if not usable:
            continue
        maps = load_or_build(tokens, range(len(sizes)), seq_length=seq_length, **settings, packing=Packing("pack_until_overflow", chopped))
        chosen, begins = plain_overflow(usable, sizes, len(sizes), limit=seq_length + 1, **settings)
        assert maps.document_index.tolist() == chosen
        assert maps.sample_index.tolist() == [[begin, 0] for begin in begins]


def test_every_part_of_a_split_keeps_to_its_documents(numbered: Callable[..., Path], golden: dict[str, Any]) -> None:
    """NeoX counts them from the file's first document, so that validation reads what was trained on."""
    dataset = whole(numbered, golden["whole"][0], range(5, 8))
    assert set(dataset.maps.document_index.tolist()) == {5, 6, 7}


def test_documents_are_numbered_and_padding_apart_from_them(numbered: Callable[..., Path], golden: dict[str, Any]) -> None:
    dataset = whole(numbered, golden["whole"][0], number_documents=True)
    assert dataset[0]["text"].tolist() == [14, 5, 6, 7, 8, 24, 25, 3]
    assert dataset[0]["document"].tolist() == [0, 1, 1, 1, 1, 2, 2, 3]
    assert dataset[4]["text"].tolist() == [24, 25, 0, 1, 2, 14, 26, 0]
    assert dataset[4]["document"].tolist() == [0, 0, 1, 1, 1, 2, 3, 4]


def test_documents_that_are_left_out_are_counted(numbered: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    case = {"sizes": [3, 0, 9, 5], "labelled": [0, 2], "pack_impl": "unpacked", "allow_chopped": False, "seq_length": 7, "num_samples": 4, "seed": 1}
    with caplog.at_level(logging.INFO):
        dataset = whole(numbered, case)
    assert set(dataset.maps.document_index.tolist()) == {0}
    sentence = "of 4 documents 1 empty, 1 longer than seq_length + 1 = 8 tokens (allow_chopped is false), 1 without a label in the first 7 tokens"
    assert f"text: left out {sentence}." in caplog.text
    with pytest.raises(DatasetError, match=r"text: no document is left for samples: of 2 documents 1 empty, 1 longer than"):
        whole(numbered, case, range(1, 3))


def test_labels_count_only_where_the_sample_reaches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_maps, "LABELS_AT_ONCE", 4)
    rng = np.random.default_rng(0)
    for number in range(20):
        documents = [rng.choice([-100, -100, -100, 7], size).tolist() for size in rng.integers(0, 6, 30)]
        labels = IndexedDataset(write(tmp_path / f"labels{number}", documents, "<i4"))
        for within in (1, 3, 9):
            assert has_labels(labels, within).tolist() == [7 in document[:within] for document in documents]


def test_other_labels_and_other_ways_of_packing_never_reuse_a_map(numbered: Callable[..., Path], golden: dict[str, Any]) -> None:
    case = dict(golden["whole"][2])
    assert 4 not in whole(numbered, case).maps.document_index
    with_four = whole(numbered, {**case, "labelled": [0, 1, 2, 3, 4, 5, 6], "num_samples": 5})
    assert 4 in with_four.maps.document_index
    unlabelled = golden["whole"][0]
    assert 5 in whole(numbered, unlabelled).maps.document_index
    assert 5 not in whole(numbered, {**unlabelled, "allow_chopped": False}).maps.document_index
    overflow = whole(numbered, {**case, "pack_impl": "pack_until_overflow"})
    assert overflow.maps.document_index.tolist() != with_four.maps.document_index.tolist()


@pytest.mark.parametrize("number", [0, 2])
def test_maps_larger_than_the_memory_are_refused(numbered: Callable[..., Path], golden: dict[str, Any], number: int) -> None:
    with pytest.raises(DatasetError, match=r"text: the order of 5,000,000,000,000 samples from .* needs .* GiB of memory"):
        whole(numbered, {**golden["whole"][number], "num_samples": 5 * 10**12})
