"""The same logits as Hugging Face's models from the same random weights: GPT-NeoX, Llama, Mistral, MPT, OPT, GPT-2, Phi, OLMo and Qwen 3.

Each architecture says which of our keys describe it and how our tensors come from theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from megatron.model.positions.alibi import alibi_slopes
from tests.model.tiny_model import DENSE, VOCAB, model_section, tiny_model, tokens

Weights = Mapping[str, Tensor]
LAYERS, WIDTH, HEADS, FFN, LENGTH = 2, 32, 4, 48, 16
SIZES = {"num_layers": LAYERS, "hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": None, "ffn_hidden_size": FFN}
THEIR_SIZES = {
    "vocab_size": VOCAB,
    "num_hidden_layers": LAYERS,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "intermediate_size": FFN,
    "max_position_embeddings": LENGTH,
}


class Architecture(NamedTuple):
    """Their class and settings, our keys, and our tensors from theirs."""

    theirs: str
    settings: dict[str, Any]
    keys: dict[str, Any]
    tensors: Callable[[Weights, int], dict[str, Tensor]]
    """(their weights, layer) -> our tensors of the layer, without prefix."""
    ends: dict[str, str]
    """Our modules or tensors outside the layers, without "sequential.", and theirs."""


def renamed(weights: Weights, names: Mapping[str, str], kinds: tuple[str, ...] = ("weight", "bias")) -> dict[str, Tensor]:
    """Our module -> their module, for whatever parameters theirs has."""
    return {f"{ours}.{kind}": weights[f"{their}.{kind}"] for ours, their in names.items() for kind in kinds if f"{their}.{kind}" in weights}


def fused(weights: Weights, prefixes: list[str], kv_heads: int) -> dict[str, Tensor]:
    """Separate projections of queries, keys and values in GPT-NeoX's order: head by head, or with fewer key/value heads one after the other."""
    out = {}
    for kind in ("weight", "bias"):
        if f"{prefixes[0]}.{kind}" in weights:
            parts = [weights[f"{prefix}.{kind}"] for prefix in prefixes]
            if kv_heads == HEADS:
                parts = [torch.stack([part.unflatten(0, (HEADS, -1)) for part in parts], 1).flatten(0, 2)]
            out[f"attention.query_key_value.{kind}"] = torch.cat(parts)
    return out


def gated(weights: Weights, prefix: str) -> dict[str, Tensor]:
    return {
        "mlp.linear1.weight": torch.cat([weights[f"{prefix}.up_proj.weight"], weights[f"{prefix}.gate_proj.weight"]]),
        "mlp.linear2.weight": weights[f"{prefix}.down_proj.weight"],
    }


def neox_layer(weights: Weights, i: int) -> dict[str, Tensor]:
    at = f"gpt_neox.layers.{i}."
    same = ("input_layernorm", "post_attention_layernorm", "attention.query_key_value", "attention.dense")
    names = {name: at + name for name in same} | {"mlp.linear1": at + "mlp.dense_h_to_4h", "mlp.linear2": at + "mlp.dense_4h_to_h"}
    return renamed(weights, names)


