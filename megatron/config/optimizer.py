"""Optimizer, learning-rate schedule, ZeRO and mixed precision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import ConfigDict

from megatron.config.offload import offloaded
from megatron.config.section import Fraction, NaturalInt, NonNegativeFloat, PositiveFloat, PositiveInt, Problem, Section
from megatron.config.zero import zero_problems


class OptimizerParams(Section):
    """All parameters of all types; SETTINGS says which belong to which."""

    lr: PositiveFloat | None = None
    """Peak learning rate. None: allowed for generation and evaluation, an error in training."""
    betas: tuple[Fraction, Fraction] | None = None
    """Adam, AdamW, Adam8bit, Lion: decay rates of the averages. None: 0.9 and 0.999, Lion 0.9 and 0.99."""
    eps: PositiveFloat | None = None
    """Adam, AdamW, Adam8bit: added to the denominator. None: 1e-8."""
    adam_w_mode: bool | None = None
    """Adam. True: weight decay shrinks the weights directly (AdamW). False: weight decay is added to the gradients. None: true."""
    momentum: Fraction | None = None
    """SGD: share of the last update that is kept. None: 0."""
    nesterov: bool | None = None
    """SGD: whether to use Nesterov's momentum. It needs `momentum` above 0. None: false."""


OptimizerType = Literal["Adam", "AdamW", "Adam8bit", "SGD", "Lion"]
SETTINGS: dict[str, dict[str, Any]] = {
    "Adam": {"betas": (0.9, 0.999), "eps": 1e-8, "adam_w_mode": True},
    "AdamW": {"betas": (0.9, 0.999), "eps": 1e-8},
    "Adam8bit": {"betas": (0.9, 0.999), "eps": 1e-8},
    "SGD": {"momentum": 0.0, "nesterov": False},
    "Lion": {"betas": (0.9, 0.99)},
}
"""What each type of optimizer takes beside lr, with its defaults."""
_ADAM_INSTEAD = "use Adam"
ROUNDING = 1e-9
"""Shares written in decimals may miss their sum by this."""


class OptimizerSpec(Section):
    not_built = {
        "type": {
            "onebitadam": f"it needs DeepSpeed's MPI or NCCL backend and does not work with ZeRO; {_ADAM_INSTEAD}",
            "cpu_adam": f"it is a way to offload; {_ADAM_INSTEAD} and zero_optimization: {{stage: 1, offload_optimizer: {{device: cpu}}}}",
            "cpu_torch_adam": f"NeoX accepts it but never uses it; {_ADAM_INSTEAD}, which is PyTorch's own on every device",
            "sm3": f"it is not part of this version; {_ADAM_INSTEAD} with ZeRO, or Adam8bit, to save memory",
            "madgrad_wd": f"it is not part of this version; {_ADAM_INSTEAD}, or SGD with momentum",
            "muadam": f"muP is not part of this version; {_ADAM_INSTEAD}",
            "muadamw": "muP is not part of this version; use AdamW",
            "musgd": "muP is not part of this version; use SGD",
        }
    }

    type: OptimizerType = "Adam"
    """Adam and AdamW: weight decay shrinks the weights directly, as with Adam in NeoX. Adam8bit: Adam with averages of 8 bits (needs the package
    bitsandbytes). SGD: plain SGD with momentum, without muP; weight decay is added to the gradients. Lion: Chen et al., 2023."""
    params: OptimizerParams = OptimizerParams()
    """Settings of the optimizer. lr: for all types. betas: for Adam, AdamW, Adam8bit and Lion. eps: for Adam, AdamW and Adam8bit. adam_w_mode: for
    Adam. momentum and nesterov: for SGD."""
    implementation: Literal["auto", "torch", "apex", "deepspeed"] = "auto"
    """Adam and AdamW: the implementation. auto: on CPUs at stage 0 the compiled one where it was built, else PyTorch's. torch: PyTorch's fused one,
    on CPU and CUDA. These clip gradients in the same pass. apex and deepspeed: their FusedAdam, which needs CUDA and the package."""


