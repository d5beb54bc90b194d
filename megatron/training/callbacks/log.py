"""Numbers of each step to every sink, NeoX's log line every `log_interval` steps, the progress display in between."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import psutil
import torch
from torch import Tensor

from megatron.config.logging import LoggingConfig
from megatron.monitor.console import ProgressDisplay
from megatron.monitor.log_line import LogRecord, train_line
from megatron.monitor.sink import Sink, Value
from megatron.training.callbacks.base import Callback

if TYPE_CHECKING:
    from megatron.training.step import StepMetrics
    from megatron.training.trainer import Trainer

log = logging.getLogger(__name__)


class Window:
    """What happened since the last log line. Only steps count as time, not evaluating or saving."""

    def __init__(self) -> None:
        self.metrics: list[StepMetrics] = []

    @property
    def seconds_per_step(self) -> float:
        return sum(m.seconds for m in self.metrics) / len(self.metrics)

    def mean_losses(self, names: Sequence[str]) -> dict[str, float]:
        """Means by name over the steps that were taken (all of them when none was)."""
        chosen = [m for m in self.metrics if m.applied] or self.metrics
        columns = zip(*((m.lm_loss, *m.aux_losses) for m in chosen), strict=True)
        return {name: sum(values) / len(values) for name, values in zip(names, columns, strict=True)}

    def loads(self) -> tuple[Tensor, Tensor]:
        """(expert_load_XE, lore_load_XG): tokens of all steps."""
        experts, lores = zip(*((m.expert_load_XE, m.lore_load_XG) for m in self.metrics), strict=True)
        return torch.stack(experts).sum(0), torch.stack(lores).sum(0)


class LogCallback(Callback):
    """`display` is None where there is none to see it. `flops_per_token`: forward and backward, active parameters only."""

    def __init__(self, config: LoggingConfig, sinks: Sequence[Sink], display: ProgressDisplay | None, *, flops_per_token: float) -> None:
        self.config = config
        self.sinks = sinks
        self.display = display
        self.flops_per_token = flops_per_token
        self.window = Window()
        self._open = ExitStack()
        self._memory_reported = False
        self._first_step = True

    def before_training(self, trainer: Trainer) -> None:
        if self.display is not None:
            self._open.enter_context(self.display)

    def after_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if self._first_step:
            log.info("First step finished %.1f s after launch.", time.time() - psutil.Process().create_time())
            self._first_step = False
        self.window.metrics.append(metrics)
        iteration = trainer.state.iteration
        values = step_values(metrics, trainer.config.moe.moe_losses)
        at_interval = iteration % self.config.log_interval == 0
        if at_interval:
            values |= self._interval_values(trainer)
        for sink in self.sinks:
            sink.write(iteration, values)
        if self.display is not None:
            speed = trainer.plan.tokens_per_step / self.window.seconds_per_step
            self.display.update(done=iteration, loss=metrics.lm_loss, tokens_per_second=speed, expert_load=metrics.expert_load_XE.tolist())
        if at_interval:
            self._log(trainer, metrics)
            self.window = Window()

    def after_training(self, trainer: Trainer) -> None:
        if self.window.metrics:
            for sink in self.sinks:
                sink.write(trainer.state.iteration, self._interval_values(trainer))
            self._log(trainer, self.window.metrics[-1])
        self.close()

    def close(self) -> None:
        """Ends the display and the sinks; called at the end of training, and by whoever catches a failure."""
        self._open.close()
        for sink in self.sinks:
            sink.close()
        self.sinks = ()

    def _interval_values(self, trainer: Trainer) -> dict[str, Value]:
        seconds = self.window.seconds_per_step
        flops = self._flops_per_device(trainer)
        values: dict[str, Value] = {
            "runtime/samples_per_sec": trainer.plan.batch.global_ / seconds,
            "runtime/iteration_time": seconds,
            "runtime/steps_per_sec": 1 / seconds,
            "runtime/tokens_per_sec": trainer.plan.tokens_per_step / seconds,
            "runtime/flops_per_sec_per_gpu": flops,
            "runtime/tokens_seen": trainer.state.consumed_tokens,
            "runtime/skipped_iterations": trainer.state.skipped,
            "runtime/nan_iterations": trainer.state.nonfinite,
        }
        if self.config.peak_theoretical_tflops:
            values["runtime/model_flops_utilization"] = flops / (self.config.peak_theoretical_tflops * 1e12)
        expert_load, lore_load = self.window.loads()
        if expert_load.numel():
            values["moe/expert_load"] = expert_load.tolist()
            values["moe/load_imbalance"] = float((expert_load.max(1).values / expert_load.float().mean(1)).mean())
        if lore_load.numel():
            values["moe/lore_load"] = lore_load.tolist()
        return values

    def _flops_per_device(self, trainer: Trainer) -> float:
        tokens_per_second = trainer.plan.tokens_per_step / self.window.seconds_per_step
        return self.flops_per_token * tokens_per_second / trainer.topology.world_size

    def _log(self, trainer: Trainer, metrics: StepMetrics) -> None:
        flops, peak = self._flops_per_device(trainer), self.config.peak_theoretical_tflops
        seconds = self.window.seconds_per_step
        record = LogRecord(
            iteration=trainer.state.iteration,
            train_iters=trainer.plan.train_iters,
            samples_per_second=trainer.plan.batch.global_ / seconds,
            milliseconds_per_step=1000 * seconds,
            learning_rate=metrics.learning_rate,
            tflops=flops / 1e12,
            model_flops_utilization=flops / (peak * 1e12) if peak else None,
            losses=self.window.mean_losses(["lm_loss", *trainer.config.moe.moe_losses]),
            loss_scale=metrics.loss_scale,
            skipped=trainer.state.skipped,
            nonfinite=trainer.state.nonfinite,
        )
        log.info("%s", train_line(record))
        if not self._memory_reported and torch.cuda.is_available():
            log.info("%s", memory_line(trainer.state.iteration))
        self._memory_reported = True


def step_values(metrics: StepMetrics, aux_names: Sequence[str] | dict[str, float]) -> dict[str, Value]:
    """A step's numbers under NeoX's names, plus `train/grad_norm` and each auxiliary loss by its own name."""
    values: dict[str, Value] = {"train/lm_loss": metrics.lm_loss, "train/learning_rate": metrics.learning_rate, "train/grad_norm": metrics.grad_norm}
    values |= {f"train/{name}": value for name, value in zip(aux_names, metrics.aux_losses, strict=True)}
    if metrics.loss_scale is not None:
        values["train/loss_scale"] = metrics.loss_scale
    return values


def memory_line(iteration: int) -> str:
    """NeoX's report of the GPU's memory, after the first log line."""
    megabytes = 1024.0**2
    parts = {
        "allocated": torch.cuda.memory_allocated(),
        "max allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
        "max reserved": torch.cuda.max_memory_reserved(),
    }
    return f"after {iteration} iterations memory (MB) | " + " | ".join(f"{name}: {value / megabytes}" for name, value in parts.items())
