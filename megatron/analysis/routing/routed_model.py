"""A model whose routing can be looked at, whatever program wrote it.

Shapes: B texts; S tokens of each; T = B*S; L layers with experts; K experts of a token; U LoREs of a token in one expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from megatron.analysis.routing.blocks import Pieces
from megatron.analysis.routing.tally import Origin
from megatron.monitor.trace_layers import Routed


class RoutedModelError(ValueError):
    """A path holds no model whose routing can be looked at. The message says what is there and what would do."""


class Kind(NamedTuple):
    """What does not depend on the text: entries of `blocks.Shape`."""

    layers: Sequence[int]
    experts_L: Sequence[int]
    top_k: int
    num_lores: int
    lores_per_token: int


class RoutedModel(Protocol):
    """A model in memory."""

    @property
    def origin(self) -> Origin: ...

    @property
    def kind(self) -> Kind: ...

    @property
    def context(self) -> int:
        """The largest number of tokens that it reads at once."""

    @property
    def end(self) -> int | None:
        """The token that ends a document. None: there is none."""

    def encode(self, text: str) -> list[int]: ...

    def pieces(self, tokens: Iterable[int]) -> Pieces:
        """The text of each token."""

    def route(self, token_BS: npt.NDArray[np.int64]) -> Routed:
        """The tokens of all texts, one text after the other. The texts do not see each other."""


def name_of(path: Path, iteration: int | None) -> str:
    """For people: the folder, and the step where one is known."""
    resolved = path.expanduser().resolve()
    if resolved.name.startswith("global_step"):
        resolved = resolved.parent
    return resolved.name if iteration is None else f"{resolved.name}, step {iteration}"
