"""StructMoEForCausalLM: this project's own class for transformers, for every model that no class of theirs fits. Exports hold its code.

Shapes: E experts; M LoREs per expert; Q LoRE rank; F hidden width; D model width; H query heads; K key/value heads; d head dimension; r rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.config.model import ModelConfig
from megatron.config.moe import TEMPERED_LOSSES, MoEConfig
from megatron.convert.architecture import Code, Source
from megatron.convert.architectures.settings import head_dim_keys
from megatron.convert.architectures.weights import attention
from megatron.convert.architectures.weights import ours as layer_name
from megatron.convert.errors import ConversionError
from megatron.convert.mapping import Entry, Misfit, Reshaped, Rows

CODE = tuple(sorted((Path(__file__).parent.parent / "huggingface").glob("*_structmoe.py")))
"""The files that an export has to hold beside its weights."""
AUTO_MAP = {
    "AutoConfig": "configuration_structmoe.StructMoEConfig",
    "AutoModel": "modeling_structmoe.StructMoEModel",
    "AutoModelForCausalLM": "modeling_structmoe.StructMoEForCausalLM",
}
NORM_WEIGHTS = {"layernorm": ("weight", "bias"), "rmsnorm": ("scale",), "scalenorm": ("g",), "non_parametric_layernorm": ()}
QK_NORMS = {"use_qk_layernorm": "all_heads", "qk_norm_per_head": "per_head", "qk_norm_all_heads": "jointly"}
EPSILONS = {"rmsnorm": "rms_norm_epsilon", "scalenorm": "scalenorm_epsilon"}

# Key of ours -> the setting that is the same.
MODEL_NAMES = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings",
    "use_bias_in_attn_linear": "attention_bias",
    "add_qkv_bias": "qkv_bias",
    "use_bias_in_mlp": "mlp_bias",
    "attention_dropout": "attention_dropout",
    "hidden_dropout": "hidden_dropout",
    "norm": "norm_type",
    "use_bias_in_norms": "norm_bias",
    "pos_emb": "position_type",
    "rotary_pct": "rotary_pct",
    "rotary_emb_base": "rotary_emb_base",
    "opt_pos_emb_offset": "position_offset",
    "rpe_num_buckets": "rpe_num_buckets",
    "rpe_max_distance": "rpe_max_distance",
    "init_method_std": "initializer_range",
}
MOE_NAMES = {
    "moe_expert_type": "expert_type",
    "moe_expert_bias": "expert_bias",
    "moe_router_type": "router_type",
    "moe_shared_expert_gate": "shared_expert_gate",
    "moe_use_residual": "residual_mlp",
    "moe_latent_size": "latent_size",
    "moe_zero_experts": "zero_experts",
    "moe_copy_experts": "copy_experts",
    "moe_constant_experts": "constant_experts",
    "moe_losses": "moe_losses",
    "moe_block_wise_temperature": "moe_block_wise_temperature",
    "moe_zero_computation_balance": "zero_computation_balance",
}
NORMALIZED = {"moe_normalize_top_k": "norm_topk_prob"}
SCALED = {**NORMALIZED, "moe_router_topk_scaling_factor": "routed_scaling_factor"}
ROUTER_NAMES: dict[str, dict[str, str]] = {
    "topk": SCALED,
    "sinkhorn": {},
    "sigmoid": {**SCALED, "moe_router_num_groups": "n_group", "moe_router_group_topk": "topk_group"},
    "top_p": {**NORMALIZED, "moe_router_top_p": "router_top_p"},
    "expert_choice": {},
    "quantile_balancing": SCALED,
    "expert_threshold": {},
    "document_pool": SCALED,
    "recurrent": {**SCALED, "moe_router_rnn_hidden_size": "router_rnn_hidden_size"},
    "smoe_dropout": {"moe_router_eval_k": "num_experts_in_evaluation"},
}
EXPERT_NAMES: dict[str, dict[str, str]] = {
    "grouped": {},
    "structmoe": {
        "moe_num_lores": "num_lores",
        "moe_lore_top_k": "lore_top_k",
        "moe_lore_rank": "lore_rank",
        "moe_lore_normalize": "lore_norm_topk_prob",
        "moe_lore_routed": "lore_routed",
        "moe_lore_interaction": "lore_interaction",
        "moe_lore_projection": "lore_projection",
    },
    "decomposed": {"moe_decomposition_rank": "decomposition_rank"},
}


class StructMoE:
    """All that can be trained here, except what a plugin adds."""

    name, model_type, class_name = "structmoe", "structmoe_neox", "StructMoEForCausalLM"
    code: Code | None = Code(CODE, AUTO_MAP)

    def obstacles(self, source: Source) -> Iterator[str]:
        moe = source.config.moe
        for key, known in (("moe_router_type", ROUTER_NAMES), ("moe_expert_type", EXPERT_NAMES)):
            if moe.has_experts and getattr(moe, key) not in known:
                yield f"{key}: {getattr(moe, key)} ({self.class_name} has {', '.join(known)}; what a plugin adds cannot be exported)"
        pool = moe.moe_eval_document_expert_pool if moe.has_experts and moe.moe_router_type == "document_pool" else None
        if pool is not None and pool < max(moe.choice_counts):
            given = f"moe_eval_document_expert_pool: {pool}"
            yield f"{given} (transformers' caches have no place for a pool that follows the text; with all experts the model can be exported)"

    def settings(self, source: Source) -> dict[str, Any]:
        model = source.config.model
        scales = [model.position_bias_coefficient(layer) for layer in range(model.num_layers)]
        window = model.sliding_window_width
        return {
            "auto_map": AUTO_MAP,
            "vocab_size": source.vocabulary,
            **{theirs: getattr(model, ours) for ours, theirs in MODEL_NAMES.items()},
            "num_key_value_heads": model.kv_heads,
            "head_dim": model.head_width,
            "intermediate_size": model.mlp_width,
            "hidden_act": model.hidden_function,
            "residual_type": model.residual,
            "norm_eps": getattr(model, EPSILONS.get(model.norm, "layernorm_epsilon")),
            "qk_norm": next((theirs for ours, theirs in QK_NORMS.items() if getattr(model, ours)), "none"),
            "position_bias_scale": scales,
            "sliding_window": None if window is None else window + 1,
            "rotary_scaling": {} if model.rope_scaling is None else model.rope_scaling.model_dump(exclude_none=True),
            "tie_word_embeddings": not model.no_weight_tying,
            **(_moe_settings(source) if source.config.moe.has_experts else {}),
        }

    def keys(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        from megatron.convert.huggingface.configuration_structmoe import StructMoEConfig

        try:
            config = StructMoEConfig(**settings)
        except ValueError as error:
            raise ConversionError(f"The settings of this {self.class_name} contradict each other: {error}.") from error
        gelu_tanh = config.hidden_act == "gelu_tanh"
        return {
            **{ours: getattr(config, theirs) for ours, theirs in MODEL_NAMES.items()},
            "add_qkv_bias": config.qkv_bias and not config.attention_bias,
            **({} if config.kv_heads == config.num_attention_heads else {"num_kv_heads": config.kv_heads}),
            **head_dim_keys({name: getattr(config, name) for name in ("hidden_size", "num_attention_heads", "head_dim")}),
            "seq_length": config.max_position_embeddings - config.position_offset,
            "ffn_hidden_size": config.intermediate_size,
            "activation": "gelu" if gelu_tanh else config.hidden_act,
            "bias_gelu_fusion": gelu_tanh,
            "gpt_j_residual": config.residual_type in ("parallel", "tied"),
            "gpt_j_tied": config.residual_type == "tied",
            "reordered_norm": config.residual_type == "reordered",
            EPSILONS.get(config.norm_type, "layernorm_epsilon"): config.norm_eps,
            **{ours: config.qk_norm == theirs for ours, theirs in QK_NORMS.items()},
            "no_weight_tying": not config.tie_word_embeddings,
            **({} if config.sliding_window is None else {"sliding_window_width": config.sliding_window - 1}),
            **({"rope_scaling": config.rotary_scaling} if config.rotary_scaling else {}),
            **_scale_keys(config.position_bias_scale),
            **(_moe_keys(config) if any(config.num_experts_by_layer) else {}),
        }

    def table(self, source: Source) -> Iterator[Entry]:
        model = source.config.model
        sections = source.config.moe.for_layers(model.num_layers)
        bias_table = OneForAllLayers()
        first_recurrent = min(sections, default=None) if source.config.moe.moe_router_type == "recurrent" else None
        yield Entry("sequential.0.word_embeddings.weight", ("model.embed_tokens.weight",))
        if model.pos_emb == "learned":
            yield Entry("sequential.0.position_embeddings.weight", ("model.embed_positions.weight",))
        for layer in range(model.num_layers):
            ours, theirs = layer_name(layer), f"model.layers.{layer}"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield from _norm(model, f"{ours}.{norm}", f"{theirs}.{norm}")
            yield from attention(model, layer, f"{theirs}.self_attn")
            yield from _query_key_norms(model, f"{ours}.attention", f"{theirs}.self_attn")
            if model.pos_emb == "rpe":
                yield bias_table.entry(f"{ours}.attention.rpe.weight", "model.position_bias.weight", layer)
            if layer in sections:
                yield from _experts_layer(model, sections[layer], f"{ours}.mlp", f"{theirs}.mlp")
                yield from _router_cell(f"{ours}.mlp.router.cell", f"{theirs}.mlp.gate.cell") if layer == first_recurrent else ()
            else:
                yield from _mlp(model, f"{ours}.mlp", f"{theirs}.mlp", model.mlp_width)
        yield from _norm(model, f"sequential.{model.num_layers + 3}.norm", "model.norm")
        if model.no_weight_tying:
            yield Entry(f"sequential.{model.num_layers + 4}.final_linear.weight", ("lm_head.weight",))


# ---------------------------------------------------------------- settings and keys


def _moe_settings(source: Source) -> dict[str, Any]:
    """The settings of a model with experts."""
    model, moe = source.config.model, source.config.moe
    sections = moe.for_layers(model.num_layers)
    names = {**MOE_NAMES, **ROUTER_NAMES.get(moe.moe_router_type, {}), **EXPERT_NAMES.get(moe.moe_expert_type, {})}
    settings = {theirs: getattr(moe, ours) for ours, theirs in names.items()} | {
        "num_experts_by_layer": [sections[layer].num_experts if layer in sections else 0 for layer in range(model.num_layers)],
        "num_experts_per_tok": 1 if moe.moe_router_type == "top_p" else moe.top_k,
        "moe_intermediate_size": moe.expert_width(model),
        "shared_expert_intermediate_size": moe.shared_width(model),
        "router_jitter_noise": 0.0 if moe.moe_router_type == "sinkhorn" else moe.moe_jitter_eps or 0.0,
    }
    if moe.moe_router_type == "topk":
        settings["norm_topk_prob"] = moe.moe_normalize_top_k or not moe.moe_router_pre_softmax
    if moe.moe_expert_type == "decomposed":
        settings["decomposition_rank"] = moe.decomposition_rank(moe.expert_model(model).hidden_size)
    return settings


def _moe_keys(config: Any) -> dict[str, Any]:
    """The keys of a StructMoEConfig with experts. Raises ConversionError for a layer with a single one."""
    layers = [layer for layer, count in enumerate(config.num_experts_by_layer) if count]
    counts = [config.num_experts_by_layer[layer] for layer in layers]
    if min(counts) < 2:
        raise ConversionError(
            f"num_experts_by_layer: {config.num_experts_by_layer} cannot be represented: a layer must have 0 experts, or 2 or more."
        )
    names = {**MOE_NAMES, **ROUTER_NAMES[config.router_type], **EXPERT_NAMES[config.expert_type]}
    keys = {ours: getattr(config, theirs) for ours, theirs in names.items()} | {
        "moe_losses": _losses(config),
        "moe_layers": layers,
        "moe_num_experts": counts[0],
        "moe_top_k": None if config.router_type == "top_p" else config.num_experts_per_tok,
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": config.shared_expert_intermediate_size or None,
        "moe_jitter_eps": config.router_jitter_noise or None,
    }
    if len(set(counts)) > 1:
        keys |= {"moe_num_experts": None, "moe_num_experts_by_layer": counts}
    if keys["moe_losses"].keys().isdisjoint(TEMPERED_LOSSES):
        del keys["moe_block_wise_temperature"]
    if "heterogeneous_load_balance" not in keys["moe_losses"]:
        del keys["moe_zero_computation_balance"]
    return {key: value for key, value in keys.items() if value is not None}


def _losses(config: Any) -> dict[str, float]:
    """`moe_losses` that add what the class adds: times what `router_aux_loss_coef` was changed by since the export."""
    if config.router_aux_loss_coef == config.loss_unit or not config.moe_losses:
        return dict(config.moe_losses)
    return {name: coefficient * config.router_aux_loss_coef / config.loss_unit for name, coefficient in config.moe_losses.items()}


def _scale_keys(scales: Sequence[float]) -> dict[str, Any]:
    """The keys that give each layer's position biases these factors. Raises ConversionError where none do."""
    if set(scales) == {1.0}:
        return {}
    numbers = [float(max(1, layer)) for layer in range(len(scales))]
    if any(scale not in (1.0, number) for scale, number in zip(scales, numbers, strict=True)):
        raise ConversionError(f"position_bias_scale: {list(scales)} cannot be represented: each must be 1 or the number of its layer.")
    kinds = ["global" if scale == number else "flash" for scale, number in zip(scales, numbers, strict=True)]
    return {"apply_query_key_layer_scaling": True, "attention_config": kinds}


