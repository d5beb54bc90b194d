"""The measured rows of `measured_rows.yml`, and what the planner predicts for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from megatron.analysis.plan.efficiency import STACKS
from megatron.analysis.plan.estimate import Cluster, Estimate, estimate
from megatron.analysis.plan.machine import load_machine
from megatron.config import config_from_dict

ROWS = Path(__file__).parent / "measured_rows.yml"


@dataclass(frozen=True)
class Row:
    """A measured run. tokens: each second on one GPU. used: when the efficiencies were fitted on it, `first`, `second` or `never`. assumed: what its
    source does not say.
    """

    name: str
    source: str
    assumed: str
    machine: str
    gpus: int
    stack: str
    used: str
    tokens: float
    vocabulary: int
    keys: Mapping[str, Any]
    gpus_per_node: int | None = None
    network_gb_per_s: float | None = None
    """Of one GPU. None for these two: as the machine's file says."""

    def cluster(self) -> Cluster:
        """Its machine and software, with even routing."""
        machine = load_machine(self.machine, self.gpus_per_node)
        if self.network_gb_per_s is not None:
            machine = replace(machine, network_gb_per_s=self.network_gb_per_s)
        return Cluster(machine, self.gpus, 1.0, STACKS[self.stack])


def measured_rows() -> list[Row]:
    """All of them."""
    return [Row(**row) for row in yaml.safe_load(ROWS.read_text(encoding="utf-8"))["rows"]]


def predictions(rows: Sequence[Row], done: Callable[[], None] = lambda: None) -> Iterator[tuple[Row, Estimate]]:
    """Each row with what is predicted for it; `done` is called after each."""
    for row in rows:
        found = estimate(config_from_dict(dict(row.keys)), row.vocabulary, row.cluster())
        done()
        yield row, found


def error(row: Row, found: Estimate) -> float:
    """Predicted over measured, less 1."""
    return found.tokens_per_gpu / row.tokens - 1
