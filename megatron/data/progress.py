"""Shows the progress of long work on text: bars on a terminal, else a line from time to time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_BARS = 0.1


class Stage:
    """Counts of one stage of the work. `done` is the finished part of the stage's total."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.bytes = 0
        self.documents = 0
        self.tokens = 0
        self.done = 0

    def advance(self, size: int, documents: int = 1, tokens: int = 0, *, position: int | None = None) -> None:
        """Counts more text. `position`: the finished part of the total, if it is not the bytes of text (as for a compressed file)."""
        self.bytes += size
        self.documents += documents
        self.tokens += tokens
        self.done = self.bytes if position is None else position

    def rest(self, what: str) -> None:
        """All input is read. `what` names the rest of the work, whose progress cannot be measured."""

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.started, 1e-9)

    def rates(self) -> str:
        parts = [f"{self.bytes / 1e6:,.1f} MB"]
        if self.documents:
            parts.append(f"{self.documents / self.seconds:,.0f} docs/s")
        if self.tokens:
            parts.append(f"{self.tokens / self.seconds:,.0f} tokens/s")
        return ", ".join(parts)


class Reporter(Protocol):
    @contextmanager
    def stage(self, what: str, total_bytes: int | None) -> Iterator[Stage]:
        """Shows `what` while the block runs. `total_bytes` None: the total is not known."""


class TerminalReporter:
    """One bar a stage: share done, docs/s, tokens/s, time left."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def stage(self, what: str, total_bytes: int | None) -> Iterator[Stage]:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            TaskProgressColumn(),
            TextColumn("{task.fields[rates]}"),
        )
        with Progress(*columns, TimeRemainingColumn(compact=True), console=self._console) as progress:
            task = progress.add_task(what, total=total_bytes, rates="")
            stage = BarStage(progress, task)
            yield stage
            for number in progress.task_ids:
                progress.update(number, total=stage.done, completed=stage.done)
            progress.update(task, rates=stage.rates())


class BarStage(Stage):
    def __init__(self, progress: Progress, task: TaskID) -> None:
        super().__init__()
        self._progress = progress
        self._task = task
        self._next_bar = self.started

    def advance(self, size: int, documents: int = 1, tokens: int = 0, *, position: int | None = None) -> None:
        super().advance(size, documents, tokens, position=position)
        if time.monotonic() >= self._next_bar:  # drawing costs more than reading a short document
            self._next_bar = time.monotonic() + SECONDS_BETWEEN_BARS
            self._progress.update(self._task, completed=self.done, rates=self.rates())

    def rest(self, what: str) -> None:
        self._progress.add_task(what, total=None, rates="")


class LineReporter:
    """A line when a stage ends, and every ten seconds of a long one."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def stage(self, what: str, total_bytes: int | None) -> Iterator[Stage]:
        stage = LineStage(self._console, what, total_bytes)
        yield stage
        stage.line(f"done in {stage.seconds:.1f} s")


class LineStage(Stage):
    def __init__(self, console: Console, what: str, total_bytes: int | None) -> None:
        super().__init__()
        self._console = console
        self._what = what
        self._total = total_bytes
        self._next_line = self.started + SECONDS_BETWEEN_LINES

    def advance(self, size: int, documents: int = 1, tokens: int = 0, *, position: int | None = None) -> None:
        super().advance(size, documents, tokens, position=position)
        if time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
            left = f"{(self._total - self.done) * self.seconds / self.done:,.0f} s left" if self._total and self.done else "running"
            self.line(left)

    def line(self, state: str) -> None:
        self._console.print(f"{self._what}: {self.rates()}, {state}", soft_wrap=True, markup=False, highlight=False)


def build_reporter(*, quiet: bool = False) -> Reporter:
    """Bars when standard error is a terminal, lines when it is not; nothing if `quiet`."""
    console = Console(stderr=True, quiet=quiet)
    return TerminalReporter(console) if console.is_terminal else LineReporter(console)
