"""`deepy.py` with processes that divide the model: the losses of one process, evaluations included, and the load of the processes in the metrics."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.training.runs import losses_of, outer_environment, run_values

REPOSITORY = Path(__file__).resolve().parents[2]
LAYOUTS = {
    "tensor": (2, {"model_parallel_size": 2, "sequence_parallel": True, "train_micro_batch_size_per_gpu": 2}),
    "expert": (2, {"moe_expert_parallel_size": 2, "train_micro_batch_size_per_gpu": 2}),
    "pipeline": (2, {"pipe_parallel_size": 2, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}),
    "all": (8, {"pipe_parallel_size": 2, "model_parallel_size": 2, "moe_expert_parallel_size": 2, "train_micro_batch_size_per_gpu": 2}),
}


def run(folder: Path, values: dict[str, Any], processes: int, keys: dict[str, Any]) -> str:
    folder.mkdir()
    file = folder / "run.yml"
    file.write_text(json.dumps({**values, "num_gpus": processes, "save": None, "metrics_file": str(folder / "metrics.jsonl"), **keys}))
    command = [sys.executable, str(REPOSITORY / "deepy.py"), "train.py", str(file)]
    done = subprocess.run(command, cwd=REPOSITORY, env=outer_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_as_one_process_does(name: str, corpus: Path, tmp_path: Path) -> None:
    """With the same micro-batches: what is averaged over a micro-batch depends on them."""
    processes, keys = LAYOUTS[name]
    values = run_values(corpus, None, train_iters=4, eval_interval=2, eval_iters=2, train_batch_size=4)
    output = run(tmp_path / "together", values, processes, keys)
    run(tmp_path / "alone", values, 1, {"train_micro_batch_size_per_gpu": keys["train_micro_batch_size_per_gpu"]})
    together, alone = (losses_of(tmp_path / folder / "metrics.jsonl") for folder in ("together", "alone"))
    assert together == pytest.approx(alone, rel=1e-5)
    assert f"{processes} processes: " in output
    records = [json.loads(line) for line in (tmp_path / "together/metrics.jsonl").read_text().splitlines()]
    loads = [record["moe/process_overload"] for record in records if "moe/process_overload" in record]
    assert bool(loads) == (name in ("tensor", "expert", "all"))
    assert all(load >= 1 for load in loads)
    evaluated = [
        [record["validation/lm_loss"] for record in read if "validation/lm_loss" in record] for read in (records, lines_of(tmp_path / "alone"))
    ]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-5)
    assert evaluated[0]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
