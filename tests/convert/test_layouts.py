"""Every layout in which a model of experts is published gives the same weights: one by one or fused, under old and new names, in any file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron.checkpoint.weights import load_model_weights
from megatron.convert.architectures import ARCHITECTURES
from megatron.convert.to_huggingface import Exported
from tests.convert.models import CASES, source_of

FAMILIES = {"mixtral": "mixtral", "qwen2-moe": "qwen2-moe", "qwen3-moe": "qwen3-moe-normalized", "olmoe": "olmoe", "glm4-moe": "glm4-moe"}


@pytest.fixture
def main(tool: Callable[[str], ModuleType]) -> Callable[..., int]:
    """tools/ckpts/convert_hf_to_neox.py."""
    module = tool("tools/ckpts/convert_hf_to_neox.py")
    return lambda *words: int(module.main([str(word) for word in words]))


def published(family: str, directory: Path, **how: Any) -> dict[str, Tensor]:
    """A random model as `save_pretrained` writes it; its weights as they lie on disk."""
    name, keys = CASES[FAMILIES[family]]
    architecture = ARCHITECTURES[name]
    config = transformers.AutoConfig.for_model(architecture.model_type, **architecture.settings(source_of(keys)))
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.save_pretrained(directory, **how)
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    ("family", "how"), [*((family, {}) for family in FAMILIES), ("mixtral", {"max_shard_size": "20KB"}), ("olmoe", "pytorch_model.bin")]
)
def test_fused_experts_are_those_that_lie_one_by_one(
    family: str, how: dict[str, Any] | str, main: Callable[..., int], tmp_path: Path, export: Callable[..., Exported]
) -> None:
    single = published(family, tmp_path / "single")
    fused = published(family, tmp_path / "fused", save_original_format=False, **(how if isinstance(how, dict) else {}))
    assert any(name.endswith(".mlp.experts.gate_up_proj") for name in fused)
    assert not any(name.endswith(".mlp.experts.gate_up_proj") for name in single)
    if isinstance(how, str):
        (tmp_path / "fused" / "model.safetensors").unlink()
        torch.save(fused, tmp_path / "fused" / how)
    runs = {}
    for form in ("single", "fused"):
        assert main("--model_path", tmp_path / form, "--output_dir", tmp_path / f"{form}-run") == 0  # logits compared
        runs[form] = load_model_weights(tmp_path / f"{form}-run").state_dict
    assert runs["single"].keys() == runs["fused"].keys()
    assert all(torch.equal(tensor, runs["fused"][name]) for name, tensor in runs["single"].items())
    export(tmp_path / "fused-run", tmp_path / "back", save_tokenizer=False, check=False)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == single.keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in single.items())


def rewrite(directory: Path, weights: dict[str, Tensor]) -> None:
    save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()},
        directory / "model.safetensors",
        {"format": "pt"},
    )


def test_mixtral_under_the_names_of_other_families(main: Callable[..., int], tmp_path: Path) -> None:
    """transformers 5 calls the block `mlp`; some tools call its matrices gate_proj, up_proj and down_proj."""
    weights = published("mixtral", tmp_path / "theirs")
    renamed = {}
    for name, tensor in weights.items():
        for old, new in ((".w1.", ".gate_proj."), (".w3.", ".up_proj."), (".w2.", ".down_proj."), (".block_sparse_moe.", ".mlp.")):
            name = name.replace(old, new)
        renamed[name] = tensor
    assert main("--model_path", tmp_path / "theirs", "--output_dir", tmp_path / "a") == 0
    rewrite(tmp_path / "theirs", renamed)
    assert main("--model_path", tmp_path / "theirs", "--output_dir", tmp_path / "b", "--skip-check") == 0
    first, second = (load_model_weights(tmp_path / run).state_dict for run in ("a", "b"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def half_fused(weights: dict[str, Tensor], fused: dict[str, Tensor]) -> dict[str, Tensor]:
    """Layer 0 in both forms."""
    return {**weights, **{name: tensor for name, tensor in fused.items() if ".layers.0.mlp.experts." in name}}


def half_there(weights: dict[str, Tensor], fused: dict[str, Tensor]) -> dict[str, Tensor]:
    """Some experts of layer 0 one by one, beside the fused tensors."""
    return {**fused, **{name: tensor for name, tensor in weights.items() if ".layers.0.mlp.experts.0." in name}}


def changed(change: Callable[[Tensor], Tensor], which: str = "gate_up_proj") -> Callable[..., dict[str, Tensor]]:
    return lambda _, fused: {name: change(tensor) if name.endswith(f".0.mlp.experts.{which}") else tensor for name, tensor in fused.items()}


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (half_fused, "holds the experts of one layer twice: as single weights (model.layers.0.mlp.experts."),
        (half_there, "holds the experts of one layer twice: as single weights (model.layers.0.mlp.experts.0."),
        (changed(lambda tensor: tensor[:3]), "gate_up_proj has the shape [3, 48, 32], but config.json needs [4, 48, 32] (experts, rows, columns"),
        (changed(lambda tensor: tensor.mT), "gate_up_proj has the shape [4, 32, 48], but config.json needs [4, 48, 32] (experts, rows, columns"),
        (
            changed(lambda tensor: tensor.mT, "down_proj"),
            "down_proj has the shape [4, 24, 32], but config.json needs [4, 32, 24] (experts, rows, columns",
        ),
        (changed(lambda tensor: tensor.flatten(0, 1)), "gate_up_proj has the shape [192, 32], but config.json needs [4, 48, 32]"),
        (changed(lambda tensor: torch.cat([tensor, tensor])), "gate_up_proj has the shape [8, 48, 32], but config.json needs [4, 48, 32]"),
        (
            lambda _, fused: {name: tensor for name, tensor in fused.items() if not name.endswith("layers.0.mlp.experts.down_proj")},
            "holds no weight model.layers.0.mlp.experts.0.down_proj.weight.",
        ),
    ],
)
def test_experts_that_do_not_fit_are_a_sentence(
    spoil: Callable[..., dict[str, Tensor]], sentence: str, main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    single, fused = published("olmoe", tmp_path / "single"), published("olmoe", tmp_path / "theirs", save_original_format=False)
    rewrite(tmp_path / "theirs", spoil(single, fused))
    assert main("--model_path", tmp_path / "theirs", "--output_dir", tmp_path / "run") == 1
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_layers_for_further_tokens_are_left_out_and_said(main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GLM-4.5's files hold one layer more than the model, for multi-token prediction; transformers reads past it."""
    weights = published("glm4-moe", tmp_path / "theirs")
    extra = {f"model.layers.3.{name}.weight": torch.ones(4) for name in ("enorm", "eh_proj", "shared_head.head")}
    rewrite(tmp_path / "theirs", {**weights, **extra})
    words = ("--model_path", tmp_path / "theirs", "--output_dir")
    file = tmp_path / "theirs" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_nextn_predict_layers": 1}))
    assert main(*words, tmp_path / "run") == 0
    assert "3 weights of layers after the model's 3 are left out (" in capsys.readouterr().out
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_nextn_predict_layers": 0}))
    assert main(*words, tmp_path / "other") == 1
    assert "holds model.layers.3.eh_proj.weight, but this model has no such weight" in capsys.readouterr().err
