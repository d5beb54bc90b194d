"""Settings that are passed on to DeepSpeed: profilers, monitors, and how gradients are averaged.

Batch sizes, precision, ZeRO and the optimizer have their own keys; megatron.config.deepspeed_json passes them on to DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from megatron.config.components import did_you_mean
from megatron.config.section import NonNegativeFloat, PositiveFloat, PositiveInt, Problem, Section

# The top-level settings of DeepSpeed's JSON that NeoX has as keys of its own. Inside deepspeed_extra_args they mean what they mean outside.
NEOX_KEYS = frozenset(
    {
        "activation_checkpointing",
        "amp",
        "autotuning",
        "bf16",
        "checkpoint",
        "comms_logger",
        "communication_data_type",
        "compression_training",
        "csv_monitor",
        "curriculum_learning",
        "data_efficiency",
        "data_types",
        "dump_state",
        "elasticity",
        "flops_profiler",
        "fp16",
        "fp32_allreduce",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "gradient_predivide_factor",
        "optimizer",
        "prescale_gradients",
        "scheduler",
        "sparse_attention",
        "sparse_gradients",
        "steps_per_print",
        "tensorboard",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "wall_clock_breakdown",
        "wandb",
        "zero_allow_untested_optimizer",
        "zero_optimization",
    }
)
# Further ones: those that work here, and those that belong to a part of DeepSpeed that this engine does not use.
PASSED_ON = {"comet": dict, "disable_python_gc": bool, "log_level": str, "memory_breakdown": bool, "timers": dict}
NOT_CONNECTED = frozenset(
    {
        "aio",
        "compile",
        "dataloader_drop_last",
        "datastates_ckpt",
        "disable_allgather",
        "eigenvalue",
        "expert_parallel",
        "gradient_allreduce_op",
        "graph_harvesting",
        "hybrid_engine",
        "managed_gradient_accumulation",
        "nebula",
        "pipeline",
        "progressive_layer_drop",
        "quantize_training",
        "seq_parallel_communication_data_type",
        "tensor_parallel",
        "torch_autocast",
        "use_data_before_expert_parallelism",
        "vocabulary_size",
        "weight_quantization",
        "zero_force_ds_cpu_optimizer",
    }
)


class FlopsProfiler(Section):
    enabled: bool = False
    """Whether one step is profiled."""
    recompute_fwd_factor: NonNegativeFloat = 0.0
    """Share of the forward pass that is computed again in the backward pass (1.0 with activation checkpointing)."""
    profile_step: PositiveInt = 1
    """The step that is profiled."""
    module_depth: Annotated[int, Field(ge=-1)] = -1
    """How deep the model's tree is shown; -1 is all of it."""
    top_modules: PositiveInt = 1
    """Modules listed at each depth."""
    detailed: bool = True
    """Whether every module is shown."""
    output_file: str | None = None
    """File for the profile. None: standard output."""


class CommsLogger(Section):
    enabled: bool = False
    """Whether DeepSpeed times its collective operations."""
    verbose: bool = False
    """Report every single operation."""
    prof_all: bool = True
    """Time all operations; false: those in `prof_ops`."""
    debug: bool = False
    """Add the caller to the name of each operation."""
    prof_ops: list[str] = []
    """Operations to time when `prof_all` is false."""


class FileMonitor(Section):
    enabled: bool = False
    """Whether this monitor is on."""
    output_path: str = ""
    """Directory that it writes to."""
    job_name: str = "DeepSpeedJobName"
    """Directory inside `output_path`."""


class WandbMonitor(Section):
    enabled: bool = False
    """Whether this monitor is on."""
    group: str | None = None
    """Group of runs. None: none."""
    team: str | None = None
    """Team or user that owns the project. None: the account's default."""
    project: str = "deepspeed"
    """Project."""


