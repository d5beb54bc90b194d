"""Dead experts and LoREs, collapsed routers and overloaded processes.

Shapes: X MoE layers; E experts of the layer that has most; G LoREs, likewise; M LoREs of an expert.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron.monitor.alerts.alert import Alert
from megatron.monitor.alerts.window import Counts, LoadWindow

Numbers = npt.NDArray[np.float64]
MOST_STEPS = 10
"""Steps that are judged together, if a log interval has so many."""
LORE_STEPS = 10
LORE_BLOCKS = 10
"""LoREs are judged every 10 steps, over 100 steps: while their routers learn, a LoRE often has no token for some tens of steps."""
ROWS = 32
"""An expert is judged when an even load would have given it so many rows."""
HISTORY = 100
"""Steps whose entropy is remembered."""
FEWEST = 10
"""With fewer steps than this nothing is compared with earlier steps."""
BUSY_SHARE = 0.95
"""If this part of the rows goes to the K busiest experts, the router chooses the same K for every token."""
FEW_PROCESSES = 0.6
"""With few processes an overload cannot get large. Then the limit is this part of the way from 1 to the largest."""
AGAIN = 5.0
"""An expert counts as alive again above this multiple of the limit, so that one near the limit raises one alert."""
SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When a router is in trouble."""

    dead_share: float
    """Part of an even load below which an expert or a LoRE is dead."""
    dead_lores: float
    """Part of a layer's LoREs that must be dead."""
    entropy: float
    """Part of the largest entropy, log E."""
    entropy_drop: float
    """Part of the layer's own earlier entropy."""
    overload: float
    """Rows of the busiest process over the mean."""


@dataclass(frozen=True, kw_only=True)
class Routers:
    """What the model has. Layers are those with experts, first layer first."""

    experts: tuple[int, ...]
    """Experts of each layer that a token can choose."""
    top_k: tuple[int | None, ...]
    """Experts of a token in each layer. None: the router chooses the number."""
    lores: int
    """LoREs of one expert; 0: there are none."""
    processes: int
    """Expert-parallel processes."""
    zero_computation: int = 0
    """The last of each layer's experts, which have no LoREs."""


class RouterStep(NamedTuple):
    """A step's counts, over all micro-batches and processes."""

    load_XE: Counts
    lore_load_XG: Counts
    entropy_X: Numbers
    """In nats."""
    overload_X: Numbers
    """NaN without expert parallelism."""