# ---------------------------------------------------------------- weights


class OneForAllLayers:
    """A weight that every layer of ours holds and that is there once: the first layer's entry carries it, the others have to agree.

    It remembers the weight from the first entry to the last, since a table is run through from its beginning to its end.
    """

    def __init__(self) -> None:
        self.weight = torch.empty(0)

    def entry(self, ours: str, theirs: str, layer: int) -> Entry:
        """The entry of a layer (from 0)."""
        return Entry(ours, () if layer else (theirs,), _Remembered(self) if layer else _Remembering(self))


class _Remembering:
    """The first layer's."""

    def __init__(self, shared: OneForAllLayers) -> None:
        self.shared = shared

    def there(self, ours: Tensor) -> Sequence[Tensor]:
        """The weight."""
        self.shared.weight = ours
        return (ours,)

    def back(self, theirs: Sequence[Tensor]) -> Tensor:
        """The weight."""
        self.shared.weight = theirs[0]
        return theirs[0]


class _Remembered:
    """A later layer's."""

    def __init__(self, shared: OneForAllLayers) -> None:
        self.shared = shared

    def there(self, ours: Tensor) -> Sequence[Tensor]:
        """Nothing. Raises Misfit where the layers do not agree."""
        if not torch.equal(ours, self.shared.weight):
            raise Misfit("differs from the first layer's, but the other architecture has a single weight for all layers")
        return ()

    def back(self, theirs: Sequence[Tensor]) -> Tensor:
        """The first layer's."""
        return self.shared.weight


