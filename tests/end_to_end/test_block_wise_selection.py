"""Block-wise expert selection does what CoSMoEs says: consecutive tokens change experts less than half as often, and the experts stay evenly used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.data.corpus.corpora import Request, speeches_corpus
from megatron.data.indexed import IndexedDatasetWriter
from tests.training.runs import train_losses

VALUES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "seq_length": 64,
    "max_position_embeddings": 64,
    "pos_emb": "rotary",
    "no_weight_tying": True,
    "moe_num_experts": 4,
    "moe_top_k": 1,
    "moe_router_type": "topk",
    "optimizer": {"type": "Adam", "params": {"lr": 3e-3, "betas": [0.9, 0.95], "eps": 1e-8}},
    "lr_decay_style": "cosine",
    "min_lr": 3e-4,
    "warmup": 0.1,
    "train_micro_batch_size_per_gpu": 8,
    "eval_iters": 0,
    "num_workers": 0,
    "tokenizer_type": "CharLevelTokenizer",
    "split": "98, 1, 1",
}


@pytest.fixture(scope="module")
def speeches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of the forty newest speeches of the default corpus, a token a character."""
    prefix = tmp_path_factory.mktemp("speeches") / "newest"
    with IndexedDatasetWriter(prefix, np.dtype("uint16")) as writer:
        for path in speeches_corpus(Request()).files[-40:]:
            text = path.read_text(errors="ignore").encode("ascii", "ignore")
            writer.add(np.frombuffer(text, dtype=np.uint8).astype(np.uint16))
    return prefix


def routers(speeches: Path, metrics: Path, steps: int, **losses: float) -> dict[str, Any]:
    """What the routers did in the last third of a run."""
    run = {"data_path": str(speeches), "train_iters": steps, "log_interval": steps // 3, "metrics_file": str(metrics)}
    temperature = {"moe_block_wise_temperature": 4.0} if losses else {}
    train_losses({**VALUES, **run, **temperature, "moe_losses": {"sequence_load_balance": 2.0, **losses}})
    return [record for line in metrics.read_text().splitlines() if "moe/expert_replacement" in (record := json.loads(line))][-1]


@pytest.mark.parametrize("steps", [150, pytest.param(300, marks=pytest.mark.slow)])
def test_experts_are_replaced_half_as_often(speeches: Path, tmp_path: Path, steps: int) -> None:
    """The balance within each sequence keeps the experts as evenly used as they were, to 2 points."""
    without = routers(speeches, tmp_path / "without.jsonl", steps)
    selected = routers(speeches, tmp_path / "with.jsonl", steps, block_wise_selection=10.0)
    replacement, uniform = "moe/expert_replacement", "moe/delta_uniform"
    assert without[replacement] > 40, "there is something to avoid"
    assert selected[replacement] <= without[replacement] / 2
    assert abs(selected[uniform] - without[uniform]) <= 2
