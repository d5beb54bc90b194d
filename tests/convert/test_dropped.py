"""What a conversion leaves out is compared first: heads that are said to be tied, stored buffers, numbers too large for the precision. And where two
models begin to differ is said."""

from __future__ import annotations

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
from megatron.convert.errors import ConversionError
from megatron.convert.parts import first_difference
from megatron.convert.to_huggingface import Exported
from tests.convert.models import CASES, DECODER, VOCABULARY, config_of, lively_model, save_model

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SIZES |= {"max_position_embeddings": 64, "initializer_range": 0.3}


@pytest.fixture
def main(tool: Callable[[str], ModuleType]) -> Callable[..., int]:
    """tools/ckpts/convert_hf_to_neox.py."""
    module = tool("tools/ckpts/convert_hf_to_neox.py")
    return lambda *words: int(module.main([str(word) for word in words]))


def published(directory: Path, kind: str, **settings: Any) -> dict[str, Tensor]:
    """A random model, saved by transformers."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **settings)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def rewrite(directory: Path, weights: dict[str, Tensor]) -> None:
    save_file({name: tensor.clone() for name, tensor in weights.items()}, directory / "model.safetensors", {"format": "pt"})


HEADS = [("Llama", "model.embed_tokens.weight", "lm_head.weight"), ("GPTNeoX", "gpt_neox.embed_in.weight", "embed_out.weight")]


@pytest.mark.parametrize("skip", [[], ["--skip-check"]])
@pytest.mark.parametrize("names", HEADS)
def test_a_head_of_its_own_is_kept_whatever_config_json_says(
    names: tuple[str, str, str], skip: list[str], main: Callable[..., int], tmp_path: Path, capsys: Any, export: Callable[..., Exported]
) -> None:
    kind, embedding, head = names
    weights = published(tmp_path / "theirs", kind, tie_word_embeddings=True)
    other = torch.randn(weights[embedding].shape, generator=torch.Generator().manual_seed(1))
    rewrite(tmp_path / "theirs", {**weights, head: other})
    assert main("--model_path", tmp_path / "theirs", "--output_dir", tmp_path / "run", *skip) == 0
    assert f"config.json says tie_word_embeddings, but {head} differs from the embedding" in capsys.readouterr().out
    assert torch.equal(load_model_weights(tmp_path / "run").state_dict["sequential.6.final_linear.weight"], other)
    assert export(tmp_path / "run", tmp_path / "back", save_tokenizer=False).class_name == f"{kind}ForCausalLM"
    assert torch.equal(load_file(tmp_path / "back" / "model.safetensors")[head], other)


@pytest.mark.parametrize(("kind", "embedding", "head"), HEADS)
def test_a_copy_of_the_embedding_is_the_tied_head(
    kind: str, embedding: str, head: str, main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = published(tmp_path / "theirs", kind, tie_word_embeddings=True)
    rewrite(tmp_path / "theirs", {**weights, head: weights[embedding]})
    assert main("--model_path", tmp_path / "theirs", "--output_dir", tmp_path / "run") == 0
    assert "tie_word_embeddings" not in capsys.readouterr().out
    assert "no_weight_tying: false" in (tmp_path / "run" / "config.yml").read_text()


def frequencies(width: int, theta: float = 10000.0) -> Tensor:
    return theta ** -(torch.arange(0, width, 2) / width)


LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
BUFFERS: dict[str, tuple[str, dict[str, Any], str, Tensor, str | None]] = {
    "as computed": ("Llama", {}, "model.layers.0.self_attn.rotary_emb.inv_freq", frequencies(8), None),
    "in half precision": ("Llama", {}, "model.layers.0.self_attn.rotary_emb.inv_freq", frequencies(8).half(), None),
    "in bfloat16": ("Llama", {}, "model.layers.0.self_attn.rotary_emb.inv_freq", frequencies(8).bfloat16(), None),
    "before linear scaling": ("Llama", {"rope_parameters": LINEAR}, "model.layers.1.self_attn.rotary_emb.inv_freq", frequencies(8), None),
    "after linear scaling": ("Llama", {"rope_parameters": LINEAR}, "model.layers.1.self_attn.rotary_emb.inv_freq", frequencies(8) / 4, None),
    "scaled without a word": ("Llama", {}, "model.layers.1.self_attn.rotary_emb.inv_freq", frequencies(8) / 4, "holds other frequencies than"),
    "another base": (
        "Llama",
        {},
        "model.layers.1.self_attn.rotary_emb.inv_freq",
        frequencies(8, 500.0),
        "([1, 0.211, 0.0447, 0.00946] instead of [1, ",
    ),
    "another width": ("Llama", {}, "model.layers.0.self_attn.rotary_emb.inv_freq", frequencies(4), "holds other frequencies than"),
    "a share": ("GPTNeoX", {"rotary_pct": 0.25}, "gpt_neox.layers.0.attention.rotary_emb.inv_freq", frequencies(2), None),
    "mask": ("GPTNeoX", {}, "gpt_neox.layers.0.attention.bias", torch.ones(1, 1, 64, 64, dtype=torch.bool).tril(), None),
    "mask with a window": (
        "GPTNeoX",
        {},
        "gpt_neox.layers.0.attention.bias",
        torch.ones(1, 1, 64, 64).tril().triu(-8),
        "must be the mask with which",
    ),
    "masked bias": ("GPTNeoX", {}, "gpt_neox.layers.0.attention.masked_bias", torch.tensor(-1e9), None),
    "another masked bias": ("GPTNeoX", {}, "gpt_neox.layers.0.attention.masked_bias", torch.tensor(1.0), "must be one large negative number"),
}


@pytest.mark.parametrize("case", BUFFERS)
def test_stored_buffers_are_those_of_the_configuration(
    case: str, main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, settings, name, buffer, sentence = BUFFERS[case]
    rewrite(tmp_path / "theirs", {**published(tmp_path / "theirs", kind, **settings), name: buffer})
    assert main("--model_path", tmp_path / "theirs", "--output_dir", tmp_path / "run", "--skip-check") == int(sentence is not None)
    assert sentence is None or f"{name} {sentence}" in (error := capsys.readouterr().err) or sentence in error


@pytest.mark.parametrize("case", [("fp16", 1e5, False), ("fp16", 6e4, True), ("bf16", 3.4e38, False), ("bf16", 3e38, True)])
def test_numbers_too_large_for_the_precision_are_an_error(
    case: tuple[str, float, bool], main: Callable[..., int], tool: Callable[[str], ModuleType], tmp_path: Path, capsys: Any
) -> None:
    """In both directions, also where the logits are not compared."""
    precision, large, fits = case
    weights = published(tmp_path / "theirs", "Llama")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = large
    rewrite(tmp_path / "theirs", weights)
    words = ("--model_path", tmp_path / "theirs", "--skip-check", "--precision")
    sentences = [] if fits else [f"too large for {'float16' if precision == 'fp16' else 'bfloat16'}: the largest is ", "or fp32."]
    assert main(*words, precision, "--output_dir", tmp_path / "run") == int(not fits)
    assert all(sentence in capsys.readouterr().err for sentence in sentences[:1])
    assert main(*words, "fp32", "--output_dir", tmp_path / "whole") == 0
    export = ["--input_dir", tmp_path / "whole", "--output_dir", tmp_path / "back", "--precision", precision, "--skip-check", "--no_save_tokenizer"]
    assert tool("tools/ckpts/convert_neox_to_hf.py").main([str(word) for word in export]) == int(not fits)
    error = capsys.readouterr().err
    assert all(sentence in error for sentence in sentences)
    assert fits or "1 numbers of model.layers.1.mlp.up_proj.weight" in error
    assert fits == (tmp_path / "back").exists()


def test_weights_that_are_no_numbers_are_not_exported(tmp_path: Path, export: Callable[..., Exported]) -> None:
    config = config_of(DECODER)
    gpt = lively_model(config)
    gpt.state_dict()["sequential.3.mlp.linear2.weight"][0, :2] = torch.nan
    save_model(tmp_path / "run", config, gpt)
    with pytest.raises(ConversionError, match=r"down_proj\.weight holds 2 numbers that are NaN or infinite"):
        export(tmp_path / "run", tmp_path / "hf", save_tokenizer=False, check=False)


WRONG = {
    "model.embed_tokens.weight": "the embedding",
    "model.layers.0.self_attn.o_proj.weight": "layer 0's attention",
    "model.layers.2.mlp.down_proj.weight": "layer 2's MLP or experts",
    "model.norm.weight": "the last norm",
    "lm_head.weight": "the head",
}


@pytest.mark.parametrize("name", WRONG)
def test_the_first_part_that_differs_is_named(name: str, tmp_path: Path, export: Callable[..., Exported], monkeypatch: pytest.MonkeyPatch) -> None:
    """The export writes a wrong weight, as a wrong table would."""
    from megatron.convert import to_huggingface

    config = config_of(CASES["llama"][1])
    save_model(tmp_path / "run", config, lively_model(config))
    right = to_huggingface.finite
    monkeypatch.setattr(to_huggingface, "finite", lambda which, stored, rounded: right(which, stored, rounded * (1.5 if which == name else 1)))
    with pytest.raises(ConversionError, match=rf"The first difference is in {WRONG[name]} \(the first layer is 0\)"):
        export(tmp_path / "run", tmp_path / "hf", save_tokenizer=False)


def test_what_is_no_number_is_a_difference() -> None:
    same, nan = torch.ones(1, 2, 3), torch.full((1, 2, 3), torch.nan)
    assert first_difference({"a": same, "b": same}, {"a": same, "b": nan}) == "b"
    assert first_difference({"a": same, "b": nan}, {"a": same + 1e-7, "b": nan}) == "b"
    assert first_difference({"a": same}, {"a": same, "c": nan}) is None
