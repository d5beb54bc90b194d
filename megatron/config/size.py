"""Parameters, memory and FLOPs from the configuration alone: no model is built.

Shapes: D hidden_size, V padded vocabulary, L layers, F width of an MLP or expert, E experts, K experts per token, M LoREs per expert,
        l LoREs per token, Q LoRE rank, S sequence length
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron.config.model import ModelConfig
from megatron.config.moe import MoEConfig

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


def padded_vocab_size(vocab_size: int, divisible_by: int) -> int:
    """The vocabulary rounded up as in NeoX; it does not depend on the number of processes."""
    return -(-vocab_size // divisible_by) * divisible_by


def count_parameters(model: ModelConfig, moe: MoEConfig, padded_vocab_size: int) -> ParameterCount:
    """Parameters of the model that `build_model` makes from the same sections."""
    moe_layers = sum(moe.is_moe_layer(layer) for layer in range(model.num_layers))
    embedding = padded_vocab_size * model.hidden_size
    if model.pos_emb == "learned":
        embedding += model.max_position_embeddings * model.hidden_size
    shared = model.rpe_num_buckets * model.num_attention_heads if model.pos_emb == "rpe" else 0
    total: dict[Part, int] = {
        "embedding": embedding,
        "attention": model.num_layers * _attention(model) + shared,
        "norms": (2 * model.num_layers + 1) * _norm(model, model.hidden_size) + model.num_layers * _query_key_norms(model),
        "mlp": (model.num_layers - moe_layers) * _mlp(model),
        "experts": moe_layers * moe.moe_num_experts * _expert(model, moe),
        "lores": 0,
        "routers": moe_layers * moe.moe_num_experts * model.hidden_size,
        "head": padded_vocab_size * model.hidden_size if model.no_weight_tying else 0,
    }
    active = total | {"experts": moe_layers * moe.moe_top_k * _expert(model, moe)}
    if model.gpt_j_tied:
        active["norms"] -= model.num_layers * _norm(model, model.hidden_size)
    if moe.moe_expert_type == "structmoe":
        lore_router = moe.moe_num_lores * model.hidden_size
        total["lores"] = moe_layers * moe.moe_num_experts * (moe.moe_num_lores * _lore(model, moe) + lore_router)
        active["lores"] = moe_layers * moe.moe_top_k * (moe.moe_lore_top_k * _lore(model, moe) + lore_router)
    return ParameterCount(total, active)


def flops_per_token(model: ModelConfig, moe: MoEConfig, padded_vocab_size: int, *, recompute: bool = False) -> int:
    """Floating-point operations for one token of one training step: forward, twice that for backward, and forward again with recomputation.

    Two per weight of every matrix that the token meets (grouped key/value heads, gates and the chosen experts as they are), and 4*S*D per layer for
    the attention scores and their use (NeoX's convention: the whole S x S square is counted, although half of it is masked; of a sliding window,
    the keys in it).
    """
    active = count_parameters(model, moe, padded_vocab_size).active
    dense = model.num_layers - sum(moe.is_moe_layer(layer) for layer in range(model.num_layers))
    matrices = model.num_layers * _attention_matrices(model) + dense * _mlp_matrices(model) + padded_vocab_size * model.hidden_size
    matrices += sum(active[part] for part in ("experts", "lores", "routers"))
    keys = model.seq_length if model.sliding_window_width is None else min(model.seq_length, model.sliding_window_width + 1)
    scores = 4 * keys * model.hidden_size * model.num_layers
    return (2 * matrices + scores) * (4 if recompute else 3)


def training_memory(parameters: int, precision: str, *, zero_stage: int, data_parallel_size: int) -> Memory:
    """Bytes per process for weights, gradients and Adam's state, as DeepSpeed keeps and divides them (`parameters` = all of the model's).

    Bytes per parameter: fp32 4 + 4 + 8; fp16, and bfloat16 under ZeRO, 2 + 2 + 12 (fp32 master weights and averages);
    bfloat16 without ZeRO 2 + 2 + 4.
    """
    weights, gradients, optimizer = (4, 4, 8) if precision == "fp32" else (2, 2, 12)
    if precision == "bfloat16" and zero_stage == 0:
        optimizer = 4

    def share(size: int, from_stage: int) -> int:
        return -(-parameters * size // data_parallel_size) if zero_stage >= from_stage else parameters * size

    return Memory(weights=share(weights, 3), gradients=share(gradients, 2), optimizer=share(optimizer, 1))


def _attention_matrices(model: ModelConfig) -> int:
    return model.hidden_size * _projected(model) + model.hidden_size * model.hidden_size


def _attention(model: ModelConfig) -> int:
    biases = _projected(model) + model.hidden_size if model.use_bias_in_attn_linear else 0
    return _attention_matrices(model) + biases


def _projected(model: ModelConfig) -> int:
    """Queries, keys and values of one token."""
    return (model.num_attention_heads + 2 * model.kv_heads) * model.head_dim


def _query_key_norms(model: ModelConfig) -> int:
    """Of a layer."""
    if model.use_qk_layernorm:
        return _norm(model, model.hidden_size)
    return 2 * _norm(model, model.head_dim) if model.qk_norm_per_head else 0


def _norm(model: ModelConfig, width: int) -> int:
    return {
        "layernorm": width * (1 + model.use_bias_in_norms),
        "rmsnorm": width,
        "scalenorm": 1,
        "non_parametric_layernorm": 0,
    }[model.norm]


def _mlp_matrices(model: ModelConfig) -> int:
    return ((2 if model.is_gated else 1) + 1) * model.hidden_size * model.mlp_width


def _mlp(model: ModelConfig) -> int:
    biases = (2 if model.is_gated else 1) * model.mlp_width + model.hidden_size
    return _mlp_matrices(model) + (biases if model.use_bias_in_mlp else 0)


def _expert(model: ModelConfig, moe: MoEConfig) -> int:
    return (3 if model.is_gated else 2) * model.hidden_size * moe.expert_width(model)


def _lore(model: ModelConfig, moe: MoEConfig) -> int:
    return moe.moe_lore_rank * (model.hidden_size + moe.expert_width(model))
