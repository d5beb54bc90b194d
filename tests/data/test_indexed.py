"""The file format, byte for byte, and a sentence for every way in which a pair of files can be wrong."""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from megatron.data import indexed
from megatron.data.indexed import DTYPES, DatasetError, IndexedDataset, IndexedDatasetWriter, token_dtype
from tests.data.conftest import write

DOCUMENTS = [[1, 2, 3], [4, 5], [], [6, 7, 8, 9]]


def test_bytes_on_disk_are_neox_s(tmp_path: Path) -> None:
    prefix = write(tmp_path / "text", DOCUMENTS)
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 4, 5)
    arrays = struct.pack("<4i", 3, 2, 0, 4) + struct.pack("<4q", 0, 6, 10, 10) + struct.pack("<5q", 0, 1, 2, 3, 4)
    assert Path(f"{prefix}.idx").read_bytes() == header + arrays
    assert Path(f"{prefix}.bin").read_bytes() == struct.pack("<9H", *range(1, 10))


@pytest.mark.parametrize("dtype", [dtype.str for dtype in DTYPES.values()])
def test_every_token_type_comes_back(tmp_path: Path, dtype: str) -> None:
    dataset = IndexedDataset(write(tmp_path / "text", DOCUMENTS, dtype))
    assert dataset.dtype == np.dtype(dtype)
    assert [dataset.get(i).tolist() for i in range(len(dataset))] == DOCUMENTS
    assert dataset.num_tokens == 9
    assert dataset.tokens.tolist() == list(range(1, 10))


def test_parts_of_a_document(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "text", DOCUMENTS))
    assert dataset.get(3, 1, 2).tolist() == [7, 8]
    assert dataset.get(3, 2).tolist() == [8, 9]
    with pytest.raises(IndexError, match=r"tokens 2..5 of document 3 were asked for, but it has 4 tokens"):
        dataset.get(3, 2, 3)
    with pytest.raises(ValueError, match="read-only"):
        dataset.get(0)[0] = 1


def test_a_pickled_dataset_maps_the_files_again(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "text", DOCUMENTS))
    data = pickle.dumps(dataset)
    assert len(data) < 500
    assert pickle.loads(data).tokens.tolist() == dataset.tokens.tolist()


def test_token_type_follows_the_vocabulary() -> None:
    assert token_dtype(65499) == np.dtype("<u2")
    assert token_dtype(65500) == np.dtype("<i4")


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt), IndexedDatasetWriter(tmp_path / "text", np.dtype("<u2")) as writer:
        writer.add([1, 2])
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_ids_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(DatasetError, match=r"token ids 1\.\.70000 do not fit the file's type uint16"),
        IndexedDatasetWriter(tmp_path / "text", np.dtype("<u2")) as writer,
    ):
        writer.add([1, 70000])
    with pytest.raises(DatasetError, match="tokens of type uint32 cannot be stored"):
        IndexedDatasetWriter(tmp_path / "text", np.dtype("<u4"))


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_missing_half_is_named(tmp_path: Path, suffix: str) -> None:
    prefix = write(tmp_path / "text", DOCUMENTS)
    os.remove(f"{prefix}.{suffix}")
    with pytest.raises(DatasetError, match=rf"no file .*text\.{suffix}; `python prepare_data.py` makes"):
        IndexedDataset(prefix)


def test_a_misspelt_path_gets_a_suggestion(tmp_path: Path) -> None:
    write(tmp_path / "train_text_document", DOCUMENTS)
    with pytest.raises(DatasetError, match=r"no file .*train\.bin and no file .*train\.idx; did you mean .*train_text_document\?"):
        IndexedDataset(tmp_path / "train")
    with pytest.raises(DatasetError, match=r"give the path without \.bin"):
        IndexedDataset(tmp_path / "train_text_document.bin")


