"""Every table against Hugging Face's own class: all weights, both directions, and the logits of both implementations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron.convert.architecture import Source
from megatron.convert.architectures import ARCHITECTURES
from megatron.convert.mapping import check_complete, to_ours, to_theirs
from megatron.convert.tensor_files import StoredTensors
from tests.convert.models import CASES, VOCABULARY, config_of, lively_model, logits_of, source_of

TOLERANCE = 1e-4


def write_directory(directory: Path, settings: dict[str, Any], weights: dict[str, Tensor], class_name: str, model_type: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps({**settings, "architectures": [class_name], "model_type": model_type}))


def load_theirs(directory: Path) -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_ours_there_and_back(case: str, tmp_path: Path) -> None:
    name, keys = CASES[case]
    architecture, source = ARCHITECTURES[name], source_of(keys)
    gpt = lively_model(source.config)
    if name in ("qwen2-moe", "glm4-moe"):
        for key, tensor in gpt.state_dict().items():
            if key.endswith("attention.dense.bias"):
                tensor.zero_()
    state = gpt.state_dict()
    assert list(architecture.obstacles(source)) == []
    table = list(architecture.table(source))
    check_complete(table, state)
    theirs = {named.name: named.tensor for named in to_theirs(table, state.__getitem__)}
    write_directory(tmp_path, architecture.settings(source), theirs, architecture.class_name, architecture.model_type)
    model = load_theirs(tmp_path)
    tokens_BS = torch.randint(VOCABULARY, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = (model(tokens_BS).logits - logits_of(gpt, tokens_BS)).abs().max().item()
    assert difference < TOLERANCE

    back = {named.name: named.tensor for named in to_ours(table, StoredTensors(tmp_path).read)}
    unused = {entry.ours for entry in table if not entry.theirs}
    assert back.keys() == state.keys()
    assert [key for key in state if key not in unused and not torch.equal(state[key], back[key])] == []


@pytest.mark.parametrize("case", CASES)
def test_theirs_here_and_back(case: str, tmp_path: Path) -> None:
    """A random model of Hugging Face's, saved by it, becomes ours by its own config.json, and is written again."""
    name, keys = CASES[case]
    architecture = ARCHITECTURES[name]
    settings = architecture.settings(source_of(keys))
    config = transformers.AutoConfig.for_model(architecture.model_type, **settings)
    torch.manual_seed(2)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter_name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(0.25 * torch.randn(tensor.shape, generator=generator) + float("norm" in parameter_name))
    model.save_pretrained(tmp_path / "theirs")

    loaded = transformers.AutoConfig.from_pretrained(tmp_path / "theirs").to_dict()
    source = Source(config_of({**architecture.keys(loaded), "tokenizer_type": "CharLevelTokenizer"}), VOCABULARY)
    assert list(architecture.obstacles(source)) == []
    table = list(architecture.table(source))
    state = {named.name: named.tensor for named in to_ours(table, StoredTensors(tmp_path / "theirs").read)}
    gpt = lively_model(source.config)
    gpt.load_state_dict(state)
    tokens_BS = torch.randint(VOCABULARY, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (model(tokens_BS).logits - logits_of(gpt, tokens_BS)).abs().max().item() < TOLERANCE

    stored = load_file(tmp_path / "theirs" / "model.safetensors")
    theirs = {named.name: named.tensor for named in to_theirs(table, state.__getitem__)}
    assert theirs.keys() == stored.keys()
    assert [key for key in stored if not torch.equal(stored[key], theirs[key])] == []
