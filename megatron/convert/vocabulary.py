"""Rows of embedding and head for tokens that a model has none for, and entries of a tokenizer that a model has no rows for.

Shapes: V rows of the vocabulary; D model width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.checkpoint.vocabulary import TABLE
from megatron.convert.json_files import read_json, write_json
from megatron.data.tokenizer.companions import ADDED_TOKENS, CONFIG, GENERATION, SPECIAL_TOKENS, TOKEN_IDS, token_text

LISTS = ("additional_special_tokens", "extra_special_tokens")


class NewRows(NamedTuple):
    """Rows first..end-1 become the mean of those before them. The model had `before` rows and has `total` then."""

    before: int
    first: int
    end: int
    total: int

    def sentence(self) -> str:
        """What a user should know."""
        count, added = self.end - self.first, self.total - self.before
        kind = "row" if count == 1 else "rows"
        where = f"; embedding and head now have {self.total:,} rows, {added:,} more than before" if added else ", in place of padding rows"
        return f"{count:,} {kind} of embedding and head, from row {self.first:,} on, start as the mean of the {self.first:,} rows before{where}."


def with_new_rows(weights: Iterable[tuple[str, Tensor]], new: NewRows | None) -> Iterator[tuple[str, Tensor]]:
    """The weights, embedding and head (and its bias) with the new rows. `new` None: there are none."""
    for name, tensor in weights:
        if new is None or not TABLE.search(name):
            yield name, tensor
            continue
        known = tensor[: new.first]
        mean = known.double().mean(0, keepdim=True).to(tensor.dtype)
        yield name, torch.cat([known, mean.expand(new.end - new.first, *known.shape[1:]), tensor[new.end :]])


def drop_entries(folder: Path, rows: int) -> list[str]:
    """Takes the entries of which the id is `rows` or more out of tokenizer.json and the settings beside it. Returns their texts."""
    file = folder / "tokenizer.json"
    content = read_json(file)
    dropped = {token["content"] for token in content.get("added_tokens") or [] if token["id"] >= rows}
    content["added_tokens"] = [token for token in content.get("added_tokens") or [] if token["id"] < rows]
    dropped |= _cut_model(content["model"], rows)
    write_json(file, content)
    for name in (CONFIG, SPECIAL_TOKENS):
        if settings := read_json(folder / name):
            write_json(folder / name, _without(settings, dropped, rows))
    if added := read_json(folder / ADDED_TOKENS):
        write_json(folder / ADDED_TOKENS, {text: number for text, number in added.items() if not isinstance(number, int) or number < rows})
    for name in (GENERATION, TOKEN_IDS):
        if settings := read_json(folder / name):
            write_json(folder / name, {key: _fitting(value, rows) if key.endswith("_token_id") else value for key, value in settings.items()})
    return sorted(dropped)


def _cut_model(model: dict[str, Any], rows: int) -> set[str]:
    """Cuts the vocabulary of a model of the tokenizers library, and the merges that need what is cut."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        model["vocab"] = vocabulary[:rows]
        return {piece for piece, _ in vocabulary[rows:]}
    dropped = {text for text, number in vocabulary.items() if number >= rows}
    model["vocab"] = {text: number for text, number in vocabulary.items() if number < rows}
    if dropped and model.get("merges"):
        pairs = ((merge, merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"])
        model["merges"] = [merge for merge, (left, right) in pairs if not {left, right, left + right} & dropped]
    return dropped


def _without(settings: dict[str, Any], dropped: set[str], rows: int) -> dict[str, Any]:
    """tokenizer_config.json or special_tokens_map.json without what names an entry that is gone."""
    kept = {key: value for key, value in settings.items() if not (key.endswith("_token") and token_text(value) in dropped)}
    for key in LISTS:
        if isinstance(kept.get(key), list):
            kept[key] = [value for value in kept[key] if token_text(value) not in dropped]
        elif isinstance(kept.get(key), dict):
            kept[key] = {name: value for name, value in kept[key].items() if token_text(value) not in dropped}
    decoder = kept.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        kept["added_tokens_decoder"] = {number: token for number, token in decoder.items() if not number.isdecimal() or int(number) < rows}
    return kept


def _fitting(value: Any, rows: int) -> Any:
    """A token id, or a list of them, without those that are gone."""
    if isinstance(value, list):
        return [number for number in value if not isinstance(number, int) or number < rows]
    return None if isinstance(value, int) and value >= rows else value
