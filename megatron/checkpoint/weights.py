"""A checkpoint's weights and facts without an engine, in the one form that everything here works with: whole, under today's names, in today's order.

This is what inference, conversion and the checks before loading read, whichever version of GPT-NeoX wrote them, on however many processes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron.checkpoint import layout
from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.gqa_layout import Ordered, todays_order
from megatron.checkpoint.held import WEIGHT
from megatron.checkpoint.names import Named, modern_names, one_name
from megatron.checkpoint.shards import merge_shards
from megatron.checkpoint.stored import StoredCheckpoint, check_known_layout, client_state_of, has_checksums, inspect_checkpoint
from megatron.checkpoint.table import read_table
from megatron.checkpoint.vocabulary import Fitted, fit_vocabulary
from megatron.checkpoint.zero3 import merge_zero3


@dataclass(frozen=True)
class Expected:
    """What a run knows about the model that it wants to load: compared with the checkpoint, or needed to put it together."""

    args: Mapping[str, Any] = field(default_factory=dict)
    """NeoX's `args`. Empty: nothing is compared."""
    vocab_size: int | None = None
    """Entries of the tokenizer. None: the vocabulary must have as many rows there as here."""
    parallel_residual: bool = False
    """`gpt_j_residual`: biases of row-parallel layers are sums over the tensor-parallel processes."""
    gqa_layout: str = "auto"
    """How another program laid out query/key/value rows of grouped-query attention."""


class ModelWeights(NamedTuple):
    """Weights by NeoX's names in the precision they were trained in, the resolved configuration (empty for another program's checkpoint), the client
    state (iteration, args, ...), and sentences for the user on what was translated, left out or decided."""

    state_dict: dict[str, torch.Tensor]
    config: dict[str, Any]
    client_state: dict[str, Any]
    notices: tuple[str, ...] = ()
    vocabulary_changed: bool = False
    """Whether padding rows were cut off or added."""
    gqa_layout: str = layout.GQA_LAYOUT
    """How the stored rows of grouped query/key/value projections were found to lie."""


def load_model_weights(path: Path | str, expected: Expected | None = None) -> ModelWeights:
    """Reads the weights of a checkpoint for use without DeepSpeed. `path`: a checkpoint, or a directory of them (then the one `latest` names).

    Tensors are read from the file when they are used: copy them before the checkpoint may be deleted. Raises CheckpointError.
    """
    path, expected = Path(path), expected or Expected()
    if not layout.looks_like_checkpoint(path):
        path = find_checkpoint(path)
    table = read_table(path)
    if table is not None and table.is_divided:
        return _joined_weights(path, expected)
    stored = inspect_checkpoint(path)
    try:
        state, notices, gqa_layout = _whole_weights(stored, expected)
        fitted = _fitted(state, stored.client_state, expected)
    except CheckpointError as error:
        message = str(error)
        raise CheckpointError(message if str(path) in message else f"{path}: {message}") from error
    notices += filter(None, [fitted.notice])
    told = tuple(f"{path}: {notice}" for notice in notices)
    return ModelWeights(fitted.state, read_config(path), stored.client_state, told, fitted.notice is not None, gqa_layout)


def _joined_weights(path: Path, expected: Expected) -> ModelWeights:
    """The weights that this program divided among processes, joined in memory."""
    from megatron.checkpoint.logical import LogicalCheckpoint  # which reads other checkpoints through this module

    checkpoint = LogicalCheckpoint(path, expected, optimizer=False)
    state = {name: checkpoint.read(one_name(name), WEIGHT, checkpoint.whole(one_name(name))).clone() for name in checkpoint.every_name()}
    client_state = client_state_of(path, checkpoint.head)
    checkpoint.close()
    fitted = _fitted(state, client_state, expected)
    notices = () if fitted.notice is None else (f"{path}: {fitted.notice}",)
    return ModelWeights(fitted.state, read_config(path), client_state, notices, fitted.notice is not None)


def _fitted(state: dict[str, torch.Tensor], client_state: Mapping[str, Any], expected: Expected) -> Fitted:
    rows = expected.args.get("padded_vocab_size")
    if expected.vocab_size is None or rows is None:
        return Fitted(state, None)
    return fit_vocabulary(state, rows=rows, vocab_size=expected.vocab_size, args=client_state.get("args") or {})


def _whole_weights(stored: StoredCheckpoint, expected: Expected) -> tuple[dict[str, torch.Tensor], list[str], str]:
    """The weights under today's names and in today's order, tensor-parallel shards merged; notices; the order of grouped queries. Raises
    CheckpointError."""
    check_known_layout(stored)
    named = [modern_names(shard) for shard in ([merge_zero3(stored)] if stored.is_zero3 else stored.shards)]
    ordered = in_todays_order(stored, named, expected)
    merged = merge_shards(ordered.shards, parallel_residual=expected.parallel_residual)
    return merged.state, [*notices_on(stored, named, ordered), *merged.notices], ordered.layout


def notices_on(stored: StoredCheckpoint, named: list[Named], ordered: Ordered) -> list[str]:
    """What a user should know of how the weights were read."""
    notices = [*_name_notices(named[0]), *filter(None, [ordered.notice])]
    if len(named) > 1:
        notices.insert(0, f"Saved with model_parallel_size {len(named)}: the parts of its weights are joined.")
    if not has_checksums(stored.path):
        why = "Its manifest is missing" if stored.is_own else "Written by another program, without checksums"
        notices.insert(0, f"{why}: its files cannot be checked for damage.")
    return notices


def in_todays_order(stored: StoredCheckpoint, named: list[Named], expected: Expected) -> Ordered:
    """The weights of each tensor-parallel process, their query/key/value rows as today's. Raises CheckpointError."""
    heads = (stored.client_state.get("args") or {}).get("num_attention_heads") or expected.args.get("num_attention_heads")
    if stored.is_own or not isinstance(heads, int):
        return Ordered([entry.state for entry in named], None)
    return todays_order([entry.state for entry in named], heads=max(1, heads // len(named)), layout=expected.gqa_layout)


def _name_notices(named: Named) -> list[str]:
    notices = []
    if named.translated:
        notices.append(f"Names of weights from an older GPT-NeoX are translated: {'; '.join(named.translated)}.")
    if named.left_out:
        notices.append(f"Not read, because the configuration gives it: {', '.join(named.left_out)}.")
    return notices


def read_config(path: Path) -> dict[str, Any]:
    """The resolved configuration inside a checkpoint; empty when it has none. Raises CheckpointError when unreadable."""
    file = path / layout.CONFIGS / layout.RESOLVED_CONFIG
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds a {type(config).__name__}, not the keys of a configuration.")
    return config
