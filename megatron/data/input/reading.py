"""Reads files into documents, one at a time: plain text, JSON lines, JSON arrays and parquet, compressed or in archives, of any size.

Input that cannot be read is reported with its place to a callback. The callback raises or counts (`bad_input.BadInput`).
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from megatron.data.input.archives import ARCHIVE_SUFFIXES, tar_members, zip_members
from megatron.data.input.bad_input import Kind, OnProblem, Problem
from megatron.data.input.compression import Damaged, naming_damage, unpack
from megatron.data.input.contents import Format, JsonForm, encoding_of, unread_format
from megatron.data.input.input_files import kind_of
from megatron.data.input.json_lines import Placed, decode, json_array, json_lines, json_values
from megatron.data.input.opening import Begun, begin, recoded
from megatron.data.input.parquet import parquet_rows
from megatron.data.input.recognise import Taken, compression_taken, container_taken, form_taken, is_plain

MAX_TEXT_BYTES = 16 << 20
"""A longer plain text becomes several documents. It is cut in its second half: at an empty line, else at the end of a line, else at a space."""
PIECE_BYTES = 1 << 16
CUTS = (b"\n\n", b"\n", b" ")
MOST_COMPRESSIONS = 3
JSON_READERS = {JsonForm.LINES: json_lines, JsonForm.VALUES: json_values, JsonForm.ARRAY: json_array}


class Document(NamedTuple):
    """`origin` says where it starts: file:line, or file:row N in parquet files. Inside an archive the file is archive/member."""

    origin: str
    text: str


class Record(NamedTuple):
    """The value of a line, an array element or a row: any JSON value. The record of a plain text is a string."""

    origin: str
    value: Any


@dataclass
class Meter:
    """How much of the files has been read, in bytes on the disk."""

    total: int = 0
    done: int = 0

    @classmethod
    def of(cls, files: Sequence[Path]) -> Meter:
        return cls(total=sum(path.stat().st_size for path in files))


def read_documents(path: Path, key: str, on_problem: OnProblem, meter: Meter | None = None, *, form: Format = "auto") -> Iterator[Document]:
    """The texts under `key` of one file's records; those without any text are reported as Kind.BLANK. `form`: see read_records."""
    for record in read_records(path, on_problem, (key,), meter, form=form):
        text = text_of(record, key, on_problem)
        if text is not None:
            yield Document(record.origin, text)


def read_records(
    path: Path, on_problem: OnProblem, keys: Sequence[str] | None = None, meter: Meter | None = None, *, form: Format = "auto"
) -> Iterator[Record]:
    """The records of one file. Of parquet files only the columns `keys` are read (None: all). Counts what is read in `meter`.

    `form`: auto recognises the format by the first bytes. If the name says something else, this is reported (Kind.READ_AS). text and json force
    the format of the content. Compression and archives are recognised in every case.
    """
    before = meter.done if meter is not None else 0
    with path.open("rb") as raw:
        seekable = raw.seekable()
        file = io.BufferedReader(raw if meter is None else CountedFile(raw, meter), 1 << 20)
        try:
            yield from Reader(on_problem, keys, form).records(file, str(path), seekable=seekable)
        except Damaged as error:
            on_problem(error.problem)
        if meter is not None and seekable:
            meter.done = before + raw.seek(0, io.SEEK_END)


def text_of(record: Record, key: str, on_problem: OnProblem) -> str | None:
    """The text of a record: the record itself, or the value under `key`. A list of strings is read as paragraphs, as in GPT-NeoX. A record without
    text is reported and gives None."""
    value = record.value
    if isinstance(value, dict):
        if key not in value:
            others = ", ".join(sorted(name for name, other in value.items() if isinstance(other, str)))
            inside = ", ".join(f"{name}.{inner}" for name, part in value.items() if isinstance(part, dict) for inner in part if inner == key)
            hint = f"; the keys with text are: {others} (choose one with --jsonl-key)" if others else ""
            hint += f"; it has {inside}, but only keys of the record itself are read: move the text to the top level" if inside else ""
            on_problem(Problem(Kind.NO_KEY, record.origin, f"no key {key!r}{hint}"))
            return None
        value = value[key]
    if isinstance(value, list) and isinstance(record.value, dict) and all(isinstance(part, str) for part in value):
        value = "\n\n".join(value)
    if not isinstance(value, str):
        what = f"the value of {key!r} is" if isinstance(record.value, dict) else "the line is"
        on_problem(Problem(Kind.NOT_TEXT, record.origin, f"{what} {name_of_type(value)}, not a string"))
        return None
    if not value.strip():
        on_problem(Problem(Kind.BLANK, record.origin, "no text in it"))
        return None
    try:
        value.encode()
    except UnicodeEncodeError:
        on_problem(Problem(Kind.NOT_UTF8, record.origin, "half a character (a lone surrogate such as \\ud83d) in the text"))
        return None
    return value