class RouterWatch:
    """Judges the last 10 steps after every step, or those of a log interval if it is shorter. So what happens is reported within one log interval.
    LoREs are judged over 100 steps.

    Loads are not judged up to the run's step `settled`, because a young router often forgets an expert for some steps. Entropies are judged from the
    first step on.
    """

    def __init__(self, routers: Routers, limits: Limits, *, log_interval: int, settled: float) -> None:
        steps = min(log_interval, MOST_STEPS)
        self.routers = routers
        self.limits = limits
        self._settled = settled
        self._count_X = np.array(routers.experts, dtype=np.int64)
        pairs = zip(routers.experts, routers.top_k, strict=True)
        self._idle_X = np.array([(1 - BUSY_SHARE) * count / (count - k) if k is not None and count >= k + 2 else 0.0 for count, k in pairs])
        """If the K busiest experts get nearly all rows, one of the others gets less than this part of an even load."""
        self._experts = LoadWindow(self._count_X, steps=steps, rows=ROWS)
        self._lores = LoadWindow((self._count_X - routers.zero_computation) * routers.lores, steps=LORE_BLOCKS, rows=ROWS) if routers.lores else None
        self._block: list[Counts] = []
        """The LoREs' loads of the last steps, up to ten, which become one entry of the window."""
        self._entropy_SX: Numbers = np.zeros((0, len(routers.experts)))
        self._overloads: deque[Numbers] = deque(maxlen=steps)
        self._steps = steps
        self._dead: list[set[int]] = [set() for _ in routers.experts]
        self._open: set[tuple[str, int]] = set()
        """(kind, layer) of the troubles that last."""

    def judge(self, step: int, now: RouterStep) -> list[Alert]:
        """Give it every step. It returns what is new: trouble that lasts is reported once. Leave out a step that is not finite, because NaN weights
        choose experts without meaning."""
        self._experts.add(now.load_XE)
        self._add_lores(now.lore_load_XG)
        self._entropy_SX = np.concatenate([self._entropy_SX, now.entropy_X[None]])[-(HISTORY + self._steps) :]
        self._overloads.append(now.overload_X)
        found: list[Alert] = []
        for layer in self._suspects():
            load_E = None if self._experts.load_XE is None or step <= self._settled else self._experts.load_XE[layer, : self.routers.experts[layer]]
            collapse = self._collapse(step, layer, load_E)
            found += self._opened("router_collapse", layer, collapse)
            if load_E is not None:
                found += self._dead_experts(step, layer, load_E, quiet=collapse is not None)
            found += self._opened("dead_lores", layer, self._dead_lores(step, layer, load_E))
            found += self._opened("process_overload", layer, self._overload(step, layer, load_E))
        return found

    def _add_lores(self, load_XG: Counts) -> None:
        if self._lores is None:
            return
        self._block.append(load_XG)
        if len(self._block) == LORE_STEPS:
            self._lores.add(np.sum(self._block, 0))
            self._block = []

    def _suspects(self) -> list[int]:
        """The layers to look at closely: those in trouble, and those that may be. All layers are looked through at once, because a model may have
        many."""
        suspect_X = np.array([bool(self._dead[layer]) for layer in range(len(self._dead))])
        suspect_X[[layer for _, layer in self._open]] = True
        with np.errstate(divide="ignore", invalid="ignore"):
            entropy_X = self._entropy_SX[-self._steps :].mean(0)
            suspect_X |= entropy_X < np.maximum(self.limits.entropy * np.log(self._count_X), self.limits.entropy_drop * self._entropy_SX.max(0))
            suspect_X |= np.mean(self._overloads, 0) > 1
            if (load_XE := self._experts.load_XE) is not None:
                exists_XE = np.arange(load_XE.shape[1]) < self._count_X[:, None]
                least_X = np.where(exists_XE, load_XE, np.iinfo(np.int64).max).min(1) * self._count_X / load_XE.sum(1)
                suspect_X |= least_X < np.maximum(self.limits.dead_share, self._idle_X)
            if self._lores is not None and load_XE is not None and self._lores.load_XE is not None:
                lores = self.routers.lores
                lore_XEM = self._lores.load_XE.reshape(len(load_XE), -1, lores)
                dead_X = (lore_XEM * lores < self.limits.dead_share * lore_XEM.sum(2, keepdims=True)).sum((1, 2))
                suspect_X |= (dead_X > 0) & (dead_X >= self.limits.dead_lores * lores)
        return [int(layer) for layer in np.flatnonzero(suspect_X)]

    def _opened(self, kind: str, layer: int, found: Alert | None) -> list[Alert]:
        """The alert, if the trouble is new."""
        is_new = found is not None and (kind, layer) not in self._open
        (self._open.discard if found is None else self._open.add)((kind, layer))
        return [found] if found is not None and is_new else []

    def _collapse(self, step: int, layer: int, load_E: Counts | None) -> Alert | None:
        count, top_k = self.routers.experts[layer], self.routers.top_k[layer]
        values = self._entropy_SX[:, layer]
        if count < 2 or len(values) < self._steps:
            return None
        largest, entropy, earlier = math.log(count), float(np.mean(values[-self._steps :])), values[: -self._steps]
        limit = self.limits.entropy * largest
        compared = f"the largest possible is {largest:.3f}"
        if len(earlier) >= FEWEST and (own := self.limits.entropy_drop * float(np.median(earlier))) > limit:
            limit, compared = own, f"the median of the {len(earlier)} steps before is {float(np.median(earlier)):.3f}"
        if entropy < limit:
            seen = f"The entropy of its probabilities is {entropy:.4f} nats; {compared}, and the limit is {limit:.4f}."
            return Alert(kind="router_collapse", step=step, layer=layer, value=entropy, limit=limit, seen=seen)
        if load_E is None or top_k is None or count < top_k + 2 or not load_E.any():
            return None
        busiest = np.argsort(load_E)[::-1][:top_k]
        share = float(load_E[busiest].sum() / load_E.sum())
        if share <= BUSY_SHARE:
            return None
        seen = f"{share:.1%} of the rows go to {named('expert', sorted(busiest.tolist()))} of {count}; the limit is {BUSY_SHARE:.0%}."
        return Alert(kind="router_collapse", step=step, layer=layer, value=share, limit=BUSY_SHARE, seen=seen)

    def _dead_experts(self, step: int, layer: int, load_E: Counts, *, quiet: bool) -> list[Alert]:
        """`quiet`: the router has collapsed, which explains them."""
        share_E = load_E * len(load_E) / max(1, load_E.sum())
        dead = set(np.flatnonzero(share_E < self.limits.dead_share).tolist())
        known = self._dead[layer]
        known -= set(np.flatnonzero(share_E >= AGAIN * self.limits.dead_share).tolist())
        fresh = sorted(dead - known)
        known |= dead
        if not fresh or quiet:
            return []
        lowest = float(share_E[fresh].min())
        seen = (
            f"In the last {len(self._experts)} steps {named('expert', fresh)} got less than {self.limits.dead_share:.1%} of an even load "
            f"({lowest:.2%}). In all {len(dead)} of {len(load_E)} experts are dead."
        )
        return [Alert(kind="dead_experts", step=step, layer=layer, value=lowest, limit=self.limits.dead_share, seen=seen)]

    def _dead_lores(self, step: int, layer: int, load_E: Counts | None) -> Alert | None:
        if self._lores is None or self._lores.load_XE is None or load_E is None:
            return None
        own = len(load_E) - self.routers.zero_computation
        alive_E = load_E[:own] * len(load_E) >= self.limits.dead_share * load_E.sum()
        load_EM = self._lores.load_XE[layer, : own * self.routers.lores].reshape(own, -1)[alive_E]
        dead = int((load_EM * self.routers.lores < self.limits.dead_share * load_EM.sum(1, keepdims=True)).sum())
        share = dead / max(1, load_EM.size)
        if not dead or share < self.limits.dead_lores:
            return None
        seen = (
            f"In {len(self._lores) * LORE_STEPS} steps {dead} of {load_EM.size} LoREs got less than {self.limits.dead_share:.1%} of an even load of "
            f"their expert; the limit is {self.limits.dead_lores:.0%} of them."
        )
        return Alert(kind="dead_lores", step=step, layer=layer, value=share, limit=self.limits.dead_lores, seen=seen)

    def _overload(self, step: int, layer: int, load_E: Counts | None) -> Alert | None:
        value = float(np.mean([overload_X[layer] for overload_X in self._overloads])) if self._overloads else math.nan
        processes = self.routers.processes
        limit = min(self.limits.overload, 1 + FEW_PROCESSES * (processes - 1))
        if load_E is None or not value > limit:
            return None
        seen = f"The busiest of {processes} expert-parallel processes gets {value:.2f} times the mean number of rows; the limit is {limit:.2f}."
        if len(load_E) % processes == 0:
            busiest = int(load_E.reshape(processes, -1).sum(1).argmax())
            seen += f" It is number {busiest} (from 0)."
        return Alert(kind="process_overload", step=step, layer=layer, value=value, limit=limit, seen=seen)


def named(what: str, numbers: list[int]) -> str:
    """`expert 3`, `experts 1, 5`, and not more than eight numbers."""
    shown = ", ".join(map(str, numbers[:SHOWN])) + (f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else "")
    return f"{what}{'s' if len(numbers) > 1 else ''} {shown}"
