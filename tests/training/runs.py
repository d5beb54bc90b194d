"""Training runs inside a test's own processes: what to train, and what to bring home from it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megatron.config.loader import LoadedConfig
from megatron.testing.tiny import TINY_STRUCTMOE, tiny_config


def run_values(corpus: Path, save: Path | None, **overrides: Any) -> dict[str, Any]:
    """Key values of a tiny StructMoE on the fox corpus; `save` None saves nothing."""
    saving = {"save": str(save), "checkpoint_factor": 4} if save is not None else {}
    return {
        **TINY_STRUCTMOE,
        "data_path": str(corpus),
        "split": "80, 10, 10",
        "tokenizer_type": "CharLevelTokenizer",
        **saving,
        **overrides,
    }


def train_losses(values: Mapping[str, Any], *, picture: bool = False) -> list[float]:
    """Trains in this process and returns the loss of every step (NaN as None). For run_distributed(..., backend=None).

    Without `picture`, and where the values name no `plot_file`, no picture is drawn: that takes longer than the steps.
    """
    from megatron.training.callbacks import build
    from megatron.training.run import train

    config = tiny_config(values)
    metrics = Path(config.logging.metrics_file or Path(str(config.checkpoint.save)) / "metrics.jsonl")
    drawn = picture or config.logging.plot_file is not None
    with contextlib.nullcontext() if drawn else patch.object(build, "plot_path", lambda *given: None):
        train(LoadedConfig(config))
    return losses_of(metrics)


def losses_of(metrics: Path, key: str = "train/lm_loss") -> list[float]:
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [record[key] for record in records if key in record]


def train_with_bad_losses(values: Mapping[str, Any], bad: Mapping[int, float]) -> list[float]:
    """`train_losses`, but the micro-batch number n (from 0) of this process gets `bad[n]` added to its loss."""
    from megatron.training import step

    original, counter = step.forward, itertools.count()

    def forward(*args: Any, **settings: Any) -> Any:
        output = original(*args, **settings)
        wrong = bad.get(next(counter))
        return output if wrong is None else output._replace(loss=output.loss + wrong, lm_loss=output.lm_loss + wrong)

    step.forward = forward
    try:
        return train_losses(values)
    finally:
        step.forward = original


def train_with_one_bad_process(values: Mapping[str, Any]) -> list[float]:
    """`train_losses` with a NaN in the third micro-batch of the second process only."""
    return train_with_bad_losses(values, {2: float("nan")} if os.environ["RANK"] == "1" else {})


def outer_environment() -> dict[str, str]:
    """This process's environment without what a run in it has left there: its rank and its port, which a run in another process must not take."""
    own = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return {key: value for key, value in os.environ.items() if key not in own}
