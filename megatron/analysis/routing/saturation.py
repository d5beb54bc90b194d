"""How early the routers decide (OLMoE, arXiv 2409.02060, section 5.1; FLAME-MoE, arXiv 2505.20225). Formulas: `findings.Saturation`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron.analysis.routing.blocks import Choices, divided, used
from megatron.analysis.routing.findings import Floats, Saturation

CHUNK = 4096


@dataclass(frozen=True)
class Kept:
    """The choices of one model for the tokens that are compared."""

    name: str
    iteration: int | None
    layers: Sequence[int]
    experts_L: Sequence[int]
    token_N: Choices
    expert_NLK: Choices


def saturation(models: Sequence[Kept]) -> Saturation | str | None:
    """The models against the last of them. None: there is one. A sentence: why they cannot be compared."""
    if len(models) < 2:
        return None
    last = models[-1]
    for model in models[:-1]:
        if list(model.layers) != list(last.layers) or list(model.experts_L) != list(last.experts_L):
            return f"Saturation is left out: {model.name} and {last.name} do not have the same layers and experts."
        if not np.array_equal(model.token_N, last.token_N):
            return f"Saturation is left out: {model.name} and {last.name} did not read the same tokens."
    share = np.array([overlap(model.expert_NLK, last.expert_NLK, last.experts_L) for model in models])
    first = np.array([_same_first(model.expert_NLK, last.expert_NLK) for model in models])
    used_L = (last.expert_NLK >= 0).sum((0, 2)) / max(1, len(last.expert_NLK))
    names, iterations = [model.name for model in models], [model.iteration for model in models]
    return Saturation(names, iterations, list(last.layers), len(last.token_N), share, first, used_L / np.array(last.experts_L))


def overlap(expert_NLK: Choices, last_NLK: Choices, experts_L: Sequence[int]) -> Floats:
    """share_L: the mean over the tokens of |experts of both| / |experts of the last|."""
    total_L, count = np.zeros(last_NLK.shape[1]), 0
    for begin in range(0, len(last_NLK), CHUNK):
        one, other = (used(part[begin : begin + CHUNK], max(experts_L)) for part in (expert_NLK, last_NLK))
        total_L += np.nan_to_num(divided((one & other).sum(-1), other.sum(-1))).sum(0)
        count += len(one)
    return divided(total_L, np.array(count))


def _same_first(expert_NLK: Choices, last_NLK: Choices) -> Floats:
    same_L: Floats = (expert_NLK[:, :, 0] == last_NLK[:, :, 0]).mean(0)
    return same_L


def in_order(models: Sequence[Kept]) -> list[Kept]:
    """By iteration where all have one; else as given."""
    known = [model.iteration for model in models if model.iteration is not None]
    return sorted(models, key=lambda model: model.iteration or 0) if len(known) == len(models) else list(models)