class ZeroOptimization(Section):
    model_config = ConfigDict(extra="allow")

    stage: Literal[0, 1, 2, 3] = 0
    """What DeepSpeed divides among the processes. 0: nothing. 1: the optimizer state. 2: the gradients too. 3: the weights too."""


class Fp16(Section):
    enabled: bool = True
    """Whether fp16 training is on."""
    loss_scale: NonNegativeFloat = 0.0
    """Fixed loss scale. 0: the loss scale is dynamic."""
    loss_scale_window: PositiveInt = 1000
    """A dynamic loss scale is doubled after this many steps without overflow."""
    initial_scale_power: NaturalInt = 16
    """A dynamic loss scale starts at 2 to the power of this."""
    hysteresis: PositiveInt = 2
    """A dynamic loss scale is halved after this many overflows in a row."""
    min_loss_scale: NonNegativeFloat = 1.0
    """A dynamic loss scale never falls below this."""
    fp16: bool = True
    """Accepted because NeoX files have it. Only `enabled` decides."""
    type: str = "fp16"
    """Accepted because NeoX files have it. Only `enabled` decides."""
    auto_cast: bool = False
    """Accepted because DeepSpeed files have it. DeepSpeed casts floating-point inputs of the model to fp16; here they are token numbers."""


class Bf16(Section):
    enabled: bool = True
    """Whether bfloat16 training is on."""


