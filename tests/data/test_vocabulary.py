"""Token ids are checked once a file, and again as soon as the file changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.data import vocabulary
from megatron.data.indexed import DatasetError, IndexedDataset
from megatron.data.loader import SamplePlan, build_data
from megatron.data.vocabulary import check_labels, check_vocabulary
from tests.data.conftest import write


def test_ids_beyond_the_vocabulary_are_named(tmp_path: Path, data_config: Callable[..., Any]) -> None:
    dataset = IndexedDataset(write(tmp_path / "text", [[5, 1], [9, 3, 7, 2]]))
    check_vocabulary(dataset, 10)
    message = r"text\.bin holds token ids 1\.\.9 but the vocabulary has 9 \(0\.\.8\): it was made with another tokenizer"
    with pytest.raises(DatasetError, match=message):
        check_vocabulary(dataset, 9)
    plan = SamplePlan(train_samples=1, valid_samples=0, test_samples=0)
    with pytest.raises(DatasetError, match=message):
        build_data(data_config(data_path=str(dataset.prefix)), seq_length=2, plan=plan, seed=1, vocab_size=9)


def test_negative_ids_and_numbers_that_are_no_ids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"token ids -1\.\.3"):
        check_vocabulary(IndexedDataset(write(tmp_path / "signed", [[3, -1]], "<i4")), 10)
    with pytest.raises(DatasetError, match="holds float32 values and not token ids"):
        check_vocabulary(IndexedDataset(write(tmp_path / "floats", [[3, 1]], "<f4")), 10)
    check_vocabulary(IndexedDataset(write(tmp_path / "empty", [])), 10)


def test_the_scan_goes_in_chunks_and_happens_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write(tmp_path / "text", [range(100), range(50, 200)])
    monkeypatch.setattr(vocabulary, "CHUNK_TOKENS", 7)
    check_vocabulary(IndexedDataset(prefix), 200)
    monkeypatch.setattr(vocabulary, "scan", None)
    with pytest.raises(DatasetError, match=r"0\.\.199"):
        check_vocabulary(IndexedDataset(prefix), 199)


def test_a_rewritten_file_is_scanned_again(tmp_path: Path) -> None:
    prefix = write(tmp_path / "text", [[1, 2, 3]])
    check_vocabulary(IndexedDataset(prefix), 4)
    write(prefix, [[1, 4, 3]])
    with pytest.raises(DatasetError, match=r"1\.\.4"):
        check_vocabulary(IndexedDataset(prefix), 4)


def test_a_damaged_note_is_replaced_by_a_scan(tmp_path: Path) -> None:
    prefix = write(tmp_path / "text", [np.array([1, 2, 3])])
    check_vocabulary(IndexedDataset(prefix), 4)
    (note,) = tmp_path.glob("index_maps/*/token_range.json")
    note.write_text("")
    with pytest.raises(DatasetError, match=r"1\.\.3"):
        check_vocabulary(IndexedDataset(prefix), 3)


def label_file(tmp_path: Path, documents: list[list[int]], dtype: str = "<i4") -> IndexedDataset:
    return IndexedDataset(write(tmp_path / "labels", documents, dtype))


@pytest.mark.parametrize(
    ("labels", "dtype", "message"),
    [
        ([[1, 2], [3]], "<i4", "labels do not fit the tokens .*text: 2 and 3 documents; both come from one run"),
        ([[1, 2], [3], [4]], "<i4", r"document 1 \(counted from 0\) has 1 labels and 2 tokens, and 1 more documents differ; both come from"),
        ([[1, 2], [3, -100], []], "<i4", r"document 2 \(counted from 0\) has 0 labels and 3 tokens; both come from"),
        ([[1, 2], [3, 9], [4, 5, 6]], "<i4", r"labels.bin holds labels up to 9 but the vocabulary has 9 \(0..8\); masked tokens have the label -100"),
        ([[1, 2], [3, 65436], [4, 5, 6]], "<u2", r"labels up to 65436 .* which needs a signed type such as int32"),
        ([[1, 2], [3, 4], [4, 5, 6]], "<f4", "labels.bin holds float32 values, not labels"),
    ],
)
def test_labels_that_do_not_fit_are_explained(tmp_path: Path, labels: list[list[int]], dtype: str, message: str) -> None:
    tokens = IndexedDataset(write(tmp_path / "text", [[1, 2], [3, 4], [4, 5, 6]]))
    with pytest.raises(DatasetError, match=message):
        check_labels(label_file(tmp_path, labels, dtype), tokens, 9)


def test_masked_labels_are_fine(tmp_path: Path) -> None:
    tokens = IndexedDataset(write(tmp_path / "text", [[1, 2], [], [3]]))
    check_labels(label_file(tmp_path, [[-100, 2], [], [-100]]), tokens, 3)
    check_labels(label_file(tmp_path, [[-100, 200], [], [-100]]), tokens, None)
