"""Whether a configuration describes the model and the steps of a checkpoint: differences that no tensor's shape shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.checkpoint.manifest import read_manifest
from megatron.checkpoint.table import read_table
from megatron.checkpoint.weights import read_config
from megatron.config.messages import show
from megatron.config.model import ModelConfig
from megatron.config.moe import MoEConfig
from megatron.config.section import ConfigError
from megatron.config.training import Batch, TrainingConfig, resolve_batch

# Keys of the model that may differ from the checkpoint's: they say how it was trained, run or padded, not what it computes.
FREE_KEYS = frozenset(
    {
        "seq_length",
        "attention_dropout",
        "hidden_dropout",
        "init_method",
        "output_layer_init_method",
        "init_method_std",
        "precision",
        "attention_config",
        "rotary_save_freqs_buffer",
        "make_vocab_size_divisible_by",
        "moe_jitter_eps",
        "moe_lore_init",
        "moe_losses",
        "moe_loss_ramp",
        "moe_block_wise_temperature",
        "moe_zero_computation_balance",
        "moe_router_start_k",
        "moe_router_growth",
        "moe_router_eval_k",
        "moe_router_quantile_balancing_ema",
        "moe_router_threshold_decay",
        "moe_min_document_expert_pool",
        "moe_max_document_expert_pool",
        "moe_eval_document_expert_pool",
        "kernel_backends",
    }
)
# What training further from the weights may change without changing a shape: how far apart positions are, and how far a token sees.
POSITION_KEYS = frozenset({"max_position_embeddings", "rotary_emb_base", "rope_scaling", "sliding_window_width"})
# Keys that earlier versions of this program did not have, and what their models were.
LATER_KEYS = {
    "head_dim": None,
    "add_qkv_bias": False,
    "reordered_norm": False,
    "moe_latent_size": None,
    "moe_zero_experts": 0,
    "moe_copy_experts": 0,
    "moe_constant_experts": 0,
}
LENGTH_KEY = "max_position_embeddings"
WITH_A_TABLE = "learned"
"""The `pos_emb` that has a row of weights for each position; all others compute what they need for any number of positions."""
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def check_architecture(path: Path, flat_config: Mapping[str, Any], *, finetune: bool = False) -> list[str]:
    """Raises ConfigError naming every key of the architecture whose value in `flat_config` (NeoXConfig.flat) differs from that in the checkpoint.

    Keys that the checkpoint does not know, all of them in another program's, are not compared. `finetune`: POSITION_KEYS may differ, and without it
    the number of positions where no table of weights has as many rows; the sentences that are returned say which do.
    Raises CheckpointError when the checkpoint's configuration cannot be read.
    """
    stored = read_config(path)
    stored = {**LATER_KEYS, **stored} if stored else stored
    keys = [key for section in (ModelConfig, MoEConfig) for key in section.model_fields if key not in FREE_KEYS]
    theirs = {key: _meaning({**flat_config, **stored}, key) for key in keys if key in stored}
    different = {
        key: f"'{key}' = {show(flat_config[key])}: the model in {path} was trained with {show(value)}"
        for key, value in theirs.items()
        if value != _meaning(flat_config, key) and not stored[key] is flat_config[key] is None  # else another key is what differs
    }
    free = free_positions(flat_config["pos_emb"], finetune=finetune)
    moved = [key for key in different if key in free]
    problems = [sentence + _advice(key, flat_config["pos_emb"], finetune=finetune) for key, sentence in different.items() if key not in moved]
    if problems:
        raise ConfigError(problems)
    return [f"{different[key]}." for key in moved]


def _meaning(config: Mapping[str, Any], key: str) -> Any:
    """The value of a key; of one that stands for a number where it is None, that number."""
    if config[key] is None and key == "num_kv_heads":
        return config["num_attention_heads"]
    if config[key] is None and key == "head_dim":
        return config["hidden_size"] // config["num_attention_heads"]
    return config[key]


def free_positions(pos_emb: str, *, finetune: bool) -> frozenset[str]:
    """What may differ from a checkpoint about positions."""
    if pos_emb == WITH_A_TABLE:
        return POSITION_KEYS - {LENGTH_KEY} if finetune else frozenset()
    return POSITION_KEYS if finetune else frozenset({LENGTH_KEY})


def without_free_positions(args: Mapping[str, Any], pos_emb: str, *, finetune: bool = False) -> dict[str, Any]:
    """NeoX's `args` without those that may differ from a checkpoint's."""
    return {key: value for key, value in args.items() if key not in free_positions(pos_emb, finetune=finetune)}


def batch_change(path: Path, batch: Batch) -> str | None:
    """A sentence for the log when a run that goes on from the checkpoint takes steps of another size, so that the step number no longer tells how
    much of the data was read. None when nothing changed, or the checkpoint does not say. Raises CheckpointError.
    """
    before = _stored_batch(path)
    if before is None or before.global_ == batch.global_:
        return None
    return (
        f"{path} was trained with {before.global_} sequences in each step; this run uses {batch.global_}. The learning-rate schedule "
        "continues from the step number, "
        "and the data from the number of sequences already read."
    )


def samples_at_once(path: Path) -> int:
    """How many samples all processes of the checkpoint's run took for one forward pass, as its configuration says; 0 where it does not say. Raises
    CheckpointError."""
    before = _stored_batch(path)
    return 0 if before is None else before.global_ // before.accumulation


def length_change(path: Path, train_iters: int) -> str | None:
    """A sentence for the log when a run that goes on from the checkpoint is to be of another length. None when it is not, or the checkpoint does not
    say. Raises CheckpointError.
    """
    before = read_config(path).get("train_iters")
    if before is None or before == train_iters:
        return None
    return (
        f"{path} belongs to a training of {before:,} steps; this run has {train_iters:,}. The order of the training samples is chosen for all "
        "steps at once. If the run reads its data more than once, the order changes."
    )


def _advice(key: str, pos_emb: str, *, finetune: bool) -> str:
    if key == LENGTH_KEY and pos_emb == WITH_A_TABLE:
        return f" (pos_emb: {pos_emb} has a row of weights for each position, so their number cannot change)"
    return "; finetune: true may change it" if key in POSITION_KEYS and not finetune else ""


def _stored_batch(path: Path) -> Batch | None:
    manifest, stored, table = read_manifest(path), read_config(path), read_table(path)
    if manifest is None or not stored:
        return None
    try:
        replicas = manifest.facts["world_size"] if table is None else table.topology.data_parallel_size
        return resolve_batch(TrainingConfig.model_validate({key: stored.get(key) for key in BATCH_KEYS}), replicas)
    except (KeyError, TypeError, ValueError):
        return None  # written by a version whose keys or facts were others