class OptimizerConfig(Section):
    optimizer: OptimizerSpec = OptimizerSpec()
    """{type, params: {lr, betas, eps}}: the type (Adam, AdamW, Adam8bit, SGD or Lion) and its settings."""
    use_bnb_optimizer: bool = False
    """Use Adam with averages of 8 bits from the package bitsandbytes, as `optimizer.type: Adam8bit` does. NeoX also adds a layer norm after the
    embedding. Here the model stays the same."""
    weight_decay: NonNegativeFloat = 0.1
    """Weight decay. Biases and the parameters of norms have no weight decay."""
    gradient_clipping: NonNegativeFloat = 1.0
    """Largest norm of all gradients together. A larger gradient is scaled down to it. 0: no clipping."""
    lr_decay_style: Literal["constant", "linear", "cosine", "exponential", "wsd", "infinite_cosine", "infinite_inv_sqrt"] = "linear"
    """Shape of the learning rate after warm-up. wsd: constant, then a cosine at the end. infinite_*: it falls to `constant_lr` (cooldown), stays
    there, and then falls exponentially (annealing)."""
    lr_decay_iters: PositiveInt | None = None
    """Steps after which the learning rate reaches `min_lr`. None: `train_iters`, or `lr_decay_fraction` of it."""
    lr_decay_fraction: Fraction | None = None
    """`lr_decay_iters` as a share of `train_iters`. None: not used."""
    min_lr: NonNegativeFloat = 0.0
    """The learning rate never falls below this."""
    warmup: Fraction = 0.01
    """Share of the decay steps in which the learning rate rises from 0 to its peak."""
    wsd_decay_ratio: Fraction = 0.1
    """lr_decay_style wsd: share of the decay steps, at their end, in which the learning rate falls from its peak to `min_lr`."""
    constant_lr: PositiveFloat | None = None
    """lr_decay_style infinite_*: the learning rate between cooldown and annealing. None: an error with these styles."""
    cooldown_iters_perc: Fraction = 0.0
    """lr_decay_style infinite_*: share of the decay steps in which the learning rate falls from its peak to `constant_lr`, after the warm-up."""
    constant_iters_perc: Fraction = 0.0
    """lr_decay_style infinite_*: share of the decay steps that stay at `constant_lr`, after the cooldown. The rest anneals to `min_lr`."""
    timescale: PositiveFloat = 1.0
    """lr_decay_style infinite_inv_sqrt: steepness of the cooldown."""
    override_lr_scheduler: bool = False
    """For a run that continues from a checkpoint with another schedule: use the schedule of this configuration."""
    use_checkpoint_lr_scheduler: bool = False
    """For a run that continues from a checkpoint with another schedule: use the schedule of the checkpoint. If neither this key nor
    `override_lr_scheduler` is true, such a run is refused."""
    zero_optimization: ZeroOptimization = ZeroOptimization()
    """{stage: 0..3} and DeepSpeed's other ZeRO settings, which are passed on to DeepSpeed. offload_optimizer: {device: cpu} keeps the optimizer's
    state and the fp32 weights in the CPU's memory, and updates them there (stages 1 to 3). offload_param: {device: cpu} keeps the weights there
    too (stage 3). Offloading to NVMe disks is refused."""
    fp16: Fp16 | None = None
    """fp16 training: {enabled, loss_scale, loss_scale_window, initial_scale_power, hysteresis, min_loss_scale}. None: `precision` decides."""
    bf16: Bf16 | None = None
    """bfloat16 training: {enabled}. None: `precision` decides."""
    fp32_allreduce: bool = False
    """Sum gradients over processes in fp32, whatever `precision` is."""
    data_types: dict[str, str] = {}
    """{grad_accum_dtype: fp32|fp16|bf16}: the number format in which the gradients of several micro-batches are summed. It must be fp32 or the
    format of `precision`. 16 bits lose small gradients beside large ones. Empty: fp32 at ZeRO stage 0, the format of `precision` from stage 1 on."""

    @property
    def optimizer_type(self) -> OptimizerType:
        """The optimizer to build."""
        return "Adam8bit" if self.use_bnb_optimizer else self.optimizer.type

    @property
    def optimizer_settings(self) -> dict[str, Any]:
        """Its numbers beside the learning rate, defaults filled in."""
        given = {key: getattr(self.optimizer.params, key) for key in SETTINGS[self.optimizer_type]}
        return {key: default if given[key] is None else given[key] for key, default in SETTINGS[self.optimizer_type].items()}

    @property
    def averages(self) -> tuple[int, int]:
        """How many averages the optimizer keeps for each parameter, and how many bytes each takes."""
        momentum = 1 if self.optimizer_settings.get("momentum") else 0
        return {"SGD": (momentum, 4), "Lion": (1, 4), "Adam8bit": (2, 1)}.get(self.optimizer_type, (2, 4))

    def idle_keys(self) -> Iterator[tuple[str, str]]:
        """(key, what to say of it) for keys that were given and have no effect."""
        if self.fp16 is not None and self.fp16.auto_cast:
            yield "fp16.auto_cast", "has no effect here: it casts floating-point inputs of the model to fp16, and the inputs are token numbers"

    def check(self) -> Iterator[Problem]:
        yield from self._optimizer_problems()
        yield from self._schedule_problems()
        if self.fp16 is not None and self.bf16 is not None and self.fp16.enabled and self.bf16.enabled:
            yield Problem(("bf16.enabled", "fp16.enabled"), "fp16 is enabled too; enable only one of them")
        for key, value in self.data_types.items():
            if key != "grad_accum_dtype" or value not in ("fp32", "fp16", "bf16"):
                yield Problem((f"data_types.{key}",), "must be grad_accum_dtype: fp32, fp16 or bf16; no other entry is allowed")
        if self.fp16 is not None and (self.fp16.min_loss_scale < 1 or self.fp16.min_loss_scale % 1):
            yield Problem(("fp16.min_loss_scale",), "must be a whole number, 1 or more")
        yield from (wrong := list(zero_problems(self.zero_optimization.model_extra or {}, self.zero_optimization.stage)))
        if not wrong:
            yield from self._offload_problems()

    @property
    def offloaded(self) -> dict[str, dict[str, Any]]:
        """What is kept in the CPU's memory: `offload_optimizer`, `offload_param` -> DeepSpeed's settings of it."""
        return offloaded(self.zero_optimization.model_extra or {})

    def _offload_problems(self) -> Iterator[Problem]:
        """An optimizer that computes on GPUs only cannot update what is in the CPU's memory."""
        if "offload_optimizer" not in self.offloaded:
            return
        given = self.zero_optimization.model_extra or {}
        key = f"zero_optimization.{'offload_optimizer' if given.get('offload_optimizer') else 'cpu_offload'}"
        if self.optimizer_type == "Adam8bit":
            yield Problem((key, "optimizer.type"), "Adam8bit computes on a GPU, and the offloaded state is on the CPU; write optimizer.type: Adam")
        elif self.optimizer.implementation in ("apex", "deepspeed"):
            message = (
                f"optimizer.implementation: {self.optimizer.implementation} computes on a GPU; remove it, and PyTorch's fused Adam runs on the CPU"
            )
            yield Problem((key, "optimizer.implementation"), message)

    def _optimizer_problems(self) -> Iterator[Problem]:
        spec, kind = self.optimizer, self.optimizer_type
        if self.use_bnb_optimizer and spec.type not in ("Adam", "Adam8bit"):
            yield Problem(("use_bnb_optimizer", "optimizer.type"), f"needs optimizer.type Adam, not {spec.type}")
            return
        taken = ("lr", *SETTINGS[kind])
        for key in OptimizerParams.model_fields:
            if key not in taken and getattr(spec.params, key) is not None:
                yield Problem((f"optimizer.params.{key}", "optimizer.type"), f"is not a setting of {kind}; {kind} takes {', '.join(taken)}")
        if kind == "SGD" and spec.params.nesterov and not spec.params.momentum:
            yield Problem(("optimizer.params.nesterov", "optimizer.params.momentum"), "needs momentum above 0")
        if spec.implementation in ("apex", "deepspeed") and kind not in ("Adam", "AdamW"):
            yield Problem(("optimizer.implementation", "optimizer.type"), f"is for Adam and AdamW; remove it for {kind}")

    def _schedule_problems(self) -> Iterator[Problem]:
        lr = self.optimizer.params.lr
        if lr is not None and self.min_lr > lr:
            yield Problem(("min_lr", "optimizer.params.lr"), f"must be at most optimizer.params.lr ({lr})")
        if self.lr_decay_iters is not None and self.lr_decay_fraction is not None:
            yield Problem(("lr_decay_fraction", "lr_decay_iters"), f"give either it or lr_decay_iters ({self.lr_decay_iters}), not both")
        if self.override_lr_scheduler and self.use_checkpoint_lr_scheduler:
            yield Problem(("use_checkpoint_lr_scheduler", "override_lr_scheduler"), "contradicts override_lr_scheduler: true; keep one of them")
        if self.lr_decay_style == "wsd" and self.warmup + self.wsd_decay_ratio > 1 + ROUNDING:
            yield Problem(("wsd_decay_ratio", "warmup"), f"the sum with warmup ({self.warmup}) must be at most 1")
        if self.lr_decay_style.startswith("infinite"):
            yield from self._infinite_problems()

    def _infinite_problems(self) -> Iterator[Problem]:
        lr, level = self.optimizer.params.lr, self.constant_lr
        if level is None:
            yield Problem(("constant_lr", "lr_decay_style"), f"must be given with lr_decay_style: {self.lr_decay_style}")
        elif level < self.min_lr or (lr is not None and level > lr):
            yield Problem(("constant_lr", "min_lr", "optimizer.params.lr"), f"must be between min_lr ({self.min_lr}) and optimizer.params.lr ({lr})")
        used = self.warmup + self.cooldown_iters_perc + self.constant_iters_perc
        if used > 1 + ROUNDING:
            message = f"the sum with warmup and constant_iters_perc is {used:g}; it must be at most 1"
            yield Problem(("cooldown_iters_perc", "warmup", "constant_iters_perc"), message)
        elif used < 1 - ROUNDING and not self.min_lr:
            yield Problem(("min_lr", "lr_decay_style"), "must be above 0, because the annealing phase falls to it exponentially")
