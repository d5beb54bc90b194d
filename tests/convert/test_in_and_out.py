"""Every class in, trained and out: an import trains exactly the parameters of its origin, and comes back as the class that it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from megatron.checkpoint.layout import ORIGIN_KEY
from megatron.checkpoint.save import resolved_config_document
from megatron.checkpoint.save_weights import Division, save_weights
from megatron.config import load_config
from megatron.config.size import count_parameters
from megatron.convert.architectures import ARCHITECTURES
from megatron.convert.errors import ConversionError
from megatron.convert.from_huggingface import Import, import_model
from megatron.data.progress import build_reporter
from megatron.inference.model import load_ready_model
from megatron.training.setup import checkpoint_args
from tests.convert.class_models import CLASS_MODELS, write_class_model
from tests.convert.models import BASE, DECODER, EXPERTS, VOCABULARY, config_of, lively_model, save_model
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


def test_every_class_is_tried() -> None:
    assert {model_type for model_type, _ in CLASS_MODELS.values()} == {
        architecture.model_type for architecture in ARCHITECTURES.values() if architecture.code is None
    }


def test_layers_that_predict_later_tokens_are_left_out_and_named(tmp_path: Path) -> None:
    """As published, GLM-4.5 has a layer more than num_hidden_layers says, which transformers' class has not either."""
    model = write_class_model(tmp_path / "theirs", "GLM-4.5")
    weights = load_file(tmp_path / "theirs" / "model.safetensors")
    later = {name.replace("layers.1.", "layers.2."): tensor.clone() for name, tensor in weights.items() if "layers.1." in name}
    later |= {f"model.layers.2.{name}.weight": torch.ones(40) for name in ("eh_proj", "enorm", "hnorm", "shared_head.norm")}
    save_file({**weights, **later}, tmp_path / "theirs" / "model.safetensors", {"format": "pt"})
    imported = import_model(Import(tmp_path / "theirs", tmp_path / "run"), build_reporter())
    assert imported.compared is not None
    assert imported.notices[1].startswith(f"{len(later)} weights of layers after the model's 2 are left out (model.layers.2.")
    assert load_ready_model(load_config([tmp_path / "run" / "config.yml"]).config).gpt.num_layers == model.config.num_hidden_layers == 2
    weights["model.layers.2.input_layernorm.weight"] = torch.ones(40)
    save_file(weights, tmp_path / "theirs" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConversionError, match=r"holds model\.layers\.2\.input_layernorm\.weight, but this model has no such weight \(1 "):
        import_model(Import(tmp_path / "theirs", tmp_path / "other"), build_reporter())


@pytest.mark.parametrize("name", CLASS_MODELS)
def test_in_trained_and_out(name: str, tmp_path: Path, corpus: Path, export: Any) -> None:
    model = write_class_model(tmp_path / "theirs", name)
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


def test_a_resumed_run_still_knows_its_class_and_a_changed_key_is_the_reason_to_leave_it(tmp_path: Path, corpus: Path, export: Any) -> None:
    """Without its origin a Mistral-Nemo would be written as a Llama, which computes the same."""
    write_class_model(tmp_path / "theirs", "Mistral-Nemo")
    import_model(Import(tmp_path / "theirs", tmp_path / "run", check=False), build_reporter())
    keys = yaml.safe_load((tmp_path / "run" / "config.yml").read_text())
    trained = {**keys, **HOW, "data_path": str(corpus), "save": str(tmp_path / "trained"), "lr_decay_iters": 3, "resume_if_exists": True}
    train_losses(trained)
    train_losses({**trained, "train_iters": 4})
    exported = export(tmp_path / "trained", tmp_path / "back", save_tokenizer=False)
    assert (exported.class_name, exported.notices) == ("MistralForCausalLM", ())

    train_losses({**keys, **HOW, "data_path": str(corpus), "save": str(tmp_path / "longer"), "rope_scaling": {"rope_type": "linear", "factor": 2.0}})
    assert export(tmp_path / "longer", tmp_path / "longer_hf", save_tokenizer=False).class_name == "MistralForCausalLM"

    moe = {"moe_num_experts": 2, "moe_top_k": 1, "moe_router_type": "topk", "moe_normalize_top_k": True}
    import_model(Import(tmp_path / "theirs", tmp_path / "upcycled", upcycle=moe), build_reporter())
    exported = export(tmp_path / "upcycled", tmp_path / "experts", save_tokenizer=False)
    assert exported.class_name == "MixtralForCausalLM"
    assert exported.notices == (
        "This model was imported as MistralForCausalLM and is exported as MixtralForCausalLM, because MistralForCausalLM cannot represent:\n"
        "  moe_num_experts: 2 (MistralForCausalLM has 1 only)",
    )


