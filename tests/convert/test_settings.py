"""Every setting of a config.json that changes what transformers computes changes what is imported, or is refused; one that a class does not read
changes nothing. Each class is loaded by transformers with the changed setting, and its logits are compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron.convert.architectures import ARCHITECTURES
from megatron.convert.errors import ConversionError
from megatron.convert.from_huggingface import Import, Imported, import_model
from megatron.data.progress import build_reporter
from tests.convert.models import CASES, source_of

MODELS = {
    "gpt_neox": "pythia",
    "llama": "llama",
    "mistral": "mistral-window",
    "olmo": "olmo",
    "qwen3": "qwen3",
    "mixtral": "mixtral",
    "qwen3_moe": "qwen3-moe",
    "qwen2_moe": "qwen2-moe",
    "olmoe": "olmoe",
    "glm4_moe": "glm4-moe",
}
READ, UNREAD, REFUSED = "obeyed", "not read by the class, and so not here", "refused"
SHARE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
WINDOW = {"use_sliding_window": True, "sliding_window": 8}
ALL = tuple(MODELS)
QWEN = ("qwen3", "qwen3_moe", "qwen2_moe")

TABLE: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
    (("gpt_neox", "glm4_moe"), {"rope_parameters": SHARE}, READ),
    (("llama", "mistral", "olmo", *QWEN, "mixtral", "olmoe"), {"rope_parameters": SHARE}, UNREAD),
    (("llama", "mistral", "olmoe"), {"partial_rotary_factor": 0.5}, UNREAD),
    (("llama", "qwen3"), {"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}}, REFUSED),
    (ALL, {"rope_parameters": LINEAR}, READ),
    (("llama", "qwen2_moe"), {"rope_theta": 500.0, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, READ),
    (("llama", "mixtral", "gpt_neox"), {"rope_parameters": {**LINEAR, "rope_type": "dynamic"}}, REFUSED),
    (("llama",), {"rope_parameters": {**LINEAR, "rope_type": "yarn", "original_max_position_embeddings": 20}}, REFUSED),
    (("mistral", "mixtral"), {"attention_bias": True}, UNREAD),
    (("llama", "olmo", "qwen3", "glm4_moe"), {"attention_bias": True}, REFUSED),
    (("mistral", "qwen3"), {"mlp_bias": True}, UNREAD),
    (("llama",), {"mlp_bias": True}, REFUSED),
    (("qwen2_moe",), {"qkv_bias": True}, REFUSED),
    (("mistral", "mixtral"), {"sliding_window": 8}, READ),
    (("llama", "olmo", "glm4_moe"), {"sliding_window": 8}, UNREAD),
    (QWEN, {"use_sliding_window": False, "sliding_window": 8}, UNREAD),
    (("qwen3", "qwen3_moe"), {**WINDOW, "max_window_layers": 1, "layer_types": None}, REFUSED),
    (("qwen3", "qwen2_moe"), {**WINDOW, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}, REFUSED),
    (("qwen3",), {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}, REFUSED),
    (("qwen3_moe", "llama"), {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}, REFUSED),
    (("qwen3_moe", "llama", "qwen3"), {"layer_types": ["full_attention"] * 3}, UNREAD),
    (("qwen3_moe",), {"use_sliding_window": True, "sliding_window": 4096}, UNREAD),
    (("olmo", "olmoe"), {"clip_qkv": 0.1}, REFUSED),
    (("llama", "qwen3_moe"), {"clip_qkv": 0.1}, UNREAD),
    (("llama", "mixtral"), {"hidden_act": "gelu"}, READ),
    (("llama", "mixtral"), {"hidden_act": "gelu_pytorch_tanh"}, REFUSED),
    (("gpt_neox",), {"hidden_act": "gelu_pytorch_tanh"}, READ),
    (("qwen3_moe", "olmoe", "qwen2_moe"), {"norm_topk_prob": True}, READ),
    (("glm4_moe",), {"norm_topk_prob": False}, READ),
    (("mixtral",), {"norm_topk_prob": False}, UNREAD),
    (("mixtral", "qwen2_moe", "glm4_moe"), {"num_experts_per_tok": 1}, READ),
    (("qwen3_moe",), {"mlp_only_layers": [0, 2]}, REFUSED),
    (("olmoe", "mixtral"), {"mlp_only_layers": [0], "decoder_sparse_step": 3}, UNREAD),
    (("glm4_moe",), {"routed_scaling_factor": 2.0}, READ),
    (("glm4_moe",), {"n_group": 2, "topk_group": 1}, READ),
    (("mixtral", "qwen3_moe"), {"routed_scaling_factor": 2.0}, UNREAD),
    (("gpt_neox",), {"use_parallel_residual": False}, READ),
    (("gpt_neox",), {"layer_norm_eps": 0.1}, READ),
    (("llama", "glm4_moe"), {"rms_norm_eps": 0.1}, READ),
    (ALL, {"logit_scale": 2.0, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 1.0, "embedding_multiplier": 3.0}, UNREAD),
    (ALL, {"is_causal": False}, REFUSED),
    (("llama", "qwen3_moe"), {"attention_dropout": 0.1}, UNREAD),  # in training it is, below
]
"""(classes, changes, what happens)."""


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random model of each class."""
    folder = tmp_path_factory.mktemp("published")
    for model_type, case in MODELS.items():
        name, keys = CASES[case]
        settings = ARCHITECTURES[name].settings(source_of({**keys, "num_kv_heads": 2} if model_type != "gpt_neox" else keys))
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(model_type, **settings))
        with torch.no_grad():
            for weight in model.parameters():
                weight.normal_(0, 0.25) if weight.ndim > 1 else weight.add_(0.2 * torch.randn_like(weight))
        model.save_pretrained(folder / model_type)
    return {model_type: folder / model_type for model_type in MODELS}