def _norm(model: ModelConfig, ours: str, theirs: str) -> Iterator[Entry]:
    for part in NORM_WEIGHTS[model.norm]:
        if part != "bias":
            yield Entry(f"{ours}.{part}", (f"{theirs}.weight",))
        elif model.use_bias_in_norms:
            yield Entry(f"{ours}.bias", (f"{theirs}.bias",))


def _query_key_norms(model: ModelConfig, ours: str, theirs: str) -> Iterator[Entry]:
    if model.use_qk_layernorm:
        yield from _norm(model, f"{ours}.qk_layernorm", f"{theirs}.qk_norm")
    if model.qk_norm_widths is not None:
        for norm in ("q_norm", "k_norm"):
            yield from _norm(model, f"{ours}.{norm}", f"{theirs}.{norm}")


def _mlp(model: ModelConfig, ours: str, theirs: str, width: int) -> Iterator[Entry]:
    into = ("up_proj", "gate_proj") if model.is_gated else ("up_proj",)
    for part in ("weight", "bias") if model.use_bias_in_mlp else ("weight",):
        yield Entry(f"{ours}.linear1.{part}", tuple(f"{theirs}.{name}.{part}" for name in into), Rows([width] * len(into)))
        yield Entry(f"{ours}.linear2.{part}", (f"{theirs}.down_proj.{part}",))


