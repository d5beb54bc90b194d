"""All runs of a tier in their order: the learning rates of a group of arms first, then its runs, seed by seed, so that what is done compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from megatron.analysis.reproduce.pool import Pool
from megatron.analysis.reproduce.protocol import Protocol, Search, Tier, Tuning
from megatron.analysis.reproduce.runs import MAIN, TUNING, Order, Place, Run, make_run, record_of

Losses = Mapping[float, float]
"""Learning rate -> validation loss."""


@dataclass
class Workflow:
    """The runs of one tier."""

    protocol: Protocol
    place: Place
    tier: Tier
    known_rates: Mapping[str, float]
    """Arm -> its learning rate, for a tier that does not tune."""

    def arms_of(self, group: str) -> list[str]:
        return [name for name, arm in self.protocol.arms.items() if arm.group == group]

    def tuning_run(self, arm: str, rate: float) -> Run:
        tuning = self.protocol.tuning
        return make_run(self.protocol, self.place, Order(TUNING, arm, tuning.domain, tuning.seed, rate, self.search(arm).steps))

    def search(self, arm: str) -> Search:
        """How the rate of this arm is found, in a tier that tunes."""
        return self.tier.tuning[self.protocol.arms[arm].group]

    def tuned(self, arm: str) -> Losses:
        """The rates that have been tried so far, in their order. None in a tier that does not tune."""
        found: dict[float, float] = {}
        if not self.tier.tuning:
            return found
        for rate in ladder(self.search(arm).rates, self.protocol.tuning):
            record = record_of(self.tuning_run(arm, rate), self.place)
            if record is not None:
                found[rate] = record["validation_loss"]
        return found

    def open_tuning(self, group: str) -> list[Run]:
        """The tuning runs that are needed next. Empty: the best rate of every arm is known."""
        wanted = [self.tuning_run(arm, rate) for arm in self.arms_of(group) for rate in self._next_rates(arm)]
        return [run for run in wanted if record_of(run, self.place) is None]

    def _next_rates(self, arm: str) -> Sequence[float]:
        tried, rates = self.tuned(arm), self.search(arm).rates
        missing = [rate for rate in rates if rate not in tried]
        return missing or beyond(tried, ladder(rates, self.protocol.tuning))

    def rate(self, arm: str) -> float | None:
        """The arm's learning rate. None: it is not known yet."""
        if not self.tier.tuning:
            return self.known_rates.get(arm)
        tried = self.tuned(arm)
        return best(tried) if tried and not self._next_rates(arm) else None

    def main_runs(self, group: str) -> list[Run]:
        """The runs of arms whose rate is known: one seed after the other, so that an interruption leaves whole comparisons."""
        rates = {arm: self.rate(arm) for arm in self.arms_of(group)}
        return [
            make_run(self.protocol, self.place, Order(MAIN, arm, domain, seed, rate, self.tier.steps))
            for seed in self.tier.seeds
            for domain in self.tier.groups[group]
            for arm, rate in rates.items()
            if rate is not None
        ]

    def expected(self) -> dict[tuple[str, int], int]:
        """(arm, steps) -> how many runs there are, if no rate beyond the first ones is tried."""
        found: dict[tuple[str, int], int] = {}
        for group, domains in self.tier.groups.items():
            for arm in self.arms_of(group):
                found[arm, self.tier.steps] = len(domains) * len(self.tier.seeds)
                if self.tier.tuning:
                    steps = self.search(arm).steps
                    found[arm, steps] = found.get((arm, steps), 0) + len(self.search(arm).rates)
        return found

    def finish(self, pool: Pool) -> None:
        """Runs everything that is not done. A run that fails twice in a row is left out."""
        for group in self.tier.groups:
            if self.tier.tuning:
                given_up: set[str] = set()
                while wanted := [run for run in self.open_tuning(group) if run.name not in given_up]:
                    pool.finish(wanted)
                    given_up |= {run.name for run in wanted if record_of(run, self.place) is None}
            pool.finish(self.main_runs(group))


def ladder(first: Sequence[float], tuning: Tuning) -> list[float]:
    """Every rate that may be tried, lowest first: the first ones, and their halves and doubles within the limits."""
    rates = sorted(first)
    while rates[0] / 2 >= tuning.lowest * 0.999:
        rates.insert(0, rates[0] / 2)
    while rates[-1] * 2 <= tuning.highest * 1.001:
        rates.append(rates[-1] * 2)
    return rates


def best(tried: Losses) -> float:
    """The rate with the lowest loss; of two equal ones the lower."""
    return min(sorted(tried), key=lambda rate: tried[rate])


def beyond(tried: Losses, rungs: Sequence[float]) -> list[float]:
    """The next rate past the best one, if the best one is the first or the last that was tried and `rungs` has another. Else none."""
    steps = dict(pairwise(rungs))
    back = {after: before for before, after in steps.items()}
    top, edges = best(tried), (min(tried), max(tried))
    following = [steps.get(top)] if top == edges[1] else [back.get(top)] if top == edges[0] else []
    return [rate for rate in following if rate is not None and rate not in tried]


def texts(protocol: Protocol, tier: Tier) -> list[str]:
    """The texts that a tier needs, in their order."""
    wanted = {domain for domains in tier.groups.values() for domain in domains} | ({protocol.tuning.domain} if tier.tuning else set())
    return [domain for domain in protocol.domains if domain in wanted]


def default_place(tier: str, runs: Path, data: Path) -> Place:
    """Each tier has a folder of its own."""
    return Place(runs / tier, data)
