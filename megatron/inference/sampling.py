"""The choice of the next token from the model's logits: pure functions.

Shapes: V vocabulary
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sampling(NamedTuple):
    """How to choose; the steps apply in this order."""

    temperature: float = 0.0
    """Logits are divided by this; 0 takes the most likely token, whatever `top_k` and `top_p` say."""
    top_k: int = 0
    """Only this many most likely tokens; 0: all."""
    top_p: float = 0.0
    """Only the smallest set of most likely tokens that has at least this probability; 0 (as 1): all."""

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0


def choose_token(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token. Greedy choice draws nothing from `generator` (a CPU generator on every device, so that seeds mean the same everywhere)."""
    if sampling.is_greedy:
        return greedy(logits_V)
    return draw(token_probabilities(logits_V, sampling), generator)


def greedy(logits_V: Tensor) -> int:
    """The most likely token; the first one of several."""
    return int(logits_V.argmax())


def token_probabilities(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """probability_V, float64: the distribution from which a token is drawn if the choice is not greedy."""
    logits_V = keep_top_k(scale_by_temperature(logits_V, sampling.temperature), sampling.top_k)
    return keep_top_p(logits_V, sampling.top_p).softmax(0)


def scale_by_temperature(logits_V: Tensor, temperature: float) -> Tensor:
    """(logits - maximum) / temperature in float64: no temperature above 0 is too small for it."""
    wide_V = logits_V.double()
    return (wide_V - wide_V.max()) / temperature


def keep_top_k(logits_V: Tensor, k: int) -> Tensor:
    """All but the k largest become -inf. Of equal ones the first are kept, so exactly k remain. Unchanged for k = 0 or k >= V."""
    if k == 0 or k >= len(logits_V):
        return logits_V
    order_V = logits_V.argsort(descending=True, stable=True)
    return logits_V.index_fill(0, order_V[k:], -torch.inf)


def keep_top_p(logits_V: Tensor, p: float) -> Tensor:
    """Keeps the fewest largest tokens whose probabilities sum to p or more, at least one; the others become -inf. Unchanged for p = 0 and p = 1.

    Nucleus sampling (Holtzman et al. 2020): a token is kept when those before it have less than p.
    """
    if p == 0 or p >= 1:
        return logits_V
    order_V = logits_V.argsort(descending=True, stable=True)
    sorted_V = logits_V.softmax(0)[order_V]
    before_V = sorted_V.cumsum(0) - sorted_V
    kept_V = before_V < p
    kept_V[0] = True
    return logits_V.index_fill(0, order_V[~kept_V], -torch.inf)


def draw(probability_V: Tensor, generator: torch.Generator) -> int:
    """Draws one token by inverting the cumulative distribution at one uniform number. A token of probability 0 is never drawn."""
    cumulative_V = probability_V.double().cumsum(0)
    uniform = torch.rand(1, dtype=torch.float64, generator=generator).to(probability_V.device)
    return int(torch.searchsorted(cumulative_V, uniform * cumulative_V[-1], right=True))
