"""Candidates measured in turns, so that what disturbs the machine disturbs all of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moe_bench.machine import Call, seconds

MIN_SECONDS = 2e-3
"""A sample consists of as many calls as take this long."""
MAX_REPEATS = 100
PROBES = (64, 8, 1)
"""A candidate is first tried on a 64th of the tokens, then on an eighth: a slow one is found before it takes minutes."""
LOADING_SECONDS = 1.5
"""A first call can take this long only because it loads something."""
REFUSALS = (RuntimeError, ValueError, NotImplementedError, ImportError, AttributeError)
"""What a library raises for a dtype, a shape or a device that it does not take."""


@dataclass(frozen=True)
class Measured:
    """Of one candidate."""

    samples: tuple[float, ...]
    """Seconds of a call, one for each round; a single estimate where `estimated`; none where it cannot run."""
    note: str = ""
    estimated: bool = False

    @property
    def median(self) -> float | None:
        """None: it did not run."""
        return statistics.median(self.samples) if self.samples else None

    @property
    def milliseconds(self) -> float | None:
        """The median; None: it did not run."""
        return None if self.median is None else 1000 * self.median


def ratio(slower: Measured, faster: Measured) -> float | None:
    """How many times the first takes the time of the second: the median over the rounds. None where one of them did not run."""
    if not slower.samples or not faster.samples:
        return None
    if slower.estimated or faster.estimated:
        return statistics.median(slower.samples) / statistics.median(faster.samples)
    return statistics.median(a / b for a, b in zip(slower.samples, faster.samples, strict=True))


def measure(
    candidates: Mapping[str, Callable[[int], Call]],
    tokens: int,
    *,
    rounds: int,
    budget: float,
    device: str,
    each_round: Call = lambda: None,
) -> dict[str, Measured]:
    """Name -> what was measured. A candidate makes its call for a number of tokens; `budget` is the longest that one call may take, in seconds."""
    results: dict[str, Measured] = {}
    calls: dict[str, tuple[Call, int]] = {}
    for name, build in candidates.items():
        tried = try_out(build, tokens, budget, device)
        if isinstance(tried, Measured):
            results[name] = tried
        else:
            calls[name] = (tried[0], max(1, min(MAX_REPEATS, math.ceil(MIN_SECONDS / tried[1]))))
    results |= in_turns(calls, rounds=rounds, device=device, each_round=each_round)
    return {name: results[name] for name in candidates}


def in_turns(calls: Mapping[str, tuple[Call, int]], *, rounds: int, device: str, each_round: Call = lambda: None) -> dict[str, Measured]:
    """Name -> the seconds of its call in each round; a sample is the mean of as many calls as stand beside it."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds if calls else 0):
        each_round()
        for name in turned(list(calls), turn):
            samples[name].append(seconds(*calls[name], device))
    return {name: Measured(tuple(taken)) for name, taken in samples.items()}


def turned(items: Sequence[str], turn: int) -> Sequence[str]:
    """Each round starts with another candidate."""
    start = turn % len(items)
    return [*items[start:], *items[:start]]


def try_out(build: Callable[[int], Call], tokens: int, budget: float, device: str) -> tuple[Call, float] | Measured:
    """(the call for all tokens, seconds of a warm one); or why it is not measured, with an estimate from fewer tokens where it is too slow.

    A GPU gets all tokens at once: nothing is emulated there, and a first call compiles.
    """
    steps = [tokens] if device == "cuda" else [max(1, tokens // share) for share in PROBES]
    points: list[tuple[int, float]] = []
    for count, following in zip(steps, [*steps[1:], 0], strict=True):
        try:
            call = build(count)
            taken = warm_seconds(call, budget, device)
        except REFUSALS as reason:
            return Measured((), note=f"cannot: {first_sentence(reason)}")
        points.append((count, taken))
        if following and estimate(points, following) > (budget if following == tokens else max(budget, LOADING_SECONDS)):
            return Measured((estimate(points, tokens),), f"estimated: {count} tokens took {taken:.2g} s", estimated=True)
    return call, taken


def estimate(points: Sequence[tuple[int, float]], tokens: int) -> float:
    """Seconds for so many tokens, on the line through the last two (tokens, seconds); in proportion where there is one only, or where they fall."""
    (last, taken), slope = points[-1], 0.0
    if len(points) > 1 and points[-2][0] < last:
        slope = (taken - points[-2][1]) / (last - points[-2][0])
    return taken + (slope if slope > 0 else taken / last) * (tokens - last)


def warm_seconds(call: Call, budget: float, device: str) -> float:
    """Of a second call, because a first one also loads and compiles; or of the first where that took much longer than the budget."""
    first = clock_seconds(call, device)
    return clock_seconds(call, device) if first < 3 * max(budget, LOADING_SECONDS) or device == "cuda" else first


def clock_seconds(call: Call, device: str) -> float:
    """By the clock, until the device has finished."""
    started = time.perf_counter()
    seconds(call, 1, device)
    return time.perf_counter() - started


def first_sentence(reason: Exception) -> str:
    """Short enough for a cell of a table."""
    line = (str(reason).strip() or type(reason).__name__).splitlines()[0].split(". ")[0].replace("|", "/")
    return line if len(line) <= 100 else f"{line[:97]}..."
