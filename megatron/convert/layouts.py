"""The layouts in which one and the same model of experts is published: experts one by one, or fused, under the names of transformers 4 or 5.

Shapes: E experts; F expert width; D model width.

    one by one   mlp.experts.{e}.gate_proj / up_proj [F, D], down_proj [D, F] (`save_pretrained`);
                 Mixtral's are block_sparse_moe.experts.{e}.w1 / w3 / w2
    fused        mlp.experts.gate_up_proj [E, 2F, D], gates first, and mlp.experts.down_proj [E, D, F] (`save_pretrained(save_original_format=False)`)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from megatron.convert.architecture import Source
from megatron.convert.errors import ConversionError
from megatron.convert.mapping import Entry
from megatron.convert.tensor_files import StoredTensors

EXPERT = re.compile(r"(?P<layer>.+)\.(?P<block>mlp|block_sparse_moe)\.experts\.(?P<expert>\d+)\.(?P<matrix>\w+)\.weight")
BLOCKS = ("mlp", "block_sparse_moe")
NAMES = {"gate": ("gate_proj", "w1"), "up": ("up_proj", "w3"), "down": ("down_proj", "w2")}
ROLES = {name: role for role, names in NAMES.items() for name in names}
FUSED = {"gate": "gate_up_proj", "up": "gate_up_proj", "down": "down_proj"}


class Place(NamedTuple):
    """Where a weight lies. `role` and `expert`: which part of a fused tensor; None: it is the whole one."""

    stored: str
    role: str | None = None
    expert: int = 0


class Arranged:
    """The weights of a folder under the names that a table asks for, in whichever layout they lie.

    Raises ConversionError for experts that are there in both forms, and in `read` for fused ones of another shape.
    """

    def __init__(self, stored: StoredTensors, table: Iterable[Entry], source: Source) -> None:
        self._stored, self._there = stored, set(stored.names)
        moe, model = source.config.moe, source.config.model
        width = moe.expert_width(model) if moe.has_experts else 0
        self._shapes = {"gate_up_proj": (2 * width, model.hidden_size), "down_proj": (model.hidden_size, width)}
        wanted = [name for entry in table for name in entry.theirs]
        self._places = {name: place for name in wanted if (place := self._place(name)) is not None}
        self._experts = Counter(place.stored for place in self._places.values() if place.role in ("gate", "down"))
        self._check_one_form()
        self._fused: tuple[str, Tensor] | None = None

    @property
    def directory(self) -> Path:
        """The folder."""
        return self._stored.directory

    @property
    def names(self) -> list[str]:
        """All weights: those that the table asks for under its names, the others as they are stored."""
        taken = {place.stored for place in self._places.values()}
        return [*self._places, *(name for name in self._stored.names if name not in taken)]

    def place_of(self, name: str) -> Place:
        """Where a weight lies that the table asks for."""
        return self._places.get(name, Place(name))

    def read(self, name: str) -> Tensor:
        """A weight. Raises ConversionError."""
        place = self.place_of(name)
        if place.role is None:
            return self._stored.read(place.stored)
        if self._fused is None or self._fused[0] != place.stored:
            self._fused = None
            self._fused = place.stored, self._checked(place.stored)
        matrix = self._fused[1][place.expert]
        half = len(matrix) // 2
        return {"gate": matrix[:half], "up": matrix[half:], "down": matrix}[place.role]

    def _place(self, name: str) -> Place | None:
        """None: it is not there in any layout."""
        return next((place for place in _places(name) if place.stored in self._there), None)

    def _checked(self, name: str) -> Tensor:
        """The fused tensor of this name."""
        tensor, wanted = self._stored.read(name), (self._experts[name], *self._shapes[name.rsplit(".", 1)[1]])
        if tuple(tensor.shape) != wanted:
            raise ConversionError(
                f"{self.directory}: {name} has the shape {list(tensor.shape)}, but config.json needs {list(wanted)} (experts, rows, "
                "columns of each expert)."
            )
        return tensor

    def _check_one_form(self) -> None:
        for name in self._there:
            match = EXPERT.fullmatch(name)
            role = None if match is None else ROLES.get(match["matrix"])
            if match is None or role is None:
                continue
            fused = next((other for block in BLOCKS if (other := f"{match['layer']}.{block}.experts.{FUSED[role]}") in self._there), None)
            if fused is not None:
                raise ConversionError(
                    f"{self.directory} holds the experts of one layer twice: as single weights ({name}) and as one fused weight "
                    f"({fused}). Remove one of the two."
                )


def _places(name: str) -> Iterator[Place]:
    """Where a weight may lie, first under its own name."""
    yield Place(name)
    if match := EXPERT.fullmatch(name):
        role = ROLES.get(match["matrix"])
        if role is None:
            return
        for block in BLOCKS:
            begin = f"{match['layer']}.{block}.experts"
            yield from (Place(f"{begin}.{match['expert']}.{matrix}.weight") for matrix in NAMES[role])
            yield Place(f"{begin}.{FUSED[role]}", role, int(match["expert"]))
    elif ".mlp." in name or ".block_sparse_moe." in name:
        old, new = BLOCKS if ".mlp." in name else BLOCKS[::-1]
        yield Place(name.replace(f".{old}.", f".{new}."))
