"""Decides the format of a file by its first bytes and its name. If the two differ, a sentence says which of them was believed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from megatron.data.input.archives import ARCHIVE_SUFFIXES
from megatron.data.input.contents import OPENING, Format, JsonForm, compression_of, container_of, json_form, start_of
from megatron.data.input.input_files import JSON_SUFFIXES, JSONL_SUFFIXES, SEARCHED_SUFFIXES, TEXT_SUFFIXES
from megatron.data.input.opening import Begun

TABLE_SUFFIXES = (".csv", ".tsv")
SEPARATORS = re.compile(r"[\t,;]")
SAYS_NOTHING = re.compile(r"(\.(dat|data|out|dump|part|raw|[0-9]+))?")  # names of files that may hold anything


class Taken(NamedTuple):
    """`kind`: what a file is taken for; `notice`: what to say about it, None where its name says the same."""

    kind: str
    notice: str | None = None


def compression_taken(start: Begun, named: str) -> Taken:
    """The suffix of the compression; empty for none. If the bytes are of no known format, the name is believed, and reading will say that the file
    is damaged."""
    found = compression_of(start.head)
    if found == named:
        return Taken(found)
    if found:
        return Taken(found, f"is compressed ({found}), although its name does not say so; it is unpacked")
    if container_of(start.head) or json_form(start.head, whole=start.whole) is not None:
        return Taken("", f"is not compressed, though its name ends in {named}; it is read as it is")
    return Taken(named)


def container_taken(start: Begun, kind: str) -> Taken:
    """.zip, .tar or .parquet if the bytes begin like such a file, else the kind that the name says. A name that wrongly says one of these gives
    ''."""
    found = container_of(start.head)
    if found == ".zip" and not says_nothing(kind) and kind not in SEARCHED_SUFFIXES:
        return Taken(kind)  # office documents and many others are zip archives within
    if found:
        return Taken(found, None if found == kind else f"is a {found} file, although its name does not say so; it is read as one")
    false = kind in (*ARCHIVE_SUFFIXES, ".parquet") and json_form(start.head, whole=start.whole) is not None
    return Taken("" if false else kind)


def form_taken(start: Begun, kind: str, keys: Sequence[str] | None, form: Format) -> tuple[JsonForm | None, str | None]:
    """How the JSON in a file is arranged, or None for plain text; and a notice, or None if the name says the same. `form`: the format that the user
    forces."""
    found = None if form == "text" else json_form(start.head, whole=start.whole)
    if kind in JSON_SUFFIXES or form != "auto":
        if found is None and form != "text":
            in_brackets = kind not in JSONL_SUFFIXES and start_of(start.head, whole=start.whole).startswith("[")
            found = JsonForm.ARRAY if in_brackets else JsonForm.LINES
        return found, None
    if found is None:
        return None, looks_like(start, kind, keys)
    if keys and found is JsonForm.VALUES and not says_nothing(kind) and kind not in TEXT_SUFFIXES and not has_key(start, keys):
        return (
            None,
            f"is JSON without the key {keys[0]!r}, and its name ends in {kind}; it is stored as it is, as plain text (--input-format json reads it)",
        )
    return found, f"is read as {found}, as its first bytes say; --input-format text stores it as plain text"


def says_nothing(kind: str) -> bool:
    return SAYS_NOTHING.fullmatch(kind) is not None


def has_key(start: Begun, keys: Sequence[str]) -> bool:
    return any(f'"{key}"'.encode() in start.head for key in keys)


def looks_like(start: Begun, kind: str, keys: Sequence[str] | None) -> str | None:
    """A notice about a file that is stored as plain text but looks like something else. None: there is nothing to say."""
    text = start_of(start.head, whole=start.whole)
    if OPENING.match(text) or text.startswith('[{"'):
        return "begins like JSON but is not valid JSON as a whole; it is stored as plain text (--input-format json reads it as JSON)"
    columns = [name.strip('" ') for name in SEPARATORS.split(text.partition("\n")[0].strip())]
    if kind in TABLE_SUFFIXES or (len(columns) > 1 and any(key in columns for key in keys or ())):
        return "looks like a table (CSV, TSV) and is stored as it is, header and separators too; to take one column, write JSON lines or parquet"
    return None


def is_plain(start: Begun) -> bool:
    """Whether nothing at the start of what is called JSON looks like JSON."""
    text = start_of(start.head, whole=start.whole)
    return bool(text) and not text.startswith(("[", "{", '"')) and not OPENING.search(text)
