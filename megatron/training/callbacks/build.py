"""The callbacks of a run, in the order in which they act after each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from megatron.checkpoint.save import resolved_config_document
from megatron.config.loader import LoadedConfig
from megatron.config.logging import LoggingConfig
from megatron.config.size import flops_per_token
from megatron.monitor.console import ProgressDisplay
from megatron.monitor.sink import Sink
from megatron.monitor.sinks import MetricsFile, metrics_path, open_sinks
from megatron.training.callbacks.alerts import AlertsCallback
from megatron.training.callbacks.base import Callback
from megatron.training.callbacks.checkpoint import CheckpointCallback, KeepGoodCallback
from megatron.training.callbacks.communication import CommunicationCallback
from megatron.training.callbacks.evaluate import EvaluateCallback
from megatron.training.callbacks.growth import GrowthCallback
from megatron.training.callbacks.labels import LabelsCallback
from megatron.training.callbacks.log import FlopsPerToken, LogCallback
from megatron.training.callbacks.loss_ramp import LossRampCallback
from megatron.training.callbacks.noise_scale import NoiseScaleCallback
from megatron.training.callbacks.norms import NormsCallback, measures
from megatron.training.callbacks.plot import PlotCallback
from megatron.training.callbacks.print_steps import PrintStepsCallback
from megatron.training.callbacks.profile import ProfileCallback
from megatron.training.callbacks.routing_trace import RoutingTraceCallback
from megatron.training.callbacks.stop import StopCallback
from megatron.training.callbacks.watchdog import WatchdogCallback
from megatron.training.trainer import Trainer

Measurements = Callable[[Trainer, Sequence[Sink]], list[Callback]]
"""Makes further callbacks that measure."""


def build_callbacks(
    trainer: Trainer, loaded: LoadedConfig, sinks: Sequence[Sink], display: ProgressDisplay | None, measurements: Measurements | None = None
) -> list[Callback]:
    """The order is: measure, judge, save. So a checkpoint of step n comes after all measurements of step n. `measurements` None: no further ones.

    At the end of the run the order is reversed: save first, so that a later failure cannot lose the last checkpoint, then evaluate, close and draw.
    """
    config = loaded.config
    vocabulary = trainer.checkpoint_args["padded_vocab_size"]
    given, recompute = (config.model, config.moe, vocabulary), config.training.checkpoint_activations
    again = flops_per_token(*given, recompute=recompute, modules=config.training.recompute_modules)
    flops = FlopsPerToken(flops_per_token(*given), again)
    metrics_file, picture = metrics_path(config.logging, config.checkpoint.save), plot_path(config.logging, config.checkpoint.save)
    callbacks: list[Callback] = []
    if config.moe.moe_router_type == "smoe_dropout":
        callbacks.append(GrowthCallback())
    if config.moe.moe_loss_ramp:
        callbacks.append(LossRampCallback(config.moe))
    if metrics_file is not None and picture is not None:
        callbacks.append(PlotCallback(metrics_file, picture))
    callbacks += [
        *optional_callbacks(trainer, sinks),
        LogCallback(config.logging, sinks, display, flops_per_token=flops),
        LabelsCallback(),
        *([AlertsCallback(trainer, sinks, metrics_file)] if config.logging.alerts and trainer.topology.is_first else []),
        WatchdogCallback(config.training.max_nonfinite_steps),
    ]
    if config.checkpoint.save is not None:
        callbacks.append(KeepGoodCallback(config.checkpoint, Path(config.checkpoint.save)))
    callbacks.append(EvaluateCallback(config.training, trainer.plan.batch.accumulation, sinks))
    callbacks += [] if measurements is None else measurements(trainer, sinks)
    if config.checkpoint.save is not None:
        documents = {**loaded.files, **resolved_config_document(config.flat())}
        layer_files = config.parallel.pipe_parallel_size > 0
        directory = Path(config.checkpoint.save)
        callbacks.append(CheckpointCallback(config.checkpoint, directory, args=trainer.checkpoint_args, documents=documents, layer_files=layer_files))
    callbacks.append(StopCallback(config.training.exit_interval))
    if config.deepspeed.comms_logger is not None and config.deepspeed.comms_logger.enabled:
        callbacks.append(CommunicationCallback())
    return callbacks


def optional_callbacks(trainer: Trainer, sinks: Sequence[Sink]) -> list[Callback]:
    """Measurements that are made when the configuration asks for them."""
    config = trainer.config.logging
    callbacks: list[Callback] = []
    if config.profile or config.memory_profiling:
        callbacks.append(ProfileCallback(config, rank=trainer.topology.rank))
    if chosen := measures(config):
        callbacks.append(NormsCallback(chosen, sinks))
    if config.log_gradient_noise_scale:
        callbacks.append(NoiseScaleCallback(config, trainer.plan.batch.global_, sinks))
    if config.steps_per_print:
        callbacks.append(PrintStepsCallback(config.steps_per_print))
    if (folder := routing_trace_path(config, trainer.config.checkpoint.save)) is not None:
        callbacks.append(RoutingTraceCallback(config, trainer.config.data, folder))
    return callbacks


def build_sinks(trainer: Trainer) -> list[Sink]:
    """The sinks of this process. Raises SinkUnavailable when Weights & Biases or Comet refuses the run."""
    config, iteration = trainer.config, trainer.state.iteration
    path = metrics_path(config.logging, config.checkpoint.save)
    metrics = None if path is None else MetricsFile(path, iteration, final_evaluation_follows=trainer.finished)
    return open_sinks(config, metrics, resume_from=iteration, failures=trainer.failures, rank=trainer.topology.rank)


def plot_path(logging: LoggingConfig, save: str | None) -> Path | None:
    """The path of the plot. None: neither this path nor `save` is configured."""
    return Path(logging.plot_file) if logging.plot_file is not None else Path(save) / "training.png" if save is not None else None


def routing_trace_path(logging: LoggingConfig, save: str | None) -> Path | None:
    """The directory for routing traces. None: none are wanted."""
    directory = logging.routing_trace_dir or Path(save or ".", "routing_traces")
    return Path(directory) if logging.traces_routing else None
