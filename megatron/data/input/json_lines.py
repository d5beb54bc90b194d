"""JSON as corpora come in: a value a line, values over several lines, or an array of values, read a piece at a time."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from megatron.data.input.bad_input import Kind, OnProblem, Problem
from megatron.data.input.compression import naming_damage
from megatron.data.input.contents import NEAR_THE_END, SCANNER, values_of_line

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MAX_VALUE_BYTES = 256 << 20
PIECE_BYTES = 1 << 16
SPACE = re.compile(r"\s*")

Placed = tuple[str, Any]
"""file:line, and the value that starts there."""


def json_lines(file: IO[bytes], name: str, on_problem: OnProblem) -> Iterator[Placed]:
    """The value of every line. Blank lines and byte order marks are skipped. A line that is not a JSON value is reported. Raises Damaged."""
    number = 0
    with naming_damage(lambda: f"{name}:{number + 1}"):
        while line := file.readline(MAX_VALUE_BYTES + 1):
            number += 1
            where = f"{name}:{number}"
            if len(line) > MAX_VALUE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_VALUE_BYTES)
                on_problem(Problem(Kind.TOO_LONG, where, f"a line of more than {MAX_VALUE_BYTES:,} bytes; JSON lines hold one document each"))
                continue
            text = decode(line, name, number, on_problem)
            if text is None or not (text := text.strip()):
                continue
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                glued = values_of_line(text)
                if glued:
                    yield from ((where, value) for value in glued)
                else:
                    on_problem(Problem(Kind.NOT_JSON, where, f"not JSON ({reason(error)})"))
                continue
            yield where, value


def json_values(file: IO[bytes], name: str, on_problem: OnProblem) -> Iterator[Placed]:
    """Values one after the other, each on any number of lines, with an optional comma between two. As in an array, the first error ends the file."""
    text = Window(file, name)
    with reporting_mistakes(text, on_problem):
        while text.next_character():
            yield text.where(), text.value()
            if text.next_character() == ",":
                text.take(",")


def json_array(file: IO[bytes], name: str, on_problem: OnProblem) -> Iterator[Placed]:
    """The elements of one array. After an error nobody knows where the next value begins, so the first error ends the file. Raises Damaged."""
    text = Window(file, name)
    with reporting_mistakes(text, on_problem):
        text.take("[")
        if text.next_character() == "]":
            text.take("]")
        else:
            yield text.where(), text.value()
            while text.next_character() == ",":
                text.take(",")
                yield text.where(), text.value()
            text.take("]")
        if text.next_character():
            raise ValueError("more text behind the array")


@contextmanager
def reporting_mistakes(text: Window, on_problem: OnProblem) -> Iterator[None]:
    """Reports errors of the JSON in `text` to `on_problem`, with their line."""
    try:
        yield
    except UnicodeDecodeError as error:
        on_problem(
            Problem(Kind.NOT_UTF8, text.where(), f"not UTF-8 (byte 0x{error.object[error.start]:02x}); the rest of the file is left out with it")
        )
    except (ValueError, RecursionError) as error:
        what = error.msg if isinstance(error, json.JSONDecodeError) else reason(error)  # its column counts from where the window starts
        on_problem(Problem(Kind.NOT_JSON, text.where(), f"not JSON ({what}); the rest of the file is left out with it"))


class Window:
    """The part of a stream of JSON that is being looked at."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file, self._name = file, name
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text, self._position, self._line, self._ended = "", 0, 1, False
        self._failure: UnicodeDecodeError | None = None  # of the bytes behind the text

    def where(self) -> str:
        """file:line of the next character that is no space."""
        self.next_character()
        return f"{self._name}:{self._line}"

    def next_character(self) -> str:
        """Passes over space; empty at the end of the file."""
        while True:
            self._move(SPACE.match(self._text, self._position).end())  # type: ignore[union-attr]  # matches nothing as well
            if self._position < len(self._text) or self._ended:
                return self._text[self._position : self._position + 1]
            self._grow()

    def take(self, character: str) -> None:
        found = self.next_character()
        if found != character:
            raise ValueError(f"expecting {character!r} and found {found!r}" if found else f"the file ends where {character!r} is expected")
        self._move(self._position + 1)

    def value(self) -> Any:
        """The JSON value that comes next; raises ValueError when there is none."""
        self.next_character()
        while True:
            try:
                value, end = SCANNER.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - NEAR_THE_END
                if self._ended or not unfinished or len(self._text) - self._position > MAX_VALUE_BYTES:
                    raise
            else:
                if end < len(self._text) or self._ended:
                    self._move(end)
                    return value
            self._grow()

    def _move(self, end: int) -> None:
        self._line += self._text.count("\n", self._position, end)
        self._position = end

    def _grow(self) -> None:
        """Reads on, as much again as is being looked at: a long value is parsed a few times, not once for each piece."""
        if self._failure is not None:
            raise self._failure
        rest = self._text[self._position :]
        with naming_damage(lambda: f"{self._name}:{self._line}"):
            data = self._file.read(max(PIECE_BYTES, len(rest)))
        self._ended = not data
        try:
            more = self._decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            self._failure, more = error, error.object[: error.start].decode()
        self._text, self._position = rest + more, 0


def reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def decode(data: bytes, name: str, first_line: int, on_problem: OnProblem) -> str | None:
    """UTF-8 text without byte order mark; None, reported with its line, when it is not UTF-8."""
    try:
        return data.removeprefix(BYTE_ORDER_MARK).decode()
    except UnicodeDecodeError as error:
        line = first_line + error.object[: error.start].count(b"\n")
        what = f"not UTF-8 (byte 0x{error.object[error.start]:02x}); convert the file or leave it out"
        on_problem(Problem(Kind.NOT_UTF8, f"{name}:{line}", what))
        return None
