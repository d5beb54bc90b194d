"""The list that goes to the disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron.data import long_list
from megatron.data.indexed import IndexedDatasetWriter
from megatron.data.long_list import LongList


def test_numbers_come_back_in_order_from_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_list, "KEPT_BYTES", 64)
    numbers = LongList(tmp_path, np.dtype("<i8"))
    for start in range(0, 100, 10):
        numbers.extend(np.arange(start, start + 10))
        numbers.append(-start)
    assert len(numbers) == 110
    expected = [value for start in range(0, 100, 10) for value in (*range(start, start + 10), -start)]
    for _ in range(2):
        assert [int(value) for piece in numbers.pieces() for value in piece] == expected
    assert len(list(numbers.pieces())) > 5
    assert not list(tmp_path.iterdir())
    numbers.close()


def test_a_pair_is_the_same_whatever_lies_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [[1] * (number % 7) for number in range(200)]
    for name, kept in (("memory", 1 << 20), ("disk", 32)):
        monkeypatch.setattr(long_list, "KEPT_BYTES", kept)
        with IndexedDatasetWriter(tmp_path / name, np.dtype("<u2")) as writer:
            for row in rows:
                writer.add(row)
    assert (tmp_path / "disk.idx").read_bytes() == (tmp_path / "memory.idx").read_bytes()
