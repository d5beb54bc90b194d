"""Between the entries of Hugging Face's config.json and our keys: what most decoders share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.config.model import ModelConfig
from megatron.convert.architecture import Source
from megatron.convert.architectures.fit import GATE_ACTIVATIONS
from megatron.convert.errors import ConversionError

OUR_GATES = {name: activation for activation, name in GATE_ACTIVATIONS.items()} | {"swish": "swiglu"}

SCALINGS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Kind of `rope_scaling` -> its numbers, the same there and here."""


TURN_A_SHARE = ("gpt_neox", "glm4_moe")
"""`model_type` of the classes that read `partial_rotary_factor`; the others turn all dimensions of a head whatever it says."""


def decoder_settings(source: Source) -> dict[str, Any]:
    """The sizes of a decoder with rotary positions and (but for those without weights) RMS norms."""
    model = source.config.model
    return {
        "vocab_size": source.vocabulary,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.mlp_width,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_width,
        "hidden_act": GATE_ACTIVATIONS[model.activation],
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.rms_norm_epsilon,
        "tie_word_embeddings": not model.no_weight_tying,
        "initializer_range": model.init_method_std,
        "attention_dropout": model.attention_dropout,
        **rotary_settings(model),
    }


def rotary_settings(model: ModelConfig) -> dict[str, Any]:
    """Under the names of transformers 5 (`rope_parameters`) and of those before it, which other programs read."""
    theta, scaling = float(model.rotary_emb_base), model.rope_scaling
    if scaling is None:
        return {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    scaled = scaling.model_dump(exclude_none=True)
    return {"rope_theta": theta, "rope_scaling": scaled, "rope_parameters": {**scaled, "rope_theta": theta}}


def partial_rotary_settings(model: ModelConfig) -> dict[str, Any]:
    """For classes that turn a share of each head: said also where it is all of it, for their defaults differ."""
    settings, share = rotary_settings(model), {"partial_rotary_factor": model.rotary_pct}
    return {**settings, **share, "rope_parameters": {**settings["rope_parameters"], **share}}


def decoder_keys(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Our keys for what `decoder_settings` writes, with no biases. Raises ConversionError for what we cannot do."""
    heads = settings["num_attention_heads"]
    kv_heads = settings.get("num_key_value_heads") or heads
    return {
        **size_keys(settings),
        **head_dim_keys(settings),
        **({} if kv_heads == heads else {"num_kv_heads": kv_heads}),
        **rotary_keys(settings),
        "ffn_hidden_size": settings["intermediate_size"],
        "norm": "rmsnorm",
        "rms_norm_epsilon": settings["rms_norm_eps"],
        "activation": known(OUR_GATES, settings["hidden_act"], "hidden_act"),
        "attention_dropout": settings.get("attention_dropout") or 0.0,
        "use_bias_in_mlp": False,
        "use_bias_in_attn_linear": False,
    }


def bias_keys(has_bias: Any, *, of_output: bool = True) -> dict[str, Any]:
    """Our keys for a class's own word on attention biases: on all projections, or (`of_output` false) on queries, keys and values alone."""
    if not has_bias:
        return {"use_bias_in_attn_linear": False}
    return {"use_bias_in_attn_linear": True} if of_output else {"use_bias_in_attn_linear": False, "add_qkv_bias": True}


def size_keys(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes and ends that every architecture has."""
    return {
        "num_layers": settings["num_hidden_layers"],
        "hidden_size": settings["hidden_size"],
        "num_attention_heads": settings["num_attention_heads"],
        "seq_length": settings["max_position_embeddings"],
        "max_position_embeddings": settings["max_position_embeddings"],
        "no_weight_tying": not settings.get("tie_word_embeddings", False),
        "init_method_std": settings.get("initializer_range", 0.02),
    }


def rotary_keys(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`pos_emb`, base and share. Raises ConversionError for scaled frequencies and broken bases."""
    parameters = settings.get("rope_parameters") or {}
    kind = parameters.get("rope_type", "default")
    if kind not in ("default", *SCALINGS):
        raise ConversionError(f"rope_parameters: rope_type {kind} cannot be represented; known are default, {', '.join(SCALINGS)}.")
    base = parameters.get("rope_theta", settings.get("rope_theta", 10000))
    if base != int(base):
        raise ConversionError(f"rope_theta: {base} cannot be represented, because rotary_emb_base must be a whole number.")
    share = parameters.get("partial_rotary_factor", settings.get("partial_rotary_factor", settings.get("rotary_pct"))) or 1.0
    if share != 1.0 and settings.get("model_type") not in TURN_A_SHARE:
        if kind != "default":
            raise ConversionError(
                f"rope_parameters: partial_rotary_factor {share} with rope_type {kind} cannot be represented, and transformers cannot run it either."
            )
        share = 1.0  # the class does not read it
    keys = {"pos_emb": "rotary", "rotary_emb_base": int(base), **({} if share == 1.0 else {"rotary_pct": share})}
    if kind in SCALINGS:
        keys["rope_scaling"] = {key: parameters[key] for key in ("rope_type", *SCALINGS[kind])}
    return keys


def window_keys(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Hugging Face counts the token itself, we do not. A window that no text exceeds is none."""
    window = settings.get("sliding_window")
    if not window or window >= settings["max_position_embeddings"]:
        return {}
    return {"sliding_window_width": window - 1}


def window_setting(model: ModelConfig) -> int | None:
    """`sliding_window`. None: every token sees all before it."""
    return None if model.sliding_window_width is None else model.sliding_window_width + 1


def head_dim_keys(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`head_dim` where it is not hidden_size / num_attention_heads."""
    width, heads = settings["hidden_size"], settings["num_attention_heads"]
    head_dim = settings.get("head_dim") or width // heads
    return {} if head_dim * heads == width else {"head_dim": head_dim}


def without_usual_head_dim(settings: Mapping[str, Any]) -> dict[str, Any]:
    """For classes whose configuration does not list `head_dim`, though they obey it: said only where it is not hidden_size / num_attention_heads."""
    return {key: value for key, value in settings.items() if key != "head_dim" or head_dim_keys(settings)}


def check_usual_head_dim(settings: Mapping[str, Any], class_name: str) -> None:
    """Raises ConversionError for heads of another width than hidden_size / num_attention_heads, in a class that has no such heads."""
    if own := head_dim_keys(settings):
        width, heads = settings["hidden_size"], settings["num_attention_heads"]
        raise ConversionError(
            f"head_dim: {own['head_dim']} cannot be read, because {class_name} divides hidden_size ({width}) among its {heads} heads."
        )


def known(table: Mapping[str, str], name: str, key: str) -> str:
    """Our word for theirs. Raises ConversionError for one that we do not have."""
    if name not in table:
        raise ConversionError(f"{key}: {name} cannot be represented; known are {', '.join(sorted(table))}.")
    return table[name]
