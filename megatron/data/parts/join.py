"""Makes one pair of the parts, in the order of the files: the first documents, as many as the limits allow. Memory does not grow with the corpus."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.indexed import WARMUP_BYTES, IndexedDataset, IndexedDatasetWriter
from megatron.data.parts.record import Record
from megatron.data.progress import Reporter, Stage

ITEMS_AT_ONCE = 1 << 14


def join(parts: Sequence[tuple[Path, Record]], output: Path, dtype: np.dtype[Any], limits: dict[str, int], reporter: Reporter) -> dict[str, int]:
    """Counts of what was written. `bytes` of a part that is taken partly is its share by tokens."""
    totals = {"documents": 0, "bytes": 0, "tokens": 0}
    wanted = min(limits.get("tokens", 1 << 62), sum(record.tokens for _, record in parts))
    with IndexedDatasetWriter(output, dtype) as writer, reporter.stage("joining", wanted) as stage:
        for prefix, record in parts:
            part = IndexedDataset(prefix)
            left = {name: limit - totals[name] for name, limit in limits.items()}
            items = items_within(part, left)
            tokens = copy_items(part, items, writer, stage)
            totals["documents"] += items
            totals["tokens"] += tokens
            totals["bytes"] += round(record.text_bytes * tokens / max(part.num_tokens, 1))
            if items < len(part):
                break
    return totals


def items_within(part: IndexedDataset, left: dict[str, int]) -> int:
    """How many of the first documents fit into what is left of the limits."""
    fitting = min(len(part), left.get("documents", len(part)))
    if part.num_tokens <= left.get("tokens", part.num_tokens):
        return fitting
    return min(fitting, int(np.searchsorted(np.cumsum(part.sizes, dtype=np.int64), left["tokens"], side="right")))


def copy_items(part: IndexedDataset, items: int, writer: IndexedDatasetWriter, stage: Stage) -> int:
    """The number of tokens of the first `items` documents, which are written."""
    token = 0
    for start in range(0, items, ITEMS_AT_ONCE):
        sizes_N = part.sizes[start : min(start + ITEMS_AT_ONCE, items)]
        end = token + int(sizes_N.sum(dtype=np.int64))
        writer.add_column(part.tokens[token:end], sizes_N)
        stage.advance((end - token) * part.dtype.itemsize, len(sizes_N), end - token, position=stage.tokens + end - token)
        token = end
    return token


def checksums(paths: Sequence[Path], reporter: Reporter) -> dict[str, str]:
    """sha256 by file name."""
    found = {}
    with reporter.stage("checksums", sum(path.stat().st_size for path in paths)) as stage:
        for path in paths:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while piece := file.read(WARMUP_BYTES):
                    digest.update(piece)
                    stage.advance(len(piece), documents=0)
            found[path.name] = digest.hexdigest()
    return found
