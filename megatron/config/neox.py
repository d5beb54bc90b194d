"""NeoXConfig: the sections together, and the rules that span them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from megatron.config.checkpoint import CheckpointConfig
from megatron.config.data import DataConfig
from megatron.config.deepspeed import DeepSpeedConfig, gradient_problems
from megatron.config.evaluation import EvaluationConfig
from megatron.config.expert_offload import offload_problems
from megatron.config.inference import InferenceConfig, int8_problems
from megatron.config.launcher import LauncherConfig
from megatron.config.logging import LoggingConfig
from megatron.config.model import ModelConfig
from megatron.config.moe import MoEConfig
from megatron.config.optimizer import OptimizerConfig
from megatron.config.packages import package_problems
from megatron.config.parallel import ONE, ParallelConfig, division_problems, layout_problem
from megatron.config.section import ConfigError, Problem, Section
from megatron.config.serve import ServeConfig
from megatron.config.training import TrainingConfig, resolve_batch

Precision = Literal["fp32", "fp16", "bfloat16"]


class NeoXConfig(Section):
    """Everything that a run was asked to do. In YAML the keys are flat. Here each key is in the section that owns it."""

    model: ModelConfig
    moe: MoEConfig = MoEConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    inference: InferenceConfig = InferenceConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    serve: ServeConfig = ServeConfig()
    launcher: LauncherConfig = LauncherConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()

    @property
    def precision(self) -> Precision:
        """Number format of weights and activations: `precision`, else whichever of `fp16` and `bf16` is enabled, else fp32."""
        return self.model.precision or _enabled_precision(self.optimizer) or "fp32"

    @property
    def lr_decay_iters(self) -> int | None:
        """Steps after which the learning rate reaches its minimum; None when `train_iters` is not given either."""
        explicit, fraction, total = self.optimizer.lr_decay_iters, self.optimizer.lr_decay_fraction, self.training.train_iters
        if explicit is None and fraction is not None and total is not None:
            return max(1, int(fraction * total))
        return explicit if explicit is not None else total

    @property
    def sums_in_fp32(self) -> bool:
        """Whether the gradients of several micro-batches are summed in fp32: always in fp32 and at ZeRO stage 0, unless it was asked for 16 bits."""
        own = {"fp32": "fp32", "fp16": "fp16", "bfloat16": "bf16"}[self.precision]
        default = "fp32" if self.optimizer.zero_optimization.stage == 0 else own
        return self.optimizer.data_types.get("grad_accum_dtype", default) == "fp32"

    def flat(self) -> dict[str, Any]:
        """Every key under its YAML name, defaults filled in and the precision resolved: plain numbers, texts, lists and dictionaries."""
        values = {key: value for section in SECTIONS for key, value in getattr(self, section).model_dump(mode="json").items()}
        return values | {"precision": self.precision}

    def given(self) -> dict[str, Any]:
        """The keys that were written in a file or on the command line, in the form of `flat`."""
        dumped = {section: getattr(self, section).model_dump(mode="json", exclude_unset=True) for section in SECTIONS}
        return {key: value for values in dumped.values() for key, value in values.items()}

    def idle_keys(self) -> Iterator[tuple[str, str]]:
        """(key, what to say of it) for keys that were given and do not do what they seem to."""
        yield from self.moe.idle_keys()
        yield from self.parallel.idle_keys()
        yield from self.optimizer.idle_keys()
        yield from self.training.idle_keys(self.parallel, has_experts=self.moe.has_experts)

    def check(self) -> Iterator[Problem]:
        enabled = _enabled_precision(self.optimizer)
        if self.model.precision is not None and enabled is not None and enabled != self.model.precision:
            other = "fp16.enabled" if enabled == "fp16" else "bf16.enabled"
            yield Problem(("precision", other), f"contradicts {other}: true; remove one of the two")
        yield from self._accumulation_problems()
        if self.training.train_epochs is not None:
            yield from self._epoch_problems()
        zero = self.optimizer.zero_optimization
        reduce_scatter = (zero.model_extra or {}).get("reduce_scatter", True)
        yield from gradient_problems(self.deepspeed, zero.stage, reduce_scatter=reduce_scatter, fp32_allreduce=self.optimizer.fp32_allreduce)
        if self.deepspeed.wandb is not None and self.deepspeed.wandb.enabled and self.logging.use_wandb:
            yield Problem(
                ("wandb.enabled", "use_wandb"), "cannot be combined with use_wandb: true, because one process can write only one run; keep use_wandb"
            )
        yield from self.moe.check_with(self.model)
        if self.logging.traces_routing and not self.moe.has_experts:
            key = "routing_trace_interval" if self.logging.routing_trace_steps is None else "routing_trace_steps"
            yield Problem((key, "moe_num_experts"), "needs a model with experts (moe_num_experts)")
        if self.parallel.layout._replace(pipe=1) != ONE and self.logging.log_gradient_noise_scale:
            yield Problem(("log_gradient_noise_scale",), "measures the gradients of one process only, and here several processes divide each layer")
        if self.parallel.layout.pipe > 1 and self.deepspeed.flops_profiler is not None and self.deepspeed.flops_profiler.enabled:
            yield Problem(
                ("flops_profiler.enabled", "pipe_parallel_size"),
                "profiles a model that is on one process; use `profile` in a pipeline, or one process",
            )
        yield from division_problems(self.parallel, self.model, self.moe, zero.stage)
        yield from package_problems(self.parallel, self.model, self.moe, self.precision)
        if "experts" in self.training.recompute_modules and self.moe.has_experts and "experts" in self.moe.kernel_backends:
            library = self.moe.kernel_backends["experts"]
            message = f"the library of kernel_backends: {{experts: {library}}} computes the whole MoE layer; name moe in place of experts"
            yield Problem(("recompute_modules", "kernel_backends.experts"), message)
        if self.inference.expert_offload is not None:
            validates = self.checkpoint.checkpoint_validation_with_forward_pass
            yield from offload_problems(self.inference.expert_offload, self.moe, validates=validates)
        yield from int8_problems(self.inference, self.moe)
        if self.checkpoint.iteration is not None and self.checkpoint.load is None and self.checkpoint.save is None:
            yield Problem(("iteration", "load"), "needs load, the directory with the checkpoint")
        if self.checkpoint.no_save_optim and self.optimizer.zero_optimization.stage == 3:
            yield Problem(
                ("no_save_optim", "zero_optimization.stage"),
                "needs zero_optimization.stage 0, 1 or 2, because at stage 3 the optimizer state contains the weights",
            )
        if self.logging.plot_file is not None and self.logging.metrics_file is None and self.checkpoint.save is None:
            yield Problem(("plot_file", "metrics_file"), "needs save or metrics_file, because the picture is drawn from the metrics file")

    def _epoch_problems(self) -> Iterator[Problem]:
        """An epoch is every document once, which only one way of packing and no weighting gives."""
        data = self.data
        if data.pack_impl != "packed":
            yield Problem(("train_epochs", "pack_impl"), f"needs pack_impl: packed, not {data.pack_impl}; write train_iters in place of train_epochs")
        if data.weight_by_num_documents:
            yield Problem(
                ("train_epochs", "weight_by_num_documents"),
                "cannot be combined with weight_by_num_documents: true; write train_iters in place of train_epochs",
            )
        if len(set(data.train_data_weights or ())) > 1:
            yield Problem(
                ("train_epochs", "train_data_weights"), "needs equal train_data_weights; remove them, or write train_iters in place of train_epochs"
            )

    def _accumulation_problems(self) -> Iterator[Problem]:
        """The number format in which gradients are summed is that of the weights or fp32."""
        own = {"fp32": "fp32", "fp16": "fp16", "bfloat16": "bf16"}[self.precision]
        given = self.optimizer.data_types.get("grad_accum_dtype", own)
        if given not in ("fp32", "fp16", "bf16"):
            return  # the section says so
        if given not in (own, "fp32"):
            choice = own if own == "fp32" else f"{own} or fp32"
            yield Problem(("data_types.grad_accum_dtype", "precision"), f"must be {choice} with precision {self.precision}")


SECTIONS: tuple[str, ...] = tuple(NeoXConfig.model_fields)
SECTION_CLASSES: dict[str, type[Section]] = {name: field.annotation for name, field in NeoXConfig.model_fields.items() if field.annotation}  # type: ignore[misc]
OWNER: dict[str, str] = {key: name for name, section in SECTION_CLASSES.items() for key in section.model_fields}


def _enabled_precision(optimizer: OptimizerConfig) -> Precision | None:
    if optimizer.fp16 is not None and optimizer.fp16.enabled:
        return "fp16"
    if optimizer.bf16 is not None and optimizer.bf16.enabled:
        return "bfloat16"
    return None


def rounding_notice(config: NeoXConfig, data_parallel_size: int) -> str | None:
    """A sentence where the gradients of several micro-batches are summed in 16 bits. None: they are not."""
    try:
        accumulation = resolve_batch(config.training, data_parallel_size).accumulation
    except ConfigError:
        return None
    if accumulation == 1 or config.sums_in_fp32:
        return None
    short = {"fp16": "fp16", "bfloat16": "bf16"}[config.precision]
    return (
        f"the gradients of {accumulation} micro-batches are summed in {short}; this loses small gradients beside large ones; "
        "data_types: {grad_accum_dtype: fp32} sums them in fp32"
    )


def data_parallel_size(config: NeoXConfig, processes: int) -> int:
    """The replicas among so many processes. Raises ConfigError where the layout does not fit their number."""
    if problem := layout_problem(config.parallel.layout, processes):
        raise ConfigError([problem])
    return processes // config.parallel.layout.model


def check_trainable(config: NeoXConfig, data_parallel_size: int) -> None:
    """Raises ConfigError with every key that training needs and that is missing, or with batch sizes that do not multiply out."""
    problems = []
    if config.training.train_iters is None and config.training.train_epochs is None:
        problems.append("'train_iters' or 'train_epochs' must be given: the number of training steps, or the number of passes through the data")
    if config.optimizer.optimizer.params.lr is None:
        problems.append("'optimizer' must be given with its learning rate, such as {type: Adam, params: {lr: 6.0e-4}}")
    if config.data.data_path is None and config.data.train_data_paths is None:
        problems.append("'data_path' or 'train_data_paths' must be given: the tokens to train on")
    try:
        resolve_batch(config.training, data_parallel_size)
    except ConfigError as error:
        problems.extend(error.problems)
    if problems:
        raise ConfigError(problems)


def check_device(config: NeoXConfig, device_type: str) -> None:
    """Raises ConfigError when the number format cannot be trained in on a device of this type (PyTorch's name: "cpu", "cuda", ...)."""
    if config.precision == "fp16" and device_type == "cpu":
        by_name = config.model.precision == "fp16"
        key, instead = ("precision", "precision=fp32 or precision=bfloat16") if by_name else ("fp16.enabled", "fp16.enabled=false")
        raise ConfigError([f"'{key}' asks for fp16, but training in fp16 needs a GPU; on a CPU add -o {instead}"])
