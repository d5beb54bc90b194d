"""OLMo's and Dolma's token files: `NAME.npy`, which in spite of its name has no NumPy header (raw uint16 or uint32 tokens), and optionally
`NAME.csv.gz` with a line `start,end,...` for each document, in tokens.

Facts: ai2-olmo-core 3.0.0, olmo_core/data/utils.py (`write_document_indices`, `iter_document_indices`).
"""

from __future__ import annotations

import gzip
import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron.data.formats.source import Documents, ReadOptions, cut, files_for, mapped, stream, unsigned_for
from megatron.data.indexed import DatasetError

NUMPY_MAGIC = b"\x93NUMPY"


class OlmoSource:
    """A TokenSource. It has borders if every file has its CSV."""

    has_loss = False

    def __init__(self, inputs: Sequence[str], options: ReadOptions) -> None:
        dtype = options.dtype or unsigned_for(options.vocab_size)
        paths = files_for(inputs, "*.npy", "OLMo's .npy files or their folder")
        for path in paths:
            check_raw(path)
        self._files = [(path, mapped(path, dtype)) for path in paths]
        self.tokens = sum(len(tokens_T) for _, tokens_T in self._files)
        self.has_borders = options.borders and all(borders_of(path) is not None for path in paths)
        self.notes: Sequence[str] = ()

    def batches(self) -> Iterator[Documents]:
        for path, tokens_T in self._files:
            borders = borders_of(path)
            if borders is None or not self.has_borders:
                yield from stream(str(path), tokens_T)
            else:
                yield from cut(str(path), tokens_T, read_borders(borders, len(tokens_T)))


def check_raw(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(NUMPY_MAGIC)) == NUMPY_MAGIC:
            raise DatasetError(
                f"{path} begins with NumPy's header, so it is an array saved by numpy.save. OLMo's .npy files hold tokens only; write the array with "
                "`array.tofile(...)`"
            )


def borders_of(path: Path) -> Path | None:
    """The CSV beside the tokens. None: there is none."""
    names = (path.with_suffix(".csv.gz"), path.with_suffix(".csv"))
    return next((name for name in names if name.is_file()), None)


def read_borders(path: Path, tokens: int) -> np.ndarray:
    """Where each document ends. Raises DatasetError if the documents leave tokens out or overlap."""
    ends, before = array("q"), 0
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open("rt") as file:
            for number, line in enumerate(file, start=1):
                start, end = (int(value) for value in line.split(",")[:2])
                if start != before or end < start or end > tokens:
                    raise DatasetError(
                        f"{path}:{number}: a document from token {start:,} to {end:,}, but the one before ends at {before:,} of {tokens:,} "
                        "tokens: tokens would be lost or doubled. --borders eod takes the borders from the tokens"
                    )
                ends.append(end)
                before = end
    except DatasetError:
        raise
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise DatasetError(f"{path} is damaged or no list of `start,end` lines ({error}); --borders eod takes the borders from the tokens") from None
    if before != tokens:
        raise DatasetError(
            f"{path} ends at token {before:,} of {tokens:,}: the tokens after it belong to no document. --borders eod makes them the last one"
        )
    return np.frombuffer(ends, np.int64) if ends else np.empty(0, np.int64)
