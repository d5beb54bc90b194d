"""What these tests share: blocks and shapes by hand, and a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron.analysis.routing.blocks import Block, Shape, View, Viewer

VOCABULARY = 300


def shape(experts: int = 4, top_k: int = 2, *, layers: int = 1, domains: Sequence[str] = ("one",), lores: tuple[int, int] = (0, 0)) -> Shape:
    """`lores`: of an expert, and of a token in it."""
    return Shape(list(range(layers)), [experts] * layers, top_k, list(domains), *lores)


def block(
    tokens: Sequence[Sequence[int]], *, domain: int = 0, lores: Sequence[Sequence[Sequence[int]]] | None = None, continues: bool = False
) -> Block:
    """One layer: the experts of each token, and the LoREs of each of these."""
    lore_TLKU = None if lores is None else np.array(lores)[:, None]
    return Block(domain, np.array(tokens)[:, None], None, None, lore_TLKU, continues)


def view(tokens: Sequence[Sequence[int]], size: Shape, **options: object) -> View:
    """A block without one before it."""
    return Viewer(size, 63).view(block(tokens, **options))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE that reads every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 2, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the routing of a text, of the text and of the next text"], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path
