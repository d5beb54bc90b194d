"""Several data sets in fixed proportions. The next sample comes from the data set that is furthest behind its weight, as in NeoX.

Shapes: D data sets, I samples
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from pathlib import PurePath

import numpy as np
from torch.utils.data import Dataset

from megatron.data.builders import builders
from megatron.data.indexed import DatasetError
from megatron.data.sample.samples import SampleDataset

MAX_DATASETS = 254
MARGIN = 1.005  # NeoX asks each data set for this much more than its share


class BlendedDataset(Dataset[dict[str, np.ndarray]]):
    """Samples of several data sets, interleaved by weight. Its length is the sum of their lengths.

    With `names`, one for each data set, each sample has the number of its data set under "corpus" (int64).
    """

    def __init__(self, datasets: Sequence[SampleDataset], weights: Sequence[float], names: Sequence[str] = ()) -> None:
        self.datasets = list(datasets)
        self.names = tuple(names)
        self.dataset_index, self.sample_index = builders().blend(normalise(weights), sum(map(len, self.datasets)))

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        corpus = int(self.dataset_index[index])
        sample = self.datasets[corpus].wrapped(int(self.sample_index[index]))
        return sample | {"corpus": np.array(corpus)} if self.names else sample


def normalise(weights: Sequence[float]) -> np.ndarray:
    """float64 [D] that sum to 1."""
    values = np.array(shares(weights), dtype=np.float64)
    return values / values.sum()


def shares(weights: Sequence[float]) -> list[float]:
    """The weights divided by their sum. The sum is added one by one, because NumPy and newer Pythons round it differently from NeoX, and ties
        depend on
    the last bit."""
    total = functools.reduce(operator.add, weights)
    return [weight / total for weight in weights]


def check_weights(weights: Sequence[float] | None, paths: Sequence[str], key: str) -> list[float]:
    """One weight for each path; all are 1 if none are given. Raises DatasetError if paths and weights do not match."""
    if len(paths) > MAX_DATASETS:
        raise DatasetError(f"{key}_data_paths has {len(paths)} entries; at most {MAX_DATASETS} can be blended: merge some of the files")
    if weights is None:
        return [1.0] * len(paths)
    if len(weights) != len(paths):
        raise DatasetError(f"{key}_data_weights has {len(weights)} numbers for {len(paths)} {key}_data_paths; give one weight a path")
    if min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise DatasetError(f"{key}_data_weights = {list(weights)}: weights must not be negative and at least one must be positive")
    return [float(weight) for weight in weights]


def corpus_names(paths: Sequence[str]) -> list[str]:
    """A name for each corpus: the last part of its path. If several have the same last part: the whole path. If several have the same path: a
    number too."""
    last = [PurePath(path).name for path in paths]
    names = [path if last.count(name) > 1 else name for path, name in zip(paths, last, strict=True)]
    return [f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def weights_by_documents(counts: Sequence[int], alpha: float) -> list[float]:
    """NeoX's weight_by_num_documents: with p a set's part of all documents, p^alpha / sum(p^alpha) * (1 - p), normalised; 1 for a set alone.

    Raises DatasetError where that gives no weight at all.
    """
    total = sum(counts)
    if not total:
        raise DatasetError(f"weight_by_num_documents: none of the {len(counts)} corpora has a document")
    if len(counts) == 1:
        return [1.0]
    share_D = [count / total for count in counts]
    weight_D = [boosted * (1 - share) for boosted, share in zip(shares([share**alpha for share in share_D]), share_D, strict=True)]
    if not any(weight_D):
        raise DatasetError(
            "weight_by_num_documents: all documents are in one corpus, and this rule gives it the weight 0; leave the empty corpora out"
        )
    return shares(weight_D)


def samples_each(weights: Sequence[float], num_samples: int) -> list[int]:
    """How many samples to ask of each data set so that a blend of `num_samples` does not run out."""
    return [math.ceil(num_samples * weight * MARGIN) for weight in shares(weights)]
