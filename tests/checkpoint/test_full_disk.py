"""A disk that is full or may not be written: a sentence on every rank, and what was there stays."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint.load import CheckpointError
from megatron.checkpoint.save import prepare

NO_SMALL_DISK = "a small disk cannot be mounted here (needs root)"


def test_one_rank_that_cannot_write_stops_the_save_on_all(two: list[dict[str, Any]], root: Path) -> None:
    for result in (results["fill_up"] for results in two):
        assert "Could not save" in result["sentence"]
        assert "global_step2: File too large" in result["sentence"]
        assert "(on rank 1; 1 of 2 ranks failed)" in result["sentence"]
        assert result["found"] == str(root / "full" / "global_step1")
        assert result["left"] == ["global_step1", "latest"]
        assert result["after"] == str(root / "full" / "global_step2")


def test_a_full_disk(one: dict[str, Any]) -> None:
    if "fill_disk" not in one:
        pytest.skip(NO_SMALL_DISK)
    result = one["fill_disk"]
    assert "global_step2: No space left on device. The incomplete files have been removed" in result["sentence"]
    assert (result["found"], result["left"]) == ("global_step1", ["global_step1", "latest"])
    assert result["after"] == "global_step2"


def test_a_directory_that_cannot_be_made(one: dict[str, Any]) -> None:
    assert one["unwritable"].startswith("Could not save into ")
    assert "Not a directory" in one["unwritable"]


def test_a_disk_mounted_read_only(small_disk: Path | None) -> None:
    if small_disk is None:
        pytest.skip(NO_SMALL_DISK)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match=r"Could not save into .*Read-only file system"):
        prepare(small_disk / "run")
