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

from megatron.analysis.routing import findings
from megatron.analysis.routing.blocks import Shape, View, divided
from megatron.analysis.routing.findings import Floats
from megatron.monitor.routing_trace import Numbers, Trace, TraceError


class LocalityMeans(NamedTuple):
    """Means over the layers of a trace that is in memory."""

    exrep: float
    not_uniform: float
    sch: dict[int, dict[int, float]]
    """Window length -> slots -> hit rate."""
    srp: dict[int, float]
    """Window length -> F1."""
    size_ratio: dict[int, float]
    """Window length -> experts of the best sets per expert of a token."""


def locality(trace: Trace, *, windows: Sequence[int] = (4, 16, 64), slots: Sequence[int] | None = None) -> LocalityMeans:
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
    return LocalityMeans(
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
    return best_of_histogram(np.bincount(count_WE.ravel(), minlength=length + 1))


def best_of_histogram(pairs_N: Numbers) -> tuple[float, float]:
    """`best_sets` from the number of (window, expert) pairs that are used 0, 1, ..., N = `length` times."""
    length = len(pairs_N) - 1
    histogram = pairs_N[::-1][:-1]  # pairs that are used `length` times, ..., once
    pairs, hits = histogram.cumsum(), (histogram * np.arange(length, 0, -1)).cumsum()
    total = int(hits[-1])
    f1 = 2 * hits / np.maximum(1, length * pairs + total)
    best = int(f1.argmax())
    return float(f1[best]), float(pairs[best] * length / max(1, total))


class LocalityCount:
    """SRP and SCH of text that comes in blocks. Windows lie in one text."""

    def __init__(self, shape: Shape, windows: Sequence[int], slots: Sequence[int]) -> None:
        self._shape, self._windows, self._slots = shape, sorted(windows), sorted(slots)
        size = len(shape.domains), len(shape.layers), len(self._windows)
        self._histogram = [np.zeros((*size[:2], length + 1), np.int64) for length in self._windows]
        self._hits_DLWC, self._total_DLW = np.zeros((*size, len(self._slots)), np.int64), np.zeros(size, np.int64)

    def add(self, view: View) -> None:
        """Counts the windows that end in a new token."""
        for place, length in enumerate(self._windows):
            first = max(0, view.old - length + 1)
            if len(view.expert_TLK) - first < length:
                continue
            for layer, count in enumerate(self._shape.experts_L):
                count_WE = window_counts(view.used_TLE[first:, layer, :count], length).astype(np.int16)
                self._histogram[place][view.domain, layer] += np.bincount(count_WE.ravel(), minlength=length + 1)
                self._total_DLW[view.domain, layer, place] += int(count_WE.sum(dtype=np.int64))
                self._hits_DLWC[view.domain, layer, place] += most_used(count_WE, self._slots)

    def found(self) -> findings.Locality:
        """Of all tokens so far, without the windows that no text is long enough for."""
        over = self._shape.over_groups
        hits_GLWC, total_GLW = over(self._hits_DLWC), over(self._total_DLW)
        kept = [place for place in range(len(self._windows)) if total_GLW[:, :, place].any()]
        best = np.array([[[_best(pairs_N) for pairs_N in layers] for layers in over(self._histogram[place])] for place in kept])
        best_GLW2: Floats = best.transpose(1, 2, 0, 3) if kept else np.zeros((*total_GLW.shape[:2], 0, 2))
        sch_GLWC = divided(hits_GLWC, total_GLW[..., None])[:, :, kept]
        return findings.Locality([self._windows[place] for place in kept], self._slots, sch_GLWC, best_GLW2[..., 0], best_GLW2[..., 1])


def most_used(count_WE: npt.NDArray[np.int16], slots: Sequence[int]) -> Numbers:
    """hits_C: over all windows, the choices that fall on the window's most used experts, as many as there are slots."""
    ordered_E = np.sort(count_WE, 1).sum(0, dtype=np.int64)[::-1]
    return np.array([ordered_E[:size].sum() for size in slots], np.int64)


def _best(pairs_N: Numbers) -> tuple[float, float]:
    return best_of_histogram(pairs_N) if pairs_N[1:].any() else (float("nan"), float("nan"))
