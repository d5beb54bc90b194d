"""Copies of what a process prints."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from megatron.monitor.console import LOGGER, configure_logging
from megatron.monitor.tee import copied_streams


def read(folder: Path, name: str) -> str:
    (file,) = folder.glob(f"*_rank_01_{name}.txt")
    return file.read_text()


def test_both_streams_are_copied_and_appended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    for word in ("first", "second"):
        with copied_streams(str(tmp_path / "deep/logs"), rank=1):
            print(word)
            print(f"{word} error", file=sys.stderr)
            assert sys.stdout.encoding == before[0].encoding
    assert (sys.stdout, sys.stderr) == before
    lines = read(tmp_path / "deep/logs", "stdout").splitlines()
    assert lines[1::2] == ["first", "second"]
    assert all("rank 1, process" in line for line in lines[::2])
    assert read(tmp_path / "deep/logs", "stderr") == "first error\nsecond error\n"
    assert capsys.readouterr() == ("first\nsecond\n", "first error\nsecond error\n")


def test_messages_of_a_silent_process_are_in_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with copied_streams(str(tmp_path), rank=1):
        configure_logging(rank=1)
        logging.getLogger(LOGGER).info(" samples/sec: 1.0 |")
    configure_logging(rank=1)
    logging.getLogger(LOGGER).info("not copied any more")
    assert read(tmp_path, "stdout").splitlines()[1:] == [" samples/sec: 1.0 |"], "as on the console, for those who parse it"
    assert capsys.readouterr().out == ""


def test_messages_of_the_first_process_are_copied_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with copied_streams(str(tmp_path), rank=1):
        configure_logging(rank=0)
        logging.getLogger(LOGGER).info("hello")
    configure_logging(rank=0)
    assert read(tmp_path, "stdout").splitlines()[1:] == ["hello"]
    assert capsys.readouterr().out == "hello\n"


def test_why_a_process_ended_is_in_its_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), copied_streams(str(tmp_path), rank=1):
        raise RuntimeError("out of luck")
    assert read(tmp_path, "stderr").rstrip().endswith("RuntimeError: out of luck")


def test_nothing_is_asked_for(tmp_path: Path) -> None:
    before = sys.stdout
    with copied_streams(None, rank=0):
        assert sys.stdout is before
