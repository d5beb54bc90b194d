"""Cores: affinity and quota, whichever is smaller."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron.config import machine


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cgroup folder on a machine of which this process may use four cores."""
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 5}, raising=False)
    return tmp_path


def test_without_a_quota_the_affinity_decides(cgroups: Path) -> None:
    assert machine.usable_cores() == 4


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 4), ("200000 100000", 2), ("150000 100000", 2), ("20000 100000", 1), ("1600000 100000", 4), ("0 100000", 4), ("rubbish", 4)],
)
def test_quota_of_version_2(cgroups: Path, quota: str, cores: int) -> None:
    (cgroups / "cpu.max").write_text(quota + "\n")
    assert machine.usable_cores() == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1", 4), ("250000", 3)])
def test_quota_of_version_1(cgroups: Path, quota: str, cores: int) -> None:
    (cgroups / "cpu").mkdir()
    (cgroups / "cpu/cpu.cfs_quota_us").write_text(quota + "\n")
    (cgroups / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert machine.usable_cores() == cores


def test_a_system_without_affinity_counts_its_cores(cgroups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert machine.usable_cores() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert machine.usable_cores() == 1


def test_a_folder_of_a_package_s_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Weights & Biases leaves one beside a run."""
    for name in ("wandb_of_nobody", "tiktoken_of_nobody/x"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not machine.is_installed("wandb_of_nobody")
    assert not machine.is_installed("nothing_at_all")
    assert machine.is_installed("json")
    with pytest.raises(ImportError, match="tiktoken_of_nobody is a folder, not a package"):
        machine.import_optional("tiktoken_of_nobody")
    assert machine.import_optional("json").dumps([]) == "[]"
