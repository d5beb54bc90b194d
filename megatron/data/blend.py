"""Several data sets in fixed proportions: at every sample the one that lags furthest behind its weight is next (NeoX 5.3).

Shapes: D data sets, I samples, B blocks simulated side by side
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from megatron.data.indexed import DatasetError
from megatron.data.packed import PackedDataset

MAX_DATASETS = 254
MARGIN = 1.005  # NeoX asks each data set for this much more than its share
BLOCK = 2048
WARM_UP = 256


class BlendedDataset(Dataset[dict[str, np.ndarray]]):
    """Samples of several PackedDatasets interleaved by weight; as long as all of them together."""

    def __init__(self, datasets: Sequence[PackedDataset], weights: Sequence[float]) -> None:
        self.datasets = list(datasets)
        self.dataset_index, self.sample_index = build_blend(normalise(weights), sum(map(len, self.datasets)))

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.datasets[int(self.dataset_index[index])].wrapped(int(self.sample_index[index]))


def normalise(weights: Sequence[float]) -> np.ndarray:
    """float64 [D] that sum to 1."""
    values = np.array(weights, dtype=np.float64)
    return values / values.sum()


def check_weights(weights: Sequence[float] | None, paths: Sequence[str], key: str) -> list[float]:
    """One weight a path, all 1 when None are given. Raises DatasetError when they do not match."""
    if len(paths) > MAX_DATASETS:
        raise DatasetError(f"{key}_data_paths has {len(paths)} entries; at most {MAX_DATASETS} can be blended: merge some of the files")
    if weights is None:
        return [1.0] * len(paths)
    if len(weights) != len(paths):
        raise DatasetError(f"{key}_data_weights has {len(weights)} numbers for {len(paths)} {key}_data_paths; give one weight a path")
    if min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise DatasetError(f"{key}_data_weights = {list(weights)}: weights must not be negative and at least one must be positive")
    return [float(weight) for weight in weights]


def samples_each(weights: Sequence[float], num_samples: int) -> list[int]:
    """How many samples to ask of each data set so that a blend of `num_samples` does not run out."""
    return [math.ceil(num_samples * weight * MARGIN) for weight in normalise(weights)]


def build_blend(weights_D: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(data set uint8 [I], sample in it int64 [I]): argmax_d(weights_D[d] * max(i, 1) - count_d), the first of equals.

    Every choice depends on the one before, so blocks are simulated side by side from guessed starting counts, and a block
    whose guess was not what the block before it ended with is done again: the result is exact, guesses only save time.
    """
    blocks = -(-size // BLOCK)
    begin_B = np.arange(blocks) * BLOCK
    guess_BD = guess_counts(weights_D, np.maximum(begin_B - WARM_UP, 0))
    start_BD, _ = simulate(weights_D, np.maximum(begin_B - WARM_UP, 0), guess_BD, WARM_UP)
    start_BD[:1] = 0
    chosen_BI = np.empty((blocks, BLOCK), np.uint8)
    end_BD = np.empty_like(start_BD)
    todo = np.arange(blocks)
    while len(todo):
        end_BD[todo], chosen_BI[todo] = simulate(weights_D, begin_B[todo], start_BD[todo], BLOCK)
        todo = 1 + np.flatnonzero((start_BD[1:] != end_BD[:-1]).any(axis=1))
        start_BD[todo] = end_BD[todo - 1]
    chosen_I = chosen_BI.reshape(-1)[:size]
    sample_I = np.empty(size, np.int64)
    for dataset in range(len(weights_D)):
        places = np.flatnonzero(chosen_I == dataset)
        sample_I[places] = np.arange(len(places))
    return chosen_I, sample_I


def guess_counts(weights_D: np.ndarray, begin_B: np.ndarray) -> np.ndarray:
    """Likely counts after begin_B samples: the exact shares rounded so that each row sums to begin_B."""
    exact_BD = begin_B[:, None] * weights_D
    counts_BD = np.floor(exact_BD)
    missing_B = begin_B - counts_BD.sum(axis=1)
    rank_BD = np.argsort(np.argsort(counts_BD - exact_BD, axis=1, kind="stable"), axis=1)
    return counts_BD + (rank_BD < missing_B[:, None])


def simulate(weights_D: np.ndarray, begin_B: np.ndarray, counts_BD: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(counts after, choices [B, steps]) of `steps` steps of the rule in every block at once."""
    counts_BD = counts_BD.copy()
    chosen_BI = np.empty((len(begin_B), steps), np.uint8)
    every_B = np.arange(len(begin_B))
    for step in range(steps):
        lag_BD = weights_D * np.maximum(begin_B + step, 1).astype(np.float64)[:, None] - counts_BD
        choice_B = lag_BD.argmax(axis=1)
        counts_BD[every_B, choice_B] += 1
        chosen_BI[:, step] = choice_B
    return counts_BD, chosen_BI
