"""The rows of the vocabulary that only fill it up: GPT-NeoX pads it to a multiple that depends on tensor parallelism, so that another number of
processes, or another program, has more or fewer of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.checkpoint.errors import CheckpointError
from megatron.config.size import padded_vocab_size

TABLE = re.compile(r"\.word_embeddings\.weight$|\.final_linear\.(?:weight|bias)$")
UNKNOWN_UNIT = 1024
"""Rows that padding may add where the checkpoint does not say to which multiple: 128 for each of 8 processes."""


class Fitted(NamedTuple):
    """Weights whose vocabulary has the model's number of rows, and a sentence on what was done; None where nothing was."""

    state: dict[str, Tensor]
    notice: str | None


def fit_vocabulary(state: Mapping[str, Tensor], *, rows: int, vocab_size: int, args: Mapping[str, Any]) -> Fitted:
    """Cuts off or adds padding rows (zeros) so that embedding and head have `rows` of them; `vocab_size` of them are tokens.

    `args`: NeoX's, of the checkpoint; what they say about padding decides whether the difference is padding. Raises CheckpointError when it is not:
    the checkpoint is of another tokenizer.
    """
    fitted = dict(state)
    stored_rows = 0
    for name, table in state.items():
        if not TABLE.search(name) or table.shape[0] == rows:
            continue
        stored_rows = table.shape[0]
        _check_rows(name, stored_rows, rows, vocab_size, args)
        fitted[name] = table[:rows] if stored_rows > rows else torch.cat([table, table.new_zeros(rows - stored_rows, *table.shape[1:])])
    return Fitted(fitted, _notice(stored_rows, rows, vocab_size) if stored_rows else None)


def check_padding(
    stored: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]], *, vocab_size: int | None, args: Mapping[str, Any]
) -> str | None:
    """Compares the shapes of a checkpoint with those of a model, as `fit_vocabulary` does with weights. A sentence where rows are cut off or added;
    None where not. Raises CheckpointError for another tokenizer. `vocab_size` None: nothing is compared."""
    sentence = None
    for name, shape in shapes.items():
        if vocab_size is not None and TABLE.search(name) and name in stored and stored[name][0] != shape[0]:
            _check_rows(name, stored[name][0], shape[0], vocab_size, args)
            sentence = _notice(stored[name][0], shape[0], vocab_size)
    return sentence


def _check_rows(name: str, stored_rows: int, rows: int, vocab_size: int, args: Mapping[str, Any]) -> None:
    if not _is_padding(stored_rows, vocab_size, args):
        raise CheckpointError(
            f"{name} has {stored_rows:,} rows, but the tokenizer has {vocab_size:,} entries, padded to {rows:,}. The model was trained with "
            "another tokenizer. Set tokenizer_type and vocab_file to that tokenizer."
        )


def _notice(stored_rows: int, rows: int, vocab_size: int) -> str:
    change = f"{stored_rows - rows} padding rows are left out" if stored_rows > rows else f"{rows - stored_rows} padding rows of zeros are added"
    return f"The checkpoint's vocabulary has {stored_rows:,} rows; this run has {rows:,} rows for {vocab_size:,} tokens: {change}."


def _is_padding(stored_rows: int, vocab_size: int, args: Mapping[str, Any]) -> bool:
    """Whether that many rows are `vocab_size` tokens and padding."""
    divisible_by, processes = args.get("make_vocab_size_divisible_by"), args.get("model_parallel_size")
    if isinstance(divisible_by, int) and isinstance(processes, int) and divisible_by * processes > 1:
        return stored_rows == padded_vocab_size(vocab_size, divisible_by * processes)
    return vocab_size <= stored_rows < vocab_size + UNKNOWN_UNIT
