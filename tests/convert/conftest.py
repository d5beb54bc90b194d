"""What these tests share: a small tokenizer, and a way to export without a terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron.convert.to_huggingface import Export, Exported, export_checkpoint
from megatron.convert.tokenizers import SAMPLE
from megatron.data.progress import build_reporter
from tests.convert.models import VOCABULARY


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of fewer entries than the models have rows; its alphabet is that of SAMPLE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 2, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.train_from_iterator([SAMPLE], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture
def export() -> Callable[..., Exported]:
    """`export_checkpoint` of the given settings."""

    def run(source: Path, target: Path, **settings: Any) -> Exported:
        return export_checkpoint(Export(source, target, **settings), build_reporter())

    return run
