"""`attention_config`, as GPT-NeoX writes it: a list with a name for each layer, or patterns of names with the number of times they repeat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron.config.messages import show
from megatron.config.section import Problem

KINDS = ("global", "flash")
# What else GPT-NeoX knows, and why it is not here.
REFUSED = {
    "local": "local attention is not part of this version; sliding_window_width limits attention in all layers",
    **dict.fromkeys(("sparse_fixed", "sparse_variable", "bigbird", "bslongformer"), "sparse attention is not part of this version"),
    **dict.fromkeys(("gmlp", "amlp"), "gated MLPs in place of attention are not part of this version"),
    **dict.fromkeys(("mamba", "rwkv"), "only transformer layers are part of this version"),
}


def expand_attention(config: Sequence[Any] | None, num_layers: int) -> list[str]:
    """One name for each layer, from a configuration without problems."""
    if config is None:
        return ["global"] * num_layers
    if all(isinstance(item, str) for item in config):
        return list(config)
    return [name for item in config for name in list(item[0]) * _times(item, num_layers)]


def _times(pattern: Sequence[Any], num_layers: int) -> int:
    names, times = pattern
    return num_layers // len(names) if times == "all" else int(times)


def attention_problems(config: Sequence[Any] | None, num_layers: int) -> Iterator[Problem]:
    """What is wrong with the value, if anything; the first thing only."""
    if config is None:
        return
    if problem := _form_problem(config) or _name_problem(config):
        yield Problem(("attention_config",), problem)
    elif problem := _length_problem(config, num_layers):
        yield Problem(("attention_config", "num_layers"), problem)


def _form_problem(config: Sequence[Any]) -> str | None:
    if not config or all(isinstance(item, str) for item in config):
        return None if config else "must name at least one kind of attention"
    for item in config:
        if not _is_pattern(item):
            return f'{show(item)} must be [[names], repetitions], such as [["global", "flash"], 6] or [["flash"], "all"]'
    if len(config) > 1 and any(times == "all" for _, times in config):
        return '"all" fills every layer, so no other entry may stand beside it'
    return None


def _is_pattern(item: Any) -> bool:
    if not (isinstance(item, list | tuple) and len(item) == 2 and isinstance(item[0], list | tuple) and item[0]):
        return False
    names, times = item
    counted = times == "all" or (isinstance(times, int) and not isinstance(times, bool) and times >= 1)
    return counted and all(isinstance(name, str) for name in names)


def _name_problem(config: Sequence[Any]) -> str | None:
    names = [name for item in config for name in ([item] if isinstance(item, str) else item[0])]
    wrong = next((name for name in names if name not in KINDS), None)
    if wrong is None:
        return None
    return f"{REFUSED.get(wrong, f'{show(wrong)} is not a kind of attention')}; use {' or '.join(KINDS)}"


def _length_problem(config: Sequence[Any], num_layers: int) -> str | None:
    length = sum(1 if isinstance(item, str) else len(item[0]) * _times(item, num_layers) for item in config)
    if length == num_layers:
        return None
    return f"names {length} layers, but num_layers is {num_layers}" if length else f"has more names than num_layers ({num_layers})"
