"""Which unit (expert or LoRE) leaves its slot when another one needs it. One small class for each policy, without tensors or files.

on_demand   what a token did not select leaves after the token (CoSMoEs: Huber et al., 2025, equation 8)
lru         the one that was selected longest ago (Eliseev and Mazur, 2023)
lfu         the one that was selected least often
static      the one that a profile says is selected least often: the hottest ones stay
belady      the one whose next selection is farthest away (Belady, 1966). It needs the trace of the same text: a bound, not a method
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from megatron.inference.offload.errors import OffloadError

Steps = Sequence[Sequence[int]]
"""What a layer's tokens (or calls with several tokens) selected, in order: the different units of each."""


class Policy(Protocol):
    """Decides for one layer."""

    def begin(self, units: Sequence[int]) -> None:
        """A call of the layer begins that needs these units."""
        ...

    def victim(self, candidates: Sequence[int]) -> int:
        """The one that leaves: one of `candidates`, which are not empty."""
        ...

    def leaving(self, resident: Sequence[int], units: Sequence[int]) -> Sequence[int]:
        """Those that leave after a call that used `units`, though no other one needs their slot."""
        ...


class LRU:
    """Least recently used."""

    def __init__(self) -> None:
        self._now, self._last = 0, dict[int, int]()

    def begin(self, units: Sequence[int]) -> None:
        """Notes the time."""
        self._now += 1
        self._last.update(dict.fromkeys(units, self._now))

    def victim(self, candidates: Sequence[int]) -> int:
        """The one used longest ago; of equals the one with the smallest number."""
        return min(candidates, key=lambda unit: (self._last.get(unit, 0), unit))

    def leaving(self, resident: Sequence[int], units: Sequence[int]) -> Sequence[int]:
        """None."""
        return ()


class OnDemand(LRU):
    """Exactly the selected ones stay."""

    def leaving(self, resident: Sequence[int], units: Sequence[int]) -> Sequence[int]:
        """All that were not selected."""
        return sorted(set(resident) - set(units))


class LFU(LRU):
    """Least frequently used; of equals the one used longest ago."""

    def __init__(self) -> None:
        super().__init__()
        self._count: Counter[int] = Counter()

    def begin(self, units: Sequence[int]) -> None:
        """Counts."""
        super().begin(units)
        self._count.update(units)

    def victim(self, candidates: Sequence[int]) -> int:
        """The one used least often."""
        return min(candidates, key=lambda unit: (self._count[unit], self._last.get(unit, 0), unit))


class Static(LRU):
    """Those that a profile says are used least often leave first."""

    def __init__(self, profile: Mapping[int, int]) -> None:
        super().__init__()
        self.profile = profile

    def victim(self, candidates: Sequence[int]) -> int:
        """The coldest one of the profile; of equals the one with the largest number, so that the hottest are found by counting from the front."""
        return min(candidates, key=lambda unit: (self.profile.get(unit, 0), -unit))

    def hottest(self, units: int, count: int) -> list[int]:
        """The `count` units that stay, of all `units`."""
        return sorted(sorted(range(units), key=lambda unit: (-self.profile.get(unit, 0), unit))[:count])


class Belady:
    """Knows what comes."""

    def __init__(self, steps: Steps) -> None:
        self._steps, self._now = [tuple(sorted(step)) for step in steps], -1
        self._uses: dict[int, list[int]] = defaultdict(list)
        for now, step in enumerate(self._steps):
            for unit in step:
                self._uses[unit].append(now)

    def begin(self, units: Sequence[int]) -> None:
        """Raises OffloadError where the text is not the trace's."""
        self._now += 1
        if self._now >= len(self._steps) or self._steps[self._now] != tuple(sorted(units)):
            raise OffloadError(
                f"expert_offload.policy: belady needs the trace of exactly this text, but its step {self._now} is another one. Record the trace with "
                "the same prompt and seed, or use another policy."
            )

    def victim(self, candidates: Sequence[int]) -> int:
        """The one that is needed last."""
        return max(candidates, key=lambda unit: (self._next_use(unit), -unit))

    def leaving(self, resident: Sequence[int], units: Sequence[int]) -> Sequence[int]:
        """None."""
        return ()

    def _next_use(self, unit: int) -> float:
        uses = self._uses[unit]
        place = bisect_right(uses, self._now)
        return uses[place] if place < len(uses) else float("inf")


def profile_of(steps: Steps) -> Counter[int]:
    """How many steps used each unit."""
    return Counter(unit for step in steps for unit in step)


POLICIES: Mapping[str, Callable[[Steps], Policy]] = {
    "on_demand": lambda steps: OnDemand(),
    "lru": lambda steps: LRU(),
    "lfu": lambda steps: LFU(),
    "static": lambda steps: Static(profile_of(steps)),
    "belady": Belady,
}
"""Name -> the policy of a layer, from the layer's steps in a trace (empty: there is none)."""
