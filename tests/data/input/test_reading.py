"""Text in: every format, compression and archive gives the same documents, and everything broken is named with its place."""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import json
import lzma
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.data.indexed import DatasetError
from megatron.data.input import json_lines, reading
from megatron.data.input.bad_input import BadInput, Kind, Problem
from megatron.data.input.input_files import find_files, kind_of
from megatron.data.input.reading import Meter, read_documents, read_records

LINES = '\ufeff{"text": "one", "n": 1}\n\n   \n{"text": "zwei ü"}\r\n{"text": ""}\n"legacy"\n{"text": ["a", "b"]}\n{"text": "three\\r\\nlines"}'
TEXTS = ["one", "zwei ü", "legacy", "a\n\nb", "three\r\nlines"]
PLACES = ["1", "4", "6", "7", "8"]
BLANK = "document without text"


def documents(path: Path, key: str = "text") -> tuple[list[str], list[str]]:
    """(texts, problems with the folder's name taken out)."""
    problems: list[Problem] = []
    texts = [document.text for document in read_documents(path, key, problems.append)]
    return texts, [str(problem).replace(f"{path.parent}/", "") for problem in problems if problem.kind != BLANK]


def zstandard_compress(data: bytes) -> bytes:
    compress: Callable[[bytes], bytes] = pytest.importorskip("zstandard", reason="the package zstandard is not installed").compress
    return compress(data)


COMPRESSIONS = [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstandard_compress)]


