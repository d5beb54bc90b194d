"""Model variants under DeepSpeed: they train, save, and resume bit for bit, whatever is shared, unused or derived in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.runs import run_values, train_losses

VARIANTS: dict[str, dict[str, Any]] = {
    "one table for all layers": {"pos_emb": "rpe", "zero_optimization": {"stage": 1}},
    "derived slopes": {"pos_emb": "alibi", "sliding_window_width": 5, "precision": "bfloat16", "zero_optimization": {"stage": 1}},
    "an unused norm": {"gpt_j_residual": True, "gpt_j_tied": True, "norm": "scalenorm"},
}


@pytest.mark.parametrize("keys", VARIANTS.values(), ids=VARIANTS)
def test_a_variant_resumes_bit_for_bit(corpus: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    straight = train_losses(run_values(corpus, tmp_path / "straight", **keys))
    halves = run_values(corpus, tmp_path / "halves", **keys, resume_if_exists=True)
    assert train_losses({**halves, "exit_interval": 5}) == straight[:5]
    assert train_losses(halves) == straight
    assert straight[-1] < straight[0]


def test_separating_documents_changes_the_loss(corpus: Path, tmp_path: Path) -> None:
    values = run_values(corpus, None, seq_length=128, max_position_embeddings=128, pos_emb="learned", train_iters=2, eval_iters=0)
    losses = []
    for attention, positions in ((False, False), (True, False), (True, True)):
        keys = {"reset_attention_mask": attention, "reset_position_ids": positions, "metrics_file": str(tmp_path / f"{attention}{positions}.jsonl")}
        losses.append(tuple(train_losses({**values, **keys})))
    assert len(set(losses)) == 3
