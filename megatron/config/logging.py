"""Which numbers are recorded, and where."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from megatron.config.section import Fraction, NaturalInt, PositiveFloat, PositiveInt, Problem, Section


class LoggingConfig(Section):
    log_interval: PositiveInt = 100
    """Steps between log lines."""
    metrics_file: str | None = None
    """File with one JSON object for every step. None: metrics.jsonl in `save`, if `save` is given."""
    plot_file: str | None = None
    """Picture of loss and expert load, drawn at the end. None: training.png in `save`, if `save` is given."""
    tensorboard_dir: str | None = None
    """Directory for TensorBoard. None: off."""
    log_dir: str | None = None
    """Directory for copies of standard output and standard error. Each process appends to two files, which are named by host and rank. None: off."""
    use_wandb: bool | None = None
    """Log to Weights & Biases. None: off."""
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
    """Weights & Biases. True: one run for each process. False: one run for all processes."""
    use_comet: bool | None = None
    """Log to Comet. None: off."""
    comet_workspace: str | None = None
    """Comet: workspace. None: the account's default."""
    comet_project: str | None = None
    """Comet: project. None: the account's default."""
    comet_experiment_name: str | None = None
    """Comet: name of this run. None: Comet makes one up."""
    comet_tags: list[str] | None = None
    """Comet: tags of this run. None: none."""
    comet_others: dict[str, Any] | None = None
    """Comet: additional entries of this run. None: none."""
    peak_theoretical_tflops: PositiveFloat | None = None
    """Peak of the device in TFLOPS. The log then reports MFU (the share of the peak that the model needs) and HFU (the share that the hardware
    does). None: not reported."""
    steps_per_print: NaturalInt = 10
    """Steps between DeepSpeed's short progress lines; 0 turns them off."""
    wall_clock_breakdown: bool = False
    """Let DeepSpeed measure the time of forward, backward, all-reduce and step, and print it for every micro-batch."""
    log_grad_norm: bool = False
    """Record the norm of every parameter's gradient at every step (`gradient_norms/*`), at every ZeRO stage."""
    log_param_norm: bool = False
    """Record the norm of every parameter after every step (`parameter_norms/*`)."""
    log_grad_pct_zeros: bool = False
    """Record the percentage of zeros in every parameter's gradient at every step (`pct_grad_zeros/*`)."""
    log_optimizer_states: bool = False
    """Record the norms of the optimizer's averages for every group of parameters at every step (`optimizer_state_norms/*`)."""
    log_gradient_noise_scale: bool = False
    """Record the gradient noise scale (McCandlish et al., 2018) as `train/noise_scale`. It estimates the batch size above which more compute
    brings little."""
    gradient_noise_scale_n_batches: Annotated[int, Field(ge=2)] = 5
    """Number of batches in one measurement of the noise scale."""
    gradient_noise_scale_cpu_offload: bool = False
    """Keep the sum of these batches' gradients in CPU memory."""
    profile: bool = False
    """Record a trace of some steps with PyTorch's profiler. It is written to `tensorboard_dir`, or to `log_dir` if `tensorboard_dir` is not given."""
    profile_step_start: NaturalInt = 10
    """The recording starts after this step."""
    profile_step_stop: PositiveInt = 12
    """The recording ends with this step."""
    memory_profiling: bool = False
    """Record memory allocations between profile_step_start and profile_step_stop. On CUDA: a memory snapshot. On a CPU: a table of operators."""
    memory_profiling_path: str | None = None
    """Directory for the memory profile. None: `tensorboard_dir`, or `log_dir` if `tensorboard_dir` is not given."""
    routing_trace_steps: list[PositiveInt] | None = None
    """Steps whose routing is written: the experts and LoREs of each token (`tools/analysis/routing.py` reads it). None: no single steps."""
    routing_trace_interval: PositiveInt | None = None
    """The routing of every step that is a multiple of it is written. None: only that of `routing_trace_steps`."""
    routing_trace_dir: str | None = None
    """Directory for the routing, with a folder for each step. None: routing_traces in `save`, or here without `save`."""
    routing_trace_tokens: PositiveInt = 65536
    """Each process writes at most so many tokens of a step."""
    progress: Literal["auto", "rich", "plain"] = "auto"
    """Progress display. auto: rich on a terminal, plain lines otherwise."""
    curves: Literal["brief", "detailed"] = "brief"
    """Curves in TensorBoard, Weights & Biases and Comet. brief: the smallest and the largest value over the layers, and percentiles over the experts.
    detailed: one for each layer and each expert. `metrics_file` always has everything."""
    max_curves: PositiveInt = 500
    """Largest number of curves in each of them. The log says once what is left out."""
    alerts: bool = True
    """Look for faults in every step's numbers: loss spikes, NaN, dead experts and LoREs, collapsed routers, overloaded processes. docs/monitoring.md
    has the rules."""
    alert_loss_rise: PositiveFloat = 0.2
    """Alert if the loss is more than this many nats above the median of the last 20 steps, and also more than `alert_loss_deviations`."""
    alert_loss_deviations: PositiveFloat = 6.0
    """Alert if the loss is more than this many robust standard deviations above the median of the last 20 steps, and also more than
    `alert_loss_rise`."""
    alert_nonfinite_steps: PositiveInt = 1
    """Alert after this many steps in a row whose loss or gradient is NaN or infinite."""
    alert_dead_share: Fraction = 0.01
    """Alert if an expert gets less than this part of an even load."""
    alert_dead_lores: Fraction = 0.5
    """Alert if this part of a layer's LoREs gets less than `alert_dead_share` of an even load of their expert."""
    alert_entropy: Fraction = 0.05
    """Alert if a router's entropy is below this part of the largest possible, log E."""
    alert_entropy_drop: Fraction = 0.25
    """Alert if a router's entropy is below this part of its own median over the last 100 steps."""
    alert_overload: Annotated[float, Field(ge=1)] = 2.0
    """Alert if an expert-parallel process receives more than this many times the mean number of rows. With 2 processes the limit is at most 1.6."""

    @property
    def traces_routing(self) -> bool:
        """Whether the routing of some steps is written."""
        return bool(self.routing_trace_steps) or self.routing_trace_interval is not None

    @property
    def trace_dir(self) -> str | None:
        """Where profiles go; None when there is no directory for them."""
        return self.tensorboard_dir or self.log_dir

    def check(self) -> Iterator[Problem]:
        if self.routing_trace_dir is not None and not self.traces_routing:
            yield Problem(("routing_trace_dir", "routing_trace_steps"), "needs routing_trace_steps or routing_trace_interval: the steps to write")
        if (self.profile or self.memory_profiling) and self.profile_step_stop <= self.profile_step_start:
            yield Problem(("profile_step_stop", "profile_step_start"), f"must be more than profile_step_start ({self.profile_step_start})")
        if self.profile and self.trace_dir is None:
            yield Problem(("profile", "tensorboard_dir"), "needs tensorboard_dir or log_dir: the trace is written there")
        if self.memory_profiling and self.memory_profiling_path is None and self.trace_dir is None:
            yield Problem(
                ("memory_profiling", "memory_profiling_path"), "needs memory_profiling_path, tensorboard_dir or log_dir: it is written there"
            )
