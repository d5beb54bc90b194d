"""GPTNeoXForCausalLM: Pythia and GPT-NeoX-20B."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron.config.model import ModelConfig
from megatron.convert.architecture import Code, Source
from megatron.convert.architectures import fit
from megatron.convert.architectures.settings import check_usual_head_dim, known, partial_rotary_settings, rotary_keys, size_keys
from megatron.convert.architectures.weights import ends, layer_norms, norm, ours
from megatron.convert.mapping import Constant, Entry, Repeated

TANH_GELUS = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
OUR_ACTIVATIONS = {name: name for name in ("gelu", "relu", "silu", "mish")} | {"swish": "silu"} | dict.fromkeys(TANH_GELUS, "gelu_tanh")


class GPTNeoX:
    """Layer norms with biases, MLPs without a gate, as many key as query heads; its fused projection has our order."""

    name, model_type, class_name = "neox", "gpt_neox", "GPTNeoXForCausalLM"
    code: Code | None = None
    allowed: fit.Allowed = {
        **fit.DENSE,
        "norm": {"layernorm"},
        "rotary_pct": fit.ANY,
        "gpt_j_residual": fit.ANY,
        "gpt_j_tied": fit.ANY,
        "use_bias_in_attn_linear": fit.ANY,
        "use_bias_in_mlp": fit.ANY,
        "activation": fit.ACTIVATIONS,
    }

    def obstacles(self, source: Source) -> Iterator[str]:
        yield from fit.obstacles(source, self.allowed, class_name=self.class_name, own_head_dim=False)
        if source.config.model.kv_heads != source.config.model.num_attention_heads:
            yield f"num_kv_heads: {source.config.model.kv_heads} ({self.class_name} has a key head for each query head only)"

    def settings(self, source: Source) -> dict[str, Any]:
        model = source.config.model
        return {
            "vocab_size": source.vocabulary,
            "hidden_size": model.hidden_size,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_attention_heads,
            "intermediate_size": model.mlp_width,
            "hidden_act": fit.ACTIVATIONS[model.hidden_function],
            "rotary_pct": model.rotary_pct,
            "rotary_emb_base": model.rotary_emb_base,
            **partial_rotary_settings(model),
            "attention_dropout": model.attention_dropout,
            "hidden_dropout": model.hidden_dropout,
            "max_position_embeddings": model.max_position_embeddings,
            "initializer_range": model.init_method_std,
            "layer_norm_eps": model.layernorm_epsilon,
            "tie_word_embeddings": not model.no_weight_tying,
            "use_parallel_residual": model.gpt_j_residual,
            "attention_bias": model.use_bias_in_attn_linear,
        }

    def keys(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        check_usual_head_dim(settings, self.class_name)
        activation = known(OUR_ACTIVATIONS, settings["hidden_act"], "hidden_act")
        return {
            **size_keys(settings),
            **rotary_keys(settings),
            "ffn_hidden_size": settings["intermediate_size"],
            "norm": "layernorm",
            "layernorm_epsilon": settings["layer_norm_eps"],
            "activation": activation.removesuffix("_tanh"),
            **({"bias_gelu_fusion": True} if activation == "gelu_tanh" else {}),
            "gpt_j_residual": settings.get("use_parallel_residual", True),
            "use_bias_in_attn_linear": settings.get("attention_bias", True),
            "attention_dropout": settings.get("attention_dropout", 0.0),
            "hidden_dropout": settings.get("hidden_dropout", 0.0),
        }

    def table(self, source: Source) -> Iterator[Entry]:
        model = source.config.model
        yield from ends(source, ("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out"))
        for layer in range(model.num_layers):
            theirs = f"gpt_neox.layers.{layer}"
            yield from _tied_norms(model, layer, theirs) if model.gpt_j_tied else layer_norms(model, layer, theirs)
            for part in ("weight", "bias") if model.use_bias_in_attn_linear else ("weight",):
                for name in ("query_key_value", "dense"):
                    yield Entry(f"{ours(layer)}.attention.{name}.{part}", (f"{theirs}.attention.{name}.{part}",))
            for name, their_name, width in (("linear1", "dense_h_to_4h", model.mlp_width), ("linear2", "dense_4h_to_h", model.hidden_size)):
                yield Entry(f"{ours(layer)}.mlp.{name}.weight", (f"{theirs}.mlp.{their_name}.weight",))
                bias = (f"{theirs}.mlp.{their_name}.bias",)
                yield Entry(f"{ours(layer)}.mlp.{name}.bias", bias) if model.use_bias_in_mlp else Entry(None, bias, Constant(width, 0.0))


def _tied_norms(model: ModelConfig, layer: int, theirs: str) -> Iterator[Entry]:
    """One norm for both branches, where the class has two; our second one takes no part."""
    names = ("input_layernorm", "post_attention_layernorm")
    first, second = (list(norm(model, f"{ours(layer)}.{name}", f"{theirs}.{name}")) for name in names)
    for entry, other in zip(first, second, strict=True):
        if entry.ours is None or other.ours is None:
            yield from (entry, other)
        else:
            yield Entry(entry.ours, entry.theirs + other.theirs, Repeated(2))
            yield Entry(other.ours, (), Constant(model.hidden_size, float(other.ours.endswith("weight")), unused=True))
