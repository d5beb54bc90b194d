"""What importers refuse, how they find documents, and what they write."""

from __future__ import annotations

import gzip
import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.data.formats import exporting, importing, source
from megatron.data.formats.exporting import export_tokens
from megatron.data.formats.importing import Imported, ImportOptions, import_tokens
from megatron.data.indexed import DatasetError, IndexedDataset, IndexedDatasetWriter
from megatron.data.progress import build_reporter

QUIET = build_reporter(quiet=True)
EOD = 0
DOCUMENTS = [[5, 6, EOD], [7, EOD], [8, 9, 10, 11, EOD], [EOD], [12, EOD]]


def run(tmp_path: Path, kind: str, *inputs: Path, **options: Any) -> Imported:
    given = {"format": kind, "inputs": tuple(map(str, inputs)), "output_prefix": str(tmp_path / "out"), "vocab_size": 300, "eod": EOD}
    return import_tokens(ImportOptions(**{**given, **options}), QUIET)


def read(prefix: Path) -> list[list[int]]:
    pair = IndexedDataset(prefix)
    ends = [0, *np.append(0, np.cumsum(pair.sizes))[pair.document_ends].tolist()]
    return [pair.tokens[start:end].tolist() for start, end in itertools.pairwise(ends)]


def raw(path: Path, documents: Sequence[Sequence[int]], dtype: str = "<u2") -> Path:
    path.parent.mkdir(exist_ok=True)
    np.array([token for row in documents for token in row], dtype).tofile(path)
    return path


def datatrove(tmp_path: Path, documents: Sequence[Sequence[int]] = DOCUMENTS, dtype: str = "<u2") -> Path:
    path = raw(tmp_path / "in" / "a.ds", documents, dtype)
    np.cumsum([len(row) for row in documents]).astype("<u8").tofile(f"{path}.index")
    return path


def test_empty_documents_are_kept_as_documents_without_items(tmp_path: Path) -> None:
    result = run(tmp_path, "datatrove", datatrove(tmp_path, [[], [1, 2], [], [], [3], []]))
    assert (result.documents, result.tokens) == (6, 3)
    assert read(tmp_path / "out") == [[], [1, 2], [], [], [3], []]
    assert IndexedDataset(tmp_path / "out").sizes.tolist() == [2, 1]


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("borders", ["eod", "bod"])
def test_borders_are_found_across_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, borders: str) -> None:
    monkeypatch.setattr(source, "BATCH_TOKENS", batch)
    stream = [[EOD, *row[:-1]] for row in DOCUMENTS] if borders == "bod" else [*DOCUMENTS, [3, 4]]
    run(tmp_path, "olmo", raw(tmp_path / "a.npy", stream), borders=borders)
    assert read(tmp_path / "out") == stream


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_documents_keep_their_borders_whatever_the_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setattr(source, "BATCH_TOKENS", batch)
    monkeypatch.setattr("megatron.data.formats.megatron_core.BATCH_TOKENS", batch)
    monkeypatch.setattr("megatron.data.formats.megatron_core.DOCUMENTS_AT_ONCE", 2)
    run(tmp_path, "datatrove", datatrove(tmp_path))
    assert read(tmp_path / "out") == DOCUMENTS
    run(tmp_path, "megatron", tmp_path / "out.idx", output_prefix=str(tmp_path / "again"))
    assert (tmp_path / "again.idx").read_bytes() == (tmp_path / "out.idx").read_bytes()


def test_an_end_is_added_where_it_is_missing(tmp_path: Path) -> None:
    run(tmp_path, "datatrove", datatrove(tmp_path, [[1, 2], [3, EOD], [], [4]]), append_eod=True)
    assert read(tmp_path / "out") == [[1, 2, EOD], [3, EOD], [], [4, EOD]]


def test_llm_c(tmp_path: Path) -> None:
    rows = [[EOD, 1, 2], [EOD, 3]]
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 5
    path = tmp_path / "a.bin"
    path.write_bytes(header.tobytes() + np.concatenate(rows).astype("<u2").tobytes())
    run(tmp_path, "llm.c", path)
    assert read(tmp_path / "out") == rows
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DatasetError, match=r"a\.bin has 4 tokens, but its header says 5: a copy was cut short"):
        run(tmp_path, "llm.c", path)
    path.write_bytes(b"x" * 2000)
    with pytest.raises(DatasetError, match=r"is not a token file of llm\.c"):
        run(tmp_path, "llm.c", path)