def _experts_layer(model: ModelConfig, moe: MoEConfig, ours: str, theirs: str) -> Iterator[Entry]:
    yield from _router(moe, f"{ours}.router", f"{theirs}.gate")
    if moe.moe_latent_size is not None:
        for part in ("down", "up"):
            yield Entry(f"{ours}.latent.{part}.weight", (f"{theirs}.latent.{part}.weight",))
    if moe.moe_constant_experts:
        for part in ("vector", "mixture.weight"):
            yield Entry(f"{ours}.zero_computation.{part}", (f"{theirs}.zero_computation.{part}",))
    for name, their_name, count in _expert_weights(model, moe):
        yield _stacked(f"{ours}.experts.{name}", f"{theirs}.experts.{their_name}", count)
    for name in _matrices(model) if moe.moe_expert_bias else ():
        bias = name.replace("w", "b")
        yield Entry(f"{ours}.experts.mlp.{bias}.bias", (f"{theirs}.experts.{bias}",))
    beside = 0
    if width := moe.shared_width(model):
        yield from _mlp(model, f"{ours}.beside.0.mlp", f"{theirs}.beside.shared_expert.mlp", width)
        if moe.moe_shared_expert_gate:
            yield Entry(f"{ours}.beside.0.gate.weight", (f"{theirs}.beside.shared_expert.gate.weight",))
        beside = 1
    if moe.moe_use_residual:
        yield from _mlp(model, f"{ours}.beside.{beside}.mlp", f"{theirs}.beside.residual_mlp.mlp", model.mlp_width)
        for part in ("weight", "bias"):
            yield Entry(f"{ours}.beside.{beside}.coefficient.{part}", (f"{theirs}.beside.residual_mlp.coefficient.{part}",))


