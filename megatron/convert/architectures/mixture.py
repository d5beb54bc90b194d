"""Mixture-of-experts decoders: Mixtral, Qwen's and GLM-4.5's, which has DeepSeek-V3's experts and router with plain attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron.convert.architecture import Source
from megatron.convert.architectures import fit
from megatron.convert.architectures.balance import balance_keys, balance_setting
from megatron.convert.architectures.llama import Llama, check_no_window, check_not_clipped
from megatron.convert.architectures.settings import (
    bias_keys,
    check_usual_head_dim,
    decoder_keys,
    decoder_settings,
    partial_rotary_settings,
    window_keys,
    window_setting,
    without_usual_head_dim,
)
from megatron.convert.architectures.weights import gated_experts, gated_mlp, ours
from megatron.convert.errors import ConversionError
from megatron.convert.mapping import Entry

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class Mixtral(Llama):
    """Experts in every layer; the weights of a token's experts sum to one."""

    name, model_type, class_name = "mixtral", "mixtral", "MixtralForCausalLM"
    divides_hidden_size = False
    allowed: fit.Allowed = {**fit.EXPERTS, "moe_router_type": {"topk normalized"}, "sliding_window_width": fit.ANY}

    def settings(self, source: Source) -> dict[str, Any]:
        model, moe = source.config.model, source.config.moe
        return {
            **decoder_settings(source),
            "intermediate_size": moe.expert_width(model),
            "sliding_window": window_setting(model),
            "num_local_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "router_aux_loss_coef": balance_setting(source),
            "router_jitter_noise": moe.moe_jitter_eps or 0.0,
        }

    def keys(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **decoder_keys(settings),
            **window_keys(settings),
            **expert_keys(settings, settings["num_local_experts"], settings["intermediate_size"]),
            **balance_keys(settings),
            "moe_router_type": "topk",
            "moe_router_pre_softmax": False,
            "moe_normalize_top_k": True,
            **({"moe_jitter_eps": settings["router_jitter_noise"]} if settings.get("router_jitter_noise") else {}),
        }

    def feed_forward(self, source: Source, layer: int, theirs: str) -> Iterator[Entry]:
        """Mixtral's own names of the experts."""
        theirs = theirs.removesuffix(".mlp") + ".block_sparse_moe"
        yield Entry(f"{ours(layer)}.mlp.router.layer.weight", (f"{theirs}.gate.weight",))
        yield from gated_experts(source.config.moe, layer, theirs, ("w1", "w3", "w2"))