def changed(source: Path, target: Path, changes: Mapping[str, Any]) -> Path:
    shutil.copytree(source, target)
    settings = {**json.loads((source / "config.json").read_text()), **changes}
    (target / "config.json").write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    return target


def imported(folder: Path, target: Path) -> Imported:
    return import_model(Import(folder, target), build_reporter())


def logits(folder: Path) -> torch.Tensor:
    tokens = torch.randint(96, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
        return model(tokens, return_dict=True).logits


@pytest.mark.parametrize(
    ("model_type", "changes", "outcome"), [(model_type, changes, outcome) for types, changes, outcome in TABLE for model_type in types], ids=str
)
def test_a_setting_does_here_what_it_does_in_transformers(
    model_type: str, changes: dict[str, Any], outcome: str, published: dict[str, Path], tmp_path: Path
) -> None:
    folder = changed(published[model_type], tmp_path / "theirs", changes)
    if outcome == REFUSED:
        with pytest.raises(ConversionError) as refused:
            imported(folder, tmp_path / "run")
        assert "does not give the logits" not in str(refused.value)
        assert "for the comparison" not in str(refused.value)
        return
    assert imported(folder, tmp_path / "run").compared is not None
    is_same = torch.equal(logits(folder), logits(published[model_type]))
    assert is_same == (outcome == UNREAD)


def without_tokenizer(made: Imported) -> list[str]:
    """Its notices but the first, which says that there is no tokenizer."""
    assert "holds no tokenizer that can be read" in made.notices[0]
    return list(made.notices[1:])


def test_a_setting_that_is_not_read_is_said(published: dict[str, Path], tmp_path: Path) -> None:
    changes = {"partial_rotary_factor": 0.5, "logit_scale": 2.0, "sliding_window": 8, "attention_bias": False, "rope_interleave": False}
    folder = changed(published["llama"], tmp_path / "theirs", changes)
    notices = without_tokenizer(imported(folder, tmp_path / "run"))
    said = [
        f"config.json says {key}: {changes[key]}. LlamaForCausalLM does not read "
        for key in ("logit_scale", "partial_rotary_factor", "sliding_window")
    ]
    assert [notice[: len(sentence)] for notice, sentence in zip(notices, said, strict=True)] == said
    assert without_tokenizer(imported(published["llama"], tmp_path / "other")) == []
    assert without_tokenizer(imported(published["gpt_neox"], tmp_path / "neox")) == []


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "qwen3_moe"])
def test_what_acts_in_training_alone_is_taken_over(model_type: str, published: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(published[model_type], tmp_path / "theirs", {"attention_dropout": 0.125})
    assert "attention_dropout: 0.125" in imported(folder, tmp_path / "run").config_file.read_text()


def test_settings_of_what_a_model_returns_do_not_matter(published: dict[str, Path], tmp_path: Path) -> None:
    changes = {"return_dict": False, "output_hidden_states": True, "output_router_logits": True, "use_cache": False}
    assert imported(changed(published["mixtral"], tmp_path / "theirs", changes), tmp_path / "run").compared is not None


def test_jitter_of_a_mixtral_is_taken_over(published: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(published["mixtral"], tmp_path / "theirs", {"router_jitter_noise": 0.125})
    assert "moe_jitter_eps: 0.125" in imported(folder, tmp_path / "run").config_file.read_text()