def test_ids_that_the_vocabulary_lacks_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"a\.ds, document 0 and what follows: token ids 1\.\.300, but the vocabulary has 300 \(0\.\.299\)"):
        run(tmp_path, "datatrove", datatrove(tmp_path, [[1], [300]]))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_type_that_is_too_small_or_too_large_is_found(tmp_path: Path) -> None:
    path = datatrove(tmp_path, [[70_000, 5]], "<u4")
    run(tmp_path, "datatrove", path, vocab_size=100_000)
    assert IndexedDataset(tmp_path / "out").dtype == np.int32
    with pytest.raises(DatasetError, match=r"a\.ds\.index ends at token 2, but the tokens' file has 4 of type uint16: .*another type \(--dtype\)"):
        run(tmp_path, "datatrove", path)


def test_what_is_cut_short_is_refused(tmp_path: Path) -> None:
    path = datatrove(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DatasetError, match=r"a\.ds has 25 bytes, which is not a whole number of uint16 values"):
        run(tmp_path, "datatrove", path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DatasetError, match=r"a\.ds\.index ends at token 13, but the tokens' file has 12"):
        run(tmp_path, "datatrove", path)
    Path(f"{path}.index").unlink()
    with pytest.raises(DatasetError, match=r"the files do not say where documents end\. --borders eod"):
        run(tmp_path, "datatrove", path)
    path.write_bytes(b"")
    with pytest.raises(DatasetError, match=r"no tokens in "):
        run(tmp_path, "datatrove", path, borders="eod")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,3\n4,13\n", r"a\.csv\.gz:2: a document from token 4 to 13, but the one before ends at 3 of 13 tokens"),
        ("0,3\n3,14\n", r"a\.csv\.gz:2: a document from token 3 to 14"),
        ("0,3\n", r"a\.csv\.gz ends at token 3 of 13: the tokens after it belong to no document"),
        ("start,end\n", r"a\.csv\.gz is damaged or no list of `start,end` lines"),
    ],
)
def test_borders_of_olmo_must_be_those_of_the_tokens(tmp_path: Path, text: str, message: str) -> None:
    path = raw(tmp_path / "a.npy", DOCUMENTS)
    path.with_suffix(".csv.gz").write_bytes(gzip.compress(text.encode()))
    with pytest.raises(DatasetError, match=message):
        run(tmp_path, "olmo", path)
    run(tmp_path, "olmo", path, borders="eod")
    assert read(tmp_path / "out") == DOCUMENTS


def test_an_array_with_a_header_is_no_token_file(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(5, dtype=np.uint16))
    with pytest.raises(DatasetError, match=r"begins with NumPy's header"):
        run(tmp_path, "olmo", tmp_path / "a.npy", borders="eod")


def test_images_in_a_multimodal_pair_are_refused() -> None:
    pair = Path(__file__).parent / "fixtures" / "megatron_core" / "images.idx"
    with pytest.raises(DatasetError, match=r"images\.idx is a multimodal index: 1 of its 19 sequences are no text \(mode above 0\)"):
        importing.MegatronSource([str(pair)], source.ReadOptions(vocab_size=400))


def test_chunks_that_only_litdata_reads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError, match=r"the items are compressed inside their chunks \(compression_level batch\), which only litdata itself reads"
    ):
        run(tmp_path, "litdata", Path(__file__).parent / "fixtures" / "litdata" / "framed")


@pytest.mark.parametrize(("corpus", "kind"), [("streaming/untyped", "mds"), ("litdata/tensors", "litdata")])
def test_a_damaged_shard_is_refused(tmp_path: Path, corpus: str, kind: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for path in (Path(__file__).parent / "fixtures" / corpus).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    shard = next(path for path in sorted(folder.iterdir()) if path.name != "index.json")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2])
    with pytest.raises(DatasetError, match=r"a copy was cut short"):
        run(tmp_path, kind, folder, vocab_size=384)
    shard.write_bytes(whole[:4] + b"\xff\xff\xff\x7f" + whole[8:12] + b"\x01\x00\x00\x00" + whole[16:])
    with pytest.raises(DatasetError, match=r"is damaged: the byte offsets of its (samples|items) do not fit its size"):
        run(tmp_path, kind, folder, vocab_size=384)
    shard.unlink()
    with pytest.raises(DatasetError, match=r"no file .*, which the index names; copy the whole folder"):
        run(tmp_path, kind, folder, vocab_size=384)
    (folder / "index.json").write_text("{}")
    with pytest.raises(DatasetError, match=r"is not an index of"):
        run(tmp_path, kind, folder, vocab_size=384)


def test_a_column_is_chosen_or_asked_for(tmp_path: Path) -> None:
    folder = Path(__file__).parent / "fixtures" / "streaming"
    with pytest.raises(DatasetError, match=r"no column 'text'; the columns are: a, id, tokens"):
        run(tmp_path, "mds", folder / "untyped", column="text")
    with pytest.raises(DatasetError, match=r"the column has the encoding 'str'"):
        run(tmp_path, "mds", folder / "untyped", column="a")
    with pytest.raises(DatasetError, match=r"stored as plain bytes\. Give their type with --dtype \(llm-foundry wrote int64\)"):
        run(tmp_path, "mds", folder / "bytes")


