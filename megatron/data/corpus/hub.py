"""Corpora on the Hugging Face hub, streamed through the package `datasets`: only what is read is downloaded."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron.data.indexed import DatasetError
from megatron.data.input.reading import Record
from megatron.data.optional import import_optional

PARQUET_BRANCH = "refs/convert/parquet"  # the hub's own conversion: for repositories with a loading script, which `datasets` no longer runs
GENERIC = "hf:"
THE_MACHINE_S = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


@dataclass(frozen=True)
class HubCorpus:
    """A repository of texts. `subset` is the default configuration (None: the only one). `size` is shown to a user who must choose a limit.

    `files` is a pattern with {subset} in it, for repositories whose configurations are not reliable.
    """

    path: str
    subset: str | None
    key: str = "text"
    size: str = "of a size that is not known here"
    files: str | None = None
    revision: str | None = None


HUB_CORPORA = {
    "fineweb": HubCorpus(
        "HuggingFaceFW/fineweb",
        "sample-10BT",
        size="10 billion tokens (sample-10BT; sample-100BT, sample-350BT, default or a crawl such as CC-MAIN-2024-10)",
    ),
    "fineweb-edu": HubCorpus(
        "HuggingFaceFW/fineweb-edu", "sample-10BT", size="10 billion tokens (sample-10BT; sample-100BT, sample-350BT, default or one crawl)"
    ),
    "c4": HubCorpus("allenai/c4", "en", size="305 GB (en; realnewslike 15 GB, en.noblocklist 380 GB, or a language of mC4)"),
    "slimpajama": HubCorpus("cerebras/SlimPajama-627B", None, size="895 GB, 627 billion tokens"),
    "redpajama": HubCorpus(
        "togethercomputer/RedPajama-Data-1T-Sample", None, size="a billion tokens", files="*/*/*.parquet", revision=PARQUET_BRANCH
    ),
    "redpajama-v2": HubCorpus(
        "togethercomputer/RedPajama-Data-V2",
        "sample",
        key="raw_content",
        size="a sample (subset sample)",
        files="{subset}/*/*.parquet",
        revision=PARQUET_BRANCH,
    ),
}


def hub_corpus(name: str, key: str) -> HubCorpus | None:
    """A corpus by its name here or as hf:OWNER/NAME with its text under `key`; None: neither. Raises DatasetError for an impossible name."""
    if not name.startswith(GENERIC):
        return HUB_CORPORA.get(name)
    path = name.removeprefix(GENERIC)
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path):
        raise DatasetError(f"{name}: corpora on the Hugging Face hub are called {GENERIC}OWNER/NAME, for instance {GENERIC}roneneldan/TinyStories")
    return HubCorpus(path, None, key)


class HubStream:
    """A `store.Stream` of the corpus's training split. Raises DatasetError when it cannot be reached, opened or read on."""

    def __init__(self, corpus: HubCorpus, subset: str | None) -> None:
        self._corpus = corpus
        self._label = corpus.path + (f"/{subset}" if subset else "")
        pattern = corpus.files.format(subset=subset) if corpus.files else None
        with hub_errors(corpus.path):
            self._rows = datasets_for(corpus.path).load_dataset(
                corpus.path,
                name=None if pattern else subset,
                data_files={"train": pattern} if pattern else None,
                revision=corpus.revision,
                split="train",
                streaming=True,
            )

    def records(self) -> Iterator[Record]:
        with hub_errors(self._corpus.path):
            rows = iter(self._rows)
        number = 0
        while True:
            with hub_errors(self._corpus.path):
                row = next(rows, None)
            if row is None:
                return
            number += 1
            yield Record(f"{self._label}:row {number}", row)

    def position(self) -> Any:
        return self._rows.state_dict()

    def go_to(self, position: Any) -> None:
        self._rows.load_state_dict(position)


def datasets_for(path: str) -> Any:
    return import_optional(
        "datasets",
        f"{path} needs the package datasets (`pip install datasets`; the version is in "
        "requirements/requirements-corpora.txt). Without the package, download the corpus's files (jsonl, parquet, compressed or not) and give "
        "them as input: python prepare_data.py FOLDER --name NAME",
    )


@contextmanager
def hub_errors(path: str) -> Iterator[None]:
    """Turns every error of `datasets` and the libraries below it into a sentence. They document no list of their errors."""
    try:
        yield
    except DatasetError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in THE_MACHINE_S:
            raise  # a full disk or a missing permission is no fault of the name
        if not is_network(error):
            raise DatasetError(
                f"{path} could not be read ({type(error).__name__}: {first_line(error)}). Check the name and --subset. What was downloaded is kept: "
                "the same command continues from there"
            ) from error
        raise DatasetError(
            f"{path}: the Hugging Face hub cannot be reached ({first_line(error)}). Check the network, and that HF_HUB_OFFLINE is not set. "
            "What was downloaded is kept: the same command continues from there. "
            "Without a network, copy the corpus's files to this machine and give them as input: "
            "python prepare_data.py FOLDER --name NAME"
        ) from error


def is_network(error: Exception) -> bool:
    """Whether there is no connection, in the words of Python or of the package httpx."""
    return isinstance(error, ConnectionError) or any(base.__name__ == "TransportError" for base in type(error).__mro__)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]
