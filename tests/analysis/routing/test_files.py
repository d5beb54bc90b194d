"""Findings survive being written and read; what is no such file is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.analysis.routing.example import example
from megatron.analysis.routing.files import FindingsError, read_findings, write_findings


def same(one: Any, other: Any) -> bool:
    if dataclasses.is_dataclass(one):
        return type(one) is type(other) and all(same(getattr(one, part.name), getattr(other, part.name)) for part in dataclasses.fields(one))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and bool(np.allclose(one, other, rtol=1e-6, equal_nan=True))
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return type(other) is float and one == pytest.approx(other, rel=1e-6, nan_ok=True)
    return bool(one == other)


@pytest.mark.parametrize(("models", "lores"), [(1, 0), (2, 4)])
def test_what_is_written_is_read(models: int, lores: int, tmp_path: Path) -> None:
    found = example(400, models=models, lores=lores)
    write_findings(found, tmp_path / "routing.json")
    read = read_findings(tmp_path / "routing.json")
    assert same(found, read)
    assert (read.saturation is None) == (models == 1)
    assert (read.models[0].lores is None) == (lores == 0)
    json.loads((tmp_path / "routing.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"routing\.json is no JSON: .*Write it again with tools/analysis/routing\.py"),
        ("[]", r"is no routing\.json of this version \(format 1\)"),
        ('{"format": 2, "models": []}', r"is no routing\.json of this version"),
        ('{"format": 1, "models": [{"name": "x"}]}', r"does not hold what routing\.json holds"),
    ],
)
def test_another_file_is_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "routing.json").write_text(content)
    with pytest.raises(FindingsError, match=message):
        read_findings(tmp_path / "routing.json")


def test_a_file_that_cannot_be_written_or_read(tmp_path: Path) -> None:
    with pytest.raises(FindingsError, match="cannot be written: No such file or directory"):
        write_findings(example(100, models=1), tmp_path / "missing" / "routing.json")
    with pytest.raises(FindingsError, match="cannot be read: No such file or directory"):
        read_findings(tmp_path / "routing.json")