def test_a_source_that_changes_meanwhile_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = datatrove(tmp_path)
    before = importing.check_written

    def change(*given: Any) -> None:
        data = bytearray(path.read_bytes())
        data[4] += 1
        path.write_bytes(data)
        before(*given)

    monkeypatch.setattr(importing, "check_written", change)
    with pytest.raises(DatasetError, match=r"out\.bin differs from the source after token 0 \(document 0\)"):
        run(tmp_path, "datatrove", path)
    run(tmp_path, "datatrove", path, check=False)


def test_a_pair_does_not_overwrite_its_source(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "out", np.dtype("<u2")) as writer:
        writer.add([1])
    with pytest.raises(DatasetError, match=r"this pair is part of the input"):
        run(tmp_path, "megatron", tmp_path / "out")


@pytest.mark.parametrize("kind", ["datatrove", "olmo"])
def test_what_is_exported_comes_back(tmp_path: Path, kind: str) -> None:
    with IndexedDatasetWriter(tmp_path / "pair", np.dtype("<u2")) as writer:
        for row in [*DOCUMENTS, []]:
            writer.add_item(row[:1]) if row else None
            writer.add_item(row[1:]) if row[1:] else None
            writer.end_document()
    assert export_tokens(kind, str(tmp_path / "pair"), tmp_path / "exported", QUIET) == (6, 13)
    run(tmp_path, kind, tmp_path / "exported")
    assert read(tmp_path / "out") == read(tmp_path / "pair") == [*DOCUMENTS, []]
    (tmp_path / "exported" / "mine").write_text("")
    with pytest.raises(DatasetError, match=r"--output .*exported: this folder holds files already; give the name of a new folder"):
        export_tokens(kind, str(tmp_path / "pair"), tmp_path / "exported", QUIET)


@pytest.mark.parametrize("tokens", [[1, 2, 5_000_000_000], [1, 2, -100]])
def test_numbers_that_a_format_cannot_hold_are_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: list[int]) -> None:
    monkeypatch.setattr(exporting, "COPY_TOKENS", 2)
    with IndexedDatasetWriter(tmp_path / "pair", np.dtype("<i8")) as writer:
        writer.add(tokens)
    with pytest.raises(DatasetError, match=rf"holds the number {tokens[-1]:,}; the format stores token ids from 0 to 4,294,967,295"):
        export_tokens("olmo", str(tmp_path / "pair"), tmp_path / "exported", QUIET)
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("eod", [-1, 300])
@pytest.mark.parametrize("options", [{"append_eod": True}, {"borders": "eod"}])
def test_an_end_of_document_token_outside_the_vocabulary_is_refused(tmp_path: Path, eod: int, options: dict[str, Any]) -> None:
    with pytest.raises(DatasetError, match=rf"--eod {eod}: the vocabulary has 300 ids; give one of 0\.\.299"):
        run(tmp_path, "datatrove", datatrove(tmp_path), eod=eod, **options)
    assert not (tmp_path / "out.bin").exists()


@pytest.mark.parametrize("prefix", ["", ".", "in/.."])
def test_a_prefix_needs_a_name(tmp_path: Path, prefix: str) -> None:
    with pytest.raises(DatasetError, match=r"is not the name of a pair; give a path such as data/mine"):
        run(tmp_path, "datatrove", datatrove(tmp_path), output_prefix=prefix)


def test_the_commands(tmp_path: Path, repository: Path) -> None:
    tools, fixtures = repository / "tools" / "datasets", Path(__file__).parent / "fixtures"
    given = ["-t", "HFTokenizer", "-v", str(fixtures / "tokenizer.json")]
    first = [str(tools / "import_tokens.py"), "datatrove", str(fixtures / "datatrove" / "plain"), "--output-prefix", str(tmp_path / "p"), *given]
    done = subprocess.run([sys.executable, *first], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [
        "19 documents, 483 tokens",
        "checked: all 483 tokens and 19 documents are those of the source",
    ]
    second = [str(tools / "export_tokens.py"), "olmo", str(tmp_path / "p.bin"), "--output", str(tmp_path / "o")]
    done = subprocess.run([sys.executable, *second], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'o'}: 19 documents, 483 tokens\n"
    done = subprocess.run([sys.executable, *first[:-4]], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "give the tokenizer of the tokens (-t TYPE -v FILE), or --vocab-size N, but not both" in done.stderr
