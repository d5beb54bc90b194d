"""Padding rows of the vocabulary: cut off, added, or refused where they are no padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.vocabulary import fit_vocabulary

EMBEDDING, HEAD = "sequential.0.word_embeddings.weight", "sequential.6.final_linear.weight"
TP2 = {"make_vocab_size_divisible_by": 128, "model_parallel_size": 2}


def table(rows: int) -> dict[str, torch.Tensor]:
    return {EMBEDDING: torch.arange(float(rows))[:, None].expand(rows, 2) + 1, HEAD: torch.ones(rows, 2), "sequential.5.norm.weight": torch.ones(9)}


def test_the_20b_models_vocabulary_of_two_processes_is_cut() -> None:
    fitted = fit_vocabulary(table(50432), rows=50304, vocab_size=50277, args=TP2)
    assert fitted.state[EMBEDDING].shape == fitted.state[HEAD].shape == (50304, 2)
    assert fitted.state[EMBEDDING][-1, 0] == 50304
    assert fitted.notice == "The checkpoint's vocabulary has 50,432 rows; this run has 50,304 rows for 50,277 tokens: 128 padding rows are left out."


def test_missing_padding_is_zeros() -> None:
    fitted = fit_vocabulary(table(300), rows=384, vocab_size=300, args={})
    assert fitted.state[HEAD].shape == (384, 2)
    assert fitted.state[HEAD][300:].abs().sum() == 0
    assert fitted.state[EMBEDDING][299, 0] == 300
    assert fitted.notice == "The checkpoint's vocabulary has 300 rows; this run has 384 rows for 300 tokens: 84 padding rows of zeros are added."


def test_as_many_rows_are_left_alone() -> None:
    state = table(384)
    fitted = fit_vocabulary(state, rows=384, vocab_size=300, args=TP2)
    assert fitted == (state, None)


@pytest.mark.parametrize(
    ("rows", "vocab_size", "args"),
    [(256, 300, {}), (384, 300, TP2), (2000, 300, {}), (512, 200, TP2)],
    ids=["fewer rows than tokens", "padding for one process", "far more rows", "more than the multiple"],
)
def test_what_is_no_padding_is_refused(rows: int, vocab_size: int, args: dict[str, Any]) -> None:
    with pytest.raises(
        CheckpointError, match=rf"word_embeddings.weight has {rows:,} rows, but the tokenizer has {vocab_size} entries.*another tokenizer"
    ):
        fit_vocabulary(table(rows), rows=640, vocab_size=vocab_size, args=args)


def test_args_that_say_nothing_about_padding() -> None:
    assert fit_vocabulary(table(50432), rows=50304, vocab_size=50277, args={"make_vocab_size_divisible_by": 1, "model_parallel_size": 1}).notice
