"""Whether a model fits a class of Hugging Face's: what it does, key by key, against what the class can do."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

from megatron.config.moe import MoEConfig
from megatron.config.zero_computation import KEYS as ZERO_COMPUTATION_KEYS
from megatron.convert.architecture import Source

ANY: Final = None
"""Every value is good."""
Allowed = Mapping[str, Collection[Any] | None]

DENSE: Allowed = {
    "norm": {"rmsnorm"},
    "pos_emb": {"rotary"},
    "rotary_pct": {1.0},
    "sliding_window_width": {None},
    "use_qk_layernorm": {False},
    "qk_norm_per_head": {False},
    "qk_norm_all_heads": {False},
    "gpt_j_residual": {False},
    "gpt_j_tied": {False},
    "reordered_norm": {False},
    "use_bias_in_attn_linear": {False},
    "add_qkv_bias": {False},
    "use_bias_in_mlp": {False},
    "activation": {"swiglu", "geglu", "reglu", "glu", "bilinear"},
    "moe_num_experts": {1},
}
"""What a Llama can do; others say what they do otherwise."""
EXPERTS: Allowed = {
    **{key: values for key, values in DENSE.items() if key not in ("moe_num_experts", "use_bias_in_mlp")},
    "moe_expert_type": {"grouped"},
    "moe_router_type": {"topk"},
    "moe_router_topk_scaling_factor": {1.0},
    "moe_use_residual": {False},
    "moe_expert_bias": {False},
    "moe_num_experts_by_layer": {None},
    "moe_latent_size": {None},
    **{key: {0} for key in ZERO_COMPUTATION_KEYS},
    "shared expert": {"none"},
    "dense layers": {"none"},
}
"""What a Mixtral can do, but for how its weights are normalised."""

GATE_ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu", "glu": "sigmoid", "bilinear": "linear"}
"""Ours -> Hugging Face's `hidden_act` of a gated MLP."""
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "swish": "silu", "silu": "silu", "mish": "mish"}
"""Ours -> `hidden_act` of an MLP without a gate."""


def obstacles(source: Source, allowed: Allowed, *, class_name: str, own_head_dim: bool = True) -> Iterator[str]:
    """A sentence for each key whose value the class cannot represent. `own_head_dim`: its heads can be of another width than hidden_size / heads."""
    traits = traits_of(source)
    for key, values in allowed.items():
        if values is not ANY and traits[key] not in tuple(values):  # a list has no place in a set
            can = " or ".join(sorted(map(str, values)))
            yield f"{key}: {traits[key]} ({class_name} has {can} only)"
    model = source.config.model
    if not own_head_dim and model.attention_width != model.hidden_size:
        usual = f"{class_name} divides hidden_size, {model.hidden_size}, among its heads"
        yield f"head_dim: {model.head_width}, with {model.num_attention_heads} heads ({usual})"
    if source.config.moe.has_experts and "moe_num_experts" not in allowed and source.config.model.use_bias_in_mlp and _has_plain_mlps(source):
        yield f"use_bias_in_mlp: True ({class_name} has no biases in its dense layers and shared experts)"


def traits_of(source: Source) -> dict[str, Any]:
    """What decides whether a class fits, by the key that says it."""
    model, moe = source.config.model, source.config.moe
    traits = {key: getattr(model, key) for key in DENSE if key in type(model).model_fields}
    traits |= {key: getattr(moe, key) for key in EXPERTS if key in type(moe).model_fields}
    return traits | {
        "moe_num_experts": max(moe.expert_counts) if moe.has_experts else 1,
        "activation": model.hidden_function,
        "moe_router_type": router_kind(moe),
        "shared expert": shared_kind(source),
        "dense layers": dense_layers(source),
    }


def router_kind(moe: MoEConfig) -> str:
    """What the router computes where text is generated: `topk`, `topk normalized`, `sigmoid` or another router's name.

    Sinkhorn's router then takes the top k of a softmax (for k = 1 of a sigmoid), without dividing by their sum.
    """
    if moe.moe_router_type == "topk":
        return "topk normalized" if moe.moe_normalize_top_k or not moe.moe_router_pre_softmax else "topk"
    if moe.moe_router_type == "sinkhorn":
        return "topk" if moe.top_k > 1 else "sinkhorn with moe_top_k 1"
    return moe.moe_router_type


def shared_kind(source: Source) -> str:
    """`none`, `plain`, or `gated` by a sigmoid."""
    moe = source.config.moe
    if not (moe.has_experts and moe.shared_width(source.config.model)):
        return "none"
    return "gated" if moe.moe_shared_expert_gate else "plain"


def dense_layers(source: Source) -> str:
    """Where the layers without experts are: `none`, `first` or `anywhere`."""
    layers = source.config.model.num_layers
    experts = source.config.moe.moe_layer_numbers(layers)
    if len(experts) == layers or not experts:
        return "none"
    return "first" if experts == list(range(layers - len(experts), layers)) else "anywhere"


def _has_plain_mlps(source: Source) -> bool:
    return shared_kind(source) != "none" or dense_layers(source) != "none"
