"""Whole runs on one process: every ZeRO stage, resuming, skipping, stopping."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megatron.testing.tiny import TINY_DENSE, TINY_MOE
from tests.training.runs import losses_of, run_values, train_losses, train_with_bad_losses


def test_loss_falls_and_everything_is_written(corpus: Path, tmp_path: Path) -> None:
    losses = train_losses(run_values(corpus, tmp_path / "run", train_iters=40))
    assert losses[-1] < 0.6 * losses[0]
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"global_step4", "global_step40", "latest", "metrics.jsonl", "training.png"}
    assert (tmp_path / "run/training.png").read_bytes().startswith(b"\x89PNG")
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    loads = next(record["moe/expert_load"] for record in records if "moe/expert_load" in record)
    assert [sum(layer) for layer in loads] == [2 * 16 * 2] * 2, "2 sequences of 16 tokens, 2 experts a token, 2 layers"
    assert {"validation/lm_loss", "test/lm_loss"} <= {key for record in records for key in record}


def test_zero_stages_agree(corpus: Path, tmp_path: Path) -> None:
    curves = [train_losses(run_values(corpus, tmp_path / str(stage), zero_optimization={"stage": stage})) for stage in (0, 1, 2)]
    assert curves[1] == pytest.approx(curves[0], abs=1e-6)
    assert curves[2] == pytest.approx(curves[0], abs=1e-6)
