"""Optimizer, learning-rate schedule, ZeRO and mixed precision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import ConfigDict

from megatron.config.components import did_you_mean
from megatron.config.section import Fraction, NaturalInt, NonNegativeFloat, PositiveFloat, PositiveInt, Problem, Section

# DeepSpeed's own names under zero_optimization, compared with the installed DeepSpeed in tests/config/test_deepspeed_json.py.
ZERO_KEYS = frozenset(
    {
        "allgather_bucket_size",
        "allgather_partitions",
        "allgather_sequential",
        "compute_grad_norm",
        "contiguous_gradients",
        "cpu_offload",
        "cpu_offload_param",
        "cpu_offload_use_pin_memory",
        "elastic_checkpoint",
        "enable_sanity_checks",
        "gather_16bit_weights_on_model_save",
        "ignore_unused_parameters",
        "leaf_module",
        "legacy_stage1",
        "load_from_fp32_weights",
        "log_trace_cache_warnings",
        "max_live_parameters",
        "max_reuse_distance",
        "memory_efficient_linear",
        "model_persistence_threshold",
        "module_granularity_threshold",
        "offload_optimizer",
        "offload_param",
        "overlap_comm",
        "override_module_apply",
        "param_persistence_threshold",
        "parameter_alignment",
        "pipeline_loading_checkpoint",
        "prefetch_bucket_size",
        "reduce_bucket_size",
        "reduce_scatter",
        "round_robin_gradients",
        "save_muon_momentum_buffer_in_memory",
        "stage3_allgather_sequential",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_gather_fp16_weights_on_model_save",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_model_persistence_threshold",
        "stage3_module_granularity_threshold",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "stage3_use_all_reduce_for_fetch_params",
        "sub_group_size",
        "use_all_reduce_for_fetch_params",
        "use_multi_rank_bucket_allreduce",
        "zenflow",
        "zero_hpz_partition_size",
        "zero_quantized_gradients",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_weights",
    }
)


class OptimizerParams(Section):
    lr: PositiveFloat | None = None
    """Peak learning rate. None: fine for generation and evaluation, refused when training."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay rates of Adam's two averages."""
    eps: PositiveFloat = 1e-8
    """Added to Adam's denominator."""


class OptimizerSpec(Section):
    type: Literal["Adam", "AdamW"] = "Adam"
    """Both names mean Adam with decoupled weight decay, as in NeoX."""
    params: OptimizerParams = OptimizerParams()
    """The optimizer's own numbers."""


class ZeroOptimization(Section):
    model_config = ConfigDict(extra="allow")

    stage: Literal[0, 1, 2, 3] = 0
    """What DeepSpeed divides among the processes: 0 nothing, 1 optimizer state, 2 gradients as well, 3 weights as well."""


class Fp16(Section):
    enabled: bool = True
    """Whether fp16 training is on."""
    loss_scale: NonNegativeFloat = 0.0
    """Fixed loss scale; 0 means dynamic."""
    loss_scale_window: PositiveInt = 1000
    """Good steps after which a dynamic loss scale is doubled."""
    initial_scale_power: NaturalInt = 16
    """A dynamic loss scale starts at 2 to this power."""
    hysteresis: PositiveInt = 2
    """Overflows in a row before a dynamic loss scale is halved."""
    min_loss_scale: NonNegativeFloat = 1.0
    """A dynamic loss scale never falls below this."""
    fp16: bool = True
    """Accepted because NeoX files carry it; `enabled` decides."""
    type: str = "fp16"
    """Accepted because NeoX files carry it; `enabled` decides."""


class Bf16(Section):
    enabled: bool = True
    """Whether bfloat16 training is on."""


class OptimizerConfig(Section):
    optimizer: OptimizerSpec = OptimizerSpec()
    """{type, params: {lr, betas, eps}}."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay; norms and biases are exempt."""
    gradient_clipping: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "linear"
    """Shape of the learning rate after warm-up."""
    lr_decay_iters: PositiveInt | None = None
    """Steps after which the learning rate reaches `min_lr`. None: `train_iters`, or `lr_decay_fraction` of it."""
    lr_decay_fraction: Fraction | None = None
    """The same as a share of `train_iters`. None: not used."""
    min_lr: NonNegativeFloat = 0.0
    """The learning rate never falls below this."""
    warmup: Fraction = 0.01
    """Share of the decay steps in which the learning rate rises from 0 to its peak."""
    zero_optimization: ZeroOptimization = ZeroOptimization()
    """{stage: 0..3} and DeepSpeed's other ZeRO settings, passed through."""
    fp16: Fp16 | None = None
    """fp16 training: {enabled, loss_scale, loss_scale_window, initial_scale_power, hysteresis, min_loss_scale}. None: as `precision` says."""
    bf16: Bf16 | None = None
    """bfloat16 training: {enabled}. None: as `precision` says."""
    fp32_allreduce: bool = False
    """Sum gradients over processes in fp32 whatever the precision."""
    data_types: dict[str, str] = {}
    """{grad_accum_dtype: fp32|fp16|bf16}: the number format in which gradients are accumulated; DeepSpeed's choice when empty."""

    def check(self) -> Iterator[Problem]:
        lr = self.optimizer.params.lr
        if lr is not None and self.min_lr > lr:
            yield Problem(("min_lr", "optimizer.params.lr"), f"must be at most optimizer.params.lr ({lr})")
        if self.lr_decay_iters is not None and self.lr_decay_fraction is not None:
            yield Problem(("lr_decay_fraction", "lr_decay_iters"), f"give only one of it and lr_decay_iters ({self.lr_decay_iters})")
        if self.fp16 is not None and self.bf16 is not None and self.fp16.enabled and self.bf16.enabled:
            yield Problem(("bf16.enabled", "fp16.enabled"), "fp16 is enabled as well; choose one")
        for key, value in self.data_types.items():
            if key != "grad_accum_dtype" or value not in ("fp32", "fp16", "bf16"):
                yield Problem((f"data_types.{key}",), "only grad_accum_dtype: fp32, fp16 or bf16 is known here")
        yield from _unknown_zero_keys(self.zero_optimization.model_extra or {})


def _unknown_zero_keys(extra: dict[str, Any]) -> Iterator[Problem]:
    for key in extra:
        if key not in ZERO_KEYS:
            yield Problem((f"zero_optimization.{key}",), f"DeepSpeed has no such setting{did_you_mean(key, ZERO_KEYS)}")
