"""What `tools/reproduce.py` does: prepare the texts, run the tier, write the document."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron.analysis.reproduce.document import write_document
from megatron.analysis.reproduce.pool import Pool
from megatron.analysis.reproduce.protocol import Protocol, ProtocolError, load_protocol
from megatron.analysis.reproduce.reporting import RunReporter, work, work_of
from megatron.analysis.reproduce.results import collect, known_rates
from megatron.analysis.reproduce.runs import Place, Run, of_another_protocol, record_of
from megatron.analysis.reproduce.workflow import Workflow, default_place, texts

DOCUMENTED = ("full", "long")
"""Tiers whose results are in docs."""
COMPARED = ("validation_loss", "test_loss", "curve", "routing")


@dataclass(frozen=True)
class Command:
    """The options of the command line."""

    tier: str
    jobs: int
    protocol: Path
    runs: Path
    data: Path
    out: Path | None
    """None: `docs` for the tiers full and long, else the folder of the tier's runs."""
    report: bool
    list: bool
    again: str | None
    """None: no run is repeated."""


def reproduce(command: Command) -> int:
    """Returns the exit status: 1 if a run failed or gave other numbers. Raises ProtocolError, DatasetError and KeyboardInterrupt."""
    console = Console(file=sys.stdout if command.list else sys.stderr)
    protocol = load_protocol(command.protocol)
    if command.tier not in protocol.tiers:
        raise ProtocolError(f"--tier {command.tier}: {command.protocol} has no such tier; it has {', '.join(protocol.tiers)}")
    place = default_place(command.tier, command.runs, command.data)
    results = command.protocol.with_name("results.json")
    tier = protocol.tiers[command.tier]
    rates = {} if tier.tuning else known_rates(results)
    workflow = Workflow(protocol, place, tier, rates)
    if command.list:
        return show(workflow, console)
    if command.again is not None:
        return repeat(workflow, command.again, console)
    failures = [] if command.report else run_tier(workflow, command, console)
    out = command.out or (Path("docs") if command.tier in DOCUMENTED else place.runs)
    written = write_document(collect(workflow, command.tier), protocol, command.protocol, out)
    console.print(f"Document: {written}", soft_wrap=True, highlight=False)
    if failures:
        console.print(f"{len(failures)} run(s) failed; their sentences are above. The same command tries them again.", soft_wrap=True)
    return 1 if failures else 0


def run_tier(workflow: Workflow, command: Command, console: Console) -> list[str]:
    """Prepares the texts and does what is left. Returns a sentence for each run that failed."""
    prepare_texts(workflow.protocol, workflow.place, texts(workflow.protocol, workflow.tier))
    known = all_runs(workflow)
    if old := of_another_protocol(known, workflow.place):
        console.print(f"The protocol has changed: {len(old)} finished run(s) are run again, such as {old[0].name}.", soft_wrap=True)
    left = [run for run in known if record_of(run, workflow.place) is None]
    total, done = max(sum(workflow.expected().values()), len(known)), len(known) - len(left)
    whole = sum(count * work_of(workflow.protocol, arm, steps) for (arm, steps), count in workflow.expected().items())
    guessed = whole - sum(work(workflow.protocol, run) for run in known if run not in left)
    reporter = RunReporter(console, workflow.protocol, workflow.place, total, done, guessed)
    pool = Pool(workflow.place, command.jobs, reporter)
    console.print(f"{total} runs, {done} of them done. Runs: {workflow.place.runs}", soft_wrap=True, highlight=False)
    with reporter.shown():
        workflow.finish(pool)
    return pool.failures


def all_runs(workflow: Workflow) -> list[Run]:
    """The runs that are known now: which rates are tried beyond the first ones shows on the way."""
    tier = workflow.tier
    tuning = [
        workflow.tuning_run(arm, rate)
        for group in tier.groups
        for arm in workflow.arms_of(group)
        for rate in ({*workflow.search(arm).rates, *workflow.tuned(arm)} if tier.tuning else ())
    ]
    return [*tuning, *(run for group in tier.groups for run in workflow.main_runs(group))]


def prepare_texts(protocol: Protocol, place: Place, domains: list[str]) -> None:
    """Prepares what is not there. A folder that was made from the same input and settings stays as it is; another one raises DatasetError."""
    from megatron.data.preprocessing.prepare import prepare
    from megatron.data.preprocessing.prepare_arguments import parse
    from megatron.data.progress import build_reporter

    for domain in domains:
        text, folder = protocol.domains[domain], place.text(domain)
        prepare(parse([text.corpus, "-d", str(place.data), "--name", folder.name, "--vocab-size", str(text.vocabulary)]), build_reporter())


def show(workflow: Workflow, console: Console) -> int:
    """Every run and what it measured."""
    for run in all_runs(workflow):
        record = record_of(run, workflow.place)
        state = "not done" if record is None else f"{record.get('test_loss', record.get('validation_loss')):.4f}"
        console.print(f"{state:>9}  {run.name}", soft_wrap=True, markup=False, highlight=False)
    return 0


def repeat(workflow: Workflow, name: str, console: Console) -> int:
    """Trains one finished run from the beginning in a folder of its own and compares every number."""
    wanted = name.removeprefix(f"{workflow.place.runs}/").strip("/")
    run = next((run for run in all_runs(workflow) if run.name == wanted), None)
    before = None if run is None else record_of(run, workflow.place)
    if run is None or before is None:
        raise ProtocolError(f"--again {name}: there is no such finished run. --list shows all runs.")
    with tempfile.TemporaryDirectory() as folder:
        elsewhere = Place(Path(folder), workflow.place.data)
        reporter = RunReporter(console, workflow.protocol, elsewhere, 1, 0, work(workflow.protocol, run))
        pool = Pool(elsewhere, 1, reporter)
        pool.finish([run])
        after = record_of(run, elsewhere)
    if after is None:
        console.print(pool.failures[-1], soft_wrap=True, markup=False, highlight=False)
        return 1
    other = [key for key in COMPARED if before.get(key) != after.get(key)]
    for key in other:
        console.print(f"{key}: {_short(before.get(key))} before, {_short(after.get(key))} now", soft_wrap=True, highlight=False)
    different = "The numbers are not the same. Another processor or another version of a package rounds otherwise, which turns near ties of a router."
    console.print(different if other else "Every number is the same.", soft_wrap=True)
    return 1 if other else 0


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{text[:197]}..."
