"""results.json: the numbers of every finished run, without anything that the document does not need."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.analysis.reproduce.protocol import ProtocolError
from megatron.analysis.reproduce.runs import record_of
from megatron.analysis.reproduce.workflow import Workflow

FORMAT = 1
KEPT = ("arm", "domain", "seed", "rate", "steps", "tokens", "test_loss", "curve", "routing", "seconds", "seconds_measuring", "cpu_seconds")


def collect(workflow: Workflow, tier: str) -> dict[str, Any]:
    """The finished runs of a tier, the rates that were tried, and the runs that are missing."""
    tuning: dict[str, Any] = {}
    runs: list[dict[str, Any]] = []
    missing: list[list[Any]] = []
    versions: dict[str, str] | None = None
    seconds = [0.0, 0.0]
    for group, domains in workflow.tier.groups.items():
        arms = workflow.arms_of(group)
        for arm in arms:
            tuning[arm] = {"tried": [[rate, loss] for rate, loss in sorted(workflow.tuned(arm).items())], "rate": workflow.rate(arm)}
            for rate, _ in tuning[arm]["tried"]:
                tried = record_of(workflow.tuning_run(arm, rate), workflow.place) or {}
                seconds[0] += tried.get("seconds", 0) + tried.get("seconds_measuring", 0)
                seconds[1] += tried.get("cpu_seconds", 0)
        known = {(run.arm, run.domain, run.seed): run for run in workflow.main_runs(group)}
        for seed in workflow.tier.seeds:
            for key in [(arm, domain, seed) for domain in domains for arm in arms]:
                record = record_of(known[key], workflow.place) if key in known else None
                if record is None:
                    missing.append(list(key))
                    continue
                versions = record["versions"]
                runs.append({name: record[name] for name in KEPT if name in record})
    spent = {"tuning_seconds": round(seconds[0]), "tuning_cpu_seconds": round(seconds[1])}
    return {"format": FORMAT, "tier": tier, "versions": versions, **spent, "tuning": tuning, "runs": runs, "missing": missing}


def known_rates(path: Path) -> dict[str, float]:
    """Arm -> learning rate, from a committed file. Raises ProtocolError if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {arm: one["rate"] for arm, one in found["tuning"].items() if one["rate"] is not None}
    except FileNotFoundError:
        raise ProtocolError(
            f"There is no {path}, which has the learning rate of each arm. Restore it from git, or run `python tools/reproduce.py --tier full` once."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ProtocolError(f"{path} cannot be read as the results of a full run. Restore it from git.") from None


def runs_of(results: Mapping[str, Any]) -> dict[tuple[str, str, int], dict[str, Any]]:
    """(arm, text, seed) -> run."""
    return {(run["arm"], run["domain"], run["seed"]): run for run in results["runs"]}
