"""The command line of the live page."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.scripts import run_script

SCRIPT = "tools/analysis/dashboard.py"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "--once"], "--once needs --output PAGE"),
        (["a", "--serve", "--output", "b.html"], "--serve and --output exclude each other: start the command twice"),
        (["a", "--every", "0"], "must be a number of seconds from 1 to 86400, not '0'"),
        (["a", "--every", "nan"], "must be a number of seconds from 1 to 86400, not 'nan'"),
        (["a", "--port", "70000"], "must be a whole number from 0 to 65535, not '70000'"),
        ([], "the following arguments are required: RUN_DIR"),
    ],
)
def test_wrong_words_are_sentences(repository: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = runpy.run_path(str(repository / SCRIPT))["arguments"]
    with pytest.raises(SystemExit) as raised:
        arguments(words)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_a_page_once_and_a_folder_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 3, "train/lm_loss": 2.0}\n')
    done = run_script(
        SCRIPT, str(tmp_path), "--output", str(tmp_path / "pages/a.html"), "--once", folder=tmp_path, environment=os.environ, timeout=150
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"Writing {tmp_path}/pages/a.html.\n", "")
    assert "<td>2.0000</td>" in (tmp_path / "pages/a.html").read_text()
    wrong = run_script(SCRIPT, str(tmp_path / "none"), "--output", "a.html", "--once", folder=tmp_path, environment=os.environ, timeout=150)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (1, 1)
    assert "there is no such folder" in wrong.stderr


def test_the_server_stops_at_ctrl_c(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, repository / SCRIPT, str(tmp_path), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "(only on this machine). Ctrl-C stops it; the runs go on." in line
    url = line.split("at ")[1].split(" ")[0]
    end = time.monotonic() + 60
    while True:
        try:
            page = httpx.get(f"{url}?parts", timeout=60).text
            break
        except httpx.ConnectError:
            assert time.monotonic() < end
            time.sleep(0.05)
    assert f"nothing yet. The page waits for {tmp_path}/metrics.jsonl." in page
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert (out, errors) == ("", "")
    assert process.returncode == 0
