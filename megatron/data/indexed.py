"""The memory-mapped token files of GPT-NeoX: `PREFIX.bin` (tokens) and `PREFIX.idx` (where each document is).

`.idx`, little endian, no padding: magic `MMIDIDX\\0\\0` (9 bytes), u64 version 1, u8 dtype code, u64 N items, u64 D,
int32[N] sizes in tokens, int64[N] byte offsets into the `.bin`, int64[D] document boundaries (one item a document: 0..N).
NeoX draws samples from items and does not look at the boundaries; what this package calls a document of a file is an item.

Shapes: N documents, T tokens of one document
"""

from __future__ import annotations

import difflib
import hashlib
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from megatron.data.locking import naming, open_locked
from megatron.data.long_list import LongList

MAGIC = b"MMIDIDX\x00\x00"
CACHED_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f4"),
    7: np.dtype("<f8"),
    8: np.dtype("<u2"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
SHOWN_PAIRS = 5
LONGEST = np.iinfo(np.int32).max
WARMUP_BYTES = 64 << 20
PIECE_BYTES = 4 << 20


class DatasetError(ValueError):
    """The data cannot be used. The message names the file, the problem and what to do."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type in which NeoX stores token ids: uint16 for fewer than 65,500 ids, else int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


class IndexedDataset:
    """Random access to the documents of one `.bin/.idx` pair without reading it into memory.

    `prefix` is the path without `.bin`/`.idx`. The pair is checked here, once: raises DatasetError when a file is missing
    or the two do not belong together. Objects can be pickled; the files are mapped again on the other side.
    `sizes` (int32 [N]) are the documents' tokens.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self.idx_path = Path(f"{prefix}.idx")
        self.bin_path = Path(f"{prefix}.bin")
        check_files_exist(self.prefix)
        self._index = map_bytes(self.idx_path)
        self.dtype, count, boundaries = read_header(self.idx_path, self._index)
        self.sizes = np.frombuffer(self._index, "<i4", count, HEADER.size)
        self.offsets_N = np.frombuffer(self._index, "<i8", count, HEADER.size + 4 * count)
        self.boundaries = np.frombuffer(self._index, "<i8", boundaries, HEADER.size + 12 * count)
        self._check_bin_size()
        self._tokens = map_bytes(self.bin_path)

    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[Path]]:
        return IndexedDataset, (self.prefix,)

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.sizes)

    @cached_property
    def num_tokens(self) -> int:
        return int(self.sizes.sum(dtype=np.int64))

    @property
    def has_boundaries(self) -> bool:
        """Whether the file holds the ends of its documents. GPT-NeoX does not read them, and some of its tools lose them."""
        return len(self.boundaries) > 0 and self.boundaries[0] == 0 and bool(self.boundaries[-1] == len(self))

    @property
    def document_ends(self) -> np.ndarray:
        """int64: the number of items up to the end of each document. In a file without document ends every item is a document."""
        return self.boundaries[1:] if self.has_boundaries else np.arange(1, len(self) + 1, dtype=np.int64)

    @property
    def tokens(self) -> np.ndarray:
        """Every token of the file in order, as a read-only view of the mapped `.bin`."""
        return self._tokens[: self.num_tokens * self.dtype.itemsize].view(self.dtype)

    @cached_property
    def index_hash(self) -> str:
        """Digest of the whole `.idx`. Equal digests mean equal documents, whatever the path and the time of the file."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(self._index.data)
        return digest.hexdigest()

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens [offset, offset + length) of document `index`, a read-only view; to the document's end when `length` is None."""
        size = int(self.sizes[index])
        length = size - offset if length is None else length
        if not 0 <= offset <= offset + length <= size:
            raise IndexError(f"{self.prefix}: tokens {offset}..{offset + length} of document {index} were asked for, but it has {size} tokens")
        start = int(self.offsets_N[index]) + offset * self.dtype.itemsize
        return self._tokens[start : start + length * self.dtype.itemsize].view(self.dtype)

    def warm_up(self) -> None:
        """Read the whole `.bin` once, so that the first steps find it in the page cache (`mmap_warmup`)."""
        with self.bin_path.open("rb") as file:
            while file.read(WARMUP_BYTES):
                pass

    def _check_bin_size(self) -> None:
        have, want = self.bin_path.stat().st_size, self.num_tokens * self.dtype.itemsize
        if have != want:
            raise DatasetError(
                f"{self.bin_path} has {have:,} bytes but {self.idx_path.name} describes {want:,} "
                f"({self.num_tokens:,} tokens of {self.dtype.itemsize} bytes): the two were not written together or a copy was cut short; "
                "prepare or copy both again"
            )
        if len(self) and (self.offsets_N[0] != 0 or self.offsets_N[-1] + int(self.sizes[-1]) * self.dtype.itemsize != want or self.sizes.min() < 0):
            raise DatasetError(f"{self.idx_path} is damaged: its document sizes and byte offsets contradict each other; prepare the data again")