def _router(moe: MoEConfig, ours: str, theirs: str) -> Iterator[Entry]:
    yield Entry(f"{ours}.layer.weight", (f"{theirs}.weight",))
    if moe.moe_router_type in ("sigmoid", "quantile_balancing"):
        yield Entry(f"{ours}.balance.bias", (f"{theirs}.e_score_correction_bias",), exact=True)
    if moe.moe_router_type == "expert_threshold":
        yield Entry(f"{ours}.balance.threshold", (f"{theirs}.e_score_threshold",), exact=True)
        yield Entry(f"{ours}.balance.steps", (f"{theirs}.threshold_steps",), exact=True)
    if moe.moe_router_type == "smoe_dropout":
        yield Entry(f"{ours}.growth.k", (f"{theirs}.experts_per_token",), exact=True)
    if moe.moe_router_type == "recurrent":
        yield Entry(f"{ours}.into.weight", (f"{theirs}.into.weight",))


def _router_cell(ours: str, theirs: str) -> Iterator[Entry]:
    for name in ("input_weight", "memory_weight", "input_bias", "memory_bias", "start"):
        yield Entry(f"{ours}.{name}", (f"{theirs}.{name}",))


def _matrices(model: ModelConfig) -> tuple[str, ...]:
    """Those of an expert, by name."""
    return ("w1", "w2", "w3") if model.is_gated else ("w1", "w2")


def _expert_weights(model: ModelConfig, moe: MoEConfig) -> Iterator[tuple[str, str, tuple[int, int, int]]]:
    """(our name, their name, (matrices, rows, columns)) of everything that the experts have."""
    experts, width, expert_width = moe.num_experts, moe.expert_model(model).hidden_size, moe.expert_width(model)
    matrices = _matrices(model)
    if moe.moe_expert_type == "decomposed":
        rank = moe.decomposition_rank(width)
        thin, wide = (experts, rank, width), (experts, expert_width, rank)
        for name in matrices:
            left, right = (wide, thin) if name == "w2" else (thin, wide)
            yield f"mlp.{name}_left", f"{name}_left", left
            yield f"mlp.{name}_right", f"{name}_right", right
        return
    for name in matrices:
        yield f"mlp.{name}", name, (experts, expert_width, width)
    if moe.moe_expert_type == "structmoe":
        routed = moe.moe_lore_routed
        count, rank = (experts * moe.moe_num_lores, moe.moe_lore_rank) if routed else (experts, moe.moe_num_lores * moe.moe_lore_rank)
        width_out = width if moe.moe_lore_interaction == "standalone" else expert_width
        if routed:
            yield "lores.router", "lores.router.weight", (experts, moe.moe_num_lores, width)
        both = moe.moe_lore_projection == "both"
        for ours, theirs in (("lores", "lores.factors"), ("gate_lores", "gate_lores")) if both else (("lores", "lores.factors"),):
            yield f"{ours}.a", f"{theirs}.a", (count, rank, width)
            yield f"{ours}.b", f"{theirs}.b", (count, rank, width_out)


def _stacked(ours: str, theirs: str, shape: tuple[int, int, int]) -> Entry:
    matrices, rows, columns = shape
    return Entry(ours, (theirs,), Reshaped((matrices * rows, columns), shape))
