"""Numbers that follow from the configuration, but are also stored in GPT-NeoX's checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class DerivedBuffer(nn.Module):
    """A buffer under GPT-NeoX's name, exact in float32 in a model of any dtype. It is written into state dictionaries but never read from them."""

    def __init__(self, name: str, values: Sequence[float]) -> None:
        super().__init__()
        self.name, self.values = name, tuple(values)
        self.register_buffer(name, torch.tensor(self.values, dtype=torch.float32))

    @property
    def numbers(self) -> Tensor:
        """The buffer."""
        return self.get_buffer(self.name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DerivedBuffer:
        super()._apply(fn, recurse)
        self.register_buffer(self.name, torch.tensor(self.values, dtype=torch.float32, device=self.numbers.device))
        return self

    def _load_from_state_dict(self, *_: Any) -> None:
        """Whether a checkpoint has the numbers, and in what precision, does not matter."""
