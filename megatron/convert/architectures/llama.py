"""LlamaForCausalLM and the dense decoders that differ from it in a norm, a bias or a window."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron.convert.architecture import Code, Source
from megatron.convert.architectures import fit
from megatron.convert.architectures.settings import (
    bias_keys,
    decoder_keys,
    decoder_settings,
    window_keys,
    window_setting,
    without_usual_head_dim,
)
from megatron.convert.architectures.weights import NORMS, attention, ends, gated_mlp, head_norms, layer_norms, ours
from megatron.convert.errors import ConversionError
from megatron.convert.mapping import Entry


class Llama:
    """RMS norms, gated MLPs, biases on all attention projections, on all of the MLP's, or nowhere."""

    name, model_type, class_name = "llama", "llama", "LlamaForCausalLM"
    code: Code | None = None
    allowed: fit.Allowed = {**fit.DENSE, "use_bias_in_attn_linear": fit.ANY, "use_bias_in_mlp": fit.ANY}
    bias_of_output = True
    """Whether a bias on queries, keys and values goes with one on the output."""
    norm_names = NORMS
    """Theirs for our `input_layernorm` and `post_attention_layernorm`."""
    divides_hidden_size = True
    """Whether `num_attention_heads` has to divide `hidden_size`, also where `head_dim` is given."""

    own_head_dim = True
    """Whether its heads can be of another width than hidden_size / heads."""

    def obstacles(self, source: Source) -> Iterator[str]:
        yield from fit.obstacles(source, self.allowed, class_name=self.class_name, own_head_dim=self.own_head_dim)
        model = source.config.model
        if self.divides_hidden_size and model.hidden_size % model.num_attention_heads:
            yield f"hidden_size: {model.hidden_size} ({self.class_name} has multiples of num_attention_heads, {model.num_attention_heads}, only)"

    def settings(self, source: Source) -> dict[str, Any]:
        model = source.config.model
        return {**decoder_settings(source), "attention_bias": model.use_bias_in_attn_linear, "mlp_bias": model.use_bias_in_mlp}

    def keys(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        biases = {**bias_keys(settings.get("attention_bias")), "use_bias_in_mlp": bool(settings.get("mlp_bias", False))}
        return {**decoder_keys(settings), **biases}

    def table(self, source: Source) -> Iterator[Entry]:
        model = source.config.model
        yield from ends(source)
        for layer in range(model.num_layers):
            theirs = f"model.layers.{layer}"
            yield from layer_norms(model, layer, theirs, self.norm_names)
            yield from attention(model, layer, f"{theirs}.self_attn", bias_of_output=self.bias_of_output)
            if model.qk_norm_widths is not None:
                yield from head_norms(layer, f"{theirs}.self_attn")
            yield from self.feed_forward(source, layer, f"{theirs}.mlp")

    def feed_forward(self, source: Source, layer: int, theirs: str) -> Iterator[Entry]:
        """The part of a layer that is not attention."""
        model = source.config.model
        yield from gated_mlp(f"{ours(layer)}.mlp", theirs, model.mlp_width, bias=model.use_bias_in_mlp)


class Mistral(Llama):
    """A Llama without biases, with a window."""

    name, model_type, class_name = "mistral", "mistral", "MistralForCausalLM"
    divides_hidden_size = False
    allowed: fit.Allowed = {**fit.DENSE, "sliding_window_width": fit.ANY}

    def settings(self, source: Source) -> dict[str, Any]:
        return {**decoder_settings(source), "sliding_window": window_setting(source.config.model)}

    def keys(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {**decoder_keys(settings), **window_keys(settings)}


class Olmo(Llama):
    """A Llama whose norms have no weights."""

    name, model_type, class_name = "olmo", "olmo", "OlmoForCausalLM"
    divides_hidden_size = False
    allowed: fit.Allowed = {**fit.DENSE, "norm": {"non_parametric_layernorm"}, "use_bias_in_attn_linear": fit.ANY}
    EPSILON = 1e-5

    def obstacles(self, source: Source) -> Iterator[str]:
        yield from super().obstacles(source)
        if source.config.model.layernorm_epsilon != self.EPSILON:
            yield f"layernorm_epsilon: {source.config.model.layernorm_epsilon} ({self.class_name} has {self.EPSILON} only)"

    def settings(self, source: Source) -> dict[str, Any]:
        settings = {**decoder_settings(source), "attention_bias": source.config.model.use_bias_in_attn_linear, "clip_qkv": None}
        return {key: value for key, value in without_usual_head_dim(settings).items() if key != "rms_norm_eps"}

    def keys(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        check_not_clipped(settings)
        keys = decoder_keys({**settings, "rms_norm_eps": None})
        del keys["rms_norm_epsilon"]
        biases = bias_keys(settings.get("attention_bias"))
        return {**keys, **biases, "norm": "non_parametric_layernorm", "layernorm_epsilon": self.EPSILON}


class Olmo2(Llama):
    """A Llama with norms on what attention and MLP add, and on the queries and the keys of all heads together."""

    name, model_type, class_name = "olmo2", "olmo2", "Olmo2ForCausalLM"
    allowed: fit.Allowed = {**fit.DENSE, "reordered_norm": {True}, "qk_norm_all_heads": {True}, "use_bias_in_attn_linear": fit.ANY}
    norm_names = ("post_attention_layernorm", "post_feedforward_layernorm")
    divides_hidden_size = False

    def settings(self, source: Source) -> dict[str, Any]:
        settings = {**decoder_settings(source), "attention_bias": source.config.model.use_bias_in_attn_linear}
        return without_usual_head_dim(settings)

    def keys(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {**decoder_keys(settings), **bias_keys(settings.get("attention_bias")), "reordered_norm": True, "qk_norm_all_heads": True}


class Qwen2(Llama):
    """A Llama with biases on queries, keys and values, and none on the output."""

    name, model_type, class_name = "qwen2", "qwen2", "Qwen2ForCausalLM"
    allowed: fit.Allowed = {**fit.DENSE, "use_bias_in_attn_linear": fit.ANY, "add_qkv_bias": fit.ANY}
    bias_of_output = divides_hidden_size = False

    def obstacles(self, source: Source) -> Iterator[str]:
        yield from super().obstacles(source)
        if not source.config.model.has_qkv_bias:
            yield f"add_qkv_bias: False ({self.class_name} always has biases on queries, keys and values)"

    def settings(self, source: Source) -> dict[str, Any]:
        return {**decoder_settings(source), "use_sliding_window": False}

    def keys(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        check_no_window(settings)
        return {**decoder_keys(settings), **bias_keys(True, of_output=False)}


class Qwen3(Llama):
    """A Llama with norms on each query and key head."""

    name, model_type, class_name = "qwen3", "qwen3", "Qwen3ForCausalLM"
    divides_hidden_size = False
    allowed: fit.Allowed = {**fit.DENSE, "qk_norm_per_head": {True}, "use_bias_in_attn_linear": fit.ANY}

    def settings(self, source: Source) -> dict[str, Any]:
        return {**decoder_settings(source), "attention_bias": source.config.model.use_bias_in_attn_linear, "use_sliding_window": False}

    def keys(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        check_no_window(settings)
        return {**decoder_keys(settings), **bias_keys(settings.get("attention_bias")), "qk_norm_per_head": True}


def check_not_clipped(settings: Mapping[str, Any]) -> None:
    """Raises ConversionError where queries, keys and values are cut off at a largest number."""
    if settings.get("clip_qkv") is not None:
        raise ConversionError(f"clip_qkv: {settings['clip_qkv']} cannot be represented, because this program does not clip queries, keys and values.")


def check_no_window(settings: Mapping[str, Any]) -> None:
    """Raises ConversionError where a layer has a window that a text can exceed: which layers have one is no key here."""
    kinds = set(settings.get("layer_types") or (["sliding_attention"] if settings.get("use_sliding_window") else []))
    window = settings.get("sliding_window")
    if kinds - {"full_attention", "sliding_attention"} or (kinds - {"full_attention"} and not window):
        raise ConversionError(f"layer_types: {', '.join(sorted(kinds))} cannot be represented (with sliding_window {window}).")
    if kinds - {"full_attention"} and window < settings["max_position_embeddings"]:
        raise ConversionError(f"use_sliding_window: true cannot be represented, because only some layers would have the window of {window} tokens.")
