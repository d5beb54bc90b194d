"""The progress of an analysis: a bar on a terminal, else a line every ten seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Writes to a console, which is usually standard error."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Gives a function that counts tokens."""
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), MofNCompleteColumn(), TextColumn("tokens"))
            with RichProgress(*columns, TimeRemainingColumn(compact=True), console=self._console) as progress:
                task = progress.add_task(what, total=total)
                yield lambda tokens: progress.advance(task, tokens)
            return
        lines = _Lines(self._console, what, total)
        yield lines.advance
        lines.end()


class _Lines:
    def __init__(self, console: Console, what: str, total: int) -> None:
        self._console, self._what, self._total, self._done = console, what, total, 0
        self._begun = time.monotonic()
        self._next = self._begun + SECONDS_BETWEEN_LINES

    def advance(self, tokens: int) -> None:
        self._done += tokens
        now = time.monotonic()
        if now >= self._next:
            self._next = now + SECONDS_BETWEEN_LINES
            left = (self._total - self._done) * (now - self._begun) / self._done
            self._say(f"{self._done:,} of {self._total:,} tokens, {left:,.0f} s left")

    def end(self) -> None:
        seconds = max(1e-9, time.monotonic() - self._begun)
        self._say(f"{self._done:,} tokens in {seconds:.1f} s ({self._done / seconds:,.0f} tokens/s)")

    def _say(self, text: str) -> None:
        self._console.print(f"{self._what}: {text}", soft_wrap=True, markup=False, highlight=False)
