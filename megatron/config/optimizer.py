"""Optimizer, learning-rate schedule, ZeRO and mixed precision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import ConfigDict

from megatron.config.section import Fraction, NaturalInt, NonNegativeFloat, PositiveFloat, PositiveInt, Problem, Section
from megatron.config.zero import zero_problems


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
    """{stage: 0..3} and DeepSpeed's other ZeRO settings, passed through; offloading is refused for now."""
    fp16: Fp16 | None = None
    """fp16 training: {enabled, loss_scale, loss_scale_window, initial_scale_power, hysteresis, min_loss_scale}. None: as `precision` says."""
    bf16: Bf16 | None = None
    """bfloat16 training: {enabled}. None: as `precision` says."""
    fp32_allreduce: bool = False
    """Sum gradients over processes in fp32 whatever the precision."""
    data_types: dict[str, str] = {}
    """{grad_accum_dtype: fp32|fp16|bf16}: the number format in which gradients are accumulated: `precision`, which is what empty means, or fp32 (with
    16-bit weights from ZeRO stage 1 on)."""

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
        if self.fp16 is not None and (self.fp16.min_loss_scale < 1 or self.fp16.min_loss_scale % 1):
            yield Problem(("fp16.min_loss_scale",), "must be a whole number, 1 or more")
        yield from zero_problems(self.zero_optimization.model_extra or {})
