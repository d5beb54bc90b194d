"""What `tools/analysis/plan.py` does once its arguments are read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron.analysis.plan import report
from megatron.analysis.plan.calibration import measured_rows, predictions
from megatron.analysis.plan.efficiency import STACKS
from megatron.analysis.plan.estimate import Cluster, Estimate, check_layout, estimate
from megatron.analysis.plan.layouts import Found, Search
from megatron.analysis.plan.machine import PlanError, load_machine
from megatron.analysis.vocabulary import stated_vocabulary, vocabulary
from megatron.config.loader import LoadedConfig, load_config
from megatron.config.size import padded_vocab_size


@dataclass(frozen=True)
class Request:
    """The arguments. vocab, gpus_per_node None: as the configuration or the machine says. layouts: lines of the table, 0 for no search."""

    configs: Sequence[str]
    overrides: Sequence[str]
    conf_dir: Path | None
    gpus: int
    gpu: str
    gpus_per_node: int | None
    vocab: int | None
    skew: float
    stack: str
    layouts: int
    json: Path | None


def plan(request: Request, console: Console) -> None:
    """Prints the plan of a configuration. Raises PlanError and ConfigError."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    machine = load_machine(request.gpu, request.gpus_per_node)
    if request.stack not in STACKS:
        raise PlanError(f"--stack {request.stack}: there is no such software; known: {', '.join(STACKS)}")
    if request.json is not None and not request.json.absolute().parent.is_dir():
        raise PlanError(f"--json {request.json}: the folder {request.json.absolute().parent} does not exist; make it first")
    if request.json is not None and request.json.is_dir():
        raise PlanError(f"--json {request.json}: this is a folder; give the name of a file")
    loaded = load_config(list(request.configs), list(request.overrides), request.conf_dir)
    words = padded_vocab_size(_vocabulary(loaded, request.vocab), loaded.config.model.make_vocab_size_divisible_by)
    cluster = Cluster(machine, request.gpus, request.skew, STACKS[request.stack])
    check_layout(loaded.config, cluster)
    console.print(f"[bold]{escape(', '.join(request.configs))}[/bold] on {request.gpus} x {machine.name}, {escape(STACKS[request.stack].what)}")
    with progress(console) as bar:
        task = bar.add_task("stages", total=loaded.config.parallel.layout.pipe)
        own = estimate(loaded.config, words, cluster, lambda: bar.advance(task))
    show(console, loaded, own, cluster)
    found: list[Found] = []
    if request.layouts:
        found = search(console, Search(loaded.config, words, cluster, own.batch.global_))
        console.print("\n[bold]Layouts[/bold]", report.layout_table(found, request.layouts), "", report.best_sentence(found, own), sep="\n")
    if request.json is not None:
        values: dict[str, Any] = report.as_values(loaded.config, words, own, cluster) | {"layouts": report.layout_values(found)}
        request.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def show(console: Console, loaded: LoadedConfig, own: Estimate, cluster: Cluster) -> None:
    """The layout of the configuration."""
    parts = (
        ("Memory of one process of each stage", report.stage_table(own, cluster)),
        ("What it sends in a step", report.message_table(own)),
        ("Time of a step", report.time_table(own)),
    )
    for title, table in parts:
        if table.row_count:
            console.print(f"\n[bold]{title}[/bold]", table, sep="\n")
    console.print("", *report.summary(loaded.config, own, cluster), sep="\n")


def search(console: Console, searching: Search) -> list[Found]:
    """All layouts, with a progress bar."""
    layouts = searching.layouts()
    with progress(console) as bar:
        task = bar.add_task("layouts", total=len(layouts))
        return searching.run(layouts, lambda: bar.advance(task))


def calibrate(console: Console) -> None:
    """Prints measured and predicted speeds."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    rows = measured_rows()
    with progress(console) as bar:
        task = bar.add_task("measured runs", total=len(rows))
        found = list(predictions(rows, lambda: bar.advance(task)))
    console.print(report.calibration_table(found), "", report.calibration_sentence(found), sep="\n")


@contextmanager
def progress(console: Console) -> Iterator[Progress]:
    """A bar on a terminal, nothing elsewhere; gone when it is full."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield bar


def _vocabulary(loaded: LoadedConfig, given: int | None) -> int:
    words = vocabulary(loaded.config.data)
    stated = next((number for number in map(stated_vocabulary, loaded.files.values()) if number), None)
    if (found := given or words.size or stated) is None:
        raise PlanError(f"The vocabulary of the configuration is not known ({words.reason}); give the number of tokens with --vocab")
    return found