def change(path: Path, at: int, new: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + len(new)] = new
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("at", "new", "message"),
    [
        (0, b"NOTANIDX\x00", "is not an index of a token file: it starts with"),
        (0, b"TNTIDX\x00\x00\x00", "fairseq's old 'cached' format"),
        (9, struct.pack("<Q", 2), "has format version 2"),
        (17, b"\x09", "unknown token type code 9"),
        (18, struct.pack("<Q", 5), r"is cut short: .* but its 5 documents need"),
        (18, struct.pack("<Q", 3), r"is too long: .* but its 3 documents need"),
        (34 + 4 * 4, struct.pack("<q", 2), "document sizes and byte offsets contradict each other"),
        (34, struct.pack("<2i", -1, 6), "document sizes and byte offsets contradict each other"),
    ],
)
def test_a_damaged_index_is_explained(tmp_path: Path, at: int, new: bytes, message: str) -> None:
    prefix = write(tmp_path / "text", DOCUMENTS)
    change(Path(f"{prefix}.idx"), at, new)
    with pytest.raises(DatasetError, match=message):
        IndexedDataset(prefix)


@pytest.mark.parametrize(
    ("length", "message"), [(0, "is not an index"), (20, "20 bytes, and the header alone needs 34"), (60, "is cut short: it has 60 bytes")]
)
def test_a_truncated_index_is_explained(tmp_path: Path, length: int, message: str) -> None:
    prefix = write(tmp_path / "text", DOCUMENTS)
    os.truncate(f"{prefix}.idx", length)
    with pytest.raises(DatasetError, match=message):
        IndexedDataset(prefix)


@pytest.mark.parametrize("length", [0, 17, 19])
def test_a_bin_of_another_size_is_explained(tmp_path: Path, length: int) -> None:
    prefix = write(tmp_path / "text", DOCUMENTS)
    os.truncate(f"{prefix}.bin", length)
    with pytest.raises(DatasetError, match=rf"text\.bin has {length} bytes but text\.idx describes 18 \(9 tokens of 2 bytes\)"):
        IndexedDataset(prefix)


def test_documents_of_several_items_and_of_none(tmp_path: Path) -> None:
    """The boundaries are NeoX's `doc_idx`: a text without tokens ends a document and adds no item."""
    with IndexedDatasetWriter(tmp_path / "text", np.dtype("<u2")) as writer:
        writer.add_item([1, 2, 3])
        writer.add_item([4])
        writer.end_document()
        writer.end_document()
        writer.add([5, 6])
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 4)
    arrays = struct.pack("<3i", 3, 1, 2) + struct.pack("<3q", 0, 6, 8) + struct.pack("<4q", 0, 2, 2, 3)
    assert Path(f"{tmp_path / 'text'}.idx").read_bytes() == header + arrays
    dataset = IndexedDataset(tmp_path / "text")
    assert (len(dataset), dataset.document_ends.tolist()) == (3, [2, 2, 3])


@pytest.mark.parametrize(("code", "dtype"), [*enumerate(["u1", "i1", "<i2", "<i4", "<i8", "<f4", "<f8", "<u2"], 1)])
def test_type_codes_are_neox_s(tmp_path: Path, code: int, dtype: str) -> None:
    prefix = write(tmp_path / "text", DOCUMENTS, dtype)
    assert Path(f"{prefix}.idx").read_bytes()[17] == code
    assert Path(f"{prefix}.bin").read_bytes() == np.arange(1, 10, dtype=dtype).tobytes()


def test_a_document_too_long_for_the_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed, "LONGEST", 3)
    with (
        pytest.raises(DatasetError, match=r"text: a document has 4 tokens; the format holds at most 3 in one document\. Cut it into parts"),
        IndexedDatasetWriter(tmp_path / "text", np.dtype("<u2")) as writer,
    ):
        writer.add([1, 2, 3, 4])


def test_what_is_given_in_place_of_a_pair_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    with pytest.raises(DatasetError, match=r"a\.jsonl is not a \.bin/\.idx pair, which training needs\. `python prepare_data\.py .*a\.jsonl`"):
        IndexedDataset(tmp_path / "a.jsonl")
    (tmp_path / "mine").mkdir()
    for name in ("train.idx", "train.bin"):
        (tmp_path / "mine" / name).write_bytes(b"")
    with pytest.raises(DatasetError, match=r"mine is a folder; give the path of a pair in it, without \.bin/\.idx: .*/mine/train$"):
        IndexedDataset(tmp_path / "mine")
