"""How far the runs are: a bar on a terminal, else a line for each run that ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from megatron.analysis.reproduce.protocol import Protocol
from megatron.analysis.reproduce.runs import Place, Run, record_of


@dataclass
class RunReporter:
    """Counts runs. The time that is left is guessed from the FLOPs that are left and the speed so far."""

    console: Console
    protocol: Protocol
    place: Place
    total: int
    done_before: int
    work_left: float
    """FLOPs of the runs that are known and not done."""
    _count: int = 0
    _work_done: float = 0.0
    _begun: float = field(default_factory=time.monotonic)
    _bar: Progress | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Shows a bar on a terminal."""
        if not self.console.is_terminal:
            yield
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("runs{task.fields[left]}"))
        with Progress(*columns, console=self.console) as bar:
            self._bar = bar
            bar.add_task("Training", total=self.total, completed=self.done_before, left="")
            yield

    def done(self, run: Run, seconds: float) -> None:
        self._advance(run)
        record = record_of(run, self.place) or {}
        loss = record.get("test_loss", record.get("validation_loss", float("nan")))
        text = "test" if "test_loss" in record else "validation"
        self._say(f"{run.name}: {text} loss {loss:.4f} after {seconds:,.0f} s")

    def failed(self, run: Run, sentence: str) -> None:
        self._advance(run)
        self._say(sentence)

    def _advance(self, run: Run) -> None:
        self._count += 1
        self._work_done += work(self.protocol, run)
        self.total = max(self.total, self.done_before + self._count)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done_before + self._count, total=self.total, left=f", {self.left()}")

    def left(self) -> str:
        """The time that is left, in words."""
        rate = self._work_done / max(1e-9, time.monotonic() - self._begun)
        minutes = max(0.0, self.work_left - self._work_done) / max(1.0, rate) / 60
        return "under a minute left" if minutes < 1 else f"about {minutes:.0f} minutes left"

    def _say(self, text: str) -> None:
        place = "" if self._bar is not None else f"[{self.done_before + self._count}/{self.total}] "
        left = "" if self._bar is not None else f"; {self.left()}"
        self.console.print(f"{place}{text}{left}", soft_wrap=True, markup=False, highlight=False)


def work(protocol: Protocol, run: Run) -> float:
    """FLOPs of a run, roughly."""
    return work_of(protocol, run.arm, run.steps)


def work_of(protocol: Protocol, arm: str, steps: int) -> float:
    return float(protocol.sizes[arm].flops * steps * protocol.common["train_micro_batch_size_per_gpu"] * protocol.common["seq_length"])