def test_a_trained_weight_that_the_class_lacks_is_named(tmp_path: Path, export: Any) -> None:
    """As earlier versions imported a Qwen2: with a bias on the output of attention, which training moves."""
    config = config_of({**DECODER, "num_layers": 6, "use_bias_in_attn_linear": True, "num_kv_heads": 2})
    gpt = lively_model(config)
    state = {"iteration": 3, "args": {**checkpoint_args(config, VOCABULARY)}, ORIGIN_KEY: "qwen2"}
    documents = resolved_config_document(config.flat())
    save_weights(tmp_path / "run", gpt.state_dict().items(), client_state=state, documents=documents, division=Division())
    exported = export(tmp_path / "run", tmp_path / "hf", save_tokenizer=False)
    assert exported.class_name == "LlamaForCausalLM"
    first, *weights, last = exported.notices[0].split("\n")
    assert first == "This model was imported as Qwen2ForCausalLM and is exported as LlamaForCausalLM, because Qwen2ForCausalLM cannot represent:"
    lacking = "attention.dense.bias is not zero, but the other architecture has no such weight"
    assert weights == [f"  sequential.{layer}.{lacking}" for layer in range(2, 6)]
    assert last == "  and 2 more"
    for name, tensor in gpt.state_dict().items():
        if name.endswith("dense.bias"):
            tensor.zero_()
    save_weights(tmp_path / "zero", gpt.state_dict().items(), client_state=state, documents=documents, division=Division())
    exported = export(tmp_path / "zero", tmp_path / "hf0", save_tokenizer=False)
    assert (exported.class_name, exported.notices) == ("Qwen2ForCausalLM", ())


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("Pythia", {"head_dim": 16}, "head_dim: 16 cannot be read, because GPTNeoXForCausalLM divides hidden_size (64) among its 8 heads."),
        ("OLMoE", {"head_dim": 4}, "head_dim: 4 cannot be read, because OlmoeForCausalLM divides hidden_size (64) among its 8 heads."),
    ],
)
def test_classes_that_have_no_heads_of_their_own_width(name: str, settings: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    write_class_model(tmp_path / "theirs", name)
    file = tmp_path / "theirs" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(ConversionError) as caught:
        import_model(Import(tmp_path / "theirs", tmp_path / "run"), build_reporter())
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("name", "keys", "class_name", "refused"),
    [
        ("neox", {**BASE, "head_dim": 16}, "StructMoEForCausalLM", "head_dim: 16, with 4 heads"),
        ("olmoe", {**EXPERTS, "qk_norm_all_heads": True, "head_dim": 16}, "StructMoEForCausalLM", "head_dim: 16, with 4 heads"),
        ("llama", {**DECODER, "hidden_size": 36, "num_attention_heads": 8, "head_dim": 4}, "MistralForCausalLM", "hidden_size: 36"),
        ("qwen3", {**DECODER, "qk_norm_per_head": True, "add_qkv_bias": True}, "StructMoEForCausalLM", "add_qkv_bias: True"),
        ("llama", {**DECODER, "add_qkv_bias": True, "head_dim": 16}, "Qwen2ForCausalLM", "add_qkv_bias: True"),
    ],
)
def test_a_model_that_one_class_cannot_hold_goes_into_another(
    name: str, keys: dict[str, Any], class_name: str, refused: str, tmp_path: Path, export: Any
) -> None:
    config = config_of(keys)
    run = save_model(tmp_path / "run", config, lively_model(config))
    exported = export(run, tmp_path / "hf", save_tokenizer=False)
    assert (exported.class_name, exported.notices) == (class_name, ())
    with pytest.raises(ConversionError, match=refused):
        export(run, tmp_path / "other", architecture=name, save_tokenizer=False)
