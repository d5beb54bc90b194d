"""Where numbers go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from megatron.config.section import NaturalInt, PositiveFloat, PositiveInt, Problem, Section


class LoggingConfig(Section):
    log_interval: PositiveInt = 100
    """Steps between log lines."""
    metrics_file: str | None = None
    """File that gets one JSON object for every step. None: metrics.jsonl in `save`, when that is given."""
    plot_file: str | None = None
    """Picture of loss and expert load, drawn at the end. None: training.png in `save`, when that is given."""
    tensorboard_dir: str | None = None
    """Directory for TensorBoard. None: off."""
    log_dir: str | None = None
    """Directory for copies of standard output and standard error: two files a process, named by host and rank, which are appended to. None: off."""
    use_wandb: bool | None = None
    """Log to Weights & Biases. None is off: it is on only when asked for."""
    wandb_project: str = "neox"
    """Weights & Biases: project."""
    wandb_group: str | None = None
    """Weights & Biases: group of runs. None: none."""
    wandb_run_name: str | None = None
    """Weights & Biases: name of this run. None: wandb makes one up."""
    wandb_team: str | None = None
    """Weights & Biases: team or user that owns the project. None: the account's default."""
    wandb_host: str = "https://api.wandb.ai"
    """Weights & Biases: server."""
    wandb_init_all_ranks: bool = False
    """Weights & Biases: one run for each process instead of one in all."""
    use_comet: bool | None = None
    """Log to Comet. None is off: it is on only when asked for."""
    comet_workspace: str | None = None
    """Comet: workspace. None: the account's default."""
    comet_project: str | None = None
    """Comet: project. None: the account's default."""
    comet_experiment_name: str | None = None
    """Comet: name of this run. None: Comet makes one up."""
    comet_tags: list[str] | None = None
    """Comet: tags of this run. None: none."""
    comet_others: dict[str, Any] | None = None
    """Comet: further entries of this run. None: none."""
    peak_theoretical_tflops: PositiveFloat | None = None
    """The device's peak, for MFU and HFU (the share of it that the model needs and that the hardware does) in the log. None: not reported."""
    steps_per_print: NaturalInt = 10
    """Steps between DeepSpeed's short progress lines; 0 turns them off."""
    wall_clock_breakdown: bool = False
    """Let DeepSpeed time forward, backward, all-reduce and step, and print it for every micro-batch."""
    log_grad_norm: bool = False
    """Record the norm of every parameter's gradient at every step (`gradient_norms/*`), whatever ZeRO divides."""
    log_param_norm: bool = False
    """Record the norm of every parameter after every step (`parameter_norms/*`)."""
    log_grad_pct_zeros: bool = False
    """Record how many per cent of every parameter's gradient are zero, at every step (`pct_grad_zeros/*`)."""
    log_optimizer_states: bool = False
    """Record the norms of the optimizer's averages for every group of parameters at every step (`optimizer_state_norms/*`)."""
    log_gradient_noise_scale: bool = False
    """Record the gradient noise scale (McCandlish et al., 2018), a batch size that is worth its compute, as `train/noise_scale`."""
    gradient_noise_scale_n_batches: Annotated[int, Field(ge=2)] = 5
    """Batches that are averaged for one measurement of the noise scale."""
    gradient_noise_scale_cpu_offload: bool = False
    """Keep the sum of those batches' gradients in the CPU's memory."""
    profile: bool = False
    """Record a trace of some steps with PyTorch's profiler, into `tensorboard_dir`, or `log_dir` without one."""
    profile_step_start: NaturalInt = 10
    """The profile begins after this step."""
    profile_step_stop: PositiveInt = 12
    """The profile ends with this step."""
    memory_profiling: bool = False
    """Record who allocated memory between profile_step_start and profile_step_stop: CUDA's memory snapshot, on a CPU a table of operators."""
    memory_profiling_path: str | None = None
    """Directory for it. None: `tensorboard_dir`, or `log_dir` without one."""
    progress: Literal["auto", "rich", "plain"] = "auto"
    """Progress display: rich on a terminal and plain lines otherwise, or always the one named."""

    @property
    def trace_dir(self) -> str | None:
        """Where profiles go; None when there is no directory for them."""
        return self.tensorboard_dir or self.log_dir

    def check(self) -> Iterator[Problem]:
        if (self.profile or self.memory_profiling) and self.profile_step_stop <= self.profile_step_start:
            yield Problem(("profile_step_stop", "profile_step_start"), f"must be more than profile_step_start ({self.profile_step_start})")
        if self.profile and self.trace_dir is None:
            yield Problem(("profile", "tensorboard_dir"), "needs tensorboard_dir or log_dir: the trace is written there")
        if self.memory_profiling and self.memory_profiling_path is None and self.trace_dir is None:
            yield Problem(
                ("memory_profiling", "memory_profiling_path"), "needs memory_profiling_path, tensorboard_dir or log_dir: it is written there"
            )
