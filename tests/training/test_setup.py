"""What is decided before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from megatron.config.training import Batch
from megatron.data.loader import Datasets
from megatron.data.tokenizer import TokenizerError, build_tokenizer
from megatron.testing.tiny import tiny_config
from megatron.training.setup import build_plan, settle_length


def test_eod_mask_loss_needs_a_token_to_mask(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(path))
    batch = Batch(micro=2, accumulation=1, global_=2)
    keys = {"tokenizer_type": "HFTokenizer", "vocab_file": str(path)}
    plain, masking = tiny_config(**keys), tiny_config(**keys, eod_mask_loss=True)
    tokenizer = build_tokenizer(plain.data)
    assert build_plan(plain, tokenizer, batch).masked_token is None
    with pytest.raises(TokenizerError, match=r"eod_mask_loss needs a token that ends a document, and this tokenizer has none"):
        build_plan(masking, tokenizer, batch)
    characters = tiny_config(tokenizer_type="CharLevelTokenizer", eod_mask_loss=True)
    assert build_plan(characters, build_tokenizer(characters.data), batch).masked_token == 0


@pytest.mark.parametrize(
    ("samples", "epochs", "batch", "steps"),
    [
        (5, 3, Batch(micro=2, accumulation=1, global_=2), 6),  # the fifth sample never comes: 2 + 2 + 2 and not 15 // 2
        (5, 3, Batch(micro=2, accumulation=4, global_=8), 1),
        (11, 2, Batch(micro=1, accumulation=2, global_=4), 5),  # two processes
        (4, 1, Batch(micro=4, accumulation=1, global_=4), 1),
    ],
)
def test_the_steps_of_epochs_are_counted_in_whole_micro_batches(samples: int, epochs: int, batch: Batch, steps: int) -> None:
    config = tiny_config(train_iters=None, train_epochs=epochs, lr_decay_fraction=0.5)
    settled = settle_length(config, Datasets([None] * samples, None, None), batch)  # type: ignore[arg-type]
    assert settled.training.train_iters == steps
    assert settled.lr_decay_iters == max(1, steps // 2)
    assert config.training.train_iters is None
