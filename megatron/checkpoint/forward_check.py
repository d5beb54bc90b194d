"""Whether a loaded model computes what the saved one computed: logits of a fixed input, stored in the checkpoint (NeoX's
`checkpoint_validation_with_forward_pass`).

Shapes: S positions; V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.errors import CheckpointError

KEY = "checkpoint_validation_logits"
"""NeoX's name for them in the client state."""
POSITIONS = 32
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Largest difference, as a share of the largest logit: rounding differs between devices and numbers of threads."""


def validation_input(positions: int, vocabulary: int) -> Tensor:
    """Tokens 0, 1, 2, ... [1, S], as NeoX has them; they start again where the vocabulary ends."""
    return (torch.arange(positions) % vocabulary)[None]


def validation_logits(run: Callable[[Tensor], Tensor], *, positions: int, vocabulary: int) -> Tensor:
    """Logits [S, V] in float32, on the CPU. `run`: the model in evaluation, tokens [1, S] to logits [1, S, V]."""
    with torch.no_grad():
        return run(validation_input(positions, vocabulary))[0].float().cpu()


def check_validation_logits(path: Path, stored: Any, run: Callable[[Tensor], Tensor], *, positions: int, vocabulary: int, dtype: torch.dtype) -> str:
    """A sentence on how well the model agrees with the checkpoint's logits, or on why that cannot be said.

    At most `positions` of them are compared (NeoX stores a whole sequence), in the columns that both vocabularies have. Raises CheckpointError when
    the difference is larger than rounding makes it.
    """
    if not isinstance(stored, Tensor) or stored.ndim != 2 or not stored.numel():
        return f"{path} holds no logits, so the model cannot be checked. It was saved without checkpoint_validation_with_forward_pass."
    rows, columns = min(stored.shape[0], positions), min(stored.shape[1], vocabulary)
    computed = validation_logits(run, positions=rows, vocabulary=vocabulary)[:, :columns]
    expected = stored[:rows, :columns].float()
    difference, largest = float((computed - expected).abs().max()), float(expected.abs().max())
    allowed = TOLERANCE[dtype] * largest
    if not difference <= allowed:
        raise CheckpointError(
            f"{path}: the loaded model does not give the logits of the saved model. They differ by up to {difference:.3g} (allowed: {allowed:.3g}, "
            f"the largest is {largest:.3g}). Load it with the configuration of its training ({path / 'configs'}), or remove "
            "checkpoint_validation_with_forward_pass."
        )
    return f"{path}: the loaded model's logits agree with the saved ones (largest difference {difference:.2g}, largest logit {largest:.2g})."
