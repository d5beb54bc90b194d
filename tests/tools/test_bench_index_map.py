"""tools/bench/index_map.py measures both kinds of builders and says what it did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def measured(repository: Path, *arguments: str) -> list[dict[str, Any]]:
    """One line for each kind of builders, in the order in which they are measured."""
    command = [sys.executable, "tools/bench/index_map.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_both_builders_are_measured(repository: Path) -> None:
    sizes = ["--documents", "3000", "--mean-tokens", "50", "--seq-length", "100"]
    lines = measured(repository, *sizes, "--pack-impl", "packed", "pack_until_overflow")
    assert [line["builders"] for line in lines] == ["compiled", "numpy"] * 2
    assert {"seconds", "cpu_seconds", "peak_MiB", "samples"} <= set(lines[1])
    assert all("skipped" in line or (line["documents"] == 3000 and 0 < line["peak_MiB"] < 500) for line in lines)


@pytest.mark.slow
def test_ten_million_documents_take_less_than_ten_seconds_and_a_gigabyte(repository: Path) -> None:
    """Of processor time: what a machine with other work to do takes on top says nothing about the builders."""
    for line in measured(repository):
        assert "skipped" in line or (line["documents"] == 10_000_000 and line["cpu_seconds"] < 10 and line["peak_MiB"] < 1000)
