"""Runs: what one of them trains, where it lies, and whether it has been done already."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron.analysis.reproduce.protocol import Measure, Protocol

RECORD, LOG, CONFIG = "record.json", "log.txt", "config.yml"
TUNING, MAIN = "tuning", "main"


@dataclass(frozen=True)
class Run:
    """One training run, with everything that decides its numbers."""

    purpose: str
    """TUNING: it finds the learning rate. MAIN: it counts for the claims."""
    arm: str
    domain: str
    seed: int
    rate: float
    settings: dict[str, Any]
    """The whole configuration but for the folder that it saves in."""
    measure: dict[str, Any]
    """How it is measured: `Measure`'s numbers and the files that are read."""

    @property
    def name(self) -> str:
        """For people, and as a path."""
        return f"{self.domain}/{self.arm}/{self.purpose}-seed{self.seed}-lr{self.rate:g}-{self.steps}steps"

    @property
    def steps(self) -> int:
        return int(self.settings["train_iters"])

    @property
    def fingerprint(self) -> str:
        """Of everything above. A finished run with another one is not this run."""
        whole = json.dumps([self.purpose, self.settings, self.measure], sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Place:
    """Where the runs and the prepared texts of a tier lie."""

    runs: Path
    data: Path

    def folder(self, run: Run) -> Path:
        return self.runs / run.name

    def text(self, domain: str) -> Path:
        return self.data / f"reproduce-{domain}"


class Order(NamedTuple):
    """What is asked for: an arm on a text, with a seed, a rate and a length."""

    purpose: str
    arm: str
    domain: str
    seed: int
    rate: float
    steps: int


def make_run(protocol: Protocol, place: Place, order: Order) -> Run:
    """A run of the protocol. The same arguments always make the same run."""
    purpose, arm, domain, seed, rate, steps = order
    text, measure, final = place.text(domain), protocol.measure, protocol.tuning.final
    settings = protocol.model_settings(arm)
    settings["optimizer"] = {**settings["optimizer"], "params": {**settings["optimizer"]["params"], "lr": rate}}
    settings |= {
        **{f"{part}_data_paths": [f"{text}/{part}_text_document"] for part in ("train", "valid", "test")},
        "vocab_file": f"{text}/tokenizer.json",
        "train_iters": steps,
        "min_lr": rate * final,
        "seed": seed,
        "eval_interval": steps,
        "eval_iters": 0,
        "checkpoint_factor": max(1, steps // 2),
        "keep_last_n_checkpoints": 1,
        "resume_if_exists": True,
    }
    files = {"validation": f"{text}/valid_text_document", "test": f"{text}/test_text_document", "words": f"{text}/test.txt"}
    return Run(purpose, arm, domain, seed, rate, settings, {**measured(measure), **files})


def measured(measure: Measure) -> dict[str, Any]:
    """The numbers that decide what a run measures; the others decide what is made of it."""
    return measure.model_dump(include={"test_tokens", "validation_tokens", "curve_tokens", "curve_points", "routing_tokens"})


def record_of(run: Run, place: Place) -> dict[str, Any] | None:
    """What a finished run measured. None: it has not been finished, or with another protocol."""
    record = read_record(place.folder(run) / RECORD)
    return record if record is not None and record["fingerprint"] == run.fingerprint else None


def read_record(path: Path) -> dict[str, Any] | None:
    """The record in a file. None: there is none, or not a whole one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "fingerprint" in found else None


def of_another_protocol(runs: Sequence[Run], place: Place) -> list[Run]:
    """Runs that were finished with other settings and have to be run again."""
    return [run for run in runs if read_record(place.folder(run) / RECORD) is not None and record_of(run, place) is None]


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Completely or not at all."""
    unfinished = path.with_name(f".{path.name}.new")
    unfinished.write_text(json.dumps(record, indent=1), encoding="utf-8")
    os.replace(unfinished, path)