@pytest.mark.parametrize(("suffix", "compress"), COMPRESSIONS)
def test_every_compression_reads_the_same(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    for name in ("corpus.jsonl", "corpus.ndjson", "corpus.json"):
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(compress(LINES.encode()))
        assert documents(path) == (TEXTS, [])
        problems: list[Problem] = []
        assert [document.origin for document in read_documents(path, "text", problems.append)] == [f"{path}:{line}" for line in PLACES]
        assert [(problem.kind, problem.where) for problem in problems] == [(Kind.BLANK, f"{path}:5")]


@pytest.mark.parametrize(("suffix", "compress"), COMPRESSIONS[1:])
@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.txt", "corpus.json", "corpus.tar"])
def test_a_truncated_or_false_compressed_file_is_named(tmp_path: Path, name: str, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"{name}{suffix}"
    packed = compress(LINES.encode())
    for data in (packed[:-9], packed[: len(packed) // 2], b"this is not compressed at all"):
        path.write_bytes(data)
        problems: list[Problem] = []
        list(read_documents(path, "text", problems.append))
        assert problems[-1].kind == Kind.DAMAGED
        assert problems[-1].where.startswith(f"{path}:")
        assert "the file is damaged or cut short (" in str(problems[-1])
        assert sum(problem.kind == Kind.DAMAGED for problem in problems) == 1


def test_the_lines_before_a_cut_are_read_and_the_cut_is_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    lines = [json.dumps({"text": f"{number} {hash((number, 'x'))}"}) for number in range(20_000)]
    packed = gzip.compress("\n".join(lines).encode())
    path.write_bytes(packed[: len(packed) // 2])
    texts, problems = documents(path)
    assert 5_000 < len(texts) < 15_000
    assert texts == [json.loads(line)["text"] for line in lines[: len(texts)]]
    assert problems[0].startswith(f"a.jsonl.gz:{len(texts) + 1}: the file is damaged or cut short (Compressed file ended")


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbffirst\r\n\n\nlast\rend\n")
    assert documents(path) == (["first\n\n\nlast\nend\n"], [])
    path.write_bytes(b"no line end")
    assert documents(path, "any key") == (["no line end"], [])
    assert documents(tmp_path / "a.txt")[0] == ["no line end"]


@pytest.mark.parametrize("joint", ["\n\n", "\n", " ", ""])
def test_a_long_text_comes_in_parts_that_are_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, joint: str) -> None:
    monkeypatch.setattr(reading, "MAX_TEXT_BYTES", 1000)
    text = joint.join(f"wörter{number}" for number in range(1000))
    path = tmp_path / "a.txt"
    path.write_text(text)
    parts = list(read_documents(path, "text", pytest.fail))
    assert "".join(part.text for part in parts) == text
    assert all(len(part.text.encode()) <= 1000 for part in parts)
    assert len(parts) >= len(text.encode()) // 1000
    assert all(part.text.endswith(joint) for part in parts[:-1])
    assert parts[-1].origin == f"{path}:{1 + text[: text.rindex(parts[-1].text)].count(chr(10))}"


@pytest.mark.parametrize(
    ("name", "content", "kind", "problem"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', Kind.NOT_JSON, "a.jsonl:2: not JSON (Expecting value at column 9)"),
        ("a.jsonl", b'{"text": "x"}\n' + b"[" * 10**6, Kind.NOT_JSON, "a.jsonl:2: not JSON (nested too deeply)"),
        ("a.jsonl", b'{"text": "x"}\n{"n": ' + b"1" * 5000 + b"}", Kind.NOT_JSON, "a.jsonl:2: not JSON (Exceeds the limit (4300 digits) for"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"body": "x", "n": 1}\n',
            Kind.NO_KEY,
            "a.jsonl:2: no key 'text'; the keys with text are: body (choose one with --jsonl-key)",
        ),
        ("a.jsonl", b'{"text": "x"}\n{}', Kind.NO_KEY, "a.jsonl:2: no key 'text'"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', Kind.NOT_TEXT, "a.jsonl:2: the value of 'text' is a number, not a string"),
        ("a.jsonl", b'{"text": "x"}\n{"text": null}\n', Kind.NOT_TEXT, "a.jsonl:2: the value of 'text' is null, not a string"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ["a", 1]}\n', Kind.NOT_TEXT, "a.jsonl:2: the value of 'text' is a list, not a string"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', Kind.NOT_TEXT, "a.jsonl:2: the line is a list, not a string"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', Kind.NOT_UTF8, "a.jsonl:2: not UTF-8 (byte 0xff); convert the file or leave it out"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\\ud83d"}\n', Kind.NOT_UTF8, "a.jsonl:2: half a character (a lone surrogate such as \\ud83d)"),
        ("a.txt", b"x\ny\n caf\xe9\n", Kind.NOT_UTF8, "a.txt:3: not UTF-8 (byte 0xe9); convert the file or leave it out"),
        ("a.txt", b"", Kind.EMPTY, "a.txt: no text in it"),
        ("a.txt", b" \n\t\n", Kind.EMPTY, "a.txt: no text in it"),
        ("a.jsonl", b"\n", Kind.EMPTY, "a.jsonl: no text in it"),
        ("a.json", b"", Kind.EMPTY, "a.json: no text in it"),
        ("a.json", b"[ ]", Kind.EMPTY, "a.json: no text in it"),
        ("a.json", b'[{"text": "x"},\n {"text" "y"}]', Kind.NOT_JSON, "a.json:2: not JSON (Expecting ':' delimiter); the rest of"),
        ("a.json", b'[{"text": "x"}\n', Kind.NOT_JSON, "a.json:2: not JSON (the file ends where ']' is expected); the rest of"),
        ("a.json", b'[{"text": "x"},\n\n{"text": "y', Kind.NOT_JSON, "a.json:3: not JSON (Unterminated string starting at); the rest of"),
        ("a.json", b'[{"text": "x"}\n;{}]', Kind.NOT_JSON, "a.json:2: not JSON (expecting ']' and found ';'); the rest of"),
        ("a.json", b'[{"text": "x"}]\n{}', Kind.NOT_JSON, "a.json:2: not JSON (more text behind the array); the rest of"),
        ("a.json", b'[{"text": "x"},\n{"text": "caf\xe9"}]', Kind.NOT_UTF8, "a.json:2: not UTF-8 (byte 0xe9); the rest of the file"),
        ("a.json", b'[{"text": "x"},\n' + b"[" * 10**5, Kind.NOT_JSON, "a.json:2: not JSON (nested too deeply); the rest of"),
        ("a.zip", b"PK\x03\x04 and no more", Kind.DAMAGED, "a.zip:byte 16: the file is damaged or cut short (File is not a zip file)"),
        ("a.tar", b"no tar " * 100, Kind.DAMAGED, "a.tar:byte 0: the file is damaged or cut short (invalid header)"),
        (
            "a.zip.gz",
            b"",
            Kind.NOT_STREAMABLE,
            "a.zip.gz: a .zip file is read from its end, so it must lie uncompressed on the disk; unpack it first",
        ),
        ("a.parquet.gz", b"", Kind.NOT_STREAMABLE, "a.parquet.gz: a .parquet file is read from its end"),
    ],
)
def test_broken_input_is_named(tmp_path: Path, name: str, content: bytes, kind: Kind, problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    problems: list[Problem] = []
    texts = [document.text for document in read_documents(tmp_path / name, "text", problems.append)]
    assert problems[0].kind == kind
    assert str(problems[0]).replace(f"{tmp_path}/", "").startswith(problem)
    assert len(problems) == 1
    assert texts == (["x"] if content.startswith((b'{"text": "x"}', b'[{"text": "x"}')) else [])


def test_a_json_array_is_read_a_piece_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "PIECE_BYTES", 7)
    values = [{"text": f'wört {number} \\ " ] , {{ ' + "x" * (number % 40)} for number in range(100)]
    for text in (json.dumps(values), json.dumps(values, indent=2, ensure_ascii=False), "\ufeff \n" + json.dumps(values) + " \n"):
        (tmp_path / "a.json").write_text(text)
        assert documents(tmp_path / "a.json") == ([value["text"] for value in values], [])
    (tmp_path / "a.json").write_text('[\n\n{"text": "a"},\n{"text": "b"}\n,{"text": "c"}]')
    assert [record.origin[-2:] for record in read_records(tmp_path / "a.json", pytest.fail)] == [":3", ":4", ":5"]
    (tmp_path / "numbers.json").write_text("[12345678, 1, 123456789012, true, null]")
    assert [record.value for record in read_records(tmp_path / "numbers.json", pytest.fail)] == [12345678, 1, 123456789012, True, None]


def test_a_line_too_long_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "MAX_VALUE_BYTES", 100)
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": "' + "y" * 1000 + '"}\n{"text": "z"}\n')
    assert documents(tmp_path / "a.jsonl") == (["x", "z"], ["a.jsonl:2: a line of more than 100 bytes; JSON lines hold one document each"])


def make_tar(path: Path, mode: str, files: dict[str, bytes]) -> None:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def make_zip(path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("folder/", "")
        for name, data in files.items():
            archive.writestr(name, data)


def make_archive(path: Path, files: dict[str, bytes]) -> None:
    if path.suffix == ".zip":
        make_zip(path, files)
    elif path.name.endswith(".zst"):
        plain = path.with_name("plain.tar")
        make_tar(plain, "w", files)
        path.write_bytes(zstandard_compress(plain.read_bytes()))
    else:
        make_tar(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w", files)


ARCHIVES = ["a.tar", "a.tar.gz", "a.tgz", "a.tar.zst", "a.zip"]


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_are_read_member_by_member(tmp_path: Path, name: str) -> None:
    files = {
        "folder/a.jsonl": b'{"text": "one"}\n{"text": "two"}\n',
        "folder/b.jsonl.gz": gzip.compress(b'{"text": "three"}'),
        "enwik8": b"no suffix",
        "folder/c.txt": b"four",
        "folder/d.json": b'[{"text": "five"}]',
        "__MACOSX/a.jsonl": b"\x00\x05",
        "folder/.DS_Store": b"\x00\xff",
    }
    make_archive(tmp_path / name, files)
    assert documents(tmp_path / name) == (["one", "two", "three", "no suffix", "four", "five"], [])
    origins = [record.origin for record in read_records(tmp_path / name, pytest.fail)]
    assert origins[1] == f"{tmp_path / name}/folder/a.jsonl:2"


@pytest.mark.parametrize("name", ARCHIVES)
def test_what_an_archive_may_not_hold_is_named_and_the_rest_is_read(tmp_path: Path, name: str) -> None:
    files = {"a.tar.gz": b"x", "b.zip": b"x", "c.parquet": b"x", "d.txt": b"", "e.txt": b"\xff", "f.jsonl": b'{"text": "last"}\noops'}
    make_archive(tmp_path / name, files)
    texts, problems = documents(tmp_path / name)
    assert texts == ["last"]
    assert problems == [
        f"{name}/a.tar.gz: an archive inside an archive is not opened; unpack the outer one",
        f"{name}/b.zip: an archive inside an archive is not opened; unpack the outer one",
        f"{name}/c.parquet: a .parquet file is read from its end, so it must lie uncompressed on the disk; unpack it first",
        f"{name}/d.txt: no text in it",
        f"{name}/e.txt:1: not UTF-8 (byte 0xff); convert the file or leave it out",
        f"{name}/f.jsonl:2: not JSON (Expecting value at column 1)",
    ]
    make_archive(tmp_path / name, {})
    assert documents(tmp_path / name) == ([], [f"{name}: no text in it"])


def test_damage_in_one_member_of_a_zip_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    make_zip(path, {"a.txt": b"first", "b.jsonl": b'{"text": "second"}\n' * 50, "c.txt": b"third"})
    data = bytearray(path.read_bytes())
    start = data.index(b"b.jsonl") + len("b.jsonl")
    data[start : start + 5] = b"\xff\xff\xff\xff\xff"
    path.write_bytes(data)
    texts, problems = documents(path)
    assert texts == ["first", "third"]
    assert problems[0].startswith("a.zip/b.jsonl:1: the file is damaged or cut short (Error -3")
    contents = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1)
    data[contents + 8] |= 1  # in the table of contents: the first file asks for a password
    path.write_bytes(data)
    texts, problems = documents(path)
    assert texts == ["third"]
    assert problems[0].startswith("a.zip/a.txt:byte 0: the archive's member cannot be opened (")


def test_parquet_rows(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="the package pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="the package pyarrow is not installed")
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"text": ["one", "zwei ü", None, "", "five"], "n": [1, 2, 3, 4, 5]}), path, row_group_size=2)
    assert documents(path) == (["one", "zwei ü", "five"], ["a.parquet:row 3: the value of 'text' is null, not a string"])
    assert [record.origin for record in read_records(path, pytest.fail, ["text"])] == [f"{path}:row {row}" for row in range(1, 6)]
    assert [record.value for record in read_records(path, pytest.fail, ["n"])][-1] == {"n": 5}
    assert next(read_records(path, pytest.fail)).value == {"text": "one", "n": 1}
    assert documents(path, "body") == ([], ["a.parquet:row 1: no column 'body'; the columns are: text, n (choose one with --jsonl-key)"])
    assert documents(path, "n")[1][0] == "a.parquet:row 1: the value of 'n' is a number, not a string"
    data = path.read_bytes()
    path.write_bytes(data[:-20])
    assert documents(path)[1][0].startswith(f"a.parquet:byte {len(data) - 20}: the file is damaged or cut short (")
    path.write_bytes(data[:4] + bytes(200) + data[204:])
    assert documents(path)[1][0].startswith("a.parquet:")
    parquet.write_table(arrow.table({"text": arrow.array([], arrow.string())}), path)
    assert documents(path) == ([], ["a.parquet: no text in it"])


@pytest.mark.parametrize(("name", "package"), [("a.txt.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_a_missing_package_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    def refuse(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DatasetError, match=rf"{name}: reading \.\w+ files needs the package {package} \(`pip install {package}`\)"):
        documents(tmp_path / name)


def test_the_meter_tells_how_far_the_reading_is(tmp_path: Path) -> None:
    line = json.dumps({"text": "x" * 1000}) + "\n"
    (tmp_path / "a.jsonl").write_text(line * 5000)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"text"))
    make_zip(tmp_path / "c.zip", {"a.txt": b"text"})
    files = find_files([str(tmp_path)])
    meter = Meter.of(files)
    assert meter.total == sum(path.stat().st_size for path in files)
    seen = [meter.done for path in files for _ in read_records(path, pytest.fail, meter=meter)]
    assert seen == sorted(seen)
    assert 0 < seen[0] < seen[2500] < meter.total
    assert meter.done == meter.total


def test_bad_input_fails_at_once_or_is_counted_and_summed_up() -> None:
    problems = [Problem(Kind.NOT_JSON, f"a.jsonl:{line}", "not JSON") for line in range(1, 6)] + [Problem(Kind.EMPTY, "b.txt", "no text in it")]
    with pytest.raises(
        DatasetError, match=r"a\.jsonl:1: not JSON\. Nothing was written. Correct the input, or leave such parts out with --on-error skip"
    ):
        BadInput()(problems[0])
    bad = BadInput("skip")
    assert bad.summary() == []
    for problem in problems:
        bad(problem)
    assert bad.summary() == [
        "left out: 6 (broken JSON 5, empty file 1)",
        "  a.jsonl:1: not JSON",
        "  a.jsonl:2: not JSON",
        "  a.jsonl:3: not JSON",
        "  b.txt: no text in it",
        "  and 2 more",
    ]
    strict = BadInput("fail")
    strict(Problem(Kind.BLANK, "a.jsonl:3", "no text in it"))
    assert strict.summary() == ["left out: 1 (document without text 1)", "  a.jsonl:3: no text in it"]


def test_paths_folders_patterns_and_comma_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "b.txt",
        "a/part-10.jsonl.gz",
        "a/part-9.jsonl.gz",
        "a/b.md",
        "picture.png",
        "z.json",
        ".hidden/x.txt",
        "a/.x.txt",
        "with, comma.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path)

    def names(*inputs: str) -> list[str]:
        return [str(path.resolve().relative_to(tmp_path)) for path in find_files(inputs)]

    below_a = ["a/b.md", "a/part-9.jsonl.gz", "a/part-10.jsonl.gz"]
    assert names(str(tmp_path)) == [*below_a, "b.txt", "with, comma.txt", "z.json"]
    assert names("b.txt, a,z.json") == ["b.txt", *below_a, "z.json"]
    assert names("a/*.gz") == below_a[1:]
    assert names("**/*.md", "picture.png") == ["a/b.md", "picture.png"]
    assert names("with, comma.txt") == ["with, comma.txt"]
    with pytest.raises(DatasetError, match=r"no file or folder none\.txt; give files \(\.jsonl, \.json, \.txt, \.parquet, compressed or in"):
        find_files(["b.txt,none.txt"])
    with pytest.raises(DatasetError, match=r"no file matches \*\.csv; give files"):
        find_files(["*.csv"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DatasetError, match=r"empty: no \.txt, .*\.zip files in this folder \(compressed ones, \.gz, \.bz2, \.xz, \.zst, would count too\)"
    ):
        find_files(["empty"])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl", (".jsonl", "")),
        ("a.b.JSONL.GZ", (".jsonl", ".gz")),
        ("a.jsonl.zst.tar", (".tar", "")),
        ("a.tgz", (".tar", ".gz")),
        ("a.txt.zstd", (".txt", ".zst")),
        ("a.gz", ("", ".gz")),
        ("enwik8", ("", "")),
    ],
)
def test_the_name_says_what_is_inside(name: str, kind: tuple[str, str]) -> None:
    assert kind_of(name) == kind


READ_ALL = """
    import resource, sys
    from pathlib import Path
    from megatron.data.input.reading import read_documents
    def fail(problem): raise SystemExit(str(problem))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    characters = sum(len(document.text) for document in read_documents(Path(sys.argv[1]), "text", fail))
    print(characters, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.txt.gz"])
def test_a_file_larger_than_the_memory_it_gets_is_streamed(tmp_path: Path, name: str) -> None:
    line = ("word " * 2000 if name == "a.txt.gz" else json.dumps({"text": "word " * 2000})) + "\n"
    count = 12_000  # 120 MB
    with gzip.open(tmp_path / "all.gz", "wb", compresslevel=1) as file:
        for number in range(count):
            file.write((("," if number else "[") if name == "a.json.gz" else "").encode() + line.encode())
        file.write(b"]" if name == "a.json.gz" else b"")
    (tmp_path / "all.gz").rename(tmp_path / name)
    command = [sys.executable, "-c", textwrap.dedent(READ_ALL), str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    characters, grown = map(int, done.stdout.split())
    assert characters == (len(line) if name == "a.txt.gz" else 10_000) * count
    assert grown < (90_000 if name == "a.txt.gz" else 20_000)  # kibibytes