def name_of_type(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object", type(None): "null", bytes: "bytes"}
    return names.get(type(value), type(value).__name__)


class Reader:
    """Opens a file, also an archive. The format is what the first bytes say; if they say nothing, it is what the name says."""

    def __init__(self, on_problem: OnProblem, keys: Sequence[str] | None, form: Format = "auto") -> None:
        self._on_problem = on_problem
        self._keys = keys
        self._form = form
        self._noticed = 0  # records and problems: a file without any is empty

    def records(self, file: IO[bytes], name: str, *, inside: bool = False, seekable: bool = False) -> Iterator[Record]:
        """The records of an open file. `inside`: the file is in an archive. `seekable`: the file lies on a disk. Raises Damaged."""
        before = self._noticed
        start, kind, packed = self._unpacked(begin(file, seekable=seekable), name)
        what = unread_format(start.head)
        if what is not None:
            self._report(Problem(Kind.NOT_READ, name, f"the file is {what}"))
        elif inside and kind in ARCHIVE_SUFFIXES:
            self._report(Problem(Kind.NESTED, name, "an archive inside an archive is not opened; unpack the outer one"))
        elif (packed or not seekable) and kind in (".zip", ".parquet"):
            self._report(
                Problem(Kind.NOT_STREAMABLE, name, f"a {kind} file is read from its end, so it must lie uncompressed on the disk; unpack it first")
            )
        elif kind in ARCHIVE_SUFFIXES:
            yield from self._members(start.file, name, kind)
        else:
            for placed in self._placed(start, name, kind):
                self._noticed += 1
                yield Record._make(placed)
        if self._noticed == before:
            self._report(Problem(Kind.EMPTY, name, "no text in it"))

    def _unpacked(self, start: Begun, name: str) -> tuple[Begun, str, bool]:
        """The content where it is compressed, the suffix of what it is taken for, and whether it was compressed."""
        kind, named = kind_of(name)
        packed = False
        for _ in range(MOST_COMPRESSIONS):
            compression = self._said(name, compression_taken(start, named))
            if not compression:
                break
            start, named, packed = begin(unpack(start.file, compression, name), seekable=False), "", True
        return start, self._said(name, container_taken(start, kind)), packed

    def _placed(self, start: Begun, name: str, kind: str) -> Iterator[Placed]:
        if kind == ".parquet":
            return parquet_rows(start.file, name, self._keys, self._report)
        encoding = encoding_of(start.head)
        if encoding is not None:
            self._notice(name, f"is {encoding.upper()} text and is read as that")
            start = begin(recoded(start.file, encoding), seekable=False)
        form, notice = form_taken(start, kind, self._keys, self._form)
        if notice is not None:
            self._notice(name, notice)
        if form is None:
            return text_parts(start.file, name, self._report)
        return JSON_READERS[form](start.file, name, self._explained if is_plain(start) else self._report)

    def _explained(self, problem: Problem) -> None:
        """Reports a problem of a file that is called JSON and begins as plain text."""
        if problem.kind is Kind.NOT_JSON:
            problem = problem._replace(what=f"{problem.what}; the file looks like plain text: --input-format text stores it as it is")
        self._report(problem)

    def _said(self, name: str, taken: Taken) -> str:
        if taken.notice is not None:
            self._notice(name, taken.notice)
        return taken.kind

    def _notice(self, name: str, what: str) -> None:
        self._on_problem(Problem(Kind.READ_AS, name, what))

    def _members(self, file: IO[bytes], name: str, kind: str) -> Iterator[Record]:
        if kind == ".tar":
            for member, content in tar_members(file, name):
                yield from self.records(content, f"{name}/{member}", inside=True)
            return
        for member, content in zip_members(file, name, self._report):
            try:
                yield from self.records(content, f"{name}/{member}", inside=True)
            except Damaged as error:  # the next member starts anew
                self._report(error.problem)

    def _report(self, problem: Problem) -> None:
        self._noticed += 1
        self._on_problem(problem)


def text_parts(file: IO[bytes], name: str, on_problem: OnProblem) -> Iterator[Placed]:
    """A text with line ends of one kind (\\n), whole or in parts of at most MAX_TEXT_BYTES. Raises Damaged."""
    data, done, line, ended = bytearray(), 0, 1, False
    with naming_damage(lambda: f"{name}:byte {done}"):
        while not ended:
            while len(data) < MAX_TEXT_BYTES and not ended:
                piece = file.read(min(PIECE_BYTES, MAX_TEXT_BYTES - len(data)))
                done += len(piece)
                ended = not piece
                data += piece
            end = len(data) if ended else place_to_cut(data)
            text = decode(bytes(data[:end]), name, line, on_problem)
            if text is not None and text.strip():
                yield f"{name}:{line}", text.replace("\r\n", "\n").replace("\r", "\n")
            line += data.count(b"\n", 0, end)
            del data[:end]


def place_to_cut(data: bytearray) -> int:
    """The end of the last paragraph, else line, else word, else character."""
    half = len(data) // 2
    for separator in CUTS:
        found = data.rfind(separator, half)
        if found >= 0:
            return found + len(separator)
    end = len(data) - 1
    while end > half and data[end] & 0xC0 == 0x80:
        end -= 1
    return end


class CountedFile(io.RawIOBase):
    """A file that tells a meter what is read from it."""

    def __init__(self, file: IO[bytes], meter: Meter) -> None:
        self._file, self._meter = file, meter

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        count: int = self._file.readinto(buffer)  # type: ignore[attr-defined]
        self._meter.done += count
        return count
