"""Which text is held out of training. The rules depend on the corpus alone, so every preparation of it holds out the same text.

Shapes: N documents in corpus order
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Protocol

import numpy as np

from megatron.data.indexed import DatasetError
from megatron.data.split import SPLITS

TRAIN, VALID, TEST = range(3)
RECENT = "recent"
"""An extra file with the newest training documents once more, so that a configuration can give them weight."""
FEW_DOCUMENTS = 100
SNAP_BYTES = 10_000


@dataclass
class Survey:
    """What the first reading of the corpus records for every document: its UTF-8 bytes and a hash of its text."""

    sizes: array[int] = field(default_factory=lambda: array("q"))
    hashes: array[int] = field(default_factory=lambda: array("Q"))

    def note(self, text: str) -> int:
        """Bytes of the document."""
        data = text.encode()
        self.sizes.append(len(data))
        self.hashes.append(int.from_bytes(blake2b(data, digest_size=8).digest(), "little"))
        return len(data)


class Parts(Protocol):
    def pieces(self, number: int, text: str) -> list[tuple[str, str]]:
        """Document `number` as (split, text) pieces: itself, or cut where a split ends inside it."""


class HoldOut(Protocol):
    def divide(self, survey: Survey) -> Parts:
        """Raises DatasetError when nothing would be left to train on."""


@dataclass(frozen=True)
class ByDocument:
    """Whole documents. `codes_N` holds TRAIN, VALID or TEST for each; training documents from number `recent_from` on are pieces of RECENT as well.

    `recent_from` None: there is no such file.
    """

    codes_N: np.ndarray
    recent_from: int | None = None

    def pieces(self, number: int, text: str) -> list[tuple[str, str]]:
        code = self.codes_N[number]
        again = [(RECENT, text)] if self.recent_from is not None and code == TRAIN and number >= self.recent_from else []
        return [(SPLITS[code], text), *again]


@dataclass(frozen=True)
class ByPosition:
    """Training text up to byte `valid_start` of the whole corpus, validation up to `test_start`, then test."""

    starts_N: np.ndarray
    valid_start: int
    test_start: int

    def pieces(self, number: int, text: str) -> list[tuple[str, str]]:
        data, start = text.encode(), int(self.starts_N[number])
        first, second = (snap(data, position - start) for position in (self.valid_start, self.test_start))
        cut = ((SPLITS[TRAIN], data[:first]), (SPLITS[VALID], data[first:second]), (SPLITS[TEST], data[second:]))
        return [(split, part.decode()) for split, part in cut if part.strip()]


def snap(data: bytes, position: int) -> int:
    """The last start of a line, else of a word, else of a character, at or before `position`; 0 and the end stay."""
    if position <= 0 or position >= len(data):
        return min(max(position, 0), len(data))
    for separator in (b"\n", b" "):
        found = data.rfind(separator, max(0, position - SNAP_BYTES), position)
        if found >= 0:
            return found + 1
    while data[position] & 0xC0 == 0x80:
        position -= 1
    return position


@dataclass(frozen=True)
class Newest:
    """Documents in order of time. The newest `test_bytes` are for test, the ones before them for validation, and the ones before those are
    `recent`."""

    valid_bytes: int
    test_bytes: int
    recent_bytes: int = 0

    def divide(self, survey: Survey) -> ByDocument:
        from_end_N = np.cumsum(np.array(survey.sizes)[::-1])[::-1]
        after_N = np.append(from_end_N[1:], 0)  # bytes newer than each document
        codes_N = np.where(after_N < self.test_bytes, TEST, TRAIN).astype(np.uint8)
        tested = int(np.array(survey.sizes)[codes_N == TEST].sum())
        codes_N[(codes_N == TRAIN) & (after_N - tested < self.valid_bytes)] = VALID
        check_some_left(bool((codes_N == TRAIN).any()), survey.sizes)
        held_out = int(np.array(survey.sizes)[codes_N != TRAIN].sum())
        recent_N = (codes_N == TRAIN) & (after_N - held_out < self.recent_bytes)
        return ByDocument(codes_N, int(np.argmax(recent_N)) if recent_N.any() else None)


@dataclass(frozen=True)
class Fraction:
    """Shares of the corpus: of its documents, those with the smallest text hashes, when they are many; the tail of the text when few.

    Equal texts have equal hashes and so go to the same split.
    """

    valid: float
    test: float

    def __post_init__(self) -> None:
        if min(self.valid, self.test) < 0 or self.valid + self.test >= 1 or (self.valid == 0) != (self.test == 0):
            raise DatasetError(
                f"--valid-fraction {self.valid:g} and --test-fraction {self.test:g}: both must be above 0 and leave some text to train on; "
                "give 0 for both to hold nothing out"
            )

    def divide(self, survey: Survey) -> Parts:
        count = len(survey.sizes)
        if count < FEW_DOCUMENTS:
            ends_N = np.cumsum(np.array(survey.sizes))
            total = int(ends_N[-1])
            check_some_left(total >= 3, survey.sizes)
            return ByPosition(np.append(0, ends_N[:-1]), round(total * (1 - self.valid - self.test)), round(total * (1 - self.test)))
        hashes_N = np.array(survey.hashes)
        order_N = np.sort(hashes_N)
        codes_N = np.zeros(count, np.uint8)
        if self.test:
            tests = max(1, round(count * self.test))
            held_out = min(max(tests + 1, round(count * (self.test + self.valid))), count)
            codes_N[hashes_N <= order_N[held_out - 1]] = VALID
            codes_N[hashes_N <= order_N[tests - 1]] = TEST
        check_some_left(bool((codes_N == TRAIN).any()), survey.sizes)
        return ByDocument(codes_N)


NOTHING = Fraction(0, 0)
"""Nothing is held out here: one file, which the configuration key `split` divides."""


def check_some_left(some: bool, sizes: Sequence[int]) -> None:
    if not some:
        raise DatasetError(
            f"the corpus has {len(sizes)} document(s) with {sum(sizes):,} bytes in all: nothing would be left to train on after the held-out part"
        )
