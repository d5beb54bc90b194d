"""Index maps are found again under the same circumstances only: never stale, and safe from races and damage."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.data.indexed import DatasetError, IndexedDataset
from megatron.data.sample import map_cache
from megatron.data.sample.index_map import IndexMaps, build_index_maps
from megatron.data.sample.map_cache import load_or_build
from tests.data.conftest import write


def equal(one: IndexMaps, other: IndexMaps) -> bool:
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_cached_map_equals_a_built_one(numbered: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = IndexedDataset(numbered([3, 2, 4, 5]))
    first = load_or_build(dataset, range(4), seq_length=4, num_samples=10, seed=1234)
    monkeypatch.setattr(map_cache, "build_index_maps", None)
    assert equal(load_or_build(dataset, range(4), seq_length=4, num_samples=10, seed=1234), first)
    assert isinstance(first.sample_index, np.memmap)


@pytest.mark.parametrize("change", [{"documents": range(3)}, {"seq_length": 3}, {"num_samples": 11}, {"seed": 1}])
def test_other_settings_never_reuse_a_map(numbered: Callable[..., Path], change: dict[str, Any]) -> None:
    dataset = IndexedDataset(numbered([3, 2, 4, 5]))
    settings: dict[str, Any] = {"documents": range(4), "seq_length": 4, "num_samples": 10, "seed": 1234}
    load_or_build(dataset, **settings)
    changed = {**settings, **change}
    documents = changed.pop("documents")
    expected = build_index_maps(dataset.sizes, np.array(documents), **changed)
    assert equal(load_or_build(dataset, documents, **changed), expected)


def test_rewritten_data_never_reuses_a_map(tmp_path: Path) -> None:
    """Same name, same size, same time of change: only the content tells."""
    prefix = write(tmp_path / "text", [[1] * 5, [2] * 9])
    stamp = os.stat(f"{prefix}.idx").st_mtime_ns
    load_or_build(IndexedDataset(prefix), range(2), seq_length=4, num_samples=3, seed=1)
    write(prefix, [[1] * 9, [2] * 5])
    os.utime(f"{prefix}.idx", ns=(stamp, stamp))
    dataset = IndexedDataset(prefix)
    expected = build_index_maps(dataset.sizes, np.arange(2), seq_length=4, num_samples=3, seed=1)
    assert equal(load_or_build(dataset, range(2), seq_length=4, num_samples=3, seed=1), expected)


def test_a_damaged_cache_is_built_again(numbered: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    dataset = IndexedDataset(numbered([3, 2, 4, 5]))
    first = load_or_build(dataset, range(4), seq_length=4, num_samples=10, seed=1234)
    expected = IndexMaps(*(np.array(values) for values in first))
    (damaged,) = dataset.prefix.parent.glob("index_maps/text-*/sample_index.npy")
    os.truncate(damaged, 100)
    assert equal(load_or_build(dataset, range(4), seq_length=4, num_samples=10, seed=1234), expected)
    assert "is damaged" in caplog.text
    caplog.clear()
    load_or_build(dataset, range(4), seq_length=4, num_samples=10, seed=1234)
    assert not caplog.text


def build_in_process(prefix: Path, barrier: Any, results: Any) -> None:
    barrier.wait()
    maps = load_or_build(IndexedDataset(prefix), range(4), seq_length=4, num_samples=20_000, seed=5)
    results.put(int(maps.shuffle_index.astype(np.int64) @ np.arange(len(maps.shuffle_index))))


def test_processes_that_build_at_once_agree(numbered: Callable[..., Path]) -> None:
    prefix = numbered([3, 2, 4, 5])
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    processes = [context.Process(target=build_in_process, args=(prefix, barrier, results)) for _ in range(4)]
    for process in processes:
        process.start()
    assert len({results.get(timeout=30) for _ in processes}) == 1
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(list((prefix.parent / "index_maps").iterdir())) == 1


def test_read_only_data_uses_the_user_cache_and_says_so(numbered: Callable[..., Path], user_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = IndexedDataset(numbered([3, 2, 4, 5]))
    (dataset.prefix.parent / "index_maps").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        load_or_build(dataset, range(4), seq_length=4, num_samples=10, seed=1234)
    assert "using the user cache directory" in caplog.text
    assert len(list(user_cache.iterdir())) == 1


def test_no_place_to_write_keeps_the_maps_in_memory(numbered: Callable[..., Path], user_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = IndexedDataset(numbered([3, 2, 4, 5]))
    user_cache.parent.mkdir(parents=True)
    for place in (dataset.prefix.parent / "index_maps", user_cache):
        place.write_text("in the way")
    maps = load_or_build(dataset, range(4), seq_length=4, num_samples=10, seed=1234)
    assert "keeping in memory" in caplog.text
    assert maps.shuffle_index.tolist() == [3, 9, 2, 1, 7, 5, 4, 0, 8, 6]


def test_too_little_text_is_explained(numbered: Callable[..., Path]) -> None:
    dataset = IndexedDataset(numbered([3, 2]))
    with pytest.raises(
        DatasetError, match=r"text: 2 documents with 5 tokens in all are not enough for one sample of seq_length \+ 1 = 9 tokens; use more"
    ):
        load_or_build(dataset, range(2), seq_length=8, num_samples=None, seed=1)
    with pytest.raises(DatasetError, match="2 documents with 0 tokens in all"):
        load_or_build(IndexedDataset(numbered([0, 0], "empty")), range(2), seq_length=8, num_samples=1, seed=1)
    with pytest.raises(DatasetError, match="no documents to draw samples from"):
        load_or_build(dataset, range(2, 2), seq_length=8, num_samples=1, seed=1)


def test_neox_s_own_maps_beside_the_data_are_not_used(numbered: Callable[..., Path]) -> None:
    """Their names hold neither the split nor the data: what lies there may be of another file."""
    dataset = IndexedDataset(numbered([3, 2, 4, 5]))
    for name in ("doc_idx", "sample_idx", "shuffle_idx"):
        np.save(f"{dataset.prefix}_train_indexmap_10ns_4sl_1234s_packedpi_ac_{name}.npy", np.zeros((11, 2), np.int32))
    maps = load_or_build(dataset, range(4), seq_length=4, num_samples=10, seed=1234)
    assert maps.shuffle_index.tolist() == [3, 9, 2, 1, 7, 5, 4, 0, 8, 6]
