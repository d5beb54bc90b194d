"""The types of `route`: what is asked for, what comes out, and what an implementation supplies. Shapes as in the package's docstring."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from megatron.kernels.permute import Order


class Selection(NamedTuple):
    """How many candidates a row chooses, and what they weigh."""

    top_k: int
    normalize: bool = False
    """Whether the weights of a row are divided by their sum, before `scale`."""
    scale: float = 1.0


class Routed(NamedTuple):
    """The decision of a router."""

    weight_NK: Tensor
    choice_NK: Tensor
    """int64, 0 to C - 1."""
    probability_NC: Tensor
    logsumexp_N: Tensor
    total_PC: Tensor
    """Sum of the probabilities over the rows of each parent."""
    entropy: Tensor
    """Mean entropy of the rows' probabilities in nats; 0 without rows. Carries no gradient."""
    order: Order
    """The choices sorted by key, and the rows of each group."""


class Route(Protocol):
    """What an implementation supplies. Logits are float32 or float64; `rows_P` sums to N, which an implementation for CPUs checks."""

    def forward(self, logit_NC: Tensor, rows_P: Tensor | None, selection: Selection, *, allow_nan: bool) -> Routed:
        """The decision; `rows_P` None is one parent of all rows. Without `allow_nan`, raises ValueError for rows that have no probabilities."""
        ...

    def backward(self, grads: Gradients, saved: Saved, selection: Selection) -> Tensor:
        """grad_logit_NC."""
        ...

    def statistics(self, choice_TK: Tensor, num_experts: int, length: int) -> Tensor:
        """float64 [2], as `choice_statistics`."""
        ...


class Gradients(NamedTuple):
    """Gradients of what carries any. None: nothing depends on it."""

    weight_NK: Tensor | None
    probability_NC: Tensor | None
    logsumexp_N: Tensor | None
    total_PC: Tensor | None


class Saved(NamedTuple):
    """What the backward needs of the forward."""

    probability_NC: Tensor
    choice_NK: Tensor
    rows_P: Tensor | None
    """None: one parent."""
