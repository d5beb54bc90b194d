"""Whole runs in a pipeline: every number that is logged is that of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.testing.distributed import run_distributed
from tests.training.runs import run_values, train_losses

MEASURED = {
    "eod_mask_loss": True,
    "log_grad_norm": True,
    "log_param_norm": True,
    "log_optimizer_states": True,
    "log_grad_pct_zeros": True,
    "log_gradient_noise_scale": True,
    "gradient_noise_scale_n_batches": 2,
}
TIMES = ("time", "per_sec", "flops", "memory", "seconds", "samples")


def numbers(metrics: Path) -> dict[tuple[int, str], Any]:
    """What a metrics file says, but for times."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    found = {(record["iteration"], key): value for record in records for key, value in record.items()}
    return {place: value for place, value in found.items() if not any(word in place[1] for word in TIMES)}


@pytest.mark.parametrize(
    ("processes", "keys"),
    [
        (2, {"pos_emb": "rpe", "no_weight_tying": False}),
        pytest.param(4, {"zero_optimization": {"stage": 1}}, marks=pytest.mark.slow),
    ],
    ids=["PP2", "PP2 x DP2, ZeRO 1"],
)
def test_every_number_in_the_metrics_is_that_of_one_process(corpus: Path, tmp_path: Path, processes: int, keys: dict[str, Any]) -> None:
    optimizer = {"type": "Adam", "params": {"lr": 1e-3}}
    values = run_values(corpus, None, num_layers=4, train_iters=4, train_batch_size=4, eval_interval=2, optimizer=optimizer, **MEASURED, **keys)
    losses = train_losses({**values, "zero_optimization": {"stage": 0}, "metrics_file": str(tmp_path / "one.jsonl")})
    several = {**values, "pipe_parallel_size": 2, "metrics_file": str(tmp_path / "several.jsonl")}
    assert run_distributed(train_losses, processes, several, backend=None)[0] == pytest.approx(losses, rel=1e-5)
    one, found = numbers(tmp_path / "one.jsonl"), numbers(tmp_path / "several.jsonl")
    assert found.keys() == one.keys()
    for place, value in one.items():
        if isinstance(value, str):
            assert found[place] == value, place
        else:
            # A bias of the keys adds the same to all scores of a query: the gradient of this third is 0 but for rounding, and an exact 0 is chance.
            chance = 100 / 3 if place[1].startswith("pct_grad_zeros/") and place[1].endswith("query_key_value.bias") else 0
            expected = np.array(value, dtype=float)
            np.testing.assert_allclose(np.array(found[place], dtype=float), expected, rtol=1e-3, atol=1e-5 + chance, err_msg=str(place))
