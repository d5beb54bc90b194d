"""What happens to input that cannot be read. `--on-error fail`: the first problem ends the work. `skip`: such input is counted, named and left
out."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from enum import StrEnum
from typing import Literal, NamedTuple

from megatron.data.indexed import DatasetError
from megatron.data.input.contents import FORMATS

OnError = Literal["fail", "skip"]
ON_ERROR: tuple[OnError, ...] = ("fail", "skip")
SHOWN_OF_A_KIND = 3
SHOWN_NOTICES = 3


class Kind(StrEnum):
    """What can be wrong with input. The summary uses these words."""

    NOT_JSON = "broken JSON"
    TOO_LONG = "line too long"
    NO_KEY = "missing key"
    NOT_TEXT = "value that is no text"
    NO_CHAT = "value that is no conversation"
    NO_REWARD = "reward that is no number"
    NOT_UTF8 = "not UTF-8"
    EMPTY = "empty file"
    DAMAGED = "damaged file"
    NESTED = "archive inside an archive"
    NOT_STREAMABLE = "format that cannot be read packed"
    NOT_READ = "format that is not read"
    BLANK = "document without text"
    """Never fatal: no text is lost."""
    READ_AS = "file read as something else than its name says"
    """Never fatal and never counted: a notice about what is read."""
    PASSED_OVER = "file of a folder that is not read"
    """The same."""


NOTICES = (Kind.READ_AS, Kind.PASSED_OVER)


class Problem(NamedTuple):
    """One piece of input that cannot be used. `where` is file:line, or file:row N or file:byte N where there are no lines."""

    kind: Kind
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


OnProblem = Callable[[Problem], None]


def ignore(problem: Problem) -> None:
    """An OnProblem that ignores problems, for a second reading of the same input."""


class BadInput:
    """An OnProblem: raises DatasetError for the first problem ("fail"), or counts them all and keeps a few of each kind for the summary ("skip")."""

    def __init__(self, on_error: OnError = "fail") -> None:
        self.counts: Counter[Kind] = Counter()
        self._on_error = on_error
        self._shown: list[Problem] = []
        self._notices: list[Problem] = []

    def __call__(self, problem: Problem) -> None:
        if problem.kind in NOTICES:
            self._notices.append(problem)
            return
        if self._on_error == "fail" and problem.kind is not Kind.BLANK:
            reading = "".join(f" ({notice.what})" for notice in self._notices[-1:] if problem.where.startswith(notice.where))
            raise DatasetError(f"{problem}{reading}. Nothing was written. Correct the input, or leave such parts out with --on-error skip")
        self.counts[problem.kind] += 1
        if self.counts[problem.kind] <= SHOWN_OF_A_KIND:
            self._shown.append(problem)

    @property
    def total(self) -> int:
        return self.counts.total()

    def summary(self) -> list[str]:
        """Lines for the end of the work. Empty if everything could be read and had the format that its name says."""
        notices = [f"note: {notice}" for notice in self._notices[:SHOWN_NOTICES]]
        if len(self._notices) > SHOWN_NOTICES:
            notices.append(f"note: the same holds for {len(self._notices) - SHOWN_NOTICES:,} more files")
        return [*notices, *self._left_out()]

    def _left_out(self) -> list[str]:
        if not self.total:
            return []
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in self.counts.most_common())
        rest = self.total - len(self._shown)
        return [f"left out: {self.total:,} ({kinds})", *(f"  {problem}" for problem in self._shown), *([f"  and {rest:,} more"] if rest else [])]


def add_format_option(parser: argparse.ArgumentParser) -> None:
    """Adds --input-format, the same option in every command that reads text."""
    parser.add_argument(
        "--input-format",
        choices=FORMATS,
        default="auto",
        help="format of the input files: auto = recognised by the first bytes (JSON, parquet, an archive, compressed), else by the name; "
        "text = whole texts, stored as they are; json = JSON (default: %(default)s)",
    )


def add_on_error_option(parser: argparse.ArgumentParser) -> None:
    """Adds --on-error, the same option in every command that reads text."""
    parser.add_argument(
        "--on-error",
        choices=ON_ERROR,
        default="fail",
        help="input that cannot be read (a broken JSON line, a missing key, not UTF-8, an empty or damaged file): "
        "fail = stop at the first and write nothing; skip = leave it out, count it and name the first of each kind (default: %(default)s)",
    )
