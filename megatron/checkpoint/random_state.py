"""The random states of a process -- Python, NumPy, PyTorch, CUDA -- under NeoX's names, as plain values that can be read safely."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from megatron.checkpoint.errors import CheckpointError

KEYS = ("random_rng_state", "np_rng_state", "torch_rng_state", "cuda_rng_state")


def capture_random_state() -> dict[str, Any]:
    """This process's states. NumPy's array becomes a list, which `numpy.random.set_state` takes as well; without CUDA its state is None."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": (kind, [int(key) for key in keys], position, has_gauss, gauss),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Makes every generator go on where `state` was captured. Raises CheckpointError when a state is missing or malformed."""
    missing = [key for key in KEYS if key not in state]
    if missing:
        raise CheckpointError(
            f"The checkpoint holds no random state ({', '.join(missing)} missing), because it was saved with no_save_rng. Load it with no_load_rng."
        )
    try:
        version, internal, gauss = state["random_rng_state"]
        random.setstate((version, tuple(internal), gauss))
        np.random.set_state(state["np_rng_state"])
        torch.set_rng_state(state["torch_rng_state"])
        if state["cuda_rng_state"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda_rng_state"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"The checkpoint's random state cannot be used ({error}). Load it with no_load_rng.") from error


def derive_random_state(*, seed: int, iteration: int, data_parallel_rank: int) -> None:
    """New states for a run that goes on in another layout: they follow from the run's seed, the step and the data-parallel rank alone, so that
    processes that share a model have the same, and a second resume is the same as the first."""
    digest = hashlib.sha256(f"{seed} {iteration} {data_parallel_rank}".encode()).digest()
    number = int.from_bytes(digest[:8], "little")
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number % 2**63)
