"""tools/bench/preprocess.py measures something."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_it_prints_ratios(repository: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("We the people of the united states.\n" * 300)
    command = [sys.executable, str(repository / "tools" / "bench" / "preprocess.py"), "--megabytes", "0.05", "--rounds", "1", "--workers", "1"]
    finished = subprocess.run([*command, "--input", str(text)], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    result = json.loads(finished.stdout)
    assert result["workers"] == 1
    assert result["tokens"] > 1000
    assert 0 < result["ratio"] < 10
