"""What is decided before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from megatron.config.training import Batch
from megatron.data.tokenizer import TokenizerError, build_tokenizer
from megatron.testing.tiny import tiny_config
from megatron.training.setup import build_plan


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
