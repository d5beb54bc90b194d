"""The choice of the next token from the model's logits: pure functions.

Shapes: V vocabulary; T tokens so far
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

SORTED = 1024
"""Tokens that top_p looks at first. To sort a whole vocabulary takes longer than a step of a small model."""


class Sampling(NamedTuple):
    """How to choose; the steps apply in this order: penalty, temperature, top_k, top_p, min_p."""

    temperature: float = 0.0
    """Logits are divided by this; 0 takes the most likely token, whatever `top_k`, `top_p` and `min_p` say."""
    top_k: int = 0
    """Only this many most likely tokens; 0: all."""
    top_p: float = 0.0
    """Only the smallest set of most likely tokens that has at least this probability; 0 (as 1): all."""
    min_p: float = 0.0
    """Only tokens with at least this share of the most likely token's probability; 0: all."""
    repetition_penalty: float = 1.0
    """Tokens of the prompt and the answer get less likely by this, also at temperature 0; 1: they do not."""

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0


def choose_token(logits_V: Tensor, sampling: Sampling, generator: torch.Generator, seen_T: Tensor) -> int:
    """The next token after the tokens `seen_T`. Greedy choice draws nothing from `generator` (a CPU generator on every device, so that seeds mean the
    same everywhere)."""
    logits_V = penalize_repetition(logits_V, seen_T, sampling.repetition_penalty)
    if sampling.is_greedy:
        return greedy(logits_V)
    if not 0 < sampling.top_k < len(logits_V):
        return draw(token_probabilities(logits_V, sampling), generator)
    candidate_K = is_in_top_k(logits_V, sampling.top_k).nonzero()[:, 0]  # the others have no part in what follows
    return int(candidate_K[draw(token_probabilities(logits_V[candidate_K], sampling), generator)])


def greedy(logits_V: Tensor) -> int:
    """The most likely token; the first one of several."""
    return int(logits_V.argmax())


def token_probabilities(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """probability_V, float64: the distribution from which a token is drawn if the choice is not greedy."""
    logits_V = keep_top_k(scale_by_temperature(logits_V, sampling.temperature), sampling.top_k)
    return keep_min_p(keep_top_p(logits_V, sampling.top_p), sampling.min_p).softmax(0)


def penalize_repetition(logits_V: Tensor, seen_T: Tensor, penalty: float) -> Tensor:
    """Logits of the tokens in `seen_T` are divided by `penalty`, negative ones multiplied by it (CTRL, Keskar et al. 2019, section 4.1; as
    transformers does it). However often a token occurs, it is penalized once. Unchanged for a penalty of 1."""
    if penalty == 1:
        return logits_V
    seen_logits_T = logits_V[seen_T]
    return logits_V.scatter(0, seen_T, torch.where(seen_logits_T < 0, seen_logits_T * penalty, seen_logits_T / penalty))


def scale_by_temperature(logits_V: Tensor, temperature: float) -> Tensor:
    """(logits - maximum) / temperature in float64: no temperature above 0 is too small for it."""
    wide_V = logits_V.double()
    return (wide_V - wide_V.max()) / temperature


def keep_top_k(logits_V: Tensor, k: int) -> Tensor:
    """All but the k largest become -inf. Of equal ones the first are kept, so exactly k remain. Unchanged for k = 0 or k >= V."""
    if k == 0 or k >= len(logits_V):
        return logits_V
    return logits_V.masked_fill(~is_in_top_k(logits_V, k), -torch.inf)


def is_in_top_k(logits_V: Tensor, k: int) -> Tensor:
    """bool: whether a token is one of the k largest; of equal ones the first are."""
    smallest = logits_V.topk(k).values[-1]
    larger_V, equal_V = logits_V > smallest, logits_V == smallest
    return larger_V | (equal_V & (equal_V.cumsum(0) <= k - larger_V.sum()))


def keep_top_p(logits_V: Tensor, p: float) -> Tensor:
    """Keeps the fewest largest tokens whose probabilities sum to p or more, at least one; the others become -inf. Unchanged for p = 0 and p = 1.

    Nucleus sampling (Holtzman et al. 2020): a token is kept when those before it have less than p.
    """
    if p == 0 or p >= 1:
        return logits_V
    probability_V = logits_V.softmax(0)
    largest = probability_V.topk(min(SORTED, len(logits_V))).values
    if len(largest) < len(logits_V) and largest.sum() < p:
        largest = probability_V.sort(descending=True).values
    before = largest.cumsum(0) - largest
    return keep_top_k(logits_V, max(1, int((before < p).sum())))


def keep_min_p(logits_V: Tensor, p: float) -> Tensor:
    """Tokens whose probability is less than p times the largest one become -inf (Nguyen et al. 2024). Unchanged for p = 0."""
    if p == 0:
        return logits_V
    return logits_V.masked_fill(logits_V < logits_V.max() + math.log(p), -torch.inf)


def draw(probability_V: Tensor, generator: torch.Generator) -> int:
    """Draws one token by inverting the cumulative distribution at one uniform number. A token of probability 0 is never drawn."""
    cumulative_V = probability_V.double().cumsum(0)
    uniform = torch.rand(1, dtype=torch.float64, generator=generator).to(probability_V.device)
    return int(torch.searchsorted(cumulative_V, uniform * cumulative_V[-1], right=True))
