"""tools/bench/index_map.py measures both kinds of builders and says what it did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_both_builders_are_measured(repository: Path) -> None:
    command = [sys.executable, "tools/bench/index_map.py", "--documents", "3000", "--mean-tokens", "50", "--seq-length", "100"]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    arguments = ["--pack-impl", "packed", "pack_until_overflow"]
    done = subprocess.run([*command, *arguments], cwd=repository, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["builders"] for line in lines] == ["compiled", "numpy"] * 2
    assert {"seconds", "cpu_seconds", "peak_MiB", "samples"} <= set(lines[1])
    assert all("skipped" in line or (line["documents"] == 3000 and 0 < line["peak_MiB"] < 500) for line in lines)
