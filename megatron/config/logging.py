"""Where numbers go."""

from __future__ import annotations

from typing import Literal

from megatron.config.section import NaturalInt, PositiveFloat, PositiveInt, Section


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
    """Directory that gets a copy of the console output. None: off."""
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
    peak_theoretical_tflops: PositiveFloat | None = None
    """The device's peak, for model-FLOPs utilisation in the log. None: not reported."""
    steps_per_print: NaturalInt = 10
    """Steps between DeepSpeed's own progress lines."""
    wall_clock_breakdown: bool = False
    """Let DeepSpeed time forward, backward and step."""
    progress: Literal["auto", "rich", "plain"] = "auto"
    """Progress display: rich on a terminal and plain lines otherwise, or always the one named."""
