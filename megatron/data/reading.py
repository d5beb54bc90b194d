"""Text files to documents: plain text (one document a file) and JSON lines (one a line), compressed or not.

Whatever cannot be read is reported as `file:line: what` to a callback that raises or counts.
"""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from megatron.data.indexed import DatasetError

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")


class Document(NamedTuple):
    """`origin` says where it came from: a file, or file:line."""

    origin: str
    text: str


OnProblem = Callable[[str], None]


def kind_of(path: Path) -> str:
    """The suffix that says what is in the file, compression aside, in lower case."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in COMPRESSED_SUFFIXES else path.suffix.lower()


def read_documents(path: Path, jsonl_key: str, on_problem: OnProblem) -> Iterator[Document]:
    """The documents of one file: JSON lines by suffix, anything else as one text. Empty texts are left out."""
    read = read_json_lines(path, jsonl_key, on_problem) if kind_of(path) in JSONL_SUFFIXES else read_text(path, on_problem)
    empty = True
    try:
        for document in read:
            empty = False
            if document.text.strip():
                yield document
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        on_problem(f"{path}: damaged or cut short {path.suffix} file ({error})")
    except OSError as error:
        if error.errno is not None:  # the machine's trouble; bz2 and zstandard report damage without a number
            raise
        on_problem(f"{path}: damaged or cut short {path.suffix} file ({error})")
    else:
        if empty:
            on_problem(f"{path}: no text in it")


def read_text(path: Path, on_problem: OnProblem) -> Iterator[Document]:
    with open_binary(path) as file:
        data = file.read()
    text = decode(data, str(path), 1, on_problem)
    if text is not None and text.strip():
        yield Document(str(path), text)


def read_json_lines(path: Path, key: str, on_problem: OnProblem) -> Iterator[Document]:
    with open_binary(path) as file:
        for number, line in enumerate(file, start=1):
            text = decode(line, str(path), number, on_problem)
            if text is None or not text.strip():
                continue
            value = text_of(text.rstrip(), key, f"{path}:{number}", on_problem)
            if value is not None:
                yield Document(f"{path}:{number}", value)


def text_of(line: str, key: str, where: str, on_problem: OnProblem) -> str | None:
    """The string under `key` of one JSON line; None, reported, when there is none."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        on_problem(f"{where}: not JSON ({error.msg} at column {error.colno})")
        return None
    if not isinstance(entry, dict) or not isinstance(entry.get(key), str):
        keys = ", ".join(sorted(name for name, value in entry.items() if isinstance(value, str))) if isinstance(entry, dict) else ""
        on_problem(f"{where}: no text under {key!r}" + (f"; it has text under: {keys} (--jsonl-key)" if keys else ""))
        return None
    text: str = entry[key]
    if any("\ud800" <= character <= "\udfff" for character in text):
        on_problem(f"{where}: half a character (a lone surrogate such as \\ud83d) in the text")
        return None
    return text


def decode(data: bytes, name: str, first_line: int, on_problem: OnProblem) -> str | None:
    """UTF-8 text without byte order mark; None, reported with its line, when it is not UTF-8."""
    try:
        return data.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as error:
        line = first_line + error.object[: error.start].count(b"\n")
        on_problem(f"{name}:{line}: not UTF-8 (byte 0x{error.object[error.start]:02x}); convert the file or leave it out")
        return None


def open_binary(path: Path) -> IO[bytes]:
    """The file's content, unpacked by its suffix. Raises DatasetError when the module for it is not installed."""
    openers: dict[str, Callable[[Path, str], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": open_zstandard}
    opened: IO[bytes] = openers.get(path.suffix.lower(), open)(path, "rb")
    return opened


def open_zstandard(path: Path, mode: str) -> IO[bytes]:
    try:
        zstandard: Any = importlib.import_module("zstandard")
    except ImportError:
        raise DatasetError(f"{path}: reading .zst files needs the package zstandard (`pip install zstandard`), or unpack the file first") from None
    return io.BufferedReader(ZstandardStream(zstandard, path))


class ZstandardStream(io.RawIOBase):
    """What the frames of a .zst file hold. Damage and a missing end raise EOFError, as with the standard library's readers."""

    def __init__(self, zstandard: Any, path: Path) -> None:
        self._file = path.open("rb")
        self._zstandard = zstandard
        self._frame: Any = None  # the decompressor inside a frame; None between two
        self._packed = b""
        self._unpacked = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked and self._read_more():
            pass
        count = min(len(buffer), len(self._unpacked))
        buffer[:count] = self._unpacked[:count]
        self._unpacked = self._unpacked[count:]
        return count

    def _read_more(self) -> bool:
        """Unpack another part; False at the end of the file."""
        self._packed = self._packed or self._file.read(1 << 16)
        if not self._packed:
            if self._frame is not None:
                raise EOFError("the last frame is not complete")
            return False
        self._frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
        try:
            self._unpacked = self._frame.decompress(self._packed)
        except self._zstandard.ZstdError as error:
            raise EOFError(str(error)) from None
        self._packed = self._frame.unused_data
        if self._frame.eof:
            self._frame = None
        return True

    def close(self) -> None:
        self._file.close()
        super().close()
