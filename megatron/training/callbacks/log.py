"""Writes the numbers of each step to every sink, and NeoX's log line and the routers' line every `log_interval` steps. Updates the progress
display."""

from __future__ import annotations

import logging
import math
import resource
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

import psutil
import torch

from megatron.config.logging import LoggingConfig
from megatron.model.state import RouterReport
from megatron.monitor.console import ProgressDisplay
from megatron.monitor.log_line import LogRecord, memory_line, router_line, time_line, train_line
from megatron.monitor.routing import router_values
from megatron.monitor.sink import Sink, Value
from megatron.training.callbacks.base import Callback

if TYPE_CHECKING:
    from megatron.training.step import StepMetrics
    from megatron.training.trainer import Trainer

log = logging.getLogger(__name__)
PHASES = ("forward", "backward", "optimizer", "batch generator")
"""In GPT-NeoX's order."""


class FlopsPerToken(NamedTuple):
    """FLOPs of one training step for each token, active parameters only: those that the model needs, and those that the hardware does with
    recomputation."""

    model: float
    hardware: float


class Window:
    """The steps since the last log line. The time of evaluations and saving does not count."""

    def __init__(self) -> None:
        self.metrics: list[StepMetrics] = []

    @property
    def seconds_per_step(self) -> float:
        return sum(m.seconds for m in self.metrics) / len(self.metrics)

    @property
    def phase_seconds(self) -> dict[str, float]:
        """Seconds of each phase in one step, by name."""
        names = [name for name in PHASES if name in self.metrics[0].phase_seconds]
        return {name: sum(m.phase_seconds[name] for m in self.metrics) / len(self.metrics) for name in names}

    @property
    def skipped(self) -> int:
        return sum(not m.applied for m in self.metrics)

    @property
    def nonfinite(self) -> int:
        return sum(not math.isfinite(m.lm_loss) for m in self.with_labels)

    @property
    def with_labels(self) -> list[StepMetrics]:
        """The steps in which at least one prediction counted."""
        return [m for m in self.metrics if not m.is_empty]

    def mean_losses(self, names: Sequence[str], *, per_token: bool = True) -> dict[str, float]:
        """Means by name over the steps that were not skipped (over all steps if all were skipped). Empty if no prediction counted in any of them.

        If some predictions do not count, a step's weight in the mean of `lm_loss` is the number of those that count, unless `per_token` is False.
        """
        chosen = [m for m in self.metrics if m.applied] or self.with_labels
        if not chosen:
            return {}
        columns = zip(*((m.lm_loss, *m.aux_losses) for m in chosen), strict=True)
        means = {name: sum(values) / len(values) for name, values in zip(names, columns, strict=True)}
        counts = [m.labels.counted for m in chosen if m.labels is not None and per_token]
        if counts:
            means[names[0]] = sum(m.lm_loss * count for m, count in zip(chosen, counts, strict=True)) / sum(counts)
        return means

    def router(self) -> RouterReport:
        """The reports of the MoE layers: losses and statistics are averaged over the steps, loads are summed."""
        ran = self.with_labels or self.metrics
        losses, experts, lores, statistics = (torch.stack(part) for part in zip(*(m.router for m in ran), strict=True))
        return RouterReport(losses.mean(0), experts.sum(0), lores.sum(0), statistics.mean(0))


