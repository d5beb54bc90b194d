"""What a file is, its first bytes say: JSON under any name, compressed or not, and prose that only begins like JSON stays prose."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from megatron.data.indexed import DatasetError
from megatron.data.input.bad_input import BadInput, Kind, Problem
from megatron.data.input.contents import HEAD_BYTES, Format, JsonForm, encoding_of, json_form
from megatron.data.input.input_files import find_files
from megatron.data.input.reading import read_documents

LINES = b'{"text": "one"}\n{"text": "two"}\n'
PRETTY = json.dumps({"title": "a", "text": "one"}, indent=2) + "\n" + json.dumps({"title": "b", "text": "two"}, indent=2) + "\n"
READ = "is read as JSON lines, as its first bytes say; --input-format text stores it as plain text"


def read(path: Path, key: str = "text", form: Format = "auto") -> tuple[list[str], list[str], list[str]]:
    """(texts, notices, problems)."""
    found: list[Problem] = []
    texts = [document.text for document in read_documents(path, key, found.append, form=form)]
    notices = [problem.what for problem in found if problem.kind is Kind.READ_AS]
    return texts, notices, [str(problem).replace(f"{path.parent}/", "") for problem in found if problem.kind is not Kind.READ_AS]


@pytest.mark.parametrize("name", ["part-00000", "train.txt", "corpus.dat", "corpus.1", "notes.md", "x.unheard"])
def test_json_lines_are_json_lines_under_any_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(LINES)
    assert read(tmp_path / name) == (["one", "two"], [READ], [])
    assert read(tmp_path / name, form="text")[0] == [LINES.decode()]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b"\xef\xbb\xbf" + LINES, ["one", "two"]),
        (b"\n  \n\n" + LINES, ["one", "two"]),
        (LINES.replace(b"\n", b"\r\n"), ["one", "two"]),
        (LINES.replace(b"\n", b"\r"), ["one", "two"]),
        (b" " * (2 * HEAD_BYTES) + LINES, ["one", "two"]),
        (LINES.decode().encode("utf-16"), ["one", "two"]),
        (LINES.decode().encode("utf-16-le"), ["one", "two"]),
        (b'[{"text": "one"}, {"text": "two"}]', ["one", "two"]),
        (b'[\n{"text": "one"},\n{"text": "two"},\n{"text": "three"}\n]\n', ["one", "two", "three"]),
        (b'["one", "two"]', ["one", "two"]),
        (PRETTY.encode(), ["one", "two"]),
        (json.dumps([{"text": "one"}, {"text": "two"}], indent=4).encode(), ["one", "two"]),
        (b'{"text": "one"}{"text": "two"}\n{"text": "three"}', ["one", "two", "three"]),
        (b'{"text": "one"},\n{"text": "two"},\n', ["one", "two"]),
        (b'{"text": "' + b"x" * 3 * HEAD_BYTES + b'"}', ["x" * 3 * HEAD_BYTES]),
        (b'[{"text": "' + b"x" * 3 * HEAD_BYTES + b'"}]', ["x" * 3 * HEAD_BYTES]),
        (b'{\n "text": "' + b"x" * 3 * HEAD_BYTES + b'"\n}', ["x" * 3 * HEAD_BYTES]),
    ],
)
def test_json_in_every_shape(tmp_path: Path, content: bytes, texts: list[str]) -> None:
    for name in ("part-00000", "a.txt", "a.jsonl", "a.json"):
        (tmp_path / name).write_bytes(content)
        found, _, problems = read(tmp_path / name)
        assert (found, problems) == (texts, []), name


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_under_any_name(tmp_path: Path, compress: object) -> None:
    assert callable(compress)
    for name in ("part-00000", "part-00000.gz", "a.jsonl", "a.txt.zst"):
        (tmp_path / name).write_bytes(compress(LINES))
        assert read(tmp_path / name)[::2] == (["one", "two"], []), name
    (tmp_path / "a.jsonl.gz").write_bytes(LINES)
    assert read(tmp_path / "a.jsonl.gz") == (["one", "two"], ["is not compressed, though its name ends in .gz; it is read as it is"], [])
    (tmp_path / "cut").write_bytes(compress(LINES * 2000)[:-6])
    texts, _, problems = read(tmp_path / "cut")
    assert texts[:2] in (["one", "two"], [])
    assert "the file is damaged or cut short (" in problems[0]


def test_archives_and_their_members_under_any_name(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, data in (("part-00000", LINES), ("b/part-00001", gzip.compress(b'{"text": "three"}')), ("c.txt", b"plain")):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    for name in ("crawl", "crawl.gz", "crawl.tar"):
        (tmp_path / name).write_bytes(packed.getvalue())
        assert read(tmp_path / name)[::2] == (["one", "two", "three", "plain"], []), name
    with zipfile.ZipFile(tmp_path / "crawl-zip", "w") as archive_zip:
        archive_zip.writestr("part-00000", LINES)
    assert read(tmp_path / "crawl-zip")[::2] == (["one", "two"], [])
    (tmp_path / "report.docx").write_bytes((tmp_path / "crawl-zip").read_bytes())
    assert read(tmp_path / "report.docx")[0] != ["one", "two"]  # documents of office programs are zip archives that nobody means to open


@pytest.mark.parametrize(
    "text",
    [
        "{curly} braces begin this text.\nIt goes on.\n",
        "[1] A footnote begins this text.\n[2] Another.\n",
        "[Illustration: a harbour]\n\nThe harbour was empty.\n",
        '["Quoted", he said]\nand went on.\n',
        '["a", "b"] is a list in Python.\nSo is [].\n',
        '{"a": "b"} is an object in JSON.\nArrays stand in brackets.\n',
        '{"a": "b"}\nThat was an object.\nThis is prose.\n',
        '{"a": 1}, he said, and went on.\nThis is prose.\n',
        "{" + "x" * 2 * HEAD_BYTES,
        '{"I wonder", she said, "whether' + " it goes on" * HEAD_BYTES,
        "1\n2\n3\n",
        "3.14",
        "[1, 2, 3]",
        '"Where to?"\n"Home."\n',
        "true\n",
        "{\\bf Bold} begins this.\n{\\it So} on.\n{\\it So} on.\n",
        "text\tlabel\nfirst\t1\n",
    ],
)
def test_what_only_begins_like_json_stays_text(tmp_path: Path, text: str) -> None:
    for name in ("novel", "a.txt", "a.dat"):
        (tmp_path / name).write_text(text)
        assert read(tmp_path / name)[::2] == ([text], []), name


def test_what_is_doubtful_is_said(tmp_path: Path) -> None:
    cases = {
        "a.txt": ('{"a": "b"}\nprose\nprose\n', "begins like JSON, and as a whole it is not; it is stored as it is"),
        "a.csv": ("text,label\nx,1\n", "looks like a table (CSV, TSV) and is stored as it is, header and separators too; to take one column"),
        "train": ("text\tlabel\nx\t1\n", "looks like a table (CSV, TSV)"),
        "a.ipynb": (json.dumps({"cells": [], "nbformat": 4}, indent=1), "is JSON without the key 'text', and its name ends in .ipynb; it is stored"),
    }
    for name, (content, notice) in cases.items():
        (tmp_path / name).write_text(content)
        texts, notices, problems = read(tmp_path / name)
        assert (texts, problems) == ([content], [])
        assert [what.startswith(notice) for what in notices] == [True], notices
    (tmp_path / "novel.txt").write_text("Plain prose, with a comma.\n")
    assert read(tmp_path / "novel.txt")[1] == []


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"content": "x"}\n{"content": "y"}\n', "part:1: no key 'text'; it has text under: content (--jsonl-key)"),
        (b'{"content": "x"}', "part:1: no key 'text'; it has text under: content (--jsonl-key)"),
        (b'{"doc": {"text": "x"}}\n', "part:1: no key 'text'; it has doc.text, and only keys of the record itself are read: bring it to the top"),
        (b'{"text": 1}\n{"text": 2}\n', "part:1: the value of 'text' is a number, not a string"),
        (b'{"text": "x"}\n{"text": oops\n', "part:2: not JSON (Expecting value at column 10)"),
        (b'ext": "cut"}\n{"text": "x"}\n{"text": "y"}\n', "part:1: not JSON (Expecting value at column 1)"),
        (b"{'text': 'x'}\n{'text': 'y'}\n{'text': 'z'}\n", "part:1: not JSON (Expecting property name enclosed in double quotes at column 2)"),
        (b'[\n{"text": "x"},\n{"text": oops}\n]', "part:3: not JSON (Expecting value); the rest of the file is left out with it"),
        (b"7z\xbc\xaf\x27\x1c..", "part: the file is a 7-Zip archive; unpack it first"),
        (b"ARROW1\x00\x00..", "part: the file is an Arrow file; write its table as parquet or JSON lines"),
        (b"", "part: no text in it"),
        (b" \r\n\t ", "part: no text in it"),
        (b"\xff\xfe", "part: no text in it"),
    ],
)
def test_what_is_wrong_in_a_file_without_a_telling_name(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "part").write_bytes(content)
    assert read(tmp_path / "part")[2][0].startswith(problem)


def test_a_name_that_says_json_and_text_inside(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("Call me Ishmael.\nSome years ago.\n")
    plain = "not JSON (Expecting value at column 1); the file looks like plain text, which --input-format text takes as it is"
    assert read(tmp_path / "a.jsonl")[2] == [f"a.jsonl:1: {plain}", f"a.jsonl:2: {plain}"]
    assert read(tmp_path / "a.jsonl", form="text") == (["Call me Ishmael.\nSome years ago.\n"], [], [])
    (tmp_path / "a.txt").write_bytes(b'{"text": "x"}\nprose\nprose\n')
    assert read(tmp_path / "a.txt", form="json")[::2] == (["x"], [f"a.txt:{line}: not JSON (Expecting value at column 1)" for line in (2, 3)])


def test_parquet_under_any_name_and_json_under_parquet_s(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="the package pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="the package pyarrow is not installed")
    parquet.write_table(arrow.table({"text": ["one", "two"], "content": ["a", "b"]}), tmp_path / "part-00000")
    assert read(tmp_path / "part-00000") == (["one", "two"], ["is a .parquet file, which its name does not say; it is read as one"], [])
    (tmp_path / "a.parquet").write_bytes(LINES)
    assert read(tmp_path / "a.parquet") == (["one", "two"], [READ], [])


def test_a_parquet_file_without_the_column_is_not_called_damaged(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="the package pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="the package pyarrow is not installed")
    parquet.write_table(arrow.table({"content": ["one", "two"]}), tmp_path / "g.parquet")
    with pytest.raises(DatasetError, match=r"g\.parquet:row 1: no column 'text'; it has: content \(--jsonl-key\)\. Nothing was written"):
        list(read_documents(tmp_path / "g.parquet", "text", BadInput("fail")))


def test_folders_take_what_begins_as_a_corpus_and_say_what_they_pass_over(tmp_path: Path) -> None:
    files = {"part-00000": LINES, "part-00001.dat": LINES, "_SUCCESS": b"", "LICENSE": b"Free.", "a.png": b"\x89PNG", "packed": gzip.compress(LINES)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    found: list[Problem] = []
    assert [path.name for path in find_files([str(tmp_path)], found.append)] == ["packed", "part-00000", "part-00001.dat"]
    assert [problem.kind for problem in found] == [Kind.PASSED_OVER]
    assert "2 file(s) in it are passed over, as neither name nor first bytes say that they hold text: LICENSE, a.png;" in found[0].what
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "book").write_text("Call me Ishmael.")
    with pytest.raises(DatasetError, match=r"files in this folder .*; it has book, which you can give by name or by a pattern"):
        find_files([str(tmp_path / "other")])


def test_notices_stand_in_the_summary_and_in_the_error_they_explain() -> None:
    notice, problem = Problem(Kind.READ_AS, "part", READ), Problem(Kind.NO_KEY, "part:1", "no key 'text'")
    strict = BadInput("fail")
    strict(notice)
    with pytest.raises(DatasetError, match=r"part:1: no key 'text' \(is read as JSON lines, .*\)\. Nothing was written"):
        strict(problem)
    skip = BadInput("skip")
    for item in (notice, notice, notice, notice, problem):
        skip(item)
    assert skip.counts == {Kind.NO_KEY: 1}
    assert skip.summary() == [f"note: part: {READ}"] * 3 + [
        "note: the same of 1 more files",
        "left out: 1 (missing key 1)",
        "  part:1: no key 'text'",
    ]


def test_numbers_of_two_bytes_are_no_text() -> None:
    assert encoding_of(b"".join(number.to_bytes(2, "little") for number in range(1, 200))) is None
    assert encoding_of("plain".encode("utf-16-be")) == "utf-16-be"
    assert encoding_of(b"plain") is None
    assert json_form(b'{"text": "x"}\n{"te', whole=False) is JsonForm.LINES


@pytest.mark.skipif(sys.platform == "win32", reason="there are no named pipes")
def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(gzip.compress(LINES)))
    writer.start()
    assert find_files([str(tmp_path / "pipe")]) == (tmp_path / "pipe",)
    assert read(tmp_path / "pipe")[::2] == (["one", "two"], [])
    writer.join()
