"""From runs to verdicts: the number of each claim for each text and seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron.analysis.reproduce.protocol import Claim, Protocol
from megatron.analysis.reproduce.results import runs_of
from megatron.analysis.reproduce.statistics import NOT_RUN, Interval, interval_of, verdict

Run = Mapping[str, Any]
Curve = Sequence[Sequence[float]]
"""[step, loss], the first step first."""


@dataclass(frozen=True)
class Outcome:
    """What the runs say about a claim."""

    name: str
    values: dict[tuple[str, int], float]
    """(text, seed) -> the claim's number. Only where every arm was run."""
    wanted: int
    """How many there are in the tier."""
    whole: Interval
    by_domain: dict[str, Interval]
    verdict: str
    by_domain_verdict: dict[str, str]

    @property
    def texts_differ(self) -> bool:
        """Whether one text alone would give the opposite verdict of another."""
        return {"shown", "reversed"} <= set(self.by_domain_verdict.values())


def outcome(name: str, protocol: Protocol, results: Mapping[str, Any]) -> Outcome:
    """The claim of this name, from the content of results.json."""
    claim, measure = protocol.claims[name], protocol.measure
    runs, tier = runs_of(results), protocol.tiers[results["tier"]]
    domains = [domain for domain in protocol.domains if all(domain in tier.groups.get(protocol.arms[arm].group, ()) for arm in claim.arms)]
    values: dict[tuple[str, int], float] = {}
    for domain in domains:
        for seed in tier.seeds:
            found = {arm: runs.get((arm, domain, seed)) for arm in claim.arms}
            if all(run is not None for run in found.values()):
                values[domain, seed] = number_of(claim, found)  # type: ignore[arg-type]
    limits = {
        "shown_above": measure.smallest_loss if claim.shown_above is None else claim.shown_above,
        "reversed_below": -measure.smallest_loss if claim.reversed_below is None else claim.reversed_below,
    }
    whole = interval_of(list(values.values()), measure.confidence)
    parts = {domain: interval_of([value for (at, _), value in values.items() if at == domain], measure.confidence) for domain in domains}
    verdicts = {domain: verdict(part, **limits) for domain, part in parts.items()}
    known = {domain: part for domain, part in verdicts.items() if part != NOT_RUN}
    return Outcome(name, values, len(domains) * len(tier.seeds), whole, parts, verdict(whole, **limits), known)


def number_of(claim: Claim, runs: Mapping[str, Run]) -> float:
    """The number of one text and seed."""
    if claim.faster is not None and claim.slower is not None:
        return speedup(runs[claim.faster]["curve"], runs[claim.slower]["curve"])
    return sum(factor * quantity(claim.quantity, runs[arm]) for arm, factor in claim.sum.items())


def quantity(name: str, run: Run) -> float:
    """A number of one run, as the protocol defines it."""
    if name == "test_loss":
        return float(run["test_loss"])
    if name == "second_half":
        return second_half(run["curve"])
    routing = run["routing"]
    if name in ("replacement", "log2_replacement"):
        share = float(np.mean(routing["replacement"]))
        return share if name == "replacement" else math.log2(max(share, 1e-3))
    if name in ("delta_uniform", "lore_entropy"):
        return float(np.mean(routing[name]))
    first, *later = (seen - random for seen, random in zip(routing["first_repeats"], routing["first_repeats_random"], strict=True))
    excess = float(np.mean(later))
    return {"repeats": excess, "repeats_first_layer": first, "repeats_by_depth": excess - first}[name]


def second_half(curve: Curve) -> float:
    """The loss at the end minus that at the last point that is not after the middle."""
    middle = max(place for place, (step, _) in enumerate(curve) if step <= curve[-1][0] / 2)
    return float(curve[-1][1] - curve[middle][1])


def speedup(faster: Curve, slower: Curve) -> float:
    """log2 of: steps of the slower one over the steps after which the faster one is as low as the slower one's end.

    If the faster one never is, the two change places and the number is negative. Between two points the curve is straight; the first point counts
    from its own step on.
    """
    if faster[-1][1] > slower[-1][1]:
        return -speedup(slower, faster)
    goal, before = slower[-1][1], faster[0]
    for point in faster:
        if point[1] <= goal:
            fall = before[1] - point[1]
            step = point[0] if fall <= 0 else before[0] + (point[0] - before[0]) * (before[1] - goal) / fall
            return math.log2(slower[-1][0] / step)
        before = point
    raise AssertionError("the last point is at the goal")
