"""The output that a person sees during a run: log lines, and on a terminal a progress display below them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from megatron.monitor.tee import Tee, still_copied

LOGGER = "megatron"
MAX_EXPERTS_SHOWN = 16
BLOCKS = "▁▂▃▄▅▆▇█"


class ConsoleHandler(logging.Handler):
    """Prints log records through a rich console, so that they scroll above a live display. Long lines are not broken, so programs can parse them."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if logging.WARNING <= record.levelno < logging.ERROR else "red" if record.levelno >= logging.ERROR else None
        self.console.print(self.format(record), style=style, markup=False, highlight=False, soft_wrap=True)


class LastingConsole(Console):
    """A console that stops printing when its reader has ended (`| head`). A console of rich would end the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


def configure_logging(*, rank: int) -> Console:
    """Sends the package's messages to standard output on rank 0. If standard output is copied to a file, every rank sends its messages to its file.

    Returns the console for a progress display. The display is not copied to the file.
    """
    copied = sys.stdout if isinstance(sys.stdout, Tee) else None
    console = LastingConsole(file=copied.stream if copied is not None else None)
    logger = logging.getLogger(LOGGER)
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO)
    logger.addHandler(ConsoleHandler(console) if rank == 0 else logging.NullHandler())
    if copied is not None:
        logger.addHandler(logging.StreamHandler(copied.copy))
    return console


class ProgressDisplay:
    """A bar with steps, tokens per second, time left and loss, and one small bar per expert. Use as a context manager."""

    def __init__(self, console: Console, *, total: int, done: int) -> None:
        columns = (TextColumn("[bold]training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"))
        self._progress = Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console)
        self._task = self._progress.add_task("training", total=total, completed=done, status="")
        self._load = Text("")
        self._live = Live(Group(self._progress, self._load), console=console, refresh_per_second=4)

    def __enter__(self) -> ProgressDisplay:
        before = sys.stdout, sys.stderr
        self._live.start()  # it catches what is printed, to show it above the bar
        sys.stdout, sys.stderr = (still_copied(now, was) for now, was in zip((sys.stdout, sys.stderr), before, strict=True))
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def update(self, *, done: int, loss: float, tokens_per_second: float, expert_load: Sequence[Sequence[int]]) -> None:
        self._progress.update(self._task, completed=done, status=f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s")
        self._load.plain = load_bars(expert_load)


def load_bars(expert_load: Sequence[Sequence[int]]) -> str:
    """`expert load  ▅▃▆▄ 1.2  ...`: a bar per expert for each MoE layer, and the busiest expert's load over the mean.

    With more experts or layers than fit, only the numbers. Empty without MoE layers.
    """
    if not expert_load or not any(map(sum, expert_load)):
        return ""
    rows = []
    for row in expert_load:
        mean = sum(row) / len(row) or 1.0
        bars = "".join(BLOCKS[min(len(BLOCKS) - 1, int(count / mean * len(BLOCKS) / 2))] for count in row) if len(row) <= MAX_EXPERTS_SHOWN else ""
        rows.append(f"{bars} {max(row) / mean:.2f}x".strip())
    shown = rows if len(rows) <= MAX_EXPERTS_SHOWN else [*rows[: MAX_EXPERTS_SHOWN - 1], "..."]
    return "expert load by layer  " + "   ".join(shown)
