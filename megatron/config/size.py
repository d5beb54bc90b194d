"""Parameters, memory and FLOPs from the configuration alone: no model is built.

Shapes: D hidden_size, V padded vocabulary, L layers, F width of an MLP or expert, E experts, K experts per token, M LoREs per expert,
        l LoREs per token, Q LoRE rank, S sequence length
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron.config.model import ModelConfig
from megatron.config.moe import MoEConfig
from megatron.config.parallel import Layout

Part = Literal["embedding", "attention", "norms", "mlp", "experts", "lores", "routers", "head"]


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters there are (`total`, by part) and how many of them one token meets (`active`)."""

    total: dict[Part, int]
    active: dict[Part, int]

    @property
    def total_sum(self) -> int:
        """Parameters that are stored and trained."""
        return sum(self.total.values())

    @property
    def active_sum(self) -> int:
        """Parameters that one token meets: top_k experts of each layer, the chosen LoREs in them, and everything that is not an expert."""
        return sum(self.active.values())


@dataclass(frozen=True)
class Memory:
    """Bytes in one process, without activations."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Weights, gradients and optimizer state together."""
        return self.weights + self.gradients + self.optimizer

    def plus(self, other: Memory) -> Memory:
        """Both together."""
        return Memory(self.weights + other.weights, self.gradients + other.gradients, self.optimizer + other.optimizer)