class IndexedDatasetWriter:
    """Writes one `.bin/.idx` pair, byte for byte as NeoX does. The files get their names only when they are complete on the disk.

    Use it as a context manager. A normal end publishes the pair; an exception removes the written files.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype[Any]) -> None:
        if dtype not in CODES:
            raise DatasetError(f"{prefix}: tokens of type {dtype} cannot be stored; the format knows {', '.join(str(known) for known in CODES)}")
        self.prefix = Path(prefix)
        self.dtype = dtype
        self._sizes = LongList(self.prefix.parent, np.dtype("<i4"))
        self._boundaries = LongList(self.prefix.parent, np.dtype("<i8"))
        self._boundaries.append(0)
        self._partial = {suffix: Path(f"{prefix}.{suffix}.partial") for suffix in ("bin", "idx")}

    def __enter__(self) -> IndexedDatasetWriter:
        """Raises DatasetError when another process is writing the same pair; what a killed one left of it is overwritten."""
        try:
            self._file = open_locked(self._partial["bin"])
        except BlockingIOError:
            raise DatasetError(f"another process is writing {self.prefix}.bin right now; wait for it or choose another name") from None
        return self

    def add(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Append one document of one item."""
        self.add_item(tokens)
        self.end_document()

    def add_item(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Append one item to the document that `end_document` ends."""
        values = np.asarray(tokens)
        if len(values) and values.dtype != self.dtype and self.dtype.kind in "ui":
            limits = np.iinfo(self.dtype)
            if values.min() < limits.min or values.max() > limits.max:
                raise DatasetError(f"{self.prefix}: token ids {values.min()}..{values.max()} do not fit the file's type {self.dtype}")
        if len(values) > LONGEST:
            raise DatasetError(
                f"{self.prefix}: a document has {len(values):,} tokens; the format holds at most {LONGEST:,} in one document. Cut it into parts"
            )
        with naming(self.prefix.parent):
            self._file.write(np.ascontiguousarray(values, dtype=self.dtype).tobytes())
        self._sizes.append(len(values))

    def end_document(self) -> None:
        """Ends a document, which has the items since the last end. Without items it is an empty document, as NeoX writes a text without tokens."""
        self._boundaries.append(len(self._sizes))

    def add_column(self, tokens: np.ndarray, sizes: np.ndarray, *, ends: np.ndarray | None = None) -> None:
        """Append several items that lie end to end in `tokens`, which has the file's type. `ends`: the number of these items up to the end of each
        document; None: each item is a document."""
        assert tokens.dtype == self.dtype
        assert len(tokens) == sizes.sum()
        with naming(self.prefix.parent):
            self._file.write(tokens.data)
        start = len(self._sizes)
        self._sizes.extend(sizes)
        self._boundaries.extend(start + (np.arange(1, len(sizes) + 1) if ends is None else ends))

    def add_file(self, dataset: IndexedDataset) -> Iterator[int]:
        """Append every item of another pair of the same type, with its document boundaries. Yields the bytes of each piece after it is written."""
        start = len(self._sizes)
        self._sizes.extend(dataset.sizes)
        self._boundaries.extend(dataset.document_ends + start)
        with dataset.bin_path.open("rb") as file, naming(self.prefix.parent):
            while piece := file.read(PIECE_BYTES):
                self._file.write(piece)
                yield len(piece)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                with naming(self.prefix.parent):
                    self._publish()
        finally:
            self._sizes.close()
            self._boundaries.close()
            for path in self._partial.values():
                path.unlink(missing_ok=True)
            with suppress(OSError):  # what is still in memory and does not fit on the disk is not wanted any more
                self._file.close()

    def _publish(self) -> None:
        with self._partial["idx"].open("wb") as file:
            file.write(HEADER.pack(MAGIC, VERSION, CODES[self.dtype], len(self._sizes), len(self._boundaries)))
            for sizes in self._sizes.pieces():
                file.write(sizes.data)
            start = 0
            for sizes in self._sizes.pieces():
                ends = start + np.cumsum(sizes, dtype="<i8") * self.dtype.itemsize
                file.write(np.append(np.int64(start), ends[:-1]).astype("<i8").data)
                start = int(ends[-1])
            for boundaries in self._boundaries.pieces():
                file.write(boundaries.data)
            sync(file)
        sync(self._file)
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)  # never a new .bin beside an old .idx
        os.replace(self._partial["bin"], f"{self.prefix}.bin")
        os.replace(self._partial["idx"], f"{self.prefix}.idx")


def sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def map_bytes(path: Path) -> np.ndarray:
    """The file as read-only mapped bytes (an empty file cannot be mapped: an empty array)."""
    if path.stat().st_size == 0:
        return np.empty(0, np.uint8)
    return np.asarray(np.memmap(path, np.uint8, "r"))


def read_header(path: Path, index: np.ndarray) -> tuple[np.dtype[Any], int, int]:
    """(dtype, N, D) of a mapped `.idx`. Raises DatasetError if the file is not an index or is not complete."""
    start = index[: HEADER.size].tobytes()
    if start.startswith(CACHED_MAGIC):
        raise DatasetError(f"{path} is in fairseq's old 'cached' format, which cannot be read here; prepare the text again with prepare_data.py")
    if not start.startswith(MAGIC[: len(start)]) or not start:
        raise DatasetError(
            f"{path} is not an index of a token file: it starts with {start[:9]!r}, not {MAGIC!r}; data_path is the path without .bin/.idx"
        )
    if len(start) < HEADER.size:
        raise DatasetError(f"{path} is cut short: it has {len(start)} bytes, and the header alone needs {HEADER.size}; prepare or copy it again")
    _, version, code, count, boundaries = HEADER.unpack(start)
    if version != VERSION:
        raise DatasetError(f"{path} has format version {version}, but only version {VERSION} exists: the file is damaged or from another program")
    if code not in DTYPES:
        known = ", ".join(f"{number} {dtype}" for number, dtype in DTYPES.items())
        raise DatasetError(f"{path} has the unknown token type code {code} (known: {known}): the file is damaged or from another program")
    want = HEADER.size + 12 * count + 8 * boundaries
    if len(index) != want:
        what = "cut short" if len(index) < want else "too long"
        raise DatasetError(f"{path} is {what}: it has {len(index):,} bytes, but its {count:,} documents need {want:,}; prepare or copy it again")
    return DTYPES[code], count, boundaries


def check_files_exist(prefix: Path) -> None:
    """Raises DatasetError naming the missing half and, when there is one, a data set with a similar name beside it."""
    missing = [suffix for suffix in (".bin", ".idx") if not Path(f"{prefix}{suffix}").is_file()]
    if not missing:
        return
    if prefix.suffix in (".bin", ".idx") and prefix.is_file():
        raise DatasetError(f"{prefix}: give the path without {prefix.suffix} ({prefix.with_suffix('')}); it stands for both files of the pair")
    if prefix.is_file():
        raise DatasetError(
            f"{prefix} is not a .bin/.idx pair, which training needs. `python prepare_data.py {prefix}` makes a pair from a text file "
            "and prints the data_path to use"
        )
    inside = sorted(str(path.with_suffix("")) for path in prefix.glob("*.idx")) if prefix.is_dir() else []
    if inside:
        raise DatasetError(f"{prefix} is a folder; give the path of a pair in it, without .bin/.idx: {', '.join(inside[:SHOWN_PAIRS])}")
    nearby = sorted(path.stem for path in prefix.parent.glob("*.idx")) if prefix.parent.is_dir() else []
    close = difflib.get_close_matches(prefix.name, nearby, n=1, cutoff=0.4)
    hint = f"did you mean {prefix.parent / close[0]}?" if close and close[0] != prefix.name else "`python prepare_data.py` makes such files from text"
    raise DatasetError(f"no file {' and no file '.join(f'{prefix}{suffix}' for suffix in missing)}; {hint}")