def llama_layer(weights: Weights, i: int) -> dict[str, Tensor]:
    at = f"model.layers.{i}."
    kv_heads = HEADS * weights[at + "self_attn.k_proj.weight"].shape[0] // WIDTH
    out = fused(weights, [f"{at}self_attn.{part}_proj" for part in "qkv"], kv_heads)
    out |= gated(weights, at + "mlp") | renamed(weights, {"attention.dense": at + "self_attn.o_proj"})
    norms = {"input_layernorm": "input_layernorm", "post_attention_layernorm": "post_attention_layernorm"}
    norms |= {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"}
    scales = {f"{ours}.scale": weights.get(f"{at}{theirs}.weight") for ours, theirs in norms.items()}
    return out | {name: scale for name, scale in scales.items() if scale is not None}


def mpt_layer(weights: Weights, i: int) -> dict[str, Tensor]:
    at = f"transformer.blocks.{i}."
    split = dict(zip("qkv", weights[at + "attn.Wqkv.weight"].chunk(3), strict=True))
    names = {"input_layernorm": "norm_1", "post_attention_layernorm": "norm_2", "attention.dense": "attn.out_proj"}
    names |= {"mlp.linear1": "ffn.up_proj", "mlp.linear2": "ffn.down_proj"}
    return fused({f"{part}.weight": weight for part, weight in split.items()}, list("qkv"), HEADS) | renamed(
        weights, {ours: at + theirs for ours, theirs in names.items()}
    )


def opt_layer(weights: Weights, i: int) -> dict[str, Tensor]:
    at = f"model.decoder.layers.{i}."
    names = {"input_layernorm": "self_attn_layer_norm", "post_attention_layernorm": "final_layer_norm", "attention.dense": "self_attn.out_proj"}
    names |= {"mlp.linear1": "fc1", "mlp.linear2": "fc2"}
    out = fused(weights, [f"{at}self_attn.{part}_proj" for part in "qkv"], HEADS)
    return out | renamed(weights, {ours: at + theirs for ours, theirs in names.items()})


def gpt2_layer(weights: Weights, i: int) -> dict[str, Tensor]:
    """GPT-2's projections lie transposed."""
    at = f"transformer.h.{i}."
    turned = {name: tensor.t() if tensor.ndim == 2 else tensor for name, tensor in weights.items() if name.startswith(at)}
    for kind in ("weight", "bias"):
        turned |= {f"{part}.{kind}": tensor for part, tensor in zip("qkv", turned[f"{at}attn.c_attn.{kind}"].chunk(3), strict=True)}
    names = {"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2", "attention.dense": "attn.c_proj"}
    names |= {"mlp.linear1": "mlp.c_fc", "mlp.linear2": "mlp.c_proj"}
    return fused(turned, list("qkv"), HEADS) | renamed(turned, {ours: at + theirs for ours, theirs in names.items()})


def phi_layer(weights: Weights, i: int) -> dict[str, Tensor]:
    at = f"model.layers.{i}."
    names = {"input_layernorm": "input_layernorm", "attention.dense": "self_attn.dense", "mlp.linear1": "mlp.fc1", "mlp.linear2": "mlp.fc2"}
    out = fused(weights, [f"{at}self_attn.{part}_proj" for part in "qkv"], HEADS) | renamed(weights, {o: at + t for o, t in names.items()})
    return out | renamed(weights, {"post_attention_layernorm": "model.final_layernorm"})  # anything will do: it is not used


NO_BIASES = {"use_bias_in_attn_linear": False, "use_bias_in_mlp": False}
LLAMA = {"norm": "rmsnorm", "rms_norm_epsilon": 1e-6, "activation": "swiglu", "no_weight_tying": True, **NO_BIASES}
LLAMA_ENDS = {"0.word_embeddings.weight": "model.embed_tokens.weight", "5.norm.scale": "model.norm.weight", "6.final_linear.weight": "lm_head.weight"}
NEOX_ENDS = {"0.word_embeddings": "gpt_neox.embed_in", "5.norm": "gpt_neox.final_layer_norm", "6.final_linear.weight": "lm_head.weight"}
DECODER = "model.decoder."
ROPE = {"rope_type": "default", "rope_theta": 500.0}
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 12}


def neox(parallel: bool, share: float, tanh: bool) -> Architecture:
    rope = {**ROPE, "partial_rotary_factor": share}
    settings = {"use_parallel_residual": parallel, "rope_parameters": rope, "hidden_act": "gelu_pytorch_tanh" if tanh else "gelu"}
    keys = {"gpt_j_residual": parallel, "rotary_pct": share, "rotary_emb_base": 500, "no_weight_tying": True, "bias_gelu_fusion": tanh}
    return Architecture("GPTNeoXForCausalLM", settings, keys, neox_layer, NEOX_ENDS)


def llama(theirs: str, settings: dict[str, Any], keys: dict[str, Any]) -> Architecture:
    settings = {"rope_parameters": ROPE, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, **settings}
    return Architecture(theirs, settings, {**LLAMA, "rotary_emb_base": 500, **keys}, llama_layer, LLAMA_ENDS)


