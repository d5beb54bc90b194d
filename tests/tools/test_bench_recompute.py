"""tools/bench/recompute.py: it runs, and whole layers keep less than modules, and modules less than nothing recomputed."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest


def test_every_way_is_measured(repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("bench_recompute", repository / "tools/bench/recompute.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = ["num_layers=2", "seq_length=32", "hidden_size=64", "num_attention_heads=4", "num_kv_heads=2", "moe_ffn_hidden_size=32"]
    config = str(repository / "configs/quickstart.yml")
    monkeypatch.setattr(sys, "argv", ["recompute.py", config, "--vocabulary", "128", "--rounds", "1", "--override", *small])
    module.main()
    rows = re.findall(r"^\| `(.+?)` \| ([\d.]+) (\w+) \| ([\d.]+)x \| [\d.]+ \|$", capsys.readouterr().out, re.MULTILINE)
    assert [name for name, *_ in rows] == list(module.WAYS)
    sizes = {name: float(size) * {"KiB": 1, "MiB": 1024}[unit] for name, size, unit, _ in rows}
    nothing, attention, experts, moe, both, layers, pairs = sizes.values()
    assert nothing > attention > both > layers >= pairs
    assert nothing > experts > moe > both
    assert [rows[0][3], rows[-1][3]] == ["1.00", "1.33"]
