"""Blending against NeoX's golden vectors, and weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.data.blend import BlendedDataset, check_weights, samples_each, shares, weights_by_documents
from megatron.data.builders import builders
from megatron.data.indexed import DatasetError, IndexedDataset
from megatron.data.sample.map_cache import load_or_build
from megatron.data.sample.packed import PackedDataset
from megatron.data.sample.samples import Source


def test_golden_vector(golden: dict[str, Any]) -> None:
    dataset, sample = builders().blend(np.array(golden["blend"]["weights"]), 10)
    assert np.stack([dataset, sample], axis=1).tolist() == golden["blend"]["order"]


def test_golden_vector_of_weights_by_numbers_of_documents(golden: dict[str, Any]) -> None:
    case = golden["documents"]
    assert [round(weight, 4) for weight in weights_by_documents(case["counts"], case["alpha"])] == case["weights"]
    assert weights_by_documents([7], 0.3) == [1.0]
    assert weights_by_documents([5, 5], 1.0) == [0.5, 0.5]
    assert weights_by_documents([1, 3], 1.0) == [0.5, 0.5]  # p (1 - p) is the same for both of two


def test_weights_by_numbers_of_documents_that_give_none() -> None:
    with pytest.raises(DatasetError, match="weight_by_num_documents: none of the 2 corpora has a document"):
        weights_by_documents([0, 0], 0.3)
    with pytest.raises(DatasetError, match="all documents are in one corpus, and this rule gives it the weight 0"):
        weights_by_documents([0, 9], 0.3)


def test_weights_are_summed_one_by_one() -> None:
    """Pairwise and compensated sums give 1 and 0.1 here; in ties the last bit decides which data set comes next."""
    assert shares([0.1] * 10) == [0.1 / 0.9999999999999999] * 10
    assert shares([0.1] * 10) != [0.1] * 10


def test_each_set_is_asked_for_half_a_percent_more() -> None:
    assert samples_each([1, 3], 1000) == [252, 754]


def test_a_blend_draws_from_its_parts_and_repeats_short_ones(numbered: Callable[..., Path]) -> None:
    parts = []
    for name, sizes, count in (("long", [40, 60], 30), ("short", [9, 4], 2)):
        file = IndexedDataset(numbered(sizes, name))
        parts.append(PackedDataset(Source(file), load_or_build(file, range(2), seq_length=4, num_samples=count, seed=1), name))
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