ARCHITECTURES = {
    "gpt-neox, parallel": neox(parallel=True, share=0.25, tanh=False),
    "gpt-neox, sequential": neox(parallel=False, share=1.0, tanh=False),
    "gpt-neox, tanh": neox(parallel=True, share=0.5, tanh=True),
    "llama": llama("LlamaForCausalLM", {"num_key_value_heads": 2}, {"num_kv_heads": 2}),
    "llama, one key head": llama("LlamaForCausalLM", {"num_key_value_heads": 1}, {"num_kv_heads": 1}),
    "llama 3.1": llama(
        "LlamaForCausalLM", {"num_key_value_heads": 2, "rope_parameters": {**ROPE, **SCALED}}, {"num_kv_heads": 2, "rope_scaling": SCALED}
    ),
    "llama, all heads, biases in attention": llama("LlamaForCausalLM", {"attention_bias": True}, {"use_bias_in_attn_linear": True}),
    "mistral": llama("MistralForCausalLM", {"num_key_value_heads": 2, "sliding_window": 4}, {"num_kv_heads": 2, "sliding_window_width": 3}),
    "qwen 3": llama("Qwen3ForCausalLM", {"num_key_value_heads": 2, "head_dim": 8}, {"num_kv_heads": 2, "qk_norm_per_head": True}),
    "olmo": Architecture(
        "OlmoForCausalLM",
        {"rope_parameters": ROPE, "tie_word_embeddings": False, "pad_token_id": None, "eos_token_id": None},
        {**LLAMA, "norm": "non_parametric_layernorm", "rotary_emb_base": 500},
        llama_layer,
        {ours: theirs for ours, theirs in LLAMA_ENDS.items() if "norm" not in ours},
    ),
    "mpt": Architecture(
        "MptForCausalLM",
        {"d_model": WIDTH, "n_heads": HEADS, "n_layers": LAYERS, "max_seq_len": LENGTH},
        {"pos_emb": "alibi", "use_bias_in_norms": False, "ffn_hidden_size": 4 * WIDTH, **NO_BIASES},
        mpt_layer,
        {"0.word_embeddings": "transformer.wte", "5.norm": "transformer.norm_f"},
    ),
    "opt": Architecture(
        "OPTForCausalLM",
        {"ffn_dim": FFN, "word_embed_proj_dim": WIDTH},
        {"pos_emb": "learned", "opt_pos_emb_offset": 2, "max_position_embeddings": LENGTH + 2, "activation": "relu"},
        opt_layer,
        {
            "0.word_embeddings": DECODER + "embed_tokens",
            "0.position_embeddings": DECODER + "embed_positions",
            "5.norm": DECODER + "final_layer_norm",
        },
    ),
    "gpt-2": Architecture(
        "GPT2LMHeadModel",
        {"n_embd": WIDTH, "n_head": HEADS, "n_layer": LAYERS, "n_positions": LENGTH, "n_inner": FFN},
        {"pos_emb": "learned", "bias_gelu_fusion": True},
        gpt2_layer,
        {"0.word_embeddings": "transformer.wte", "0.position_embeddings": "transformer.wpe", "5.norm": "transformer.ln_f"},
    ),
    "phi": Architecture(
        "PhiForCausalLM",
        {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}, "tie_word_embeddings": False},
        {
            "gpt_j_residual": True,
            "gpt_j_tied": True,
            "rotary_pct": 0.5,
            "rotary_emb_base": 500,
            "no_weight_tying": True,
            "bias_gelu_fusion": True,
        },
        phi_layer,
        {"0.word_embeddings": "model.embed_tokens", "5.norm": "model.final_layernorm", "6.final_linear.weight": "lm_head.weight"},
    ),
}


def random_model(architecture: Architecture) -> nn.Module:
    """Theirs, every parameter drawn anew (norms and biases too), so that none can be left out unnoticed."""
    cls = getattr(transformers, architecture.theirs)
    sizes = {key: size for key, size in THEIR_SIZES.items() if not {"n_embd", "d_model"} & set(architecture.settings) or key == "vocab_size"}
    theirs = cls(cls.config_class(**sizes | architecture.settings, attn_implementation="eager")).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in theirs.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name or "ln_" in name else 0.0, 0.2, generator=generator)
    if theirs.get_output_embeddings().bias is not None:
        nn.init.zeros_(theirs.get_output_embeddings().bias)  # our heads have none
    return theirs


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_equal_hugging_face_s(name: str) -> None:
    architecture = ARCHITECTURES[name]
    theirs = random_model(architecture)
    weights = {name: tensor.detach() for name, tensor in theirs.state_dict().items()}
    sizes = {**SIZES, "seq_length": LENGTH, "max_position_embeddings": LENGTH}
    ours = tiny_model(model_section(**{**sizes, **architecture.keys}), DENSE).eval()
    state = {ours_: weights[theirs_] for ours_, theirs_ in architecture.ends.items() if theirs_ in weights} | renamed(weights, architecture.ends)
    for i in range(LAYERS):
        state |= {f"{2 + i}.{key}": tensor for key, tensor in architecture.tensors(weights, i).items()}
    ours.sequential.load_state_dict(state)
    text = tokens(2, LENGTH)
    with torch.inference_mode():
        wanted = theirs(text).logits
        got = ours(text).logits_BSV
    assert wanted.std() > 0.3, "logits that say something"
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 2, 4, 8, 12, 20])
def test_slopes_are_bloom_s(heads: int) -> None:
    theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)
    torch.testing.assert_close(torch.tensor(alibi_slopes(heads)), theirs[:, 0, 1])
