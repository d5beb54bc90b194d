"""Every architecture of the shipped configurations trains, made small by overrides: one dense file of each kind, and every file with experts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megatron.config.loader import load_config
from megatron.config.neox import NeoXConfig
from tests.configs.test_shipped import CONFIGS, MODELS, load
from tests.training.runs import losses_of

# One file of each architecture without experts; the test below says when a new one is missing.
DENSE = [
    "19M.yml",
    "49M.yml",
    "pythia/14M.yml",
    "llama/7B.yml",
    "llama2/70B.yml",
    "llama3.2/1B.yml",
    "mistral/7B.yml",
]
WITH_EXPERTS = [name for name in MODELS if load(name).config.moe.has_experts]
STEPS = {**dict.fromkeys(DENSE, 2), **dict.fromkeys(WITH_EXPERTS, 5)}
SMALL = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_kv_heads": 2,
    "intermediate_size": 96,
    "ffn_hidden_size": 96,
    "seq_length": 32,
    "max_position_embeddings": 64,
    "sliding_window_width": 8,
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": 2,
    "moe_ffn_hidden_size": 32,
    "moe_num_lores": 4,
    "moe_lore_rank": 8,
    "moe_decomposition_rank": 32,
}


def architecture(config: NeoXConfig) -> tuple[Any, ...]:
    """What of the model is built by other code than in another architecture; sizes and constants left out."""
    model, moe = config.model, config.moe
    kind = (model.norm, model.pos_emb, model.hidden_function, model.gpt_j_residual, model.no_weight_tying, model.use_bias_in_attn_linear)
    grouped = model.kv_heads < model.num_attention_heads
    experts = (moe.moe_expert_type, moe.moe_router_type, moe.moe_top_k > 1) if moe.moe_num_experts > 1 else (model.use_bias_in_mlp,)
    return (*kind, grouped, model.rotary_pct < 1, model.sliding_window_width is not None, *experts)


def test_every_architecture_is_trained() -> None:
    trained = {architecture(load(name).config) for name in STEPS}
    missing = [name for name in MODELS if architecture(load(name).config) not in trained]
    assert not missing, "no file of DENSE has the architecture of these"


@pytest.mark.parametrize(("name", "steps"), STEPS.items())
def test_a_few_steps(name: str, steps: int, corpus: Path, tmp_path: Path) -> None:
    given = load(name).config.given()
    smaller = {key: value for key, value in SMALL.items() if key in given}
    metrics = tmp_path / "metrics.jsonl"
    data = {"data_path": corpus, "tokenizer_type": "CharLevelTokenizer", "num_workers": 0, "eval_iters": 0, "metrics_file": metrics}
    smaller["train_iters"] = steps
    others = {key: "null" for key in given if key in ("vocab_file", "save", "load", "iteration") or key.endswith(("_data_paths", "_data_weights"))}
    others |= {key: "false" for key in ("fp16.enabled", "resume_if_exists") if key.split(".")[0] in given}
    loaded = load_config([name], [f"{key}={value}" for key, value in {**smaller, **others, **data}.items()], CONFIGS)
    from megatron.training.run import train

    train(loaded)
    losses = losses_of(metrics)
    assert len(losses) == steps
    assert all(math.isfinite(loss) and loss < 7 for loss in losses), "about ln 512 at the start"
