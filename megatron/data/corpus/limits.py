"""How much of a corpus is taken: its first documents, until one more would exceed a limit."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from megatron.data.indexed import DatasetError
from megatron.data.input.reading import Document

BATCH_CHARACTERS = 1_000_000
ALL = "all"
FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}

CountTokens = Callable[[Sequence[str]], list[int]]
"""The tokens of each text, the end-of-document token included where one is appended."""


@dataclass(frozen=True)
class Limits:
    """At most this much of a corpus. None means no limit. ALL means no limit too, for corpora where the user must give one."""

    documents: int | str | None = None
    bytes: int | str | None = None
    tokens: int | str | None = None

    @property
    def given(self) -> bool:
        return any(limit is not None for limit in asdict(self).values())

    def numbers(self) -> dict[str, int]:
        """The limits that are set."""
        return {name: limit for name, limit in asdict(self).items() if isinstance(limit, int)}


class Limiter:
    """Takes documents up to the limits and tells how much of them is used."""

    def __init__(self, limits: Limits, count_tokens: CountTokens | None = None) -> None:
        """`count_tokens` is asked only when tokens are limited; raises DatasetError when it is missing then."""
        self.limits = limits.numbers()
        self.used = dict.fromkeys(self.limits, 0)
        self._count = count_tokens
        if "tokens" in self.limits and count_tokens is None:
            raise DatasetError(
                "--max-tokens counts tokens while the text is read, so it needs a tokenizer that exists already. Give -v FILE (and -t TYPE), or "
                "limit the text by --max-bytes or --max-documents"
            )

    def take(self, documents: Generator[Document]) -> Generator[Document]:
        """Documents until the next one would exceed a limit; `documents` is closed then. Raises DatasetError if the first document already exceeds
        one."""
        with closing(documents):
            if self._is_reached():
                return
            for document, size in self._sized(documents):
                if any(self.used[name] + amount > self.limits[name] for name, amount in size.items()):
                    self._check_some(size)
                    return
                for name, amount in size.items():
                    self.used[name] += amount
                yield document
                if self._is_reached():
                    return

    @property
    def fraction(self) -> float:
        """How much of the nearest limit is used; 0 without limits."""
        return max((self.used[name] / limit for name, limit in self.limits.items()), default=0.0)

    def _is_reached(self) -> bool:
        return any(self.used[name] >= limit for name, limit in self.limits.items())

    def _check_some(self, size: dict[str, int]) -> None:
        if not any(self.used.values()):
            over = next(name for name, amount in size.items() if amount > self.limits[name])
            raise DatasetError(f"--max-{over} {self.limits[over]:,} leaves no document: the first one already has {size[over]:,} {over}")

    def _sized(self, documents: Iterable[Document]) -> Iterator[tuple[Document, dict[str, int]]]:
        """Documents with what they take of each limit. Tokens are counted for many at once, which is several times faster than one by one."""
        if "tokens" not in self.limits or self._count is None:
            yield from ((document, self._size(document, 0)) for document in documents)
            return
        for batch in batches(documents):
            counts = self._count([document.text for document in batch])
            yield from ((document, self._size(document, tokens)) for document, tokens in zip(batch, counts, strict=True))

    def _size(self, document: Document, tokens: int) -> dict[str, int]:
        sizes = {"documents": 1, "bytes": len(document.text.encode()) if "bytes" in self.limits else 0, "tokens": tokens}
        return {name: sizes[name] for name in self.limits}


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def add_limit_options(parser: argparse.ArgumentParser) -> None:
    """--max-documents, --max-bytes and --max-tokens."""
    for what, example in (("documents", "10k"), ("bytes", "2GB"), ("tokens", "1B")):
        parser.add_argument(
            f"--max-{what}",
            *(["--tokens"] if what == "tokens" else []),
            type=amount_of,
            metavar="N",
            help=f"take the first documents, at most this many {what} in all (for example {example}; all = no limit)",
        )


def amount_of(text: str) -> Any:
    """500, 10k, 2.5M, 1B (a billion), 2GB; ALL stays itself. For argparse: raises ArgumentTypeError."""
    if text.lower() == ALL:
        return ALL
    found = re.fullmatch(r"(\d+(?:[_,]\d{3})*(?:\.\d+)?)\s*([kmgbt]?)(b?)", text.strip(), re.IGNORECASE)
    amount = round(float(re.sub("[_,]", "", found[1])) * FACTORS[found[2].lower()]) if found else 0
    if amount < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount; give a number above 0, which may end in k, M, B, G or T, or give {ALL!r}")
    return amount
