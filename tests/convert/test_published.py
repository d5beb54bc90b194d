"""Every class in, trained and out: an import trains exactly the parameters of its origin, and comes back as the class that it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from megatron.config import load_config
from megatron.config.size import count_parameters
from megatron.convert.architectures import ARCHITECTURES
from megatron.convert.errors import ConversionError
from megatron.convert.from_huggingface import Import, import_model
from megatron.data.progress import build_reporter
from megatron.inference.model import load_ready_model
from tests.convert.published import PUBLISHED, write_published
from tests.training.runs import train_losses

HOW = {
    "train_iters": 3,
    "train_micro_batch_size_per_gpu": 2,
    "log_interval": 1,
    "seq_length": 16,
    "num_workers": 0,
    "checkpoint_factor": 9,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-2}},
    "split": "1,0,0",
    "eval_interval": 100,
}
OF_THE_FILE = ("transformers_version", "dtype", "_name_or_path")


def test_every_class_has_a_published_model() -> None:
    assert {model_type for model_type, _ in PUBLISHED.values()} == {
        architecture.model_type for architecture in ARCHITECTURES.values() if architecture.code is None
    }


def test_layers_that_predict_later_tokens_are_left_out_and_named(tmp_path: Path) -> None:
    """As published, GLM-4.5 has a layer more than num_hidden_layers says, which transformers' class has not either."""
    model = write_published(tmp_path / "theirs", "GLM-4.5")
    weights = load_file(tmp_path / "theirs" / "model.safetensors")
    later = {name.replace("layers.1.", "layers.2."): tensor.clone() for name, tensor in weights.items() if "layers.1." in name}
    later |= {f"model.layers.2.{name}.weight": torch.ones(40) for name in ("eh_proj", "enorm", "hnorm", "shared_head.norm")}
    save_file({**weights, **later}, tmp_path / "theirs" / "model.safetensors", {"format": "pt"})
    imported = import_model(Import(tmp_path / "theirs", tmp_path / "run"), build_reporter())
    assert imported.compared is not None
    assert imported.notices[0].startswith(f"{len(later)} weights of layers after the model's 2 are left out (model.layers.2.")
    assert load_ready_model(load_config([tmp_path / "run" / "config.yml"]).config).gpt.num_layers == model.config.num_hidden_layers == 2
    weights["model.layers.2.input_layernorm.weight"] = torch.ones(40)
    save_file(weights, tmp_path / "theirs" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConversionError, match=r"holds model\.layers\.2\.input_layernorm\.weight, which this model has no place for \(1 such"):
        import_model(Import(tmp_path / "theirs", tmp_path / "other"), build_reporter())


@pytest.mark.parametrize("name", PUBLISHED)
def test_in_trained_and_out(name: str, tmp_path: Path, corpus: Path, export: Any) -> None:
    model = write_published(tmp_path / "theirs", name)
    imported = import_model(Import(tmp_path / "theirs", tmp_path / "run"), build_reporter())
    assert imported.compared is not None
    config = load_config([tmp_path / "run" / "config.yml"]).config
    ours = load_ready_model(config).gpt
    trained = sum(parameter.numel() for parameter in ours.parameters())
    assert trained == sum(parameter.numel() for parameter in model.parameters())
    assert trained == count_parameters(config.model, config.moe, ours.vocab_size).total_sum

    keys = yaml.safe_load((tmp_path / "run" / "config.yml").read_text())
    train_losses({**keys, **HOW, "data_path": str(corpus), "save": str(tmp_path / "trained")})
    exported = export(tmp_path / "trained", tmp_path / "back", save_tokenizer=False)
    assert exported.class_name == type(model).__name__
    assert exported.notices == ()
    before, after = (load_file(tmp_path / directory / "model.safetensors") for directory in ("theirs", "back"))
    assert {key: tensor.shape for key, tensor in before.items()} == {key: tensor.shape for key, tensor in after.items()}
    unmoved = [key for key, tensor in before.items() if tensor.equal(after[key]) and ".experts." not in key]
    assert unmoved == []
    again = transformers.AutoConfig.from_pretrained(tmp_path / "back").to_dict()
    differs = {key: (value, again.get(key)) for key, value in model.config.to_dict().items() if key not in OF_THE_FILE and again.get(key) != value}
    assert not differs or differs == {"head_dim": (None, config.model.head_width)}
