"""Log lines for people and for files, and the display on a terminal."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path

import pytest
from rich.console import Console

from megatron.monitor.console import LOGGER, ConsoleHandler, LastingConsole, ProgressDisplay, configure_logging, load_bars
from megatron.monitor.tee import copied_streams


def test_only_the_first_process_speaks(capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1):
        configure_logging(rank=rank)
        logging.getLogger(LOGGER).info("hello from %d", rank)
    assert capsys.readouterr().out == "hello from 0\n"


def test_long_lines_stay_whole(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(rank=0)
    logging.getLogger(LOGGER).info("x" * 400)
    assert capsys.readouterr().out == "x" * 400 + "\n"


def test_markup_in_messages_is_text() -> None:
    out = io.StringIO()
    handler = ConsoleHandler(Console(file=out, width=200))
    handler.emit(logging.LogRecord("megatron", logging.WARNING, "", 0, "[bold]data[0][/bold]", None, None))
    assert out.getvalue() == "[bold]data[0][/bold]\n"


def test_what_is_printed_under_the_display_is_copied_and_the_bar_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with copied_streams(str(tmp_path), rank=0):
        console = LastingConsole(file=sys.stdout.stream, force_terminal=True, width=120)  # type: ignore[attr-defined]
        with ProgressDisplay(console, total=10, done=2):
            print("from a library")
            print("a warning", file=sys.stderr)
        print("afterwards")
    stdout, stderr = (next(tmp_path.glob(f"*_{name}.txt")).read_text().splitlines()[skip:] for name, skip in (("stdout", 1), ("stderr", 0)))
    assert (stdout, stderr) == (["from a library", "afterwards"], ["a warning"])
    seen = capsys.readouterr().out
    assert "training" in seen
    assert "from a library" in seen


def test_display_shows_loss_speed_and_load() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=160)
    with ProgressDisplay(console, total=10, done=2) as display:
        display.update(done=5, loss=3.21, tokens_per_second=4567.0, expert_load=[[10, 30], [20, 20]])
    shown = out.getvalue()
    assert all(part in shown for part in ("5/10", "loss 3.210", "4,567 tokens/s", "1.50x", "1.00x"))


@pytest.mark.parametrize(
    ("load", "text"),
    [
        ([], ""),
        ([[0, 0]], ""),
        ([[4, 4]], "expert load by layer  ▅▅ 1.00x"),
        ([[0, 8]], "expert load by layer  ▁█ 2.00x"),
        ([[1] * 64], "expert load by layer  1.00x"),
    ],
)
def test_load_bars(load: list[list[int]], text: str) -> None:
    assert load_bars(load) == text
