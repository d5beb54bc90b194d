"""Token files of llm.c and modded-nanogpt: 256 int32 (magic number, version, number of tokens, zeros), then the tokens. Each document begins with the
end-of-text token.

Facts: karpathy/llm.c, dev/data/data_common.py (GPT-2: magic 20240520, version 1, uint16; Llama 3: 20240801, version 7, uint32).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.formats.source import Documents, ReadOptions, files_for, mapped, stream
from megatron.data.indexed import DatasetError

HEADER_BYTES = 256 * 4
KINDS: dict[tuple[int, int], np.dtype[Any]] = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}


class LlmCSource:
    """A TokenSource without borders."""

    has_borders = False
    has_loss = False

    def __init__(self, inputs: Sequence[str], options: ReadOptions) -> None:
        self._files = [(path, open_file(path)) for path in files_for(inputs, "*.bin", "llm.c's .bin files or their folder")]
        self.tokens = sum(len(tokens_T) for _, tokens_T in self._files)
        self.notes: Sequence[str] = ()

    def batches(self) -> Iterator[Documents]:
        for path, tokens_T in self._files:
            yield from stream(str(path), tokens_T)


def open_file(path: Path) -> np.ndarray:
    header = np.fromfile(path, "<i4", 256)
    if len(header) < 256 or (int(header[0]), int(header[1])) not in KINDS:
        raise DatasetError(f"{path} is not a token file of llm.c: it does not begin with {', '.join(str(magic) for magic, _ in KINDS)} and a version")
    tokens_T = mapped(path, KINDS[int(header[0]), int(header[1])], HEADER_BYTES)
    if len(tokens_T) != header[2]:
        raise DatasetError(f"{path} has {len(tokens_T):,} tokens, but its header says {header[2]:,}: a copy was cut short")
    return tokens_T
