"""Upcycling: dense models of every kind become experts of every shape, and compute what they did; what cannot is a sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

from megatron.checkpoint.weights import load_model_weights
from megatron.config import load_config
from megatron.convert.to_huggingface import Exported
from megatron.convert.upcycle import CHOOSING_K
from megatron.inference.model import load_ready_model
from tests.convert.models import VOCABULARY
from tests.training.runs import train_losses

F = 48
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": F}
SIZES |= {"max_position_embeddings": 64, "initializer_range": 0.3}
DENSE = {
    "pythia": lambda: transformers.GPTNeoXConfig(**SIZES, rotary_pct=0.25),
    "llama": lambda: transformers.LlamaConfig(**SIZES, num_key_value_heads=2),
    "llama-biases": lambda: transformers.LlamaConfig(**SIZES, mlp_bias=True, tie_word_embeddings=True),
}
TOPK = {"moe_num_experts": 4, "moe_top_k": 2, "moe_router_type": "topk", "moe_normalize_top_k": True, "moe_losses": {"load_balance": 0.01}}
LORES = {"moe_expert_type": "structmoe", "moe_num_lores": 4, "moe_lore_rank": 8}
SHAPES: dict[str, dict[str, Any]] = {
    "experts": {},
    "lores": LORES,
    "lores beside": {**LORES, "moe_lore_interaction": "standalone"},
    "some layers": {"moe_layers": [0, 2]},
    "later layers": {"moe_first_k_dense_layers": 1, "moe_shared_expert_intermediate_size": F},
    "by layer": {"moe_num_experts": 1, "moe_num_experts_by_layer": [2, 4, 2]},
    "sigmoid": {"moe_router_type": "sigmoid"},
    "top_p": {"moe_router_type": "top_p", "moe_top_k": 1},
    "segments": {"moe_expert_segments": 3},
    "quantile balancing": {"moe_router_type": "quantile_balancing", "moe_expert_segments": 2},
    "document pool": {"moe_router_type": "document_pool"},
    "recurrent": {"moe_router_type": "recurrent", "moe_router_rnn_hidden_size": 8, "moe_layers": [1, 2]},
    "expert threshold beside the whole": {"moe_router_type": "expert_threshold", "moe_shared_expert_intermediate_size": F},
    "segments sigmoid groups": {"moe_router_type": "sigmoid", "moe_expert_segments": 2, "moe_router_num_groups": 2, "moe_router_group_topk": 2},
    "shared part": {"moe_shared_expert_intermediate_size": 16, "moe_ffn_hidden_size": 32},
    "shared part behind a gate": {"moe_shared_expert_intermediate_size": 16, "moe_shared_expert_gate": True, "moe_ffn_hidden_size": 32},
    "shared segments": {"moe_num_shared_experts": 1, "moe_expert_segments": 3, "moe_ffn_hidden_size": 36},
    "shared whole": {"moe_shared_expert_intermediate_size": F, "moe_ffn_hidden_size": 20},
    "qwen2-moe": {"moe_shared_expert_intermediate_size": F, "moe_shared_expert_gate": True, "moe_ffn_hidden_size": 12, "moe_normalize_top_k": False},
    "shared whole, wide experts": {"moe_num_shared_experts": 1, "moe_router_type": "sinkhorn", "moe_top_k": 1},
    "residual": {"moe_use_residual": True},
    "residual and shared": {"moe_use_residual": True, "moe_shared_expert_intermediate_size": 8, "moe_ffn_hidden_size": 40},
}
NOT_EXACT: dict[str, dict[str, Any]] = {
    "weights": {"moe_normalize_top_k": False},
    "scaled": {"moe_router_topk_scaling_factor": 2.5},
    "segments top_p": {"moe_router_type": "top_p", "moe_top_k": 1, "moe_expert_segments": 2},
}


@pytest.fixture
def main(tool: Callable[[str], ModuleType]) -> Callable[..., int]:
    """tools/ckpts/convert_hf_to_neox.py."""
    module = tool("tools/ckpts/convert_hf_to_neox.py")
    return lambda *words: int(module.main([str(word) for word in words]))


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a dense model with biases that matter."""
    folder = tmp_path_factory.mktemp("dense")

    def make(name: str) -> Path:
        if not (folder / name).exists():
            torch.manual_seed(1)
            model = transformers.AutoModelForCausalLM.from_config(DENSE[name]())
            with torch.no_grad():
                for weight in model.parameters():
                    if weight.ndim == 1:
                        weight.add_(0.3 * torch.randn_like(weight))
            model.save_pretrained(folder / name)
        return folder / name

    return make


def keys_of(changes: dict[str, Any], tmp_path: Path) -> Path:
    keys = {key: value for key, value in {**TOPK, **changes}.items() if key != "moe_num_experts" or value != 1}
    readers = {"moe_normalize_top_k": (*CHOOSING_K, "top_p"), "moe_top_k": (*CHOOSING_K, "sinkhorn", "expert_threshold")}
    for key, routers in readers.items():
        if keys["moe_router_type"] not in routers:
            del keys[key]
    (tmp_path / "moe.yml").write_text(json.dumps(keys))
    return tmp_path / "moe.yml"


def relative(printed: str) -> float:
    match = re.search(r"the largest relative difference of the logits is (\S+) \(", printed)
    assert match is not None, printed
    return float(match[1])


