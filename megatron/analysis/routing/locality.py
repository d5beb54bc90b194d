"""How much consecutive tokens use the same experts, from a trace alone.

ExRep   the share of a token's experts that the token before did not use (CoSMoEs: Huber et al., 2025, equations 4 and 5)
Uniform the mean distance of the experts' shares from the same share for all, as a part of it (CoSMoEs, table 3)
SCH     segment cache best hit rate: over all windows of m tokens, the share of choices that falls on the c experts most used in the window
SRP     segment routing best performance: the best F1 of a router that gives a window one set of experts, of any size, for all of its tokens
        (both: "Not All Models Suit Expert Offloading", arXiv 2505.16056, as its program moe-lrc computes them). The best sets are those of all
        (window, expert) pairs whose count is above one limit, because F1 = 2 TP / (m pairs + choices) grows with the most used pairs first.

Shapes: T tokens; K experts per token; E experts; W windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron.monitor.routing_trace import Numbers, Trace, TraceError


class Locality(NamedTuple):
    """Means over the layers."""

    exrep: float
    not_uniform: float
    sch: dict[int, dict[int, float]]
    """Window length -> slots -> hit rate."""
    srp: dict[int, float]
    """Window length -> F1."""
    size_ratio: dict[int, float]
    """Window length -> experts of the best sets per expert of a token."""


def locality(trace: Trace, *, windows: Sequence[int] = (4, 16, 64), slots: Sequence[int] | None = None) -> Locality:
    """Of all layers; windows that are longer than the trace are left out. `slots` None: 1, 2 and 4 times the experts of a token.

    Raises TraceError for a window without a token.
    """
    if wrong := [length for length in windows if length < 1]:
        raise TraceError(f"--windows: {wrong[0]} was given, and a window has at least 1 token.")
    used = [used_TE(trace, place) for place in range(len(trace.layers))]
    per_token = float(np.mean([layer.sum(1).mean() for layer in used]))
    sizes = slots if slots is not None else [min(trace.num_experts, round(per_token * times)) for times in (1, 2, 4)]
    lengths = [length for length in windows if length <= trace.tokens]
    counts = {length: [window_counts(layer, length) for layer in used] for length in lengths}
    best = {length: [best_sets(layer, length) for layer in counts[length]] for length in lengths}
    return Locality(
        float(np.mean([expert_replacement(layer) for layer in used])),
        float(np.mean([distance_from_uniform(layer) for layer in used])),
        {length: {size: float(np.mean([cache_hits(layer, size) for layer in counts[length]])) for size in sizes} for length in lengths},
        {length: float(np.mean([f1 for f1, _ in best[length]])) for length in lengths},
        {length: float(np.mean([ratio for _, ratio in best[length]])) for length in lengths},
    )


def used_TE(trace: Trace, place: int) -> npt.NDArray[np.bool_]:
    """Whether a token used an expert, in the layer at `place`."""
    expert_TK = trace.expert_TLK[:, place]
    used = np.zeros((len(expert_TK), trace.num_experts + 1), np.bool_)
    np.put_along_axis(used, np.where(expert_TK < 0, trace.num_experts, expert_TK), values=True, axis=1)
    return used[:, :-1]


def expert_replacement(used: npt.NDArray[np.bool_]) -> float:
    """ExRep, 0 to 1; 0 for fewer than two tokens."""
    changed = used[1:] & ~used[:-1]
    return float(changed.sum() / max(1, used[1:].sum()))


def distance_from_uniform(used: npt.NDArray[np.bool_]) -> float:
    """Mean over the experts of |share - 1/E| times E."""
    share = used.sum(0) / max(1, used.sum())
    return float(np.abs(share - 1 / len(share)).mean() * len(share))


def window_counts(used: npt.NDArray[np.bool_], length: int) -> Numbers:
    """count_WE: how often each expert is used in each window of `length` consecutive tokens."""
    before = np.concatenate([np.zeros((1, used.shape[1]), np.int64), used.cumsum(0)])
    counts: Numbers = before[length:] - before[:-length]
    return counts


def cache_hits(count_WE: Numbers, slots: int) -> float:
    """SCH of one layer."""
    ordered = np.sort(count_WE, 1)[:, ::-1]
    return float(ordered[:, :slots].sum() / max(1, count_WE.sum()))


def best_sets(count_WE: Numbers, length: int) -> tuple[float, float]:
    """(SRP of one layer, the size of its sets over the number of experts that a token uses)."""
    histogram = np.bincount(count_WE.ravel(), minlength=length + 1)[::-1][:-1]  # pairs that are used `length` times, ..., once
    pairs, hits = histogram.cumsum(), (histogram * np.arange(length, 0, -1)).cumsum()
    total = int(count_WE.sum())
    f1 = 2 * hits / np.maximum(1, length * pairs + total)
    best = int(f1.argmax())
    return float(f1[best]), float(pairs[best] * length / max(1, total))
