"""What a table for an architecture has to supply."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from megatron.config.neox import NeoXConfig
from megatron.convert.mapping import Entry


@dataclass(frozen=True)
class Source:
    """A model of ours: its configuration, and the rows of its vocabulary (padding included)."""

    config: NeoXConfig
    vocabulary: int


class Code(NamedTuple):
    """Python files that an export carries with it, and which classes in them transformers is to use (config.json's `auto_map`)."""

    files: tuple[Path, ...]
    auto_map: dict[str, str]


class Architecture(Protocol):
    """One model class of Hugging Face, described as a table that works in both directions."""

    name: str
    """What `--architecture` calls it."""
    model_type: str
    """`model_type` in its config.json."""
    class_name: str
    """The class for language modelling, as config.json's `architectures` names it."""

    code: Code | None
    """None: the class is one of transformers' own."""

    def obstacles(self, source: Source) -> Iterator[str]:
        """What the class cannot represent, a sentence for each key; nothing where it fits."""
        ...

    def settings(self, source: Source) -> dict[str, Any]:
        """The entries of config.json that describe the model, without tokens and number format."""
        ...

    def keys(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The model and moe keys of the configuration of ours that computes the same as a config.json. Raises ConversionError."""
        ...

    def table(self, source: Source) -> Iterator[Entry]:
        """An entry for each of our weights, layer by layer."""
        ...