GATED = ("experts", "segments", "shared part behind a gate", "qwen2-moe", "residual and shared")


@pytest.mark.parametrize(("name", "shape"), [(name, shape) for name in DENSE for shape in SHAPES if name == "pythia" or shape in GATED])
def test_upcycling_changes_no_logit(
    name: str, shape: str, dense: Callable[[str], Path], main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moe = keys_of(SHAPES[shape], tmp_path)
    assert main("--model_path", dense(name), "--output_dir", tmp_path / "run", "--upcycle", moe) == 0
    printed = capsys.readouterr().out
    assert relative(printed) < 1e-5
    assert "differ from the dense model's" not in printed
    assert "moe_losses names no loss" not in printed
    assert ("The other experts start without effect" in printed) == ("whole" in shape or shape in ("later layers", "qwen2-moe"))
    weights = load_model_weights(tmp_path / "run").state_dict
    biased = {key for key in weights if re.fullmatch(r".*\.experts\.mlp\.b\d\.bias", key)}
    layers = sum(key.endswith("router.layer.weight") for key in weights)
    assert len(biased) == layers * {"pythia": 2, "llama": 0, "llama-biases": 3}[name]


@pytest.mark.parametrize("shape", NOT_EXACT)
def test_the_difference_is_said_where_there_is_one(
    shape: str, dense: Callable[[str], Path], main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moe = keys_of({**NOT_EXACT[shape], "moe_losses": {}}, tmp_path)
    assert main("--model_path", dense("pythia"), "--output_dir", tmp_path / "run", "--upcycle", moe) == 0
    printed = capsys.readouterr().out
    assert 1e-3 < relative(printed) < 10
    assert "The logits therefore differ from the dense model's." in printed
    assert "moe_losses names no loss that balances the load" in printed


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"moe_expert_bias": False}, "sequential.2.mlp.linear1.bias is not zero, but these experts have no biases: set moe_expert_bias to true."),
        (
            {"moe_shared_expert_intermediate_size": 16},
            "the shared expert has 16 hidden units and an expert 48, but the MLP that they are made from has 48: set moe_ffn_hidden_size to 32, or",
        ),
        (
            {"moe_num_shared_experts": 1, "moe_expert_segments": 2},
            "an expert 48, but the MLP that they are made from has 48: set moe_ffn_hidden_size to 32",
        ),
        ({"moe_num_shared_experts": 3, "moe_expert_segments": 4}, "48 cannot be divided into 7 equal parts"),
        ({"moe_shared_expert_intermediate_size": 64}, "give it at most the 48 hidden units of the MLP, or moe_shared_expert_intermediate_size to 48"),
        ({"moe_latent_size": 8}, "moe_latent_size: experts are narrower than the hidden state, and an MLP is not"),
        ({"moe_copy_experts": 1}, "moe_zero_experts, moe_copy_experts, moe_constant_experts: some tokens would not meet their MLP"),
        ({"moe_router_type": "smoe_dropout"}, "moe_router_type smoe_dropout: its experts have to differ, because it does not learn"),
        ({"moe_router_type": "expert_choice"}, "moe_router_type expert_choice: some tokens would have no expert"),
        ({"moe_router_type": "expert_threshold"}, "moe_router_type expert_threshold: some tokens would have no expert"),
    ],
)
def test_shapes_that_cannot_be_are_a_sentence(
    changes: dict[str, Any],
    sentence: str,
    dense: Callable[[str], Path],
    main: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--model_path", dense("pythia"), "--output_dir", tmp_path / "run", "--upcycle", keys_of(changes, tmp_path))
    assert main(*words) > 0
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_pythia_becomes_experts_is_trained_and_exported(
    dense: Callable[[str], Path], main: Callable[..., int], tmp_path: Path, corpus: Path, export: Callable[..., Exported]
) -> None:
    """The biases are trained, and the exported class computes the same with them."""
    config = transformers.GPTNeoXConfig(**{**SIZES, "vocab_size": 512}, rotary_pct=0.25)
    torch.manual_seed(0)
    transformers.GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "theirs")
    words = ("--model_path", tmp_path / "theirs", "--output_dir", tmp_path / "run")
    assert main(*words, "--upcycle", keys_of({"moe_num_shared_experts": 1, "moe_expert_segments": 3, "moe_ffn_hidden_size": 36}, tmp_path)) == 0
    how = {"train_iters": 2, "train_micro_batch_size_per_gpu": 2, "log_interval": 1, "seq_length": 16, "num_workers": 0, "checkpoint_factor": 2}
    how |= {"optimizer": {"type": "Adam", "params": {"lr": 1e-2}}, "data_path": str(corpus), "split": "1,0,0", "eval_interval": 100}
    keys = load_config([tmp_path / "run" / "config.yml"]).config.flat()
    train_losses({**{key: value for key, value in keys.items() if value not in (None, [], {})}, **how, "save": str(tmp_path / "save")})
    ready = load_ready_model(load_config([tmp_path / "run" / "config.yml"], [f"load={tmp_path / 'save'}"]).config)
    biases = {name: weight for name, weight in ready.gpt.state_dict().items() if ".experts.mlp.b" in name}
    assert len(biases) == 6
    assert all(bool(bias.any()) for bias in biases.values())
    assert export(tmp_path / "save", tmp_path / "back", save_tokenizer=False).class_name == "StructMoEForCausalLM"