class Qwen3Moe(Llama):
    """Norms on each query and key head; dense layers anywhere."""

    name, model_type, class_name = "qwen3-moe", "qwen3_moe", "Qwen3MoeForCausalLM"
    divides_hidden_size = False
    allowed: fit.Allowed = {
        **fit.EXPERTS,
        "qk_norm_per_head": {True},
        "use_bias_in_attn_linear": fit.ANY,
        "moe_router_type": {"topk", "topk normalized"},
        "dense layers": fit.ANY,
    }

    def settings(self, source: Source) -> dict[str, Any]:
        model, moe = source.config.model, source.config.moe
        return {
            **decoder_settings(source),
            "attention_bias": model.use_bias_in_attn_linear,
            "use_sliding_window": False,
            "num_experts": moe.num_experts,
            "moe_intermediate_size": moe.expert_width(model),
            "num_experts_per_tok": moe.top_k,
            "norm_topk_prob": fit.router_kind(moe) == "topk normalized",
            "decoder_sparse_step": 1,
            "mlp_only_layers": sorted(set(range(model.num_layers)) - set(moe.moe_layer_numbers(model.num_layers))),
            "router_aux_loss_coef": balance_setting(source),
        }

    def keys(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        check_no_window(settings)
        return {**decoder_keys(settings), **bias_keys(settings.get("attention_bias")), **self.moe_keys(settings), "qk_norm_per_head": True}

    def moe_keys(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Which layers have experts, how many, how chosen."""
        layers, step, dense = settings["num_hidden_layers"], settings.get("decoder_sparse_step") or 1, settings.get("mlp_only_layers") or []
        sparse = [layer for layer in range(layers) if layer not in dense and (layer + 1) % step == 0]
        experts = settings.get("num_experts") or settings.get("num_local_experts")
        if not sparse or experts is None:
            raise ConversionError("the model has no layer with experts.")
        return {
            **expert_keys(settings, experts, settings["moe_intermediate_size"]),
            **balance_keys(settings),
            **({"moe_layers": sparse} if len(sparse) < layers else {}),
            "moe_router_type": "topk",
            "moe_normalize_top_k": bool(settings.get("norm_topk_prob", False)),
        }

    def feed_forward(self, source: Source, layer: int, theirs: str) -> Iterator[Entry]:
        model, moe = source.config.model, source.config.moe
        if layer not in moe.moe_layer_numbers(model.num_layers):
            yield from gated_mlp(f"{ours(layer)}.mlp", theirs, model.mlp_width)
            return
        yield Entry(f"{ours(layer)}.mlp.router.layer.weight", (f"{theirs}.gate.weight",))
        yield from gated_experts(moe, layer, theirs, PROJECTIONS)


class Qwen2Moe(Qwen3Moe):
    """No norms on heads; a shared expert behind a sigmoid gate; biases on queries, keys and values."""

    name, model_type, class_name = "qwen2-moe", "qwen2_moe", "Qwen2MoeForCausalLM"
    allowed: fit.Allowed = {**Qwen3Moe.allowed, "qk_norm_per_head": {False}, "add_qkv_bias": fit.ANY, "shared expert": {"gated"}}
    bias_of_output = False

    def settings(self, source: Source) -> dict[str, Any]:
        model, moe = source.config.model, source.config.moe
        settings = without_usual_head_dim(super().settings(source))
        del settings["attention_bias"]
        return {**settings, "qkv_bias": model.has_qkv_bias, "shared_expert_intermediate_size": moe.shared_width(model)}

    def keys(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        check_no_window(settings)
        return {
            **decoder_keys(settings),
            **self.moe_keys(settings),
            **bias_keys(settings.get("qkv_bias", True), of_output=False),
            "moe_shared_expert_intermediate_size": settings["shared_expert_intermediate_size"],
            "moe_shared_expert_gate": True,
        }

    def feed_forward(self, source: Source, layer: int, theirs: str) -> Iterator[Entry]:
        yield from super().feed_forward(source, layer, theirs)
        model, moe = source.config.model, source.config.moe
        if layer in moe.moe_layer_numbers(model.num_layers):
            yield Entry(f"{ours(layer)}.mlp.beside.0.gate.weight", (f"{theirs}.shared_expert_gate.weight",))
            yield from gated_mlp(f"{ours(layer)}.mlp.beside.0.mlp", f"{theirs}.shared_expert", moe.shared_width(model))


class Olmoe(Qwen3Moe):
    """Norms over all query heads and over all key heads; experts in every layer."""

    name, model_type, class_name = "olmoe", "olmoe", "OlmoeForCausalLM"
    allowed: fit.Allowed = {**Qwen3Moe.allowed, "qk_norm_per_head": {False}, "qk_norm_all_heads": {True}, "dense layers": {"none"}}
    own_head_dim = False  # its norms are over hidden_size
    LEFT_OUT = ("head_dim", "moe_intermediate_size", "use_sliding_window", "decoder_sparse_step", "mlp_only_layers")

    def settings(self, source: Source) -> dict[str, Any]:
        settings = super().settings(source)
        width = source.config.moe.expert_width(source.config.model)
        return {**{key: value for key, value in settings.items() if key not in self.LEFT_OUT}, "intermediate_size": width, "clip_qkv": None}

    def keys(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        check_not_clipped(settings)
        check_usual_head_dim(settings, self.class_name)
        return {
            **decoder_keys(settings),
            **bias_keys(settings.get("attention_bias")),
            **self.moe_keys({**settings, "moe_intermediate_size": settings["intermediate_size"]}),
            "qk_norm_all_heads": True,
        }


class Glm4Moe(Llama):
    """DeepSeek-V3's experts: sigmoid scores, a bias that only chooses, groups, shared experts, the first layers dense; plain attention."""

    name, model_type, class_name = "glm4-moe", "glm4_moe", "Glm4MoeForCausalLM"
    divides_hidden_size = False
    allowed: fit.Allowed = {
        **fit.EXPERTS,
        "rotary_pct": fit.ANY,
        "qk_norm_per_head": fit.ANY,
        "use_bias_in_attn_linear": fit.ANY,
        "add_qkv_bias": fit.ANY,
        "moe_router_type": {"sigmoid"},
        "moe_router_topk_scaling_factor": fit.ANY,
        "shared expert": {"plain"},
        "dense layers": {"none", "first"},
    }
    bias_of_output = False

    def obstacles(self, source: Source) -> Iterator[str]:
        yield from super().obstacles(source)
        model, moe = source.config.model, source.config.moe
        if moe.shared_width(model) % moe.expert_width(model):
            yield f"moe_shared_expert_intermediate_size: {moe.shared_width(model)} ({self.class_name} has multiples of the experts' width only)"
        if moe.num_experts // (moe.moe_router_num_groups or 1) < 2:
            yield f"moe_router_num_groups: {moe.moe_router_num_groups} ({self.class_name} has groups of at least two experts only)"

    def settings(self, source: Source) -> dict[str, Any]:
        model, moe = source.config.model, source.config.moe
        return {
            **decoder_settings(source),
            **partial_rotary_settings(model),
            "attention_bias": model.has_qkv_bias,
            "use_qk_norm": model.qk_norm_per_head,
            "n_routed_experts": moe.num_experts,
            "n_shared_experts": moe.shared_width(model) // moe.expert_width(model),
            "moe_intermediate_size": moe.expert_width(model),
            "num_experts_per_tok": moe.top_k,
            "norm_topk_prob": moe.moe_normalize_top_k,
            "routed_scaling_factor": moe.moe_router_topk_scaling_factor,
            "n_group": moe.moe_router_num_groups or 1,
            "topk_group": moe.moe_router_group_topk or 1,
            "first_k_dense_replace": model.num_layers - len(moe.moe_layer_numbers(model.num_layers)),
        }

    def keys(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        experts = settings.get("n_routed_experts") or settings["num_local_experts"]
        groups, chosen = settings.get("n_group") or 1, settings.get("topk_group") or 1
        return {
            **decoder_keys(settings),
            **bias_keys(settings.get("attention_bias"), of_output=False),
            "qk_norm_per_head": bool(settings.get("use_qk_norm", False)),
            **expert_keys(settings, experts, settings["moe_intermediate_size"]),
            "moe_router_type": "sigmoid",
            "moe_normalize_top_k": bool(settings["norm_topk_prob"]),
            "moe_router_topk_scaling_factor": settings["routed_scaling_factor"],
            **({} if groups == 1 else {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}),
            "moe_num_shared_experts": settings["n_shared_experts"],
            "moe_first_k_dense_layers": settings["first_k_dense_replace"],
        }

    def feed_forward(self, source: Source, layer: int, theirs: str) -> Iterator[Entry]:
        model, moe = source.config.model, source.config.moe
        if layer not in moe.moe_layer_numbers(model.num_layers):
            yield from gated_mlp(f"{ours(layer)}.mlp", theirs, model.mlp_width)
            return
        router = f"{ours(layer)}.mlp.router"
        yield Entry(f"{router}.layer.weight", (f"{theirs}.gate.weight",))
        yield Entry(f"{router}.balance.bias", (f"{theirs}.gate.e_score_correction_bias",), exact=True)
        yield from gated_experts(moe, layer, theirs, PROJECTIONS)
        yield from gated_mlp(f"{ours(layer)}.mlp.beside.0.mlp", f"{theirs}.shared_experts", moe.shared_width(model))


def expert_keys(settings: Mapping[str, Any], experts: int, width: int) -> dict[str, Any]:
    """Number, width and choice of plain experts."""
    return {"moe_num_experts": experts, "moe_top_k": settings["num_experts_per_tok"], "moe_ffn_hidden_size": width}
