"""Estimates a corpus from a sample of its documents: tokens in this tokenizer, with an interval, and the time of one core.

A cluster is one row group of a parquet file, or the beginning of another file. Tokens are counted in proportion to a measure that is known for all
of the corpus: FineWeb's own GPT-2 counts (`token_count`), else the bytes of the text. The interval is that of a ratio of cluster sums (Cochran,
Sampling Techniques, 1977, section 6.3), with Student's t.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import IO, NamedTuple

from megatron.data.indexed import DatasetError
from megatron.data.input.bad_input import ignore
from megatron.data.input.input_files import kind_of
from megatron.data.input.parquet import pyarrow_for
from megatron.data.input.reading import Meter, read_documents
from megatron.data.parts.record import InputFile
from megatron.data.preprocessing.encode import TextTask
from megatron.data.preprocessing.workers import single_threaded

CLUSTERS = 32
FEWEST_CLUSTERS = 8
BYTES_A_CLUSTER = 1 << 18
GPT2_COUNT = "token_count"
CONFIDENCE = 0.95

Open = Callable[[InputFile], IO[bytes]]


class Cluster(NamedTuple):
    """`gpt2_tokens` None: the corpus does not state them. `size`: bytes on the disk that the documents stand for."""

    texts: list[str]
    gpt2_tokens: int | None
    size: float


@dataclass(frozen=True)
class Ratio:
    """`value` plus or minus `error` (95 %). `error` None: one cluster says nothing about the spread."""

    value: float
    error: float | None


@dataclass(frozen=True)
class Estimate:
    """Ratios of the sample, and the speed of one core: seconds for a byte of text. `tokens_a_gpt2_token` None: the corpus does not state its GPT-2
    tokens."""

    documents: int
    bytes: int
    tokens: int
    clusters: int
    tokens_a_byte: Ratio
    bytes_a_disk_byte: Ratio
    documents_a_disk_byte: float
    tokens_a_gpt2_token: Ratio | None
    tokens_a_disk_byte: Ratio
    seconds_a_byte: float


def local_file(file: InputFile) -> IO[bytes]:
    return file.path.open("rb")


def estimate(files: Sequence[InputFile], key: str, task: TextTask, open_file: Open = local_file) -> Estimate:
    """Raises DatasetError if no document could be read."""
    clusters = [cluster for cluster in sample(files, key, open_file) if cluster.texts]
    if not clusters:
        raise DatasetError(f"no text under {key!r} in a sample of the input; choose the key with --jsonl-key")
    with single_threaded():
        encode = task.start()
        encode([(clusters[0].texts[0],)])  # loads what is loaded once
        started, counts = time.process_time(), []
        for cluster in clusters:
            encoded = encode([(text,) for text in cluster.texts])
            counts.append(len(encoded.columns[0].tokens_T))
        seconds = time.process_time() - started
    sizes = [sum(len(text.encode()) for text in cluster.texts) for cluster in clusters]
    stated = [cluster.gpt2_tokens for cluster in clusters if cluster.gpt2_tokens is not None]
    documents = sum(len(cluster.texts) for cluster in clusters)
    disk = [cluster.size for cluster in clusters]
    return Estimate(
        documents=documents,
        bytes=sum(sizes),
        tokens=sum(counts),
        clusters=len(clusters),
        tokens_a_byte=ratio(counts, sizes),
        bytes_a_disk_byte=ratio(sizes, disk),
        documents_a_disk_byte=documents / sum(disk),
        tokens_a_gpt2_token=ratio(counts, stated) if len(stated) == len(clusters) and any(stated) else None,
        tokens_a_disk_byte=ratio(counts, disk),
        seconds_a_byte=seconds / sum(sizes),
    )


def ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """Of the sums over clusters, with its 95 % interval."""
    value, count = sum(above) / sum(below), len(above)
    if count < 2:
        return Ratio(value, None)
    residuals = sum((high - value * low) ** 2 for high, low in zip(above, below, strict=True))
    error = (residuals * count / (count - 1)) ** 0.5 / sum(below)
    return Ratio(value, student(count - 1) * error)


def student(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t, by Cornish and Fisher's expansion (within 2 % from 3 degrees on)."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def sample(files: Sequence[InputFile], key: str, open_file: Open) -> Iterator[Cluster]:
    """CLUSTERS places, spread over the files by their sizes and drawn with a fixed seed: the same corpus gives the same sample."""
    draw, total = random.Random(0), sum(file.size for file in files)
    places = sorted((number + draw.random()) * total / CLUSTERS for number in range(CLUSTERS)) if total else []
    start, seen = 0, set[tuple[str, int]]()
    for file in files:
        inside = [place - start for place in places if start <= place < start + file.size]
        start += file.size
        if not inside:
            continue
        if kind_of(file.name) == (".parquet", ""):
            for place in inside:
                cluster = row_group(file, key, place / file.size, open_file, seen)
                if cluster is not None:
                    yield cluster
        else:
            yield from beginning(file, key, len(inside))


def row_group(file: InputFile, key: str, place: float, open_file: Open, seen: set[tuple[str, int]]) -> Cluster | None:
    """The first documents of a row group. None: it is in the sample already."""
    with open_file(file) as opened:
        table = pyarrow_for(file.name).ParquetFile(opened)
        number = min(int(place * table.num_row_groups), table.num_row_groups - 1)
        names = table.schema_arrow.names
        if (file.name, number) in seen or number < 0 or key not in names:
            return None
        seen.add((file.name, number))
        counted = GPT2_COUNT in names
        texts: list[str] = []
        tokens = filled = 0
        for batch in table.iter_batches(64, row_groups=[number], columns=[key, *([GPT2_COUNT] if counted else [])]):
            for row in batch.to_pylist():
                if isinstance(row[key], str) and row[key].strip():
                    texts.append(row[key])
                    tokens += row.get(GPT2_COUNT) or 0
                    filled += len(row[key])
            if filled >= BYTES_A_CLUSTER:
                break
        rows = table.metadata.num_rows
    return Cluster(texts, tokens if counted else None, file.size * len(texts) / max(rows, 1))


def beginning(file: InputFile, key: str, clusters: int) -> Iterator[Cluster]:
    """The first documents of a file that can only be read from its beginning, in as many clusters.

    The meter jumps when a buffer is filled: the documents up to a jump are those of the bytes before it.
    """
    meter = Meter.of([file.path])
    texts: list[str] = []
    filled = before = 0
    size = file.size
    for document in read_documents(file.path, key, ignore, meter):
        if meter.done != before and filled >= BYTES_A_CLUSTER * clusters and before:
            size = before
            break
        before = meter.done
        texts.append(document.text)
        filled += len(document.text)
    each = max(-(-len(texts) // max(clusters, FEWEST_CLUSTERS)), 1)
    whole = max(sum(len(text.encode()) for text in texts), 1)
    for start in range(0, len(texts), each):
        part = texts[start : start + each]
        yield Cluster(part, None, size * sum(len(text.encode()) for text in part) / whole)