class DeepSpeedConfig(Section):
    prescale_gradients: bool = False
    """Divide gradients by the number of processes before they are summed, not after. From ZeRO stage 1 on it needs reduce_scatter: false."""
    gradient_predivide_factor: PositiveFloat = 1.0
    """Divide gradients by this factor before they are summed, and by the remaining factor after. From ZeRO stage 1 on it needs reduce_scatter:
    false."""
    communication_data_type: Literal["fp32", "fp16", "bf16"] | None = None
    """Number format in which processes sum gradients. None: fp32 if `fp32_allreduce` is true, otherwise the format of the weights."""
    dump_state: bool = False
    """Print the state of DeepSpeed's engine at the start."""
    flops_profiler: FlopsProfiler | None = None
    """DeepSpeed's profile of one step: FLOPs, parameters and time of every module. None: off."""
    comms_logger: CommsLogger | None = None
    """DeepSpeed's timing of its collective operations, with a table at the end of training. None: off."""
    csv_monitor: FileMonitor | None = None
    """DeepSpeed's own CSV files (learning rate, loss scale, timers). The numbers of the run are in `metrics_file`. None: off."""
    tensorboard: FileMonitor | None = None
    """DeepSpeed's own TensorBoard files. The numbers of the run go to `tensorboard_dir`. None: off."""
    wandb: WandbMonitor | None = None
    """DeepSpeed's own log to Weights & Biases. The numbers of the run go there with `use_wandb`. Only one of the two can be on. None: off."""
    deepspeed_extra_args: dict[str, Any] = {}
    """Additional settings of DeepSpeed: log_level, memory_breakdown, timers, comet, disable_python_gc. A setting that is also a key on this page
    acts as that key."""

    def settings(self) -> dict[str, Any]:
        """The part of DeepSpeed's JSON that this section is: what was given, under DeepSpeed's names."""
        given = self.model_dump(mode="json", exclude_unset=True, exclude_none=True)
        extra = given.pop("deepspeed_extra_args", {})
        timed = self.comms_logger is not None and self.comms_logger.enabled
        if not timed:
            given.pop("comms_logger", None)  # DeepSpeed turns it on when it is there at all
        # DeepSpeed tells these things at level info, and shows warnings only.
        talkative = self.dump_state or timed or extra.get("memory_breakdown")
        return ({"log_level": "info"} if talkative else {}) | given | extra

    def check(self) -> Iterator[Problem]:
        for key, value in self.deepspeed_extra_args.items():
            if message := _extra_problem(key, value):
                yield Problem((f"deepspeed_extra_args.{key}",), message)

    def needs_packages(self) -> Iterator[tuple[str, str]]:
        """(package, key that asks for it) for every monitor that is on."""
        monitors = {"tensorboard": self.tensorboard, "wandb": self.wandb}
        yield from ((name, f"{name}: {{enabled: true}}") for name, monitor in monitors.items() if monitor is not None and monitor.enabled)
        if isinstance(comet := self.deepspeed_extra_args.get("comet"), dict) and comet.get("enabled"):
            yield "comet_ml", "deepspeed_extra_args: {comet: {enabled: true}}"


def _extra_problem(key: str, value: Any) -> str:
    if key in PASSED_ON:
        words = {dict: "a dictionary", bool: "true or false", str: "text"}
        return "" if isinstance(value, PASSED_ON[key]) else f"must be {words[PASSED_ON[key]]}"
    if key in NOT_CONNECTED:
        return "" if value in (None, False, {}) else "this version does not pass this setting on to DeepSpeed; remove it"
    known = sorted(NEOX_KEYS | NOT_CONNECTED | set(PASSED_ON))
    return f"DeepSpeed has no such setting{did_you_mean(key, known)}; passed on: {', '.join(sorted(PASSED_ON))}"


def gradient_problems(deepspeed: DeepSpeedConfig, stage: int, *, reduce_scatter: bool, fp32_allreduce: bool) -> Iterator[Problem]:
    """What the keys about summing gradients contradict elsewhere."""
    if stage > 0 and reduce_scatter:
        asked = {"prescale_gradients": deepspeed.prescale_gradients, "gradient_predivide_factor": deepspeed.gradient_predivide_factor != 1.0}
        for key in (key for key, wanted in asked.items() if wanted):
            message = f"needs zero_optimization.reduce_scatter: false from ZeRO stage 1 on (stage is {stage})"
            yield Problem((key, "zero_optimization.reduce_scatter"), message)
    if fp32_allreduce and deepspeed.communication_data_type not in (None, "fp32"):
        yield Problem(("communication_data_type", "fp32_allreduce"), "contradicts fp32_allreduce: true; remove one of the two")
