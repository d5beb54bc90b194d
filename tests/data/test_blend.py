"""Blending order against NeoX's golden vector and the plain greedy loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.data.blend import BLOCK, BlendedDataset, build_blend, check_weights, normalise, samples_each
from megatron.data.index_map import load_or_build
from megatron.data.indexed import DatasetError, IndexedDataset
from megatron.data.packed import PackedDataset


def greedy(weights: np.ndarray, size: int) -> list[tuple[int, int]]:
    """NeoX's C++ loop, in Python: the definition."""
    counts, order = [0] * len(weights), []
    for i in range(size):
        lag = [weight * max(float(i), 1.0) - count for weight, count in zip(weights.tolist(), counts, strict=True)]
        best = lag.index(max(lag))
        order.append((best, counts[best]))
        counts[best] += 1
    return order


def blended(weights: np.ndarray, size: int) -> list[tuple[int, int]]:
    dataset, sample = build_blend(weights, size)
    return list(zip(dataset.tolist(), sample.tolist(), strict=True))


def test_golden_vector(golden: dict[str, Any]) -> None:
    assert [list(pair) for pair in blended(np.array(golden["blend"]["weights"]), 10)] == golden["blend"]["order"]


@pytest.mark.parametrize("weights", [[1.0], [1, 1], [1, 1, 1], [0.2, 0.5, 0.3], [0, 1, 2], [1e-9, 1], [0.7, 0.1, 0.1, 0.1], [3, 1, 4, 1, 5, 9, 2, 6]])
@pytest.mark.parametrize("size", [0, 1, BLOCK, 3 * BLOCK + 5])
def test_blocks_side_by_side_equal_the_plain_loop(weights: list[float], size: int) -> None:
    assert blended(normalise(weights), size) == greedy(normalise(weights), size)


def test_many_random_weights() -> None:
    rng = np.random.default_rng(0)
    for count in (2, 3, 10, 100):
        weights = normalise(rng.random(count) ** 4)
        assert blended(weights, 2 * BLOCK + 100) == greedy(weights, 2 * BLOCK + 100)


def test_each_set_is_asked_for_half_a_percent_more() -> None:
    assert samples_each([1, 3], 1000) == [252, 754]


def test_a_blend_draws_from_its_parts_and_repeats_short_ones(numbered: Callable[..., Path]) -> None:
    parts = []
    for name, sizes, count in (("long", [40, 60], 30), ("short", [9, 4], 2)):
        file = IndexedDataset(numbered(sizes, name))
        parts.append(PackedDataset(file, load_or_build(file, range(2), seq_length=4, num_samples=count, seed=1), name))
    dataset = BlendedDataset(parts, [1, 1])
    assert len(dataset) == len(parts[0]) + len(parts[1])
    for i in range(len(dataset)):
        part, sample = int(dataset.dataset_index[i]), int(dataset.sample_index[i])
        stored = len(parts[part].maps.shuffle_index)
        expected = parts[part].wrapped(sample if sample < stored else sample % len(parts[part]))
        assert dataset[i]["text"].tolist() == expected["text"].tolist()
    with pytest.raises(IndexError, match=f"sample {len(dataset)} of {len(dataset)}"):
        dataset[len(dataset)]


def test_weights_must_match_the_paths() -> None:
    assert check_weights(None, ["a", "b"], "train") == [1, 1]
    with pytest.raises(DatasetError, match="train_data_weights has 1 numbers for 2 train_data_paths"):
        check_weights([1.0], ["a", "b"], "train")
    for weights in ([-1.0, 2.0], [0.0, 0.0], [float("nan"), 1.0]):
        with pytest.raises(DatasetError, match=r"valid_data_weights = .*: weights must not be negative"):
            check_weights(weights, ["a", "b"], "valid")
    with pytest.raises(DatasetError, match="test_data_paths has 255 entries; at most 254"):
        check_weights(None, ["a"] * 255, "test")
