"""Whole runs of the MoE family: ZeRO, recomputation, accumulation, resuming and bf16 change nothing that they should not."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.config.components import EXPERTS, ROUTERS
from megatron.config.loader import LoadedConfig
from megatron.testing.tiny import TINY_MOE, tiny_config
from megatron.training.run import train
from tests.training.runs import losses_of, run_values, train_losses

LORES = {"moe_num_lores": 2, "moe_lore_rank": 4}
PAIRS = list(zip(ROUTERS, itertools.cycle(EXPERTS), strict=False))
"""Every router, and every kind of expert."""
ADAM = {"type": "Adam", "params": {"lr": 1e-3}}


def moe_values(corpus: Path, save: Path | None, router: str, experts: str = "grouped", **overrides: Any) -> dict[str, Any]:
    values = {key: value for key, value in run_values(corpus, save).items() if key in TINY_MOE or not key.startswith("moe_")}
    lores = LORES if experts == "structmoe" else {}
    chosen = {"moe_router_type": router, "moe_expert_type": experts, "moe_losses": {"z_loss": 0.001}, "eval_iters": 0, "optimizer": ADAM}
    return {**values, **lores, **chosen, **overrides}


@pytest.mark.parametrize(("router", "experts"), PAIRS)
def test_zero_stages_agree(corpus: Path, tmp_path: Path, router: str, experts: str) -> None:
    def losses(stage: int) -> list[float]:
        zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
        settings = {"train_iters": 3, "zero_optimization": zero, "metrics_file": str(tmp_path / f"{stage}.jsonl")}
        return train_losses(moe_values(corpus, None, router, experts, **settings))

    expected = losses(0)
    for stage in (1, 2, 3):
        assert losses(stage) == pytest.approx(expected, abs=1e-5), stage


@pytest.mark.parametrize(("router", "experts"), PAIRS)
def test_recomputed_activations_change_nothing(corpus: Path, tmp_path: Path, router: str, experts: str) -> None:
    values = moe_values(corpus, None, router, experts, train_iters=4, hidden_dropout=0.1)
    expected = train_losses({**values, "metrics_file": str(tmp_path / "kept.jsonl")})
    assert train_losses({**values, "checkpoint_activations": True, "metrics_file": str(tmp_path / "again.jsonl")}) == expected


@pytest.mark.parametrize("router", ["topk", "sigmoid", "top_p", "quantile_balancing", "expert_threshold", "document_pool", "recurrent"])
def test_accumulation_changes_nothing(corpus: Path, tmp_path: Path, router: str) -> None:
    """Of the routers that look at each token alone; sinkhorn and expert_choice look at the whole micro-batch."""
    values = moe_values(corpus, None, router, train_batch_size=4, train_iters=4)
    whole = train_losses({**values, "train_micro_batch_size_per_gpu": 4, "metrics_file": str(tmp_path / "a.jsonl")})
    parts = train_losses({**values, "train_micro_batch_size_per_gpu": 1, "metrics_file": str(tmp_path / "b.jsonl")})
    assert parts == pytest.approx(whole, abs=1e-4)


@pytest.mark.parametrize(
    ("router", "stage"), [("sigmoid", 0), ("sigmoid", 3), ("quantile_balancing", 0), ("expert_threshold", 0), ("document_pool", 0), ("recurrent", 3)]
)
def test_what_routers_keep_goes_on_bit_for_bit(corpus: Path, tmp_path: Path, router: str, stage: int) -> None:
    """Rates at which what starts at 0 again chooses other experts."""
    rates = {"sigmoid": {"moe_router_bias_update_rate": 0.1}, "quantile_balancing": {"moe_router_quantile_balancing_ema": 0.5}}
    values = moe_values(corpus, tmp_path / "a", router, **rates.get(router, {}), zero_optimization={"stage": stage})
    expected = train_losses(values)
    halves = {**values, "save": str(tmp_path / "b"), "resume_if_exists": True}
    assert train_losses({**halves, "exit_interval": 5}) == expected[:5]
    assert train_losses(halves) == expected
    for key in ("moe/expert_load", "moe/delta_uniform"):
        assert losses_of(tmp_path / "b/metrics.jsonl", key) == losses_of(tmp_path / "a/metrics.jsonl", key)


def test_the_balance_bias_stays_float32_in_bf16(corpus: Path, tmp_path: Path) -> None:
    values = moe_values(corpus, None, "sigmoid", precision="bfloat16", train_iters=3, metrics_file=str(tmp_path / "m.jsonl"))
    engine = train(LoadedConfig(tiny_config(values))).engine
    biases = [buffer for name, buffer in engine.module.named_buffers() if name.endswith("balance.bias")]
    assert len(biases) == 2
    assert next(engine.module.parameters()).dtype == torch.bfloat16
    for bias in biases:
        assert bias.dtype == torch.float32
        steps = bias / 0.001
        assert bias.any()
        assert torch.allclose(steps, steps.round(), atol=1e-3), "it moved by whole steps of 0.001"
