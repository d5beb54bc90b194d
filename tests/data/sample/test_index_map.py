"""The order of packed samples against NeoX's golden vector."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron.data.indexed import DatasetError
from megatron.data.sample.index_map import IndexMaps, build_index_maps


def equal(one: IndexMaps, other: IndexMaps) -> bool:
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_golden_vector(golden: dict[str, Any]) -> None:
    packed = golden["packed"]
    sizes_N = np.array(packed["sizes"], np.int32)
    maps = build_index_maps(sizes_N, np.arange(4), seq_length=packed["seq_length"], num_samples=packed["num_samples"], seed=packed["seed"])
    assert {name: values.tolist() for name, values in maps._asdict().items()} == {name: packed[name] for name in IndexMaps._fields}
    assert [values.dtype for values in maps] == [np.int32, np.int32, np.uint32]


@pytest.mark.parametrize(("num_samples", "epochs"), [(0, 1), (3, 1), (4, 2), (6, 2), (7, 3)])
def test_the_fewest_epochs_that_suffice(num_samples: int, epochs: int) -> None:
    maps = build_index_maps(np.array([3, 2, 4, 5], np.int32), np.arange(4), seq_length=4, num_samples=num_samples, seed=1)
    assert len(maps.document_index) == 4 * epochs
    assert len(maps.shuffle_index) == (14 * epochs - 1) // 4


def test_one_epoch_whatever_it_gives() -> None:
    sizes_N = np.array([3, 2, 4, 5], np.int32)
    one = build_index_maps(sizes_N, np.arange(4), seq_length=4, num_samples=None, seed=1234)
    assert equal(one, build_index_maps(sizes_N, np.arange(4), seq_length=4, num_samples=3, seed=1234))
    assert sorted(one.document_index.tolist()) == [0, 1, 2, 3]


def test_maps_larger_than_the_memory_are_refused_before_they_are_built() -> None:
    """More samples than 32 bits can count are fine as such; the memory is the limit."""
    message = r"the order of 9,000,000,000,\d+ samples from 10,285,714,[\d,]+ documents .* needs .* GiB of memory, but .* GiB are free"
    with pytest.raises(DatasetError, match=message):
        build_index_maps(np.array([3, 2, 4, 5], np.int32), np.arange(4), seq_length=4, num_samples=9 * 10**12, seed=1)