def padded_vocab_size(vocab_size: int, divisible_by: int) -> int:
    """The vocabulary rounded up to a multiple. NeoX takes the multiple times model_parallel_size, so that its models change size with the number of
    processes; this does not depend on it (with one they are equal)."""
    return -(-vocab_size // divisible_by) * divisible_by


def count_parameters(model: ModelConfig, moe: MoEConfig, padded_vocab_size: int) -> ParameterCount:
    """Parameters of the model that `build_model` makes from the same sections. top_p is counted with one expert per token, the least it uses."""
    moe_layers = list(moe.for_layers(model.num_layers).values())
    embedding = padded_vocab_size * model.hidden_size
    if model.pos_emb == "learned":
        embedding += model.max_position_embeddings * model.hidden_size
    shared = model.rpe_num_buckets * model.num_attention_heads if model.pos_emb == "rpe" else 0
    total: dict[Part, int] = {
        "embedding": embedding,
        "attention": model.num_layers * _attention(model) + shared,
        "norms": (2 * model.num_layers + 1) * _norm(model, model.hidden_size) + model.num_layers * _query_key_norms(model),
        "mlp": (model.num_layers - len(moe_layers)) * _mlp(model) + sum(_beside(model, layer) for layer in moe_layers),
        "experts": sum(layer.num_experts * _expert(model, layer) for layer in moe_layers),
        "lores": sum(layer.num_experts * _lores(model, layer, active=False) for layer in moe_layers),
        "routers": sum(_router(model, layer) for layer in moe_layers) + (_router_cell(moe_layers[0]) if moe_layers else 0),
        "head": padded_vocab_size * model.hidden_size if model.no_weight_tying else 0,
    }
    active = total | {
        "experts": sum(_active_experts(layer) * _expert(model, layer) for layer in moe_layers),
        "lores": sum(_active_experts(layer) * _lores(model, layer, active=True) for layer in moe_layers),
    }
    if model.gpt_j_tied:
        active["norms"] -= model.num_layers * _norm(model, model.hidden_size)
    return ParameterCount(total, active)


def flops_per_token(model: ModelConfig, moe: MoEConfig, padded_vocab_size: int, *, recompute: bool = False, modules: Sequence[str] = ()) -> int:
    """Floating-point operations for one token of one training step: forward, twice that for backward, and forward again with recomputation.

    `modules`: the parts of layers that are recomputed if whole layers are not (`recompute_modules`).
    """
    forward = forward_flops(model, moe, padded_vocab_size)
    parts = {"moe": ("experts", "beside", "routers")}
    again = sum(forward.values()) if recompute else sum(forward[part] for name in modules for part in parts.get(name, (name,)))
    return 3 * sum(forward.values()) + again


def forward_flops(model: ModelConfig, moe: MoEConfig, padded_vocab_size: int) -> dict[str, int]:
    """Floating-point operations of the forward pass for one token, by part of the model.

    Two per weight of every matrix that the token meets (grouped key/value heads, gates and the chosen experts as they are), and 4*S*D per layer for
    the attention scores and their use (NeoX's convention: the whole S x S square is counted, although half of it is masked; of a sliding window,
    the keys in it; with heads of their own width, the width of all heads in D's place).
    """
    active = count_parameters(model, moe, padded_vocab_size).active
    moe_layers = list(moe.for_layers(model.num_layers).values())
    keys = model.seq_length if model.sliding_window_width is None else min(model.seq_length, model.sliding_window_width + 1)
    biases = sum(_active_experts(layer) * _expert_biases(model, layer) for layer in moe_layers)
    return {
        "attention": model.num_layers * (2 * _attention_matrices(model) + 4 * keys * model.attention_width),
        "mlp": 2 * (model.num_layers - len(moe_layers)) * _mlp_matrices(model),
        "experts": 2 * (active["experts"] + active["lores"] - biases),
        "beside": 2 * sum(_beside(model, layer, biases=False) for layer in moe_layers),
        "routers": 2 * sum(_router(model, layer) + _router_cell(layer, biases=False) for layer in moe_layers),
        "head": 2 * padded_vocab_size * model.hidden_size,
    }


def training_memory(
    parameters: int, precision: str, *, zero_stage: int, data_parallel_size: int, averages: tuple[int, int] = (2, 4), sums_in_fp32: bool | None = None
) -> Memory:
    """Bytes per process for weights, gradients and the optimizer's state when a step's gradients are complete (`parameters` = all of the model's).

    Bytes per parameter with Adam, before ZeRO divides them: fp32 4 + 4 + 8; under ZeRO 4 + 4 + 12, for DeepSpeed keeps a second fp32 copy of the
    weights there too; 16 bits 2 + 2 + 12 (fp32 copies and averages), without ZeRO 2 + 4 + 12. `averages`: how many the optimizer keeps, and bytes of
    each. `sums_in_fp32`: whether micro-batches' gradients are summed in fp32; None: as by default. What is not counted: ZeRO's buckets
    (`reduce_bucket_size`, `allgather_bucket_size`), and what ZeRO copies to fp32 while it updates.
    """
    weights = 4 if precision == "fp32" else 2
    gradients = _gradient_bytes(precision, zero_stage, sums_in_fp32)
    optimizer = (0 if precision == "fp32" and zero_stage == 0 else 4) + averages[0] * averages[1]

    def share(size: int, from_stage: int) -> int:
        return -(-parameters * size // data_parallel_size) if zero_stage >= from_stage else parameters * size

    return Memory(weights=share(weights, 3), gradients=share(gradients, 2), optimizer=share(optimizer, 1))


def divided_memory(count: ParameterCount, layout: Layout, replicas: int, memory: Callable[[int, int], Memory]) -> Memory:
    """Of one of the processes that divide a model; `replicas`: data-parallel processes. `memory`: that of parameters which so many processes hold."""
    dense, experts = _process_parameters(count, layout)
    return memory(dense, replicas).plus(memory(experts, max(1, replicas // layout.expert)))


def _process_parameters(count: ParameterCount, layout: Layout) -> tuple[int, int]:
    """(parameters beside the experts, parameters of experts) of one process, as if layers and vocabulary divided evenly and norms too."""
    experts = count.total["experts"] + count.total["lores"]
    return -(-(count.total_sum - experts) // layout.model), -(-experts // (layout.model * layout.expert))


def _gradient_bytes(precision: str, zero_stage: int, sums_in_fp32: bool | None) -> int:
    """Of one parameter. Sums in fp32 lie in the place of 16-bit gradients, except at stage 1 in bfloat16 (DeepSpeed's BF16_Optimizer), where they lie
    beside them; 16-bit ones at stage 0 are copied to fp32 for the update, all at once."""
    if precision == "fp32":
        return 4
    if zero_stage == 0:
        return 4 if sums_in_fp32 in (None, True) else 6
    if not sums_in_fp32:
        return 2
    return 6 if zero_stage == 1 and precision == "bfloat16" else 4


def _attention_matrices(model: ModelConfig) -> int:
    return model.hidden_size * (_projected(model) + model.attention_width)


def _attention(model: ModelConfig) -> int:
    biases = (_projected(model) if model.has_qkv_bias else 0) + (model.hidden_size if model.use_bias_in_attn_linear else 0)
    return _attention_matrices(model) + biases


def _projected(model: ModelConfig) -> int:
    """Queries, keys and values of one token."""
    return (model.num_attention_heads + 2 * model.kv_heads) * model.head_width


def _query_key_norms(model: ModelConfig) -> int:
    """Of a layer."""
    if model.use_qk_layernorm:
        return _norm(model, model.attention_width)
    return sum(_norm(model, width) for width in model.qk_norm_widths or ())


def _norm(model: ModelConfig, width: int) -> int:
    return {
        "layernorm": width * (1 + model.use_bias_in_norms),
        "rmsnorm": width,
        "scalenorm": 1,
        "non_parametric_layernorm": 0,
    }[model.norm]


def _projections(model: ModelConfig) -> int:
    """Matrices of one MLP or expert."""
    return 3 if model.is_gated else 2


def _mlp_matrices(model: ModelConfig, width: int | None = None) -> int:
    """Of an MLP of the given hidden width; None: the model's."""
    return _projections(model) * model.hidden_size * (model.mlp_width if width is None else width)


def _mlp(model: ModelConfig, width: int | None = None) -> int:
    biases = (_projections(model) - 1) * (model.mlp_width if width is None else width) + model.hidden_size
    return _mlp_matrices(model, width) + (biases if model.use_bias_in_mlp else 0)


def _beside(model: ModelConfig, moe: MoEConfig, *, biases: bool = True) -> int:
    """Of what every token of a layer meets beside the experts: the shared expert and the residual MLP, with what weighs them, the two projections of
    latent MoE, and constant experts (a vector, and two rows that weigh it)."""
    count, mlp = (
        2 * model.hidden_size * (moe.moe_latent_size or 0) + 3 * model.hidden_size * moe.moe_constant_experts,
        _mlp if biases else _mlp_matrices,
    )
    if width := moe.shared_width(model):
        count += mlp(model, width) + (model.hidden_size if moe.moe_shared_expert_gate else 0)
    if moe.moe_use_residual:
        count += mlp(model) + 2 * (model.hidden_size + biases)
    return count


def _router(model: ModelConfig, moe: MoEConfig) -> int:
    """Trained weights of one layer's router, without what it shares with those of other layers. Those of `smoe_dropout` are not trained."""
    if moe.moe_router_type == "recurrent":
        return moe.moe_router_rnn_hidden_size * (model.hidden_size + moe.num_choices)
    return 0 if moe.moe_router_type == "smoe_dropout" else moe.num_choices * model.hidden_size


def _router_cell(moe: MoEConfig, *, biases: bool = True) -> int:
    """Of the GRU that the recurrent routers of all layers share."""
    if moe.moe_router_type != "recurrent":
        return 0
    width = moe.moe_router_rnn_hidden_size
    return 6 * width * width + (7 * width if biases else 0)


def _active_experts(moe: MoEConfig) -> int:
    """Experts that a token uses."""
    return 1 if moe.moe_router_type == "top_p" else moe.top_k


def _expert(model: ModelConfig, moe: MoEConfig) -> int:
    width, seen = moe.expert_width(model), moe.expert_model(model).hidden_size
    if moe.moe_expert_type == "decomposed":
        matrices = _projections(model) * moe.decomposition_rank(seen) * (seen + width)
    else:
        matrices = _projections(model) * seen * width
    return matrices + _expert_biases(model, moe)


def _expert_biases(model: ModelConfig, moe: MoEConfig) -> int:
    """Of one expert."""
    seen = moe.expert_model(model).hidden_size
    return (_projections(model) - 1) * moe.expert_width(model) + seen if moe.moe_expert_bias else 0


def _lores(model: ModelConfig, moe: MoEConfig, *, active: bool) -> int:
    """Of the LoREs of one expert and their router: all, or those that one row uses."""
    if moe.moe_expert_type != "structmoe":
        return 0
    seen = moe.expert_model(model).hidden_size
    width_out = seen if moe.moe_lore_interaction == "standalone" else moe.expert_width(model)
    pairs = 2 if moe.moe_lore_projection == "both" else 1
    one = pairs * moe.moe_lore_rank * (seen + width_out)
    if not moe.moe_lore_routed:
        return moe.moe_num_lores * one
    return (moe.moe_lore_top_k if active else moe.moe_num_lores) * one + moe.moe_num_lores * seen
