"""NeoX keys that no section has: other names, keys without effect here, and keys whose feature is not part of this version. Each has one sentence
that says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron.config.messages import show

# Another name -> the key that a section has (dots reach into a dictionary): NeoX's earlier names, those of the StructMoE author's fork of NeoX, and
# Megatron-LM's for what NeoX has no key for.
RENAMED: dict[str, str] = {
    "num_processes": "num_gpus",
    "expert_interval": "moe_expert_interval",
    "gas": "gradient_accumulation_steps",
    "save_interval": "checkpoint_factor",
    "lora_rank": "moe_lore_rank",
    "moe_lora_experts": "moe_num_lores",
    "lora_top_k": "moe_lore_top_k",
    "lora_interaction_type": "moe_lore_interaction",
    "moe_lora_aux_loss_coeff": "moe_losses.lore_balance",
    "moe_aux_loss_coeff": "moe_losses.load_balance",
    "moe_z_loss_coeff": "moe_losses.z_loss",
    "kv_channels": "head_dim",
}
# Another name -> its words -> those of the key that it stands for.
OTHER_WORDS: dict[str, dict[str, str]] = {"lora_interaction_type": {"addition": "entangled", "geglu": "gated"}}
# Other names of losses that 0 turns off: a coefficient of 0 under our own name measures the loss all the same.
OFF_AT_ZERO = frozenset({"moe_lora_aux_loss_coeff"})
# (another name, a further key that it stands for, that key's value)
IMPLIED: tuple[tuple[str, str, str], ...] = (("moe_lora_experts", "moe_expert_type", "structmoe"),)
# Keys whose default is not NeoX's, on purpose -> NeoX's default, and why.
OTHER_DEFAULTS: dict[str, tuple[Any, str]] = {
    "gradient_accumulation_steps": (
        1,
        "if it is not given, it is computed from train_batch_size and train_micro_batch_size_per_gpu, as NeoX's manual says",
    ),
    "distributed_backend": ("nccl", "nccl on a machine with GPUs, gloo without GPUs"),
    "seq_length": (None, "it must be given; NeoX starts without it and fails later"),
}

Judgement = Callable[[Any], bool]


def _asks_for_nothing(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {}) or (isinstance(value, dict) and value.get("enabled") is False)


@dataclass(frozen=True)
class Ignored:
    """Accepted without effect, with a notice unless the value asks for nothing."""

    reason: str
    quiet: Judgement = _asks_for_nothing


@dataclass(frozen=True)
class Refused:
    """An error, unless the value asks for nothing (or for what this version does anyway)."""

    reason: str
    harmless: Judgement = _asks_for_nothing


class Verdict(NamedTuple):
    """What to say about a key that no section has; an empty sentence says nothing."""

    refused: bool
    sentence: str


def judge(key: str, value: Any) -> Verdict | None:
    """The verdict on a key of this table, or None when the table does not know it."""
    entry = TABLE.get(key)
    if isinstance(entry, Ignored):
        return Verdict(False, "" if entry.quiet(value) else f"'{key}' has no effect here: {entry.reason}")
    if isinstance(entry, Refused):
        return Verdict(not entry.harmless(value), "" if entry.harmless(value) else f"'{key}' = {show(value)} is not supported: {entry.reason}")
    return None


def _is(*values: Any) -> Judgement:
    """Null or one of these; words without regard to case, as NeoX reads its choices."""

    def same(value: Any, allowed: Any) -> bool:
        return type(value) is type(allowed) and (value.lower() == allowed.lower() if isinstance(value, str) else value == allowed)

    return lambda value: value is None or any(same(value, allowed) for allowed in values)


def _always(value: Any) -> bool:
    return True


_FUSION = "attention and activations use PyTorch's fused operations if they exist"
_DERIVED = "it is computed from other keys; remove it"
_DERIVED_ZERO = "it is part of zero_optimization; write it there, such as zero_optimization: {stage: 1, reduce_bucket_size: 500000000}"
_DERIVED_PROCESS = "every process reads it from its environment; write num_gpus, or global_num_gpus for several machines"
_POST_TRAINING = "only pre-training (train_impl: normal) is part of this version; remove it"
_MUP = "muP is not part of this version; remove it"
_DEEPSPEED = "this DeepSpeed feature is not part of this version; remove it"
_TRANSFORMER_ENGINE = "Transformer Engine is not used; remove it"
_OTHER_BLOCKS = "only transformer layers are part of this version; remove it"
_OLD_MOE = "NeoX removed it in 2025, and here no token is ever dropped; remove it"
_REMOVED_BY_DEEPSPEED = "DeepSpeed has removed it"


def _entries(kind: type[Ignored] | type[Refused], reason: str, *keys: str, unless: Judgement = _asks_for_nothing) -> dict[str, Ignored | Refused]:
    return {key: kind(reason, unless) for key in keys}


_OF_FEATURES_THAT_ARE_OFF = [
    "s3_chunk_size",
    "gmlp_attn_dim",
    "te_fp8_format",
    "te_fp8_wgrad",
    "te_fp8_amax_history_len",
    "te_fp8_amax_compute_algo",
    "dpo_fp32",
    "dpo_beta",
    "kto_fp32",
    "kto_beta",
    "kto_desirable_weight",
    "kto_undesirable_weight",
    "fp32_reinforce",
    "kl_impl",
    "kl_div_beta",
    "online_dataserver_ips",
    "online_dataserver_ports",
    "mamba_selective_fp32_params",
    "mamba_use_bias_in_conv",
    "mamba_use_bias_in_linears",
    "mup_init_scale",
    "mup_width_scale",
    "mup_embedding_mult",
    "mup_rp_embedding_mult",
]
_DEAD_UPSTREAM = [
    "moe_lbl_in_fp32",
    "num_unique_layers",
    "short_seq_prob",
    "adlr_autoresume",
    "adlr_autoresume_interval",
    "param_sharing_style",
    "deepscale",
    "deepscale_config",
    "mup_attn_temp",
    "mup_output_temp",
    "te_fp8_margin",
    "weight_server_port",
    "lazy_mpu_init",
    "onnx_safe",
]

_WITHOUT_EFFECT: dict[str, Ignored | Refused] = {
    **_entries(
        Ignored,
        _FUSION,
        "scaled_upper_triang_masked_softmax_fusion",
        "scaled_masked_softmax_fusion",
        "bias_dropout_fusion",
        "rope_fusion",
        "use_flashattn_swiglu",
        "fused_kernels_build_path",
    ),
    "output_layer_parallelism": Ignored(
        "with tensor parallelism each process has some rows of the output projection, which is NeoX's column", _is("column")
    ),
    "synchronize_each_layer": Ignored("it makes the process wait for the GPU at each recomputed layer, and the results are the same"),
    "contiguous_checkpointing": Ignored("PyTorch's allocator places the kept inputs of recomputed layers"),
    "profile_backward": Ignored("write profile: true, which records the backward pass too"),
    "deepspeed_activation_checkpointing": Ignored("PyTorch's activation checkpointing is used", _is(True, False)),
    "recompute": Ignored("generation always uses a key/value cache; the texts are the same"),
    "sparse_gradients": Ignored(f"{_REMOVED_BY_DEEPSPEED}; the gradients of embeddings are dense and have the same values"),
    "attention_softmax_in_fp32": Ignored("the softmax of attention is summed in fp32 in every precision"),
    "fp16_lm_cross_entropy": Ignored(
        "the loss is computed in fp32 for a few tokens at a time; this needs less memory than fp16 logits of all tokens"
    ),
    "use_cpu_initialization": Ignored("weights are initialised the same way on every device"),
    "deepspeed": Ignored("DeepSpeed is always used", _is(True)),
    **_entries(Ignored, "NeoX does not read it either", *_DEAD_UPSTREAM, unless=_always),
    **_entries(Ignored, "write it inside the fp16 dictionary, as NeoX requires too", "hysteresis", "loss_scale_window", unless=_is()),
    "min_scale": Ignored("write fp16: {min_loss_scale: ...}, as NeoX requires too", _is()),
    "git_hash": Ignored("the run finds it at its start", _always),
    **_entries(Ignored, "it belongs to a feature that is off", *_OF_FEATURES_THAT_ARE_OFF, unless=_always),
    "zero_allow_untested_optimizer": Ignored("DeepSpeed is always told to accept the optimizer", _is(True)),
}

_NOT_BUILT: dict[str, Ignored | Refused] = {
    **_entries(Refused, "sparse attention is not part of this version; remove it", "sparsity_config", "sparse_attention"),
    "soft_prompt_tuning": Refused("soft prompts are not part of this version; remove it"),
    **_entries(
        Refused,
        _OTHER_BLOCKS,
        "mamba_selective_scan_fusion",
        "mamba_causal_conv_fusion",
        "mamba_inner_func_fusion",
        "dim_att",
        "head_size",
        "ffn_dim",
    ),
    **_entries(Refused, _TRANSFORMER_ENGINE, "te_columnparallel", "te_rowparallel", "te_layernorm_mlp", "te_mha", "te_fp8_mha"),
    "serve_model_weights": Refused(_POST_TRAINING),
    "label_data_paths": Refused("write train_label_data_paths, valid_label_data_paths and test_label_data_paths"),
    "inter_document_attention_masking": Refused(
        "write reset_attention_mask: true; for positions that start again at each document write reset_position_ids: true too"
    ),
    **_entries(Refused, _POST_TRAINING, "train_reward_data_paths", "valid_reward_data_paths"),
    **_entries(Refused, _POST_TRAINING, "test_reward_data_paths", "dpo_reference_free", "reinforce_leave_one_out", "precompute_model_name"),
    **_entries(
        Refused,
        _POST_TRAINING,
        *(f"{sign}_{part}_{kind}" for sign in ("pos", "neg") for part in ("train", "valid", "test") for kind in ("data_paths", "label_data_paths")),
    ),
    "train_impl": Refused(_POST_TRAINING, _is("normal")),
    "dataset_impl": Refused(_POST_TRAINING, _is("gpt2")),
    "z_loss": Refused("it is a setting of the reward model; for the router write moe_losses: {z_loss: ...}", _is(0.0, 0)),
    "s3_path": Refused("checkpoints are written to a file system; remove it"),
    "loss_scale": Refused("write fp16: {loss_scale: ...}"),
    "char_level_ppl": Refused("eval.py reports bits per byte; remove it"),
    **_entries(Refused, _MUP, "use_mup", "coord_check", "save_base_shapes", "base_shapes_file"),
    "scheduler": Refused("the training loop has its own schedule; write lr_decay_style, lr_decay_iters, warmup and min_lr"),
    "amp": Refused(f"{_REMOVED_BY_DEEPSPEED}; write precision: bfloat16 or precision: fp16"),
    "curriculum_learning": Refused(f"{_REMOVED_BY_DEEPSPEED}, and all sequences have the same length; remove it"),
    "elasticity": Refused(f"{_REMOVED_BY_DEEPSPEED}; write train_batch_size, which stays the same for any number of processes"),
    "compression_training": Refused(f"{_REMOVED_BY_DEEPSPEED}; remove it"),
    **_entries(
        Refused, "the search for settings needs DeepSpeed's own training loop; remove it", "autotuning", "autotuning_run", "autotuning_config"
    ),
    "data_efficiency": Refused("the order of the data comes from its index maps, not from DeepSpeed's sampler; remove it"),
    "checkpoint": Refused("this program writes and checks checkpoints itself; use save, load and the other checkpoint keys, and remove it"),
    "deepspeed_mpi": Refused("write launcher: openmpi and force_multi: true"),
    "return_logits": Refused("generate.py writes text, not logits; remove it"),
    **_entries(Refused, _DERIVED_PROCESS, "world_size", "local_rank", "rank"),
    **_entries(
        Refused,
        _DERIVED_ZERO,
        "zero_stage",
        "zero_reduce_scatter",
        "zero_contiguous_gradients",
        "zero_reduce_bucket_size",
        "zero_allgather_bucket_size",
    ),
    **_entries(Refused, _DERIVED, "comet_experiment", "curriculum_seqlen", "config_files", unless=_is(0)),
    "is_pipe_parallel": Refused("it is computed from pipe_parallel_size; write pipe_parallel_size"),
    "padded_vocab_size": Refused("it is computed from the tokenizer and make_vocab_size_divisible_by; write make_vocab_size_divisible_by"),
    "optimizer_type": Refused("it is computed from optimizer; write optimizer: {type: Adam}", _is("adam")),
    "user_script": Refused("it is the first word of deepy.py's command line; remove it"),
    "do_train": Refused("train.py trains for train_iters steps; remove it"),
    **_entries(Refused, "eval_interval and eval_iters control evaluation, and eval_iters: 0 turns it off; remove it", "do_valid", "do_test"),
    "batch_size": Refused("it is another name of train_micro_batch_size_per_gpu; write that name"),
    "clip_grad": Refused("it is computed from gradient_clipping; write gradient_clipping", _is(1.0, 1)),
    "dynamic_loss_scale": Refused("it is computed from fp16; write fp16: {enabled: true, loss_scale: 0}"),
    "lr": Refused("write optimizer: {type: Adam, params: {lr: ...}}"),
    "moe_loss_coeff": Refused(
        "NeoX removed it in 2025; write moe_losses: {load_balance: c}; for moe_type deepspeed c is this number, "
        "for moe_type megablocks this number divided by the number of layers with experts (docs/moe.md compares the definitions)"
    ),
    **_entries(Refused, _OLD_MOE, "moe_train_capacity_factor", "moe_eval_capacity_factor", "moe_min_capacity", "moe_token_dropping"),
    "create_moe_param_group": Refused("NeoX removed it in 2025; the optimizer treats experts as all other weights; remove it"),
    **_entries(
        Refused,
        "NeoX removed it in 2025; write moe_tensor_parallel: width to divide each expert among tensor-parallel processes",
        "enable_expert_tensor_parallelism",
        unless=_is(False, 0, 1),
    ),
    "moe_type": Refused(
        "NeoX removed it in 2025; experts never drop tokens (as in megablocks); write moe_expert_type to choose the kind of expert", _is("megablocks")
    ),
    "moe_glu": Refused("NeoX removed it in 2025; write a gated activation, such as activation: swiglu"),
    "use_tutel": Refused("NeoX removed it in 2025; remove it, and write kernel_backends to choose an implementation"),
    "mlp_type": Refused("NeoX removed it in 2024; write activation: swiglu, and ffn_hidden_size for the width", _is("regular")),
    "warmup_iters": Refused("write warmup, the share of lr_decay_iters, such as 0.01"),
    "decay_lr_to": Refused("write min_lr, the learning rate at the end (decay_lr_to is its share of lr)"),
    "attention_type": Refused("write attention_config, such as [[[flash], all]]"),
}

TABLE: dict[str, Ignored | Refused] = {**_WITHOUT_EFFECT, **_NOT_BUILT}
