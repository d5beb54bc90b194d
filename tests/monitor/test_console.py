"""Log lines for people and for files, and the display on a terminal."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
from rich.console import Console

from megatron.monitor.console import LOGGER, ConsoleHandler, ProgressDisplay, configure_logging, load_bars


def test_only_the_first_process_speaks(capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1):
        configure_logging(rank=rank, log_dir=None)
        logging.getLogger(LOGGER).info("hello from %d", rank)
    assert capsys.readouterr().out == "hello from 0\n"


def test_long_lines_stay_whole(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(rank=0, log_dir=None)
    logging.getLogger(LOGGER).info("x" * 400)
    assert capsys.readouterr().out == "x" * 400 + "\n"


def test_log_files_are_appended_one_a_process(tmp_path: Path) -> None:
    for word in ("first", "second"):
        configure_logging(rank=1, log_dir=str(tmp_path / "logs"))
        logging.getLogger(LOGGER).info(word)
    (file,) = (tmp_path / "logs").iterdir()
    assert file.name.endswith("_rank_01_stdout.txt")
    assert [line.split()[-1] for line in file.read_text().splitlines()] == ["first", "second"]


def test_markup_in_messages_is_text() -> None:
    out = io.StringIO()
    handler = ConsoleHandler(Console(file=out, width=200))
    handler.emit(logging.LogRecord("megatron", logging.WARNING, "", 0, "[bold]data[0][/bold]", None, None))
    assert out.getvalue() == "[bold]data[0][/bold]\n"


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
