"""docs/migrating.md speaks of keys that there are, and what it says about configurations is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron.config.aliases import RENAMED, TABLE
from megatron.config.loader import LoadedConfig, load_config
from megatron.config.neox import OWNER
from megatron.config.section import ConfigError
from megatron.config.training import resolve_batch

GUIDE = Path(__file__).resolve().parent.parent.parent / "docs" / "migrating.md"
MODEL = {"num-layers": 2, "hidden-size": 64, "num-attention-heads": 4, "seq-length": 32, "max-position-embeddings": 32}
# Words with an underscore that are no keys: names of other things.
OTHER_WORDS = {
    "weights_only",
    "flash_attn",
    "load_balance",
    "expert_choice",
    "top_p",
    "document_pool",
    "expert_threshold",
    "quantile_balancing",
    "dense_h_to_4h",
    "lr_decay_iters",
}


def load(folder: Path, *texts: str) -> LoadedConfig:
    base = "".join(f"{key}: {value}\n" for key, value in MODEL.items())
    names = []
    for position, text in enumerate((base, *texts)):
        (folder / f"{position}.yml").write_text(text)
        names.append(f"{position}.yml")
    return load_config(names, conf_dir=folder)


def test_every_key_in_it_is_known() -> None:
    code = re.findall(r"`([^`\n]+)`", GUIDE.read_text(encoding="utf-8"))
    words = [match[1] for text in code if (match := re.fullmatch(r"([a-z]+(?:_[a-z0-9]+)+)(: .*)?", text))]
    assert len(words) > 20
    unknown = {word for word in words if word not in OWNER and word not in TABLE and word not in RENAMED and word not in OTHER_WORDS}
    assert not unknown


ACCEPTED = [
    "min_lr: 1e-5\noptimizer: {type: Adam, params: {lr: 1e-3}}",
    "data_impl: infer",
    "precision: bfloat16",
    "use_bias_in_mlp: false\ngpt_j_residual: true",
    "use_bias_in_mlp: false",
    "moe_num_experts: 4\ngpt_j_residual: true",
    "moe_num_experts: 4\nmoe_router_type: sinkhorn",
    "init_method: orthogonal",
    "sliding_window_width: 8\npos_emb: rotary",
    "attention_config: [[[flash], all]]",
    "distributed_backend: nccl",
    "temperature: 0.0\ntop_k: 5",
    "log_gradient_noise_scale: true",
]


@pytest.mark.parametrize("text", ACCEPTED)
def test_what_fails_there_is_accepted_here(text: str, tmp_path: Path) -> None:
    assert load(tmp_path, text).notices == ()


REFUSED = [
    ("num_layers: 3", "1.yml:1: 'num_layers' is already given at "),
    ("train_iters: 1e5", "must be a whole number; write 100000"),
    ("zero_optimization: {stage: 0, stage: 1}", "'zero_optimization.stage' is given twice"),
    ("data_impl: cached", "'data_impl' = 'cached'"),
    ("autotuning_run: tune", "is not supported"),
    ("use_mup: true", "is not supported"),
    ("train_impl: dpo", "is not supported"),
    ("attention_config: [[[mamba], all]]", "only transformer layers"),
    ("te_mha: true", "is not supported"),
]


@pytest.mark.parametrize(("text", "sentence"), REFUSED)
def test_what_is_refused_says_so(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert sentence in str(caught.value)


def test_the_third_batch_number_is_worked_out(tmp_path: Path) -> None:
    assert resolve_batch(load(tmp_path, "train_batch_size: 32\ntrain_micro_batch_size_per_gpu: 4\n").config.training, 2) == (4, 4, 32)
