"""dataset_token_count.py: documents and tokens of pairs, and of all of them together."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.data.conftest import write


@pytest.fixture
def main(tool: Callable[[str], ModuleType]) -> Callable[..., int]:
    return lambda *argv: tool("tools/datasets/dataset_token_count.py").main([str(part) for part in argv])


def test_it_counts_each_and_all(
    main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", [[0] * 1234, [0] * 1_000_000])
    write(tmp_path / "much_longer", [[1]] * 1500)
    assert main("a.bin", "much_longer") == 0
    assert capsys.readouterr().out == (
        "             documents     tokens\na                    2  1,001,234\nmuch_longer      1,500      1,500\ntotal            1,502  1,002,734\n"
    )
    assert main("a") == 0
    assert capsys.readouterr().out == "   documents     tokens\na          2  1,001,234\n"


def test_a_missing_or_broken_pair_is_a_sentence(
    main: Callable[..., int], tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a", [[1, 2, 3]])
    os.truncate(tmp_path / "a.bin", 4)
    assert main(tmp_path / "a") == 1
    assert "a.bin has 4 bytes but a.idx describes 6 (3 tokens of 2 bytes)" in capsys.readouterr().err
    os.truncate(tmp_path / "a.idx", 40)
    assert main(tmp_path / "a") == 1
    assert "a.idx is cut short: it has 40 bytes" in capsys.readouterr().err
    os.remove(tmp_path / "a.bin")
    command = [sys.executable, str(repository / "tools/datasets/dataset_token_count.py"), str(tmp_path / "a")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"no file {tmp_path}/a.bin; `python prepare_data.py` makes such files from text\n"