class LogCallback(Callback):
    """`display` is None on a process that shows no progress."""

    def __init__(self, config: LoggingConfig, sinks: Sequence[Sink], display: ProgressDisplay | None, *, flops_per_token: FlopsPerToken) -> None:
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
        values = step_values(metrics, trainer.config.moe.moe_losses) | {"train/tokens": trainer.state.consumed_tokens}
        at_interval = iteration % self.config.log_interval == 0
        if at_interval:
            values |= self._interval_values(trainer)
        for sink in self.sinks:
            sink.write(iteration, values)
        if self.display is not None and not metrics.is_empty:
            speed = trainer.plan.tokens_per_step / self.window.seconds_per_step
            self.display.update(done=iteration, loss=metrics.lm_loss, tokens_per_second=speed, expert_load=metrics.router.expert_load_XE.tolist())
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
        """Ends the display and the sinks. It is called at the end of training and after a failure."""
        self._open.close()
        for sink in self.sinks:
            sink.close()
        self.sinks = ()

    def _interval_values(self, trainer: Trainer) -> dict[str, Value]:
        record = self._record(trainer, self.window.metrics[-1])
        values: dict[str, Value] = {
            "runtime/samples_per_sec": record.samples_per_second,
            "runtime/iteration_time": record.seconds_per_step,
            "runtime/steps_per_sec": 1 / record.seconds_per_step,
            "runtime/tokens_per_sec": trainer.plan.tokens_per_step / record.seconds_per_step,
            "runtime/flops_per_sec_per_gpu": record.flops,
            "runtime/skipped_iterations": trainer.state.skipped,
            "runtime/nan_iterations": trainer.state.nonfinite,
        }
        if record.peak_flops is not None:
            values["runtime/model_flops_utilization"] = record.model_flops / record.peak_flops
            values["runtime/hardware_flops_utilization"] = record.flops / record.peak_flops
        values |= {f"timers/{name}": seconds for name, seconds in self.window.phase_seconds.items()}
        return values | self._router_values(trainer)

    def _router_values(self, trainer: Trainer) -> dict[str, Value]:
        if not self.window.with_labels:
            return {}
        values = router_values(self.window.router(), trainer.config.moe, trainer.config.model.num_layers)
        if "moe/overload_seconds" in values:  # of one micro-batch, a mean over layers
            lost = sum(values["moe/overload_seconds_by_layer"]) * trainer.plan.batch.accumulation  # type: ignore[arg-type]
            values["moe/process_overload_share"] = lost / self.window.seconds_per_step
        return values

    def _record(self, trainer: Trainer, metrics: StepMetrics) -> LogRecord:
        seconds, peak = self.window.seconds_per_step, self.config.peak_theoretical_tflops
        tokens_per_second = trainer.plan.tokens_per_step / seconds / trainer.topology.world_size
        return LogRecord(
            iteration=trainer.state.iteration,
            train_iters=trainer.plan.train_iters,
            samples_per_second=trainer.plan.batch.global_ / seconds,
            seconds_per_step=seconds,
            learning_rate=metrics.learning_rate,
            flops=self.flops_per_token.hardware * tokens_per_second,
            model_flops=self.flops_per_token.model * tokens_per_second,
            peak_flops=peak * 1e12 if peak else None,
            losses=self.window.mean_losses(["lm_loss", *trainer.config.moe.moe_losses], per_token=trainer.config.training.calculate_per_token_loss),
            loss_scale=metrics.loss_scale,
            skipped=self.window.skipped,
            nonfinite=self.window.nonfinite,
        )

    def _log(self, trainer: Trainer, metrics: StepMetrics) -> None:
        log.info("%s", train_line(self._record(trainer, metrics)))
        if routers := self._router_values(trainer):
            log.info("%s", router_line(routers))
        if not self._memory_reported:
            log.info("%s", memory_line(trainer.state.iteration, memory_sizes(torch.device(trainer.engine.device))))
        self._memory_reported = True
        log.info("%s", time_line(self.window.phase_seconds))


def step_values(metrics: StepMetrics, aux_names: Iterable[str]) -> dict[str, Value]:
    """A step's numbers under NeoX's names, plus `train/grad_norm` and each auxiliary loss by its own name. No losses if no prediction counted."""
    values: dict[str, Value] = {"train/learning_rate": metrics.learning_rate}
    if not metrics.is_empty:
        values = {"train/lm_loss": metrics.lm_loss} | values | {"train/grad_norm": metrics.grad_norm}
        values |= {f"train/{name}": value for name, value in zip(aux_names, metrics.aux_losses, strict=True)}
    if metrics.labels is not None:
        values["train/labels"] = metrics.labels.counted
    if metrics.loss_scale is not None:
        values["train/loss_scale"] = metrics.loss_scale
    return values


def memory_sizes(device: torch.device) -> dict[str, int]:
    """Bytes of memory. On a GPU by upstream's names; elsewhere the memory of the process now and at most."""
    if device.type != "cuda":
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        now = psutil.Process().memory_info().rss
        return {"resident": now, "max resident": max(now, most)}  # Linux counts the two apart, and its maximum may lag behind
    return {
        "allocated": torch.cuda.memory_allocated(),
        "max allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
        "max reserved": torch.cuda.max_memory_reserved(),
    }
