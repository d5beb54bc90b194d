"""NeoX keys that no section has: other names, keys without effect here, keys whose behaviour is not built. One table, one sentence for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron.config.messages import show

# Another name -> the key that a section has.
RENAMED: dict[str, str] = {"num_processes": "num_gpus", "expert_interval": "moe_expert_interval"}

Judgement = Callable[[Any], bool]


def _asks_for_nothing(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


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
    return lambda value: value is None or any(value == allowed and type(value) is type(allowed) for allowed in values)


def _always(value: Any) -> bool:
    return True


def _only_full_attention(value: Any) -> bool:
    """`[[["flash"], 12]]`, `["global", "flash", ...]`: causal attention over the whole sequence, which is what every layer here does."""
    if isinstance(value, list):
        return all(_only_full_attention(item) for item in value)
    return value in ("global", "flash", "all", None) or (isinstance(value, int) and not isinstance(value, bool))


_FUSION = "attention and activations use PyTorch's own fused operations where there are any"
_ONE_PROCESS_MODEL = "the model is not divided over processes in this version"
_DERIVED = "it is worked out from other keys; remove it"
_POST_TRAINING = "only pre-training (train_impl: normal) is part of this version; remove it"
_COMET = "use tensorboard_dir, use_wandb or metrics_file instead of Comet"
_MUP = "muP is not part of this version; remove it"
_DEEPSPEED = "this DeepSpeed feature is not connected; remove it"
_PROFILING = "profiling from the configuration is not part of this version; remove it"
_TRANSFORMER_ENGINE = "Transformer Engine is not used; remove it"
_OTHER_BLOCKS = "only transformer layers are part of this version; remove it"
_PARALLEL = "the batch is divided over processes (data parallelism, ZeRO) in this version; remove it"
_OLD_MOE = "upstream dropped it in 2025; experts are dropless and balance is set with moe_losses: {load_balance: 0.01}; remove it"


def _entries(kind: type[Ignored] | type[Refused], reason: str, *keys: str, unless: Judgement = _asks_for_nothing) -> dict[str, Ignored | Refused]:
    return {key: kind(reason, unless) for key in keys}


_OF_FEATURES_THAT_ARE_OFF = [
    "profile_step_start",
    "profile_step_stop",
    "memory_profiling_path",
    "gradient_noise_scale_n_batches",
    "gradient_noise_scale_cpu_offload",
    "s3_chunk_size",
    "rpe_num_buckets",
    "rpe_max_distance",
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
    "no_save_optim",
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
        "layernorm_fusion",
        "rmsnorm_fusion",
        "use_flashattn_swiglu",
        "fused_kernels_build_path",
    ),
    **_entries(Ignored, _ONE_PROCESS_MODEL, "partition_activations", "pipe_partition_method", unless=_is(False, "type:transformer|mlp")),
    "output_layer_parallelism": Ignored(_ONE_PROCESS_MODEL, _is("column")),
    **_entries(
        Ignored, "PyTorch's activation checkpointing has no such setting", "synchronize_each_layer", "contiguous_checkpointing", "profile_backward"
    ),
    "deepspeed_activation_checkpointing": Ignored("PyTorch's activation checkpointing is used", _is(True, False)),
    "attention_softmax_in_fp32": Ignored("the softmax of attention keeps fp32 sums in every precision"),
    "use_cpu_initialization": Ignored("weights are initialised the same way on every device"),
    "rotary_save_freqs_buffer": Ignored("rotary frequencies are computed, never saved"),
    "deepspeed": Ignored("DeepSpeed is always used", _is(True)),
    **_entries(Ignored, "upstream does not read it either", *_DEAD_UPSTREAM, unless=_always),
    **_entries(Ignored, "write it inside the fp16 dictionary, as upstream requires too", "hysteresis", "loss_scale_window", unless=_is()),
    "min_scale": Ignored("write fp16: {min_loss_scale: ...}, as upstream requires too", _is()),
    **_entries(Ignored, _COMET, "comet_workspace", "comet_project", "comet_experiment_name", "comet_tags", "comet_others"),
    **_entries(
        Ignored, "norms of single parameters are not recorded", "log_grad_norm", "log_param_norm", "log_optimizer_states", "log_grad_pct_zeros"
    ),
    "git_hash": Ignored("it is found at the start of a run", _always),
    "dump_state": Ignored("the resolved configuration is saved in every checkpoint"),
    "override_lr_scheduler": Ignored("the schedule always follows the configuration, also after loading a checkpoint"),
    **_entries(Ignored, "it belongs to a feature that is off", *_OF_FEATURES_THAT_ARE_OFF, unless=_always),
    "gradient_predivide_factor": Ignored("gradients are averaged by DeepSpeed in one division", _is(1.0, 1)),
}

_NOT_BUILT: dict[str, Ignored | Refused] = {
    "attention_config": Refused("every layer has full causal attention ('global' or 'flash')", _only_full_attention),
    "sliding_window_width": Refused("sliding-window attention is not part of this version; remove it"),
    **_entries(Refused, "sparse attention is not part of this version; remove it", "sparsity_config", "sparse_attention"),
    "use_qk_layernorm": Refused("norms on queries and keys are not part of this version; remove it"),
    "apply_query_key_layer_scaling": Refused("attention scores are scaled by 1/sqrt(head dimension); remove it"),
    "fp16_lm_cross_entropy": Refused("the loss is computed in fp32; remove it"),
    "opt_pos_emb_offset": Refused("position 0 is the first row of the position table; remove it", _is(0)),
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
    "sequence_parallel": Refused(_PARALLEL),
    "use_bnb_optimizer": Refused("optimizers are Adam and AdamW; remove it"),
    "use_checkpoint_lr_scheduler": Refused("the schedule always follows the configuration; remove it"),
    "label_data_paths": Refused("write train_label_data_paths, valid_label_data_paths and test_label_data_paths"),
    "inter_document_attention_masking": Refused("write reset_attention_mask: true, and reset_position_ids: true where positions shall begin again"),
    **_entries(Refused, _POST_TRAINING, "train_reward_data_paths", "valid_reward_data_paths"),
    **_entries(Refused, _POST_TRAINING, "test_reward_data_paths", "dpo_reference_free", "reinforce_leave_one_out", "precompute_model_name"),
    **_entries(
        Refused,
        _POST_TRAINING,
        *(f"{sign}_{part}_{kind}" for sign in ("pos", "neg") for part in ("train", "valid", "test") for kind in ("data_paths", "label_data_paths")),
    ),
    "train_impl": Refused(_POST_TRAINING, _is("normal")),
    "dataset_impl": Refused(_POST_TRAINING, _is("gpt2")),
    "z_loss": Refused("it is the reward model's; for the router write moe_losses: {z_loss: ...}", _is(0.0, 0)),
    "checkpoint_validation_with_forward_pass": Refused("checkpoints are checked by checksums instead; remove it"),
    "s3_path": Refused("checkpoints are written to a file system; remove it"),
    "checkpoint_in_cpu": Refused("recomputed layers keep their inputs on the device; remove it"),
    "loss_scale": Refused("write fp16: {loss_scale: ...}"),
    "char_level_ppl": Refused("eval.py reports bits per byte; remove it"),
    **_entries(Refused, _MUP, "use_mup", "coord_check", "save_base_shapes", "base_shapes_file"),
    "scheduler": Refused("write lr_decay_style, warmup and min_lr"),
    "amp": Refused("write precision: bfloat16 or fp16"),
    **_entries(
        Refused, _DEEPSPEED, "prescale_gradients", "sparse_gradients", "curriculum_learning", "flops_profiler", "autotuning", "autotuning_run"
    ),
    **_entries(
        Refused, _DEEPSPEED, "activation_checkpointing", "data_efficiency", "tensorboard", "wandb", "csv_monitor", "elasticity", "comms_logger"
    ),
    **_entries(Refused, _DEEPSPEED, "compression_training", "checkpoint", "deepspeed_extra_args"),
    "communication_data_type": Refused("write fp32_allreduce: true to sum gradients in fp32"),
    "deepspeed_mpi": Refused("write launcher: openmpi and force_multi: true"),
    "use_comet": Refused(_COMET),
    "log_gradient_noise_scale": Refused("the gradient noise scale is not measured; remove it"),
    **_entries(Refused, _PROFILING, "profile", "memory_profiling"),
    "return_logits": Refused("generate.py writes text, not logits; remove it"),
    "recompute": Refused("generation always uses its key/value cache; remove it"),
    "eval_tasks": Refused("lm-eval tasks are not part of this version; eval.py measures text files (eval_text_files)"),
    **_entries(Refused, _DERIVED, "world_size", "is_pipe_parallel", "padded_vocab_size", "optimizer_type", "zero_stage", "zero_reduce_scatter"),
    **_entries(Refused, _DERIVED, "zero_contiguous_gradients", "zero_reduce_bucket_size", "zero_allgather_bucket_size", "local_rank", "rank"),
    **_entries(Refused, _DERIVED, "user_script", "do_train", "do_valid", "do_test", "config_files", "batch_size", "clip_grad", "dynamic_loss_scale"),
    **_entries(Refused, _DERIVED, "comet_experiment", "curriculum_seqlen", unless=_is(0)),
    "lr": Refused("write optimizer: {type: Adam, params: {lr: ...}}"),
    **_entries(
        Refused, _OLD_MOE, "moe_loss_coeff", "moe_train_capacity_factor", "moe_eval_capacity_factor", "moe_min_capacity", "moe_token_dropping"
    ),
    **_entries(Refused, _OLD_MOE, "create_moe_param_group", "moe_use_residual", "moe_expert_parallel_size", "moe_type", "moe_glu"),
    **_entries(Refused, _OLD_MOE, "enable_expert_tensor_parallelism", "use_tutel"),
}

TABLE: dict[str, Ignored | Refused] = {**_WITHOUT_EFFECT, **_NOT_BUILT}
