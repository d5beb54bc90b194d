"""The sinks that a configuration names, for whoever has numbers: a training run, or an evaluation of its checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from megatron.config.logging import LoggingConfig
from megatron.config.machine import is_installed
from megatron.config.neox import NeoXConfig
from megatron.monitor.comet import CometSink
from megatron.monitor.curves import Curves
from megatron.monitor.guarded import GuardedSink
from megatron.monitor.jsonl import JsonlSink
from megatron.monitor.sink import Sink, SinkUnavailable
from megatron.monitor.tensorboard import TensorboardSink
from megatron.monitor.wandb import WandbSink


class MetricsFile(NamedTuple):
    """A metrics file to write, and what happens to the lines in it (`JsonlSink`)."""

    path: Path
    resume_from: int | None
    """None: the lines stay."""
    final_evaluation_follows: bool = False


def open_sinks(config: NeoXConfig, metrics: MetricsFile | None, *, resume_from: int, failures: list[str], rank: int = 0) -> list[Sink]:
    """The sinks of the process of this rank. The first process writes to all, the others to Weights & Biases if `wandb_init_all_ranks` is on.

    `metrics` None: there is no metrics file. `resume_from`: the step after which TensorBoard hides what is there. `failures` gets a sentence for each
    sink that cannot write. Raises SinkUnavailable when Weights & Biases or Comet refuses the run.
    """
    logging, first = config.logging, rank == 0
    sinks: list[tuple[Sink, Path]] = []
    if logging.use_wandb and (first or logging.wandb_init_all_ranks):
        sinks.append((WandbSink(logging, config.flat(), rank=rank), Path(os.environ.get("WANDB_DIR", "wandb"))))
    if first and metrics is not None:
        jsonl = JsonlSink(metrics.path, resume_from=metrics.resume_from, final_evaluation_follows=metrics.final_evaluation_follows)
        sinks.append((jsonl, metrics.path))
    if first and (folder := logging.tensorboard_dir) is not None:
        curves = Curves("TensorBoard", detail=logging.curves, most=logging.max_curves)
        sinks.append((TensorboardSink(folder, curves, resume_from=resume_from), Path(folder)))
    if first and logging.use_comet:
        sinks.append((CometSink(logging, config.flat()), Path(os.environ.get("COMET_OFFLINE_DIRECTORY", ".cometml-runs"))))
    return [GuardedSink(sink, place, failures) for sink, place in sinks]


def check_sinks(logging: LoggingConfig) -> None:
    """Raises SinkUnavailable if a package that a sink needs is not installed. It is raised on every process, before any long work."""
    wanted = {"wandb": logging.use_wandb, "comet_ml": logging.use_comet, "tensorboard": logging.tensorboard_dir is not None}
    files = {"wandb": "wandb", "comet_ml": "comet", "tensorboard": "tensorboard"}
    for package, key in (("wandb", "use_wandb: true"), ("comet_ml", "use_comet: true"), ("tensorboard", "tensorboard_dir")):
        if wanted[package] and not is_installed(package):
            pinned = f"the version: requirements/requirements-{files[package]}.txt"
            raise SinkUnavailable(f"{key} needs the package '{package}': pip install {package}, or leave the key out ({pinned})")


def metrics_path(logging: LoggingConfig, save: str | None) -> Path | None:
    """The path of the metrics file. None: neither this path nor `save` is configured."""
    return Path(logging.metrics_file) if logging.metrics_file is not None else Path(save) / "metrics.jsonl" if save is not None else None
