"""A corpus of a few thousand characters with something to learn in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron.data.indexed import IndexedDatasetWriter

SENTENCE = "the quick brown fox jumps over the lazy dog and the dog looks up at the fox "


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of an indexed file: 60 documents of characters below 128."""
    prefix = tmp_path_factory.mktemp("corpus") / "foxes"
    with IndexedDatasetWriter(prefix, np.dtype("uint16")) as writer:
        for number in range(60):
            text = (SENTENCE * 3)[number % 40 :][: 120 + number]
            writer.add(np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16))
    return prefix
