"""What the first bytes of a file say that it is, whatever its name says: compressed, an archive, parquet, JSON, UTF-16, or none of these.

Nothing here reads a file: each function takes the bytes that stand at its start.
"""

from __future__ import annotations

import codecs
import json
import re
from enum import StrEnum
from typing import Any, Literal

Format = Literal["auto", "text", "json"]
FORMATS: tuple[Format, ...] = ("auto", "text", "json")

HEAD_BYTES = 1 << 16
SCANNER = json.JSONDecoder()
OPENING = re.compile(r"\{\s*[\"']")  # how a line begins that is meant as a JSON object, or as a Python dictionary
KEYED = re.compile(r"\{\s*\"(?:[^\"\\]|\\.)*\"\s*:")  # how a JSON object begins
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f]")
NEXT_OBJECT = re.compile(r"(?:,\s*)?(?:\{|$)")  # what may stand behind an object: another one, a comma between them, or nothing
COMMA = re.compile(r"\s*,?\s*")
NEAR_THE_END = 16

COMPRESSED = {".gz": (b"\x1f\x8b\x08",), ".bz2": (b"BZh",), ".xz": (b"\xfd7zXZ\x00",), ".zst": (b"\x28\xb5\x2f\xfd",)}
BZIP2_BLOCKS = (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90")  # a block of data, or the end of an empty file
PARQUET, ZIP, EMPTY_ZIP, TAR = b"PAR1", b"PK\x03\x04", b"PK\x05\x06", b"ustar"
TAR_PLACE = 257
UNREAD = {
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive; unpack it first",
    b"Rar!\x1a\x07": "a RAR archive; unpack it first",
    b"\x04\x22\x4d\x18": "compressed by lz4; unpack it first",
    b"ARROW1\x00\x00": "an Arrow file; write its table as parquet or JSON lines (datasets: to_parquet, to_json)",
    b"\xff\xff\xff\xff": "an Arrow stream (save_to_disk of the package datasets); write it as parquet or JSON lines (to_parquet, to_json)",
    b"%PDF-": "a PDF file; take its text out first",
    b"SQLite format 3\x00": "an SQLite data base; write its table as JSON lines",
    b"\x93NUMPY": "a NumPy array; text is wanted, or the .bin/.idx pair that training reads",
    b"MMIDIDX\x00\x00": "the index of a .bin/.idx pair, which is prepared data already: name its path without .idx as data_path",
}
"""First bytes of what people have and what is not read: what it is, and what to do."""
UNICODE_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class JsonForm(StrEnum):
    """How JSON values stand in a file; the words stand in notices."""

    LINES = "JSON lines"
    VALUES = "JSON objects that span several lines"
    ARRAY = "a JSON array"


def compression_of(head: bytes) -> str:
    """The suffix of the compression that the bytes begin with; empty for none."""
    for suffix, marks in COMPRESSED.items():
        if head.startswith(marks) and (suffix != ".bz2" or head[4:10] in BZIP2_BLOCKS):
            return suffix
    return ""


def container_of(head: bytes) -> str:
    """`.parquet`, `.zip` or `.tar` where the bytes begin as such a file does; empty for none."""
    if head.startswith(PARQUET):
        return ".parquet"
    if head.startswith((ZIP, EMPTY_ZIP)):
        return ".zip"
    return ".tar" if head[TAR_PLACE : TAR_PLACE + len(TAR)] == TAR else ""


def unread_format(head: bytes) -> str | None:
    """What a file is that nothing here reads, and what to do about it; None: nothing known."""
    return next((what for mark, what in UNREAD.items() if head.startswith(mark)), None)


def encoding_of(head: bytes) -> str | None:
    """UTF-16 or UTF-32, by its byte order mark or, without one, by the zeros in every second byte. None: neither."""
    for mark, encoding in UNICODE_MARKS:
        if head.startswith(mark):
            return encoding
    half = len(head) // 2
    if half < 2 or b"\0" not in head:
        return None
    zeros = [head[place::2].count(0) / half for place in (0, 1)]
    if max(zeros) < 0.4 or min(zeros) > 0.1:
        return None
    encoding = "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
    text = head[: 2 * half].decode(encoding, errors="ignore")
    return None if CONTROL.search(text) else encoding  # numbers of two bytes look alike


def json_form(head: bytes, *, whole: bool) -> JsonForm | None:
    """How the JSON stands that the bytes begin with; None for anything else, also for prose that begins with a bracket. `whole`: there is no more.

    JSON is told by its values, not by its first character: most lines are objects, or the first value is one object or an array of objects, lists or
    strings, with nothing but more of the kind behind it.
    """
    text = start_of(head, whole=whole)
    if text.startswith("["):
        return form_of_array(text, whole=whole)
    if mostly_objects(text, whole=whole):
        return JsonForm.LINES
    if KEYED.match(text) is None:
        return None
    try:
        _, end = SCANNER.raw_decode(text)
    except json.JSONDecodeError as error:
        if whole or not is_cut(error, text):
            return None
        return JsonForm.VALUES if "\n" in text else JsonForm.LINES
    except (ValueError, RecursionError):
        return None
    rest = text[end:].lstrip()
    return JsonForm.VALUES if NEXT_OBJECT.match(rest) else None


def start_of(head: bytes, *, whole: bool) -> str:
    """The text that the bytes begin with, byte order mark and white space taken off."""
    return head.removeprefix(codecs.BOM_UTF8).decode(errors="replace" if whole else "ignore").lstrip()


def is_cut(error: json.JSONDecodeError, text: str) -> bool:
    """Whether the mistake may be no more than the end of the text that was looked at."""
    return error.msg.startswith("Unterminated") or error.pos >= len(text) - NEAR_THE_END


def form_of_array(text: str, *, whole: bool) -> JsonForm | None:
    """Of text that begins with a bracket: an array, or lines that are lists."""
    try:
        values, end = SCANNER.raw_decode(text)
    except (ValueError, RecursionError) as error:
        return form_of_first(text[1:].lstrip(), may_be_cut=not whole and isinstance(error, json.JSONDecodeError) and is_cut(error, text))
    rest = text[end:].lstrip()
    if not values or not all(isinstance(value, dict | list | str) for value in values[:100]) or (rest and not rest.startswith("[")):
        return None
    return JsonForm.LINES if rest else JsonForm.ARRAY


def form_of_first(element: str, *, may_be_cut: bool) -> JsonForm | None:
    """Of an array that cannot be read to its end, from its first element on: a mistake that follows an object is a mistake in an array of objects."""
    try:
        first, end = SCANNER.raw_decode(element)
    except (ValueError, RecursionError):
        return JsonForm.ARRAY if may_be_cut and KEYED.match(element) else None
    expected = dict if not may_be_cut else dict | list | str
    return JsonForm.ARRAY if first and isinstance(first, expected) and element[end:].lstrip().startswith(",") else None


def mostly_objects(text: str, *, whole: bool) -> bool:
    """Whether more than half of the lines begin as objects do, and one of them is one, or there are more than two."""
    lines = text.split("\n")
    complete = lines if whole or len(lines) == 1 else lines[:-1]
    filled = [line.strip() for line in complete if line.strip()]
    begun = [line for line in filled if OPENING.match(line)]
    if 2 * len(begun) <= len(filled) or not begun:
        return False
    return len(begun) > 2 or any(values_of_line(line) for line in begun)


def values_of_line(line: str) -> list[Any]:
    """The objects of a line, one or several glued together, a comma behind each at most; empty when it holds anything else."""
    values: list[Any] = []
    place = 0
    while place < len(line):
        try:
            value, end = SCANNER.raw_decode(line, place)
        except (ValueError, RecursionError):
            return []
        if not isinstance(value, dict):
            return []
        values.append(value)
        place = COMMA.match(line, end).end()  # type: ignore[union-attr]  # matches nothing as well
    return values
