"""The sizes that docs/papers.md states are those of the shipped configurations."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron.analysis.size import Layout, read_sizes

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| `(\S+\.yml)`[^|]*\| ([\d,]+) \| ([\d,]+) \| (\S+) \|$", re.MULTILINE)
ROWS = ROW.findall((ROOT / "docs/papers.md").read_text())


def test_every_size_has_its_row() -> None:
    assert len(ROWS) == 15


@pytest.mark.parametrize(("file", "total", "active", "flops"), ROWS)
def test_sizes(file: str, total: str, active: str, flops: str) -> None:
    (size,) = read_sizes([str(ROOT / "configs" / file)], Layout())
    assert (f"{size.count.total_sum:,}", f"{size.count.active_sum:,}", f"{size.flops:.3e}") == (total, active, flops)
