"""tools/bench/train_step.py: it runs, and says what its report is read for."""

from __future__ import annotations

import json
from pathlib import Path

from tests.scripts import run_script
from tests.training.runs import outer_environment


def test_one_round_of_one_step(repository: Path, tmp_path: Path) -> None:
    words = ("tools/bench/train_step.py", "--precision", "fp32", "--rounds", "1", "--steps", "1")
    environment = {**outer_environment(), "PYTHONPATH": str(repository), "DS_ACCELERATOR": "cpu"}
    finished = run_script(*words, folder=repository, environment=environment, timeout=120, outputs=tmp_path)
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout.splitlines()[-1])
    assert (report["precision"], report["zero_stage"]) == ("fp32", 0)
    assert report["ratio_to_plain"] > 0
    assert report["ratio_to_upstream"] > report["ratio_to_plain"]
    assert min(report[rate] for rate in ("tokens_per_second", "plain_tokens_per_second", "matmul_flops")) > 0
